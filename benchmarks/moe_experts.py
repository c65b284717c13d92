"""A mixture's experts at decode sizes: INT4 on our kernel and on vLLM's, against BF16 on vLLM's. Needs a CUDA GPU.

    python benchmarks/moe_experts.py --json OUT.json
    python benchmarks/moe_experts.py --shapes qwen3-30b-a3b --tokens 1 8
    python benchmarks/moe_experts.py --shapes qwen3-30b-a3b --tokens 1 8 --tune    # plans of our kernel

One layer's experts behind the router (sorting tokens by expert, both products, the activation, the sum), random weights, and
experts chosen evenly. In INT4 they are what drafts run with ``draft_experts: int4``. Times are medians of CUDA graphs'
replays; every launch reads another layer's weights, more than the L2 cache holds in turn. ``gb_s`` are the weights of the
experts that were chosen over the time. Where vLLM's Marlin kernel does not run, its rows are left out, with the reason.
"""

import argparse
import itertools
from pathlib import Path

import torch
from common import write_json

DEVICE, DTYPE = "cuda", torch.bfloat16
# Experts, hidden size, width, experts per token.
SHAPES = {
    "qwen3-30b-a3b": (128, 2048, 768, 8),
    "qwen1.5-moe-a2.7b": (60, 2048, 1408, 4),
    "mixtral-8x7b": (8, 4096, 14336, 2),
}
TOKENS = (1, 2, 4, 8, 16, 32, 64)
CHOICES = 8  # of experts, taken in turn


def median(run, rep=60):
    from triton.testing import do_bench_cudagraph

    return do_bench_cudagraph(run, rep=rep, return_mode="median") * 1e3


class Bf16:
    name = layout = "bf16"
    bytes_per_weight = 2

    def __init__(self, shape):
        self.number, self.hidden, self.width, _ = shape

    def make(self):
        w13 = torch.randn(self.number, 2 * self.width, self.hidden, dtype=DTYPE, device=DEVICE) * 0.02
        return w13, torch.randn(self.number, self.hidden, self.width, dtype=DTYPE, device=DEVICE) * 0.02

    def __call__(self, x, weights, ids, layer):
        from vllm.model_executor.layers.fused_moe.fused_moe import fused_experts

        return fused_experts(x, *layer, weights, ids, global_num_experts=self.number)


