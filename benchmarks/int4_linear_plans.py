#!/usr/bin/env python3
"""Launches of the small-batch INT4 kernel as a model has them, behind a norm: the plan that is chosen, and others. One GPU.

    python benchmarks/int4_linear_plans.py --json OUT.json
    python benchmarks/int4_linear_plans.py --models 8b qwen2.5-7b --tokens 1

`int4_linear.py` times linears one behind the other, where each begins under the end of the one before. In a model a norm, an
activation or attention lies between them. Here it is a kernel that waits for 2 us on one multiprocessor and lets its
successor begin (programmatic dependent launch): 32 linears, each on the next of so many weights that L2 holds none when its
turn comes, and as many waits, in a CUDA graph. A row is a plan's microseconds per linear less those of the waits alone.
"""

import argparse
import ctypes
import itertools
import math
import statistics
import tempfile
from concurrent.futures import ThreadPoolExecutor
from functools import cache
from pathlib import Path

import torch
from common import write_json
from int4_linear import random_packed

from vllm_quantspec.kernels import int4_linear, nvrtc
from vllm_quantspec.kernels.device import device_properties
from vllm_quantspec.kernels.int4_linear import CHUNK, ROWS, Plan

GROUP, LAUNCHES, COPIES_BYTES = 128, 32, 160 << 20
WAIT_NS, WAIT_CTAS = 2000, 1
TERABYTES = 4.26  # per second, what an H200 copies
# (in, out) of a rank's linears.
MODELS = {
    "8b": {"qkv": (4096, 6144), "o": (4096, 4096), "gate_up": (4096, 28672), "down": (14336, 4096)},
    "8b, 2 GPUs": {"qkv": (4096, 3072), "o": (2048, 4096), "gate_up": (4096, 14336), "down": (7168, 4096)},
    "70b, 2 GPUs": {"qkv": (8192, 5120), "o": (4096, 8192), "gate_up": (8192, 28672), "down": (14336, 8192)},
    "qwen2.5-7b": {"qkv": (3584, 4608), "o": (3584, 3584), "gate_up": (3584, 37888), "down": (18944, 3584)},
    "qwen3-32b": {"qkv": (5120, 10240), "o": (8192, 5120), "gate_up": (5120, 51200), "down": (25600, 5120)},
    "3b": {"qkv": (2048, 2560), "o": (2048, 2048), "gate_up": (2048, 22016), "down": (11008, 2048)},
}
WAIT = """
struct Params { long long ns; };
extern "C" __global__ void wait(const __grid_constant__ Params p) {
  asm volatile("griddepcontrol.wait;" ::: "memory");
  asm volatile("griddepcontrol.launch_dependents;" ::: "memory");
  if (threadIdx.x == 0) {
    long long start, now;
    asm volatile("mov.u64 %0,%globaltimer;" : "=l"(start));
    do asm volatile("mov.u64 %0,%globaltimer;" : "=l"(now));
    while (now - start < p.ns);
  }
}
"""


class WaitParams(ctypes.Structure):
    _fields_ = (("ns", ctypes.c_int64),)


@cache
def wait_kernel() -> nvrtc.Kernel:
    path = Path(tempfile.mkdtemp(), "wait.cu")
    path.write_text(WAIT)
    Path(path.parent, "none.cuh").write_text("// The compiler is given at least one header.\n")
    return nvrtc.load(path, {}, 0, grid=(WAIT_CTAS, 1), threads=128, shared_bytes=0, overlap=True)


