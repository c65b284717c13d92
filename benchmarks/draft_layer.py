"""A draft's decoder layer between two attentions: one launch, or linears launched with the norm or the activation in
front of them (`kernels.fused_linear`), against four INT4 linears and three kernels of Inductor's.

    python benchmarks/draft_layer.py --json OUT.json
    python benchmarks/draft_layer.py --tokens 4 8 16 32 64 --json OUT.json     # one launch is for up to four
    python benchmarks/draft_layer.py --tune            # launch configurations
    python benchmarks/draft_layer.py --orders marlin   # weights in the order of vLLM's Marlin kernel, around 8

Needs a CUDA GPU of compute capability 9.0 or newer. Times are of one layer: medians of CUDA graph replays of a whole model,
every layer with weights of its own, so that nothing comes from the L2 cache. The first channels of a layer's qkv stand for
what attention makes of it, so that every launch depends on the one before.
"""

import argparse
from concurrent.futures import ThreadPoolExecutor
from functools import cache
from itertools import product
from pathlib import Path

import torch
import torch.nn.functional as F
from common import write_json
from int4_linear import DEVICE, DTYPE, Ours, copy_bandwidth, median, random_packed

from vllm_quantspec.kernels import draft_layer as module
from vllm_quantspec.kernels.device import device_properties
from vllm_quantspec.kernels.draft_layer import MAX_TOKENS, Order, Shape, choose_plan, launch, plan_of, reference
from vllm_quantspec.kernels.fused_linear import activated_linear, normalized_linear
from vllm_quantspec.kernels.int4_linear import int4_linear
from vllm_quantspec.kernels.marlin_linear import marlin_linear

# Layers, sizes, whether qkv has a bias.
MODELS = {
    "Llama-3.1-8B": (32, Shape(4096, 4096, 14336, 6144), False),
    "Qwen2.5-7B": (28, Shape(3584, 3584, 18944, 4608), True),
}
TOKENS = (1, 2, 3, 4)
EPSILON = 1e-5


def linears_of(shape):
    """(in, out) of o, gate_up, down and qkv."""
    return (
        (shape.attention, shape.hidden),
        (shape.hidden, 2 * shape.intermediate),
        (shape.intermediate, shape.hidden),
        (shape.hidden, shape.qkv),
    )


def layer_bytes(shape, order):
    per_weight = 0.5 + (2 + 0.5 * order.has_zeros) / 128 if order.is_marlin else Ours.bytes_per_weight
    return int(sum(k * n for k, n in linears_of(shape)) * per_weight)