class Int4:
    """A method of the draft's, on codes that were made up; ``most`` tokens run on our own kernel."""

    bytes_per_weight = 0.5 + 2.5 / 128

    def __init__(self, method_class, name, shape, most=0, plans=None):
        from vllm_quantspec.integration.draft.experts import ExpertShapes

        self.most, self.plans, self.layout = most, plans, method_class.__name__
        self.name, (number, hidden, width, _) = name, shape
        self.method = method_class(None, ExpertShapes(number, hidden, width, DTYPE), {"w13": 128, "w2": 128})

    def make(self):
        from vllm.model_executor.layers.fused_moe.activation import MoEActivation

        from vllm_quantspec.weights import QuantizedWeight

        layer = torch.nn.Module()
        layer.activation = MoEActivation.SILU
        for name, group in self.method.groups.items():
            (rows, channels), number = self.method.shapes.of(name), self.method.shapes.number
            step = min(number, max(1, (1 << 26) // (rows * channels)))
            for first in range(0, number, step):
                shape = (min(step, number - first) * rows, channels)
                codes = torch.randint(0, 16, shape, dtype=torch.uint8, device=DEVICE)
                scales = torch.empty(shape[0], channels // group, device=DEVICE).uniform_(0.001, 0.002).to(DTYPE)
                zeros = torch.randint(6, 10, scales.shape, dtype=torch.uint8, device=DEVICE)
                self.method.write(layer, name, first, QuantizedWeight(codes, scales, zeros, group))
        return layer

    def __call__(self, x, weights, ids, layer):
        from vllm_quantspec.kernels import int4_experts

        if self.plans:
            packed = (int4_experts.Packed(*self.method.parts(layer, name)) for name in ("w13", "w2"))
            return int4_experts.int4_experts(x, weights, ids, *packed, plans=self.plans)
        int4_experts.MAX_TOKENS = self.most
        return self.method.apply(layer, x, weights, ids)


def plans_near(shape):
    """Plans of both launches: the chosen ones for a token, and those that differ in the one or the other."""
    from vllm_quantspec.kernels.int4_experts import Plan, choose_plan, unit_of

    number, hidden, width, chosen = shape
    sizes = [(hidden, 2 * width), (width, hidden)]
    base = [choose_plan(*size, 128, number, chosen, 1, down, 0) for size, down in zip(sizes, (False, True), strict=True)]
    yield tuple(base)
    for which, (in_features, _) in enumerate(sizes):
        warps, splits, *_ = base[which]
        options = ({warps, -(-warps // 2)}, {splits, 2 * splits, -(-splits // 2)}, (16, 24), (1, 2, 4))
        for w, s, on_one, strips in itertools.product(*options):
            plan = Plan(w, s, max(1, on_one // w), strips)
            if plan != base[which] and s <= in_features // unit_of(in_features) and plan.shared_bytes(in_features) < 110000:
                yield (plan, base[1]) if which == 0 else (base[0], plan)


def contestants(shape, tune):
    from vllm_quantspec.integration.draft.experts import MarlinExpertsMethod, Wna16ExpertsMethod, marlin_problem

    if tune:
        for plans in plans_near(shape):
            yield Int4(MarlinExpertsMethod, f"ours {' '.join(str(tuple(plan)) for plan in plans)}", shape, plans=plans)
        return
    yield Bf16(shape)
    yield Int4(MarlinExpertsMethod, "ours", shape, most=1 << 20)
    if (reason := marlin_problem()) is None:
        yield Int4(MarlinExpertsMethod, "marlin", shape)
    else:
        print(f"no rows of marlin: {reason}")
    yield Int4(Wna16ExpertsMethod, "wna16", shape)


def choices(shape, tokens):
    """Experts of each token, without one twice, and their weights; and how many experts the tokens have on average."""
    number, _, _, chosen = shape
    generator = torch.Generator(device=DEVICE).manual_seed(tokens)
    drawn = []
    for _ in range(CHOICES):
        scores = torch.rand(tokens, number, generator=generator, device=DEVICE)
        weights, ids = scores.topk(chosen, dim=-1)
        drawn.append((weights / weights.sum(-1, keepdim=True), ids.to(torch.int32)))
    return drawn, sum(ids.unique().numel() for _, ids in drawn) / CHOICES


def rows_of(name, all_tokens, tune):
    shape = SHAPES[name]
    one_expert, made = 3 * shape[1] * shape[2], {}
    for contestant in contestants(shape, tune):
        layer_bytes = shape[0] * one_expert * contestant.bytes_per_weight
        if contestant.layout not in made:
            made[contestant.layout] = [contestant.make() for _ in range(max(2, min(6, int(12e9 / layer_bytes))))]
        layers = made[contestant.layout]
        for tokens in all_tokens:
            drawn, read = choices(shape, tokens)
            x = torch.randn(tokens, shape[1], dtype=DTYPE, device=DEVICE)

            def run(contestant=contestant, layers=layers, drawn=drawn, x=x):
                for i in range(24):
                    contestant(x, *drawn[i % CHOICES], layers[i % len(layers)])

            run()
            time = median(run) / 24
            num_bytes = read * one_expert * contestant.bytes_per_weight
            row = {"shape": name, "kernel": contestant.name, "tokens": tokens, "us": time, "experts_read": read}
            yield row | {"gb_s": num_bytes / time / 1e3}


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--shapes", nargs="+", choices=SHAPES, default=list(SHAPES))
    parser.add_argument("--tokens", nargs="+", type=int, default=TOKENS)
    parser.add_argument("--tune", action="store_true", help="our kernel alone, by the plans of both launches")
    parser.add_argument("--json", type=Path)
    args = parser.parse_args()
    from vllm.config import VllmConfig, set_current_vllm_config

    rows = []
    with set_current_vllm_config(VllmConfig()), torch.inference_mode():
        for name in args.shapes:
            for row in rows_of(name, args.tokens, args.tune):
                rows.append(row)
                print({k: round(v, 2) if isinstance(v, float) else v for k, v in row.items()}, flush=True)
                if args.json:
                    write_json(args.json, rows)


if __name__ == "__main__":
    main()