def plans_of(tiles: int, chunks: int, default: Plan) -> list[Plan]:
    """The default, and others: more CTAs, more warps, CTAs that share channels."""
    device, plans = device_properties(0), [default]
    sms = device.num_multiprocessors
    for warps, splits, ctas in itertools.product((8, 12, 16), (1, 2, 4), (sms, 2 * sms, 3 * sms, tiles)):
        blocks, resident = min(tiles, ctas // splits), min(3, -(-ctas // sms))
        if chunks < warps * splits or 32 * (warps + 1) * resident * 72 > 65536:  # registers
            continue
        per_block = -(-tiles // blocks)
        for passes in {-(-per_block // 8), -(-per_block // 4)}:
            for alone in {resident, max(2, resident)}:
                plan = default._replace(warps=warps, stages=0, tiles=-(-per_block // passes), splits=splits, blocks=blocks)
                plan = plan._replace(min_ctas=alone)
                room = min(device.shared_memory_per_multiprocessor // alone, device.shared_memory_per_block) - 2048
                stages = min(16, (room - plan.shared_bytes(GROUP)) // (warps * (1024 + 64)))
                plans += [plan._replace(stages=stages)] if stages >= 2 else []
    return list(dict.fromkeys(plans))


def compile_all(plans: list[Plan]) -> None:
    architecture = "sm_{}{}".format(*torch.cuda.get_device_capability())
    with ThreadPoolExecutor(16) as pool:
        list(pool.map(lambda p: nvrtc.compile_source(p.source, tuple(p.macros(GROUP, True).items()), architecture), plans))


def graph_of(x: torch.Tensor, out: torch.Tensor, weights: list, plan: Plan | None) -> torch.cuda.CUDAGraph:
    """Linears by ``plan`` and waits in turn; None: waits alone."""

    def run() -> None:
        for i in range(LAUNCHES):
            if plan is not None:
                int4_linear.launch(x, *weights[i % len(weights)], None, out, plan)
            nvrtc.launch(wait_kernel(), WaitParams(WAIT_NS))

    run()
    torch.cuda.synchronize()
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        run()
    graph.replay()
    torch.cuda.synchronize()
    return graph


def medians(graphs: dict, rounds: int) -> dict:
    """Microseconds per launch of each graph; they are replayed in turn, so that all see the same state of the card."""
    times = {name: [] for name in graphs}
    for _ in range(rounds):
        for name, graph in graphs.items():
            start, end = (torch.cuda.Event(enable_timing=True) for _ in range(2))
            graph.replay()  # what came before is another graph's
            start.record()
            graph.replay()
            end.record()
            torch.cuda.synchronize()
            times[name].append(start.elapsed_time(end) * 1e3 / LAUNCHES)
    return {name: statistics.median(t) for name, t in times.items()}


def time_linear(channels: int, rows: int, tokens: int, rounds: int) -> dict[Plan, float]:
    """Microseconds by plan, the chosen one first; all must agree on the result."""
    x = torch.randn(tokens, channels, device="cuda").bfloat16()
    out = torch.empty(tokens, rows, dtype=torch.bfloat16, device="cuda")
    weights = [random_packed((channels, rows)) for _ in range(max(4, min(64, 2 * COPIES_BYTES // (channels * rows))))]
    default = int4_linear.choose_plan(rows // ROWS, channels // CHUNK, 1, tokens, 0)
    plans = plans_of(rows // ROWS, channels // CHUNK, default)
    compile_all(plans)
    expected = int4_linear.launch(x, *weights[0], None, out, default).float().clone()
    for plan in plans:
        found = int4_linear.launch(x, *weights[0], None, out, plan).float()
        assert (found - expected).norm() < 6e-3 * expected.norm(), plan
    times = medians({plan: graph_of(x, out, weights, plan) for plan in (None, *plans)}, rounds)
    waits = times.pop(None)
    return {plan: us - waits for plan, us in times.items()}


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--models", nargs="+", choices=MODELS, default=list(MODELS), help="whose linears")
    parser.add_argument("--tokens", type=int, nargs="+", default=[1, 8], help="up to 8 each")
    parser.add_argument("--rounds", type=int, default=8)
    parser.add_argument("--keep", type=int, default=2, help="fastest plans of each in the JSON, beside the chosen one")
    parser.add_argument("--json", type=Path)
    args = parser.parse_args()
    torch.manual_seed(0)
    table = []
    for model in args.models:
        for (name, shape), tokens in itertools.product(MODELS[model].items(), args.tokens):
            times = time_linear(*shape, tokens, args.rounds)
            table += rows_of({"model": model, "linear": name, "tokens": tokens}, shape, times, args.keep)
            if args.json:
                write_json(args.json, table, wait_ns=WAIT_NS)


def rows_of(what: dict, shape: tuple[int, int], times: dict[Plan, float], keep: int) -> list[dict]:
    """Of the chosen plan and the ``keep`` fastest; they are printed in short."""
    chosen, best = next(iter(times)), min(times, key=times.get)
    floor = math.prod(shape) * 4.25 / 8 / (TERABYTES * 1e6)
    print(*what.values(), f"floor {floor:.1f}, chosen {times[chosen]:.2f}, best {times[best]:.2f} us: {best}", flush=True)
    rows = []
    for plan in dict.fromkeys([chosen, *sorted(times, key=times.get)[:keep]]):
        layout = {field: getattr(plan, field) for field in ("warps", "stages", "tiles", "splits", "blocks", "min_ctas")}
        rows.append({**what, "floor_us": round(floor, 2), "us": round(times[plan], 2), "chosen": plan == chosen, **layout})
    return rows


if __name__ == "__main__":
    main()
