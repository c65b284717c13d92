"""A mixture's experts at decode sizes: vLLM's kernels for INT4 weights against its kernel for BF16 ones. Needs a CUDA GPU.

    python benchmarks/moe_experts.py --json OUT.json
    python benchmarks/moe_experts.py --shapes qwen3-30b-a3b --tokens 1 8

One layer's experts behind the router (sorting tokens by expert, both products, the activation, the sum), random weights, and
experts chosen evenly. Times are medians of CUDA graph replays; every launch reads another layer's weights, more than the L2
cache holds in turn. ``gb_s`` are the weights of the experts that were chosen over the time.
"""

import argparse
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
    name = "bf16"
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
    """A method of the draft's, on codes that were made up."""

    bytes_per_weight = 0.5 + 2.5 / 128

    def __init__(self, method_class, name, shape):
        from vllm_quantspec.integration.draft.experts import ExpertShapes

        self.name, (number, hidden, width, _) = name, shape
        self.method = method_class(None, ExpertShapes(number, hidden, width, DTYPE), {"w13": 128, "w2": 128})

    def make(self):
        from vllm.model_executor.layers.fused_moe.activation import MoEActivation

        from vllm_quantspec.weights import QuantizedWeight

        layer = torch.nn.Module()
        layer.activation = MoEActivation.SILU
        for name, group in self.method.groups.items():
            rows, channels = self.method.shapes.of(name)
            for expert in range(self.method.shapes.number):
                codes = torch.randint(0, 16, (rows, channels), dtype=torch.uint8, device=DEVICE)
                scales = torch.empty(rows, channels // group, device=DEVICE).uniform_(0.001, 0.002).to(DTYPE)
                zeros = torch.randint(6, 10, scales.shape, dtype=torch.uint8, device=DEVICE)
                self.method.write(layer, name, expert, QuantizedWeight(codes, scales, zeros, group))
        return layer

    def __call__(self, x, weights, ids, layer):
        return self.method.apply(layer, x, weights, ids)


def contestants(shape):
    from vllm_quantspec.integration.draft.experts import MarlinExpertsMethod, Wna16ExpertsMethod

    yield Bf16(shape)
    for name, method in (("marlin", MarlinExpertsMethod), ("wna16", Wna16ExpertsMethod)):
        try:
            yield Int4(method, name, shape)
        except ValueError as error:
            print(f"{name}: {error}")


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


def rows_of(name, all_tokens):
    shape = SHAPES[name]
    one_expert = 3 * shape[1] * shape[2]
    for contestant in contestants(shape):
        layer_bytes = shape[0] * one_expert * contestant.bytes_per_weight
        layers = [contestant.make() for _ in range(max(2, min(6, int(12e9 / layer_bytes))))]
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
        del layers


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--shapes", nargs="+", choices=SHAPES, default=list(SHAPES))
    parser.add_argument("--tokens", nargs="+", type=int, default=TOKENS)
    parser.add_argument("--json", type=Path)
    args = parser.parse_args()
    from vllm.config import VllmConfig, set_current_vllm_config

    rows = []
    with set_current_vllm_config(VllmConfig()), torch.inference_mode():
        for name in args.shapes:
            for row in rows_of(name, args.tokens):
                rows.append(row)
                print({k: round(v, 2) if isinstance(v, float) else v for k, v in row.items()}, flush=True)
                if args.json:
                    write_json(args.json, rows)


if __name__ == "__main__":
    main()
