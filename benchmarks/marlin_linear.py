"""Linears of a 4-bit checkpoint on weights in Marlin's order, against BF16, vLLM's Marlin and Machete. Needs a CUDA GPU.

    python benchmarks/marlin_linear.py --json OUT.json
    python benchmarks/marlin_linear.py --tokens 64 160 512 2048 8192 --methods marlin machete alone dequantized bf16
    python benchmarks/marlin_linear.py --tune --tokens 1 8 16 32        # plans of our kernel, shape by shape

``ours`` reads Marlin's order, ``own order`` is the kernel of 16-bit models' drafts (an order of its own, zero points), and
``dequantized`` what a step of many tokens does where Marlin does not run; ``alone`` is what `one_copy_linear` chooses there.
``--group`` and ``--zeros`` say what a checkpoint has. Times are medians of CUDA graph replays; every launch reads another
weight, more than the L2 cache holds in turn. The floor: bytes of codes, scales and zero points over a copy's bandwidth.
Where a peer does not run, its columns are left out, with the reason.
"""

import argparse
import itertools
import math
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import int4_linear as int4
import torch
from common import write_json
from int4_linear import DEVICE, DTYPE, LAYERS, SHAPES, copy_bandwidth, time_model, time_shape, weights_of

TOKENS = (1, 2, 4, 5, 8, 16, 24, 32, 64)