def random_marlin(shape, has_zeros):
    """Codes, scales and zero points of a MarlinWeight; any bits are some."""
    channels, rows = shape
    groups = channels // 128

    def words(*size):
        return torch.randint(-(1 << 31), 1 << 31, size, dtype=torch.int32, device=DEVICE)

    scales = torch.empty(groups, rows, device=DEVICE).uniform_(0.001, 0.002).to(DTYPE)
    zeros = [words(groups, rows // 8) & 0x11111111 | 0x66666666] if has_zeros else []
    return words(channels // 16, 2 * rows), scales, *zeros


class Layer:
    def __init__(self, shape, has_bias, order):
        self.order = order
        make = (lambda size: random_marlin(size, order.has_zeros)) if order.is_marlin else random_packed
        self.linears = [make(size) for size in linears_of(shape)]
        self.weights = [t for linear in self.linears for t in linear]
        self.norms = [torch.rand(shape.hidden, device=DEVICE).add_(0.5).to(DTYPE) for _ in range(2)]
        self.bias = torch.randn(shape.qkv, device=DEVICE).to(DTYPE) if has_bias else None

    @property
    def arguments(self):
        return self.weights, *self.norms, self.bias, EPSILON, EPSILON

    def linear(self, number, x, bias=None):
        if not self.order.is_marlin:
            return int4_linear(x, *self.linears[number], bias)
        codes, scales, *zeros = self.linears[number]
        return marlin_linear(x, codes, scales, *(zeros or [None]), bias)


def add_and_norm(x, residual, weight):
    """vLLM's RMSNorm in PyTorch, as torch.compile sees it."""
    x = x.float() + residual.float()
    residual = x.to(DTYPE)
    x = x * torch.rsqrt(x.square().mean(-1, keepdim=True) + EPSILON)
    return x.to(DTYPE) * weight, residual


def activate(x):
    gate, up = x.chunk(2, dim=-1)
    return F.silu(gate) * up


@cache
def compiled():
    """Inductor's kernels, which overlap with those around them as in an engine."""
    import torch._inductor.config as config

    if hasattr(config.triton, "enable_pdl"):
        config.triton.enable_pdl = True
    return tuple(torch.compile(f, fullgraph=True, dynamic=False) for f in (add_and_norm, activate))


def seven_launches(attention, residual, layer):
    norm, act = compiled()
    x, residual = norm(layer.linear(0, attention), residual, layer.norms[0])
    x = layer.linear(2, act(layer.linear(1, x)))
    x, residual = norm(x, residual, layer.norms[1])
    return layer.linear(3, x, layer.bias), residual


def fused_linears(attention, residual, layer):
    o, gate_up, down, qkv = (layer.weights[i : i + 2] for i in range(0, 8, 2))
    x, residual = normalized_linear(int4_linear(attention, *o), residual, layer.norms[0], EPSILON, *gate_up)
    return normalized_linear(activated_linear(x, *down), residual, layer.norms[1], EPSILON, *qkv, layer.bias)


def four_linears(attention, residual, layer):
    """What the seven take without norms and activation; the numbers mean nothing."""
    x = layer.linear(1, layer.linear(0, attention))
    return layer.linear(3, layer.linear(2, x[:, : x.shape[1] // 2]), layer.bias), residual


def one_launch(plan=None):
    return lambda attention, residual, layer: launch(attention, residual, *layer.arguments, plan)


def time_layer(method, layers, shape, tokens, rep=60):
    attention, residual = inputs_of(shape, tokens)

    def run():
        x, r = attention, residual
        for layer in layers:
            qkv, r = method(x, r, layer)
            x = qkv[:, : shape.attention]

    run()
    return median(run, rep) / len(layers)


def inputs_of(shape, tokens):
    return (torch.randn(tokens, n, device=DEVICE).to(DTYPE) for n in (shape.attention, shape.hidden))


def relative_error(out, expected):
    return float((out.double() - expected.double()).norm() / expected.double().norm())


def check(layer, shape, tokens):
    """The largest relative errors of both results against the reference: of one launch, where it is one, and fused."""
    inputs = list(inputs_of(shape, tokens))
    methods = {"fused_error": fused_linears} if layer.order is Order.PACKED else {}
    if tokens <= MAX_TOKENS:
        methods["error"], expected = one_launch(), reference(*inputs, *layer.arguments)
    else:  # a token's result is the same whatever the others
        parts = zip(*(x.split(MAX_TOKENS) for x in inputs), strict=True)
        expected = [torch.cat(x) for x in zip(*(reference(*part, *layer.arguments) for part in parts), strict=True)]
    return {
        key: max(relative_error(a, b) for a, b in zip(method(*inputs, layer), expected, strict=True))
        for key, method in methods.items()
    }


def options_of(shape, tokens, gpu, order):
    """Plans by warps, passes over gate and up, depth of the ring, stages asked for at a time, CTAs per multiprocessor."""
    default = plan_of(shape, tokens, gpu, order=order)
    options = {"default": default, "no overlap": default._replace(overlap=False)}
    for stages in (4, 6, 8, default.stages):
        for flight in (2, 3, 4, 5, 6, 8, 12):
            if flight <= stages <= default.stages:
                options[f"stages {stages} flight {flight}"] = default._replace(stages=stages, flight=flight)
    tries = [(w, None, 1) for w in (8, 12, 14, 15)] + [(None, p, 1) for p in (2, 4, 7)] + [(8, None, 2), (8, 2, 2)]
    for warps, pairs, ctas in tries:
        try:
            options[f"warps {warps} pairs {pairs} ctas {ctas}"] = plan_of(shape, tokens, gpu, warps, pairs, ctas, order)
        except RuntimeError:
            continue
    return options


def tune(layers, shape, tokens):
    gpu = device_properties(0)
    options = options_of(shape, tokens, gpu, layers[0].order)
    compile_all(options.values(), gpu)
    times = {}
    for name, plan in options.items():
        try:
            times[name] = time_layer(one_launch(plan), layers, shape, tokens, 8)
        except RuntimeError as error:
            print("failed", name, plan, str(error)[:200])
    for name in sorted(times, key=times.get):
        print(f"   {times[name]:6.2f} us  {name}: {tuple(options[name])}", flush=True)
    return times


def compile_all(plans, gpu):
    from vllm_quantspec.kernels.nvrtc import compile_source

    with ThreadPoolExecutor(16) as pool:
        macros = dict.fromkeys(tuple(plan.macros(True).items()) for plan in plans)
        list(pool.map(lambda m: compile_source(module.SOURCE, m, gpu.architecture), macros))


def main():
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--json", type=Path, help="write the numbers here")
    parser.add_argument("--tune", action="store_true", help="time launch configurations")
    parser.add_argument("--tokens", type=int, nargs="*", default=TOKENS)
    parser.add_argument("--models", nargs="*", default=MODELS, help=f"of {', '.join(MODELS)}")
    parser.add_argument("--orders", nargs="*", type=Order, default=list(Order), help="packed, marlin, marlin_zeros")
    args = parser.parse_args()
    torch.manual_seed(0)
    bandwidth = copy_bandwidth()
    print(f"copy: {bandwidth / 1e12:.2f} TB/s", flush=True)
    rows = []
    for name, order in product(args.models, args.orders):
        number, shape, has_bias = MODELS[name]
        layers = [Layer(shape, has_bias, order) for _ in range(number)]
        for tokens in (n for n in args.tokens if n <= order.max_tokens or order is Order.PACKED):
            num_bytes = layer_bytes(shape, order)
            floor = num_bytes / bandwidth * 1e6
            row = {"model": name, "order": order.value, "tokens": tokens, "bytes": num_bytes, "floor_us": floor}
            if args.tune:
                print(f"{name}, {order.value}, {tokens} tokens, floor {floor:.2f} us")
                row["plans"] = tune(layers, shape, tokens)
            else:
                row |= check(layers[0], shape, tokens)
                methods = {"seven": seven_launches, "linears": four_linears}
                if order is Order.PACKED:
                    methods["fused"] = fused_linears
                if tokens <= order.max_tokens:
                    row["plan"] = choose_plan(shape, tokens, 0, order)._asdict() | {"order": order.value}
                    methods |= {"one": one_launch(), "again": one_launch()}
                for key, method in methods.items():
                    row[f"{key}_us"] = time_layer(method, layers, shape, tokens)
                for key, method in (("ratio", "one"), ("fused_ratio", "fused")):
                    if method in methods:
                        row[key] = row["seven_us"] / row[f"{method}_us"]
                print({k: round(v, 4) if isinstance(v, float) else v for k, v in row.items()}, flush=True)
            rows.append(row)
            if args.json:
                write_json(args.json, rows, copy_bandwidth=bandwidth)
        del layers
        torch.cuda.empty_cache()


if __name__ == "__main__":
    main()