class Ours:
    name = "ours"

    def __init__(self, group, zeros, plan=None):
        self.group, self.zeros, self.plan = group, zeros, plan
        self.bytes_per_weight = 0.5 + (2 + 0.5 * zeros) / (group if group > 0 else 4096)

    def make(self, shape):
        from vllm_quantspec.kernels.marlin_linear import MarlinWeight

        channels, rows = shape
        groups = 1 if self.group == -1 else channels // self.group
        codes = torch.randint(-(1 << 31), 1 << 31, (channels // 16, 2 * rows), dtype=torch.int32, device=DEVICE)
        scales = torch.empty(groups, rows, device=DEVICE).uniform_(0.001, 0.002).to(DTYPE)
        zeros = torch.randint(-(1 << 31), 1 << 31, (groups, rows // 8), dtype=torch.int32, device=DEVICE)
        return MarlinWeight(codes, scales, zeros if self.zeros else None)

    def __call__(self, x, weight):
        if self.plan is None:
            return torch.ops.vllm_quantspec.marlin_linear(x, *weight, None)
        from vllm_quantspec.kernels import marlin_linear

        return marlin_linear.launch(x, weight, None, x.new_empty(len(x), weight.out_features), self.plan)


class Marlin(Ours):
    """vLLM's kernel, on the same tensors."""

    name = "marlin"

    def make(self, shape):
        from vllm_quantspec.integration.gpu.marlin_linears import marlin_problem

        if (reason := marlin_problem()) is not None:
            raise RuntimeError(reason)
        return super().make(shape)

    def __call__(self, x, weight):
        from vllm_quantspec.integration.gpu.marlin_linears import vllms_marlin

        return vllms_marlin(x, *weight, None)


class Alone(Ours):
    name = "alone"

    def __call__(self, x, weight):
        return torch.ops.vllm_quantspec.one_copy_linear(x, *weight, None, False)


class Dequantized(Ours):
    name = "dequantized"

    def __call__(self, x, weight):
        from vllm_quantspec.kernels.marlin_dequantize import marlin_dequantize

        return torch.nn.functional.linear(x, marlin_dequantize(weight))


class OwnOrder(int4.Ours):
    name = "own order"


def plans_near(strips, units, kind, tokens):
    """The chosen plan first, and others for the same number of tokens."""
    from vllm_quantspec.kernels.marlin_linear import choose_plan

    base = choose_plan(strips, units, kind, tokens, 0)
    yield base
    yield base._replace(overlap=False)
    sms = torch.cuda.get_device_properties(0).multi_processor_count
    shared = 232448
    for warps, splits, resident, min_ctas in itertools.product((4, 8), range(1, 9), (1, 2), (1, 2)):
        if splits > max(1, units // warps):
            continue
        rounds = math.ceil(math.ceil(units / splits) / warps)
        blocks = min(strips, max(1, sms * resident // splits))
        load = resident * -(-strips // blocks) * rounds * warps
        if load > 1.35 * strips * units / sms:
            continue
        for slots in {2, 3, rounds} if rounds <= 4 else {2, 3}:
            plan = base._replace(
                warps=warps,
                splits=splits,
                blocks=blocks,
                x_slots=slots,
                resident=slots >= rounds,
                min_ctas=min_ctas,
            )
            budget = shared // min_ctas - 2048 - plan.x_and_sums_bytes
            stages = min(8, budget // (warps * kind.stage_bytes))
            if stages >= 2:
                yield plan._replace(stages=stages)


def tune(group, zeros, names, tokens):
    from vllm_quantspec.kernels.marlin_linear import SOURCE, kind_of, macros_of
    from vllm_quantspec.kernels.nvrtc import compile_source

    architecture = "sm_{}{}".format(*torch.cuda.get_device_capability())
    for name, shape in SHAPES.items():
        if names and name not in names:
            continue
        method = Ours(group, zeros)
        weights = weights_of(method, {name: shape})[name]
        kind, strips, units = kind_of(weights[0]), shape[1] // 64, shape[0] // 64
        for count in tokens:
            options, times = list(dict.fromkeys(plans_near(strips, units, kind, count))), {}
            with ThreadPoolExecutor(16) as pool:
                sources = {tuple(macros_of(plan, kind).items()) for plan in options}
                list(pool.map(lambda m: compile_source(SOURCE, m, architecture), sources))
            for plan in options:
                try:
                    times[plan] = time_shape(Ours(group, zeros, plan), weights, shape, count, 4)
                except RuntimeError as error:
                    print("failed", tuple(plan), str(error)[:200])
            floor = shape[0] * shape[1] * method.bytes_per_weight / 4.3e6
            print(f"{name} M={count} floor {floor:.2f} default {times[options[0]]:.2f} {tuple(options[0])}")
            for plan in sorted(times, key=times.get)[:6]:
                print(f"   {times[plan]:.2f} {tuple(plan)}", flush=True)


def main():
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--json", type=Path, help="write the numbers here")
    parser.add_argument("--tune", action="store_true", help="time launch plans")
    parser.add_argument("--shapes", nargs="*", help="only these shapes, with --tune")
    parser.add_argument("--tokens", type=int, nargs="*", default=TOKENS, help="only these numbers of tokens")
    parser.add_argument("--methods", nargs="*", help="only these methods")
    parser.add_argument("--group", type=int, default=128, choices=(32, 64, 128, -1), help="input channels per scale")
    parser.add_argument("--zeros", action="store_true", help="with zero points")
    args = parser.parse_args()
    import vllm_quantspec.integration.gpu.marlin_linears
    import vllm_quantspec.kernels.int4_linear  # noqa: F401  registers the operators

    torch.manual_seed(0)
    if args.tune:
        return tune(args.group, args.zeros, args.shapes, args.tokens)
    bandwidth = copy_bandwidth()
    print(f"copy: {bandwidth / 1e12:.2f} TB/s")
    checkpoint = args.group, args.zeros
    own = [Ours(*checkpoint), Marlin(*checkpoint), Alone(*checkpoint), Dequantized(*checkpoint)]
    methods = [int4.Bf16(), *own, int4.Machete(), OwnOrder()]
    if args.methods:
        methods = [method for method in methods if method.name in args.methods]
    rows: dict[tuple[str, int], dict] = {}
    for method in methods:
        try:
            weights = weights_of(method, SHAPES)
        except Exception as error:  # a peer that does not work here must not cost the others' numbers
            print(f"{method.name} left out: {error!r:.300}")
            continue
        for count in args.tokens:
            jobs = {"8B, 32 layers": lambda m=weights, n=count, f=method: time_model(f, m, n)}
            if count == 1:
                for name, shape in SHAPES.items():
                    jobs[name] = lambda w=weights[name], s=shape, f=method: time_shape(f, w, s, 1)
            for name, job in jobs.items():
                sizes = [SHAPES[name]] if name in SHAPES else SHAPES.values()
                size = sum(k * n for k, n in sizes) * own[0].bytes_per_weight * (LAYERS if len(sizes) > 1 else 1)
                row = rows.setdefault((name, count), {"weights": name, "tokens": count, "floor_us": size / bandwidth * 1e6})
                try:
                    row[f"{method.name}_us"] = job()
                except Exception as error:
                    print(f"{method.name}, {name}, {count} tokens: {' '.join(str(error).split())[:200]}")
        del weights
        torch.cuda.empty_cache()
    names = [method.name for method in methods]
    print(f"{'weights':15}{'M':>6}{'floor':>9}" + "".join(f"{name:>12}" for name in names))
    for row in sorted(rows.values(), key=lambda r: (r["weights"], r["tokens"])):
        times = "".join(f"{row.get(name + '_us', float('nan')):12.1f}" for name in names)
        print(f"{row['weights']:15}{row['tokens']:6}{row['floor_us']:9.1f}{times}")
    if args.json:
        rounded = [{k: round(v, 2) if isinstance(v, float) else v for k, v in row.items()} for row in rows.values()]
        write_json(args.json, rounded, group=args.group, zeros=args.zeros, copy_bandwidth_tb_s=round(bandwidth / 1e12, 3))


if __name__ == "__main__":
    main()
