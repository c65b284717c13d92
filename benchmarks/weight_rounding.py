#!/usr/bin/env python3
"""How well a model with INT4 weights predicts the model itself, for ways to round the weights.

Plain PyTorch, weights only (the KV cache is exact), teacher-forced over the first tokens of three novels:
greedy agreement, expected acceptance when sampling (sum of min(p, q)), and KL of the draft from the target.
A group that does not divide a linear's input is the largest smaller one that does, as in the engine.

    python benchmarks/weight_rounding.py [--model DIR] [--text DIR] [--context 4096] [--methods NAME ...]
    python benchmarks/weight_rounding.py --rotation --model DIR --context 512       # rotated weights; minutes on a CPU
    python benchmarks/weight_rounding.py --inputs --model DIR --context 512         # inputs of fewer bits
"""

import argparse
import itertools
import json
import time
from collections.abc import Callable
from pathlib import Path

import torch
import torch.nn.functional as F
from common import machine
from safetensors.torch import load_file
from tokenizers import Tokenizer

from vllm_quantspec import rotation
from vllm_quantspec import weights as rounding
from vllm_quantspec.kernels import int4_linear_fp8

ROOT = Path(__file__).resolve().parents[1]
SHARED = ROOT.parent / "shared"
LINEARS = {
    "self_attn.qkv": ("self_attn.q_proj", "self_attn.k_proj", "self_attn.v_proj"),
    "self_attn.o_proj": ("self_attn.o_proj",),
    "mlp.gate_up": ("mlp.gate_proj", "mlp.up_proj"),
    "mlp.down_proj": ("mlp.down_proj",),
}


class Llama:
    """A Llama of the checkpoint in ``path``, in float32, with replaceable linears ``{"<layer>.<name>": [out, in]}``."""

    def __init__(self, path: Path, device: str) -> None:
        self.config = json.loads((path / "config.json").read_text())
        tensors = {k: v.to(device).float() for k, v in load_file(path / "model.safetensors").items()}
        self.embedding = tensors["model.embed_tokens.weight"]
        self.head = tensors.get("lm_head.weight", self.embedding)
        self.num_layers = self.config["num_hidden_layers"]
        prefix = "model.layers.{}.{}.weight"
        self.norms = [
            [tensors[prefix.format(i, f"{n}_layernorm")] for n in ("input", "post_attention")]
            for i in range(self.num_layers)
        ]
        self.final_norm = tensors["model.norm.weight"]
        self.linears = {
            f"{i}.{name}": torch.cat([tensors[prefix.format(i, p)] for p in parts])
            for i in range(self.num_layers)
            for name, parts in LINEARS.items()
        }

    def hidden_states(
        self,
        ids: torch.Tensor,
        linears: dict,
        inputs: Callable | None = None,
        attend: Callable | None = None,
        first: int = 0,
    ) -> torch.Tensor:
        """float32 [..., tokens, hidden size] of the last norm, for int64 ids [..., tokens] at positions from ``first`` on.

        ``inputs(name, x)`` sees a linear's input, and may return another. ``attend(layer, q, k, v)``, of tensors
        [..., heads, tokens, head size] after the rotary embedding, replaces causal attention among these tokens.
        """
        c = self.config
        head, kv_heads, eps = c["head_dim"], c["num_key_value_heads"], c["rms_norm_eps"]
        angles = torch.outer(
            torch.arange(first, first + ids.shape[-1], device=ids.device).float(),
            c["rope_theta"] ** (-torch.arange(0, head, 2, device=ids.device).float() / head),
        )
        cos, sin = angles.cos(), angles.sin()

        def rotate(x: torch.Tensor) -> torch.Tensor:
            a, b = x.chunk(2, -1)
            return torch.cat([a * cos - b * sin, b * cos + a * sin], -1)

        def linear(name: str, x: torch.Tensor) -> torch.Tensor:
            if inputs is not None and (other := inputs(name, x)) is not None:
                x = other
            return F.linear(x, linears[name])

        def causal(layer: int, q: torch.Tensor, k: torch.Tensor, v: torch.Tensor) -> torch.Tensor:
            return F.scaled_dot_product_attention(q, k, v, is_causal=True, enable_gqa=True)

        x = self.embedding[ids]
        for i in range(self.num_layers):
            y = linear(f"{i}.self_attn.qkv", F.rms_norm(x, x.shape[-1:], self.norms[i][0], eps))
            y = y.unflatten(-1, (-1, head)).transpose(-2, -3)
            q, k, v = y.split([y.shape[-3] - 2 * kv_heads, kv_heads, kv_heads], dim=-3)
            y = (attend or causal)(i, rotate(q), rotate(k), v)
            x = x + linear(f"{i}.self_attn.o_proj", y.transpose(-2, -3).flatten(-2))
            gate, up = linear(f"{i}.mlp.gate_up", F.rms_norm(x, x.shape[-1:], self.norms[i][1], eps)).chunk(2, -1)
            x = x + linear(f"{i}.mlp.down_proj", F.silu(gate) * up)
        return F.rms_norm(x, x.shape[-1:], self.final_norm, eps)

    def logits(self, ids: torch.Tensor, linears: dict, inputs: Callable | None = None) -> torch.Tensor:
        """float32 [..., tokens, vocabulary]; arguments as of ``hidden_states``."""
        return F.linear(self.hidden_states(ids, linears, inputs), self.head)


# --- Rounding variants that lost, and calibration ---------------------------------------------------------------------


def grid_search(w: torch.Tensor, g: int, exponent: float, lows: list[float], highs: list[float] | None) -> torch.Tensor:
    """Clip search by |error|^exponent over shrunk minima and maxima (equal shrinks when ``highs`` is None)."""
    x = w.view(w.shape[0], -1, g)
    low, high = x.amin(-1, keepdim=True).clamp_max(0), x.amax(-1, keepdim=True).clamp_min(0)
    best, out = torch.full_like(low, torch.inf), x.clone()
    for a in lows:
        for b in [a] if highs is None else highs:
            scale = ((high * b - low * a) / 15).bfloat16().float().clamp_min(1e-20)
            zero = (-low * a / scale).round().clamp(0, 15)
            y = ((x / scale + zero).round().clamp(0, 15) - zero) * scale
            error = (y - x).abs().pow(exponent).sum(-1, keepdim=True)
            out = torch.where(error < best, y, out)
            best = torch.minimum(error, best)
    return out.view_as(w)


def hqq(w: torch.Tensor, g: int, integer_zero: bool, steps: int = 20) -> torch.Tensor:
    """Half-quadratic fit of the zero point (l_0.7 norm of the error), fixed scale."""
    x = w.view(w.shape[0], -1, g)
    low, high = x.amin(-1, keepdim=True), x.amax(-1, keepdim=True)
    scale = ((high - low) / 15).bfloat16().float().clamp_min(1e-20)
    zero, beta, p = -low / scale, 10.0, 0.7
    best, best_zero = torch.full_like(low, torch.inf), zero
    for _ in range(steps):
        q = (x / scale + zero).round().clamp(0, 15)
        error = x - (q - zero) * scale
        total = error.abs().mean(-1, keepdim=True)
        best_zero = torch.where(total < best, zero, best_zero)
        best = torch.minimum(total, best)
        shrunk = error.sign() * (error.abs() - error.abs().clamp_min(1e-8).pow(p - 1) / beta).clamp_min(0)
        zero = (q - (x - shrunk) / scale).mean(-1, keepdim=True)
        beta *= 1.01
    zero = best_zero.round().clamp(0, 15) if integer_zero else best_zero
    return (((x / scale + zero).round().clamp(0, 15) - zero) * scale).view_as(w)


def second_moments(model: Llama, ids: torch.Tensor) -> dict[str, torch.Tensor]:
    """Input second moments E[x x^T], float32 [in, in], of every linear over tokens ``ids``."""
    moments: dict[str, torch.Tensor] = {}

    def collect(name: str, x: torch.Tensor) -> None:
        x = x.flatten(0, -2)
        moments[name] = moments.get(name, 0) + x.T @ x

    for row in ids:
        model.logits(row, model.linears, collect)
    return {k: v / ids.numel() for k, v in moments.items()}


def self_sampled(model: Llama, rows: int, length: int) -> torch.Tensor:
    """int64 [rows, length] sampled by the model itself at temperature 1, from random first tokens."""
    ids = torch.randint(model.embedding.shape[0], (rows, 1), device=model.embedding.device)
    kept: list[tuple[torch.Tensor, torch.Tensor]] = []

    def attend(layer: int, q: torch.Tensor, k: torch.Tensor, v: torch.Tensor) -> torch.Tensor:
        if layer == len(kept):
            kept.append((k, v))
        else:
            kept[layer] = tuple(torch.cat(pair, -2) for pair in zip(kept[layer], (k, v), strict=True))
        return F.scaled_dot_product_attention(q, *kept[layer], enable_gqa=True)

    for at in range(length - 1):
        hidden = model.hidden_states(ids[:, at : at + 1], model.linears, attend=attend, first=at)[:, -1]
        ids = torch.cat([ids, F.linear(hidden, model.head).softmax(-1).multinomial(1)], 1)
    return ids


def in_blocks(w: torch.Tensor, size: int, moments: torch.Tensor) -> torch.Tensor:
    """GPTQ in groups of 128 of a weight whose inputs are rotated in blocks of ``size``; the weight of inputs as they are."""
    while w.shape[1] % size:
        size //= 2
    matrix = torch.ones(1, 1, device=w.device)
    while len(matrix) < size:
        matrix = torch.cat([torch.cat([matrix, matrix], 1), torch.cat([matrix, -matrix], 1)])

    def rotate(x: torch.Tensor) -> torch.Tensor:
        return (x.unflatten(-1, (-1, size)) @ (matrix / size**0.5)).flatten(-2)

    g, moments = rounding.fit_group_size(w.shape[1]), rotate(rotate(moments).T.contiguous()).T.contiguous()
    options = {"method": "gptq", "scale_dtype": torch.bfloat16, "second_moments": moments}
    return rotate(rounding.quantize_weight(rotate(w), g, **options).dequantize())


def e4m3(parts: int) -> Callable[[str, torch.Tensor], torch.Tensor]:
    """Inputs as ``int4_linear_fp8.cu`` multiplies them, from bfloat16."""

    def inputs(name: str, x: torch.Tensor) -> torch.Tensor:
        return int4_linear_fp8.split(x.bfloat16().flatten(0, -2), parts).view(x.shape)

    return inputs


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--model", type=Path, default=SHARED / "models/books-30m")
    parser.add_argument("--text", type=Path, default=SHARED / "data/books")
    parser.add_argument("--context", type=int, default=4096)
    parser.add_argument("--skip", type=int, default=20000, help="characters left out at the start of each novel")
    parser.add_argument("--methods", nargs="*")
    parser.add_argument("--rotation", action="store_true", help="ways to rotate, not ways to round")
    parser.add_argument("--inputs", action="store_true", help="inputs of linears in 16 bits and as e4m3 numbers")
    parser.add_argument("--json", type=Path, help="default: benchmarks/results/weight_rounding-MODEL.json")
    args = parser.parse_args()
    torch.manual_seed(0)
    torch.set_grad_enabled(False)
    device = "cuda" if torch.cuda.is_available() else "cpu"
    model = Llama(args.model, device)
    tokenizer = Tokenizer.from_file(str(args.model / "tokenizer.json"))
    texts = []
    for path in sorted(args.text.glob("*.txt")):
        text = path.read_text(encoding="utf-8")[args.skip : args.skip + 12 * args.context]
        texts.append(torch.tensor(tokenizer.encode(text).ids[: args.context], device=device))

    linears = model.linears
    moments: dict[str, dict[str, torch.Tensor]] = {}

    def sampled(rows: int, length: int) -> dict[str, torch.Tensor]:
        key = f"sampled {rows} {length}"
        if key not in moments:
            moments[key] = second_moments(model, self_sampled(model, rows, length))
        return moments[key]

    def random() -> dict[str, torch.Tensor]:
        ids = torch.randint(model.embedding.shape[0], (32, 128), device=device)
        return moments.setdefault("random", second_moments(model, ids))

    def ours(method: str, g: int, data: Callable[[], dict] | None = None, rotated: bool = False) -> Callable[[], dict]:
        def run() -> dict[str, torch.Tensor]:
            moments = data() if data is not None else {}
            return {
                k: rounding.quantize_weight(
                    w,
                    rounding.fit_group_size(w.shape[1], g),
                    method=method,
                    scale_dtype=torch.bfloat16,
                    second_moments=moments.get(k),
                    rotated=rotated,
                ).dequantize()
                for k, w in linears.items()
            }

        return run

    def each(function: Callable[..., torch.Tensor], *args) -> Callable[[], dict]:
        return lambda: {k: function(w, *args) for k, w in linears.items()}

    fine, coarse = [1 - 0.02 * i for i in range(16)], [1 - 0.05 * i for i in range(8)]
    methods: dict[str, Callable[[], dict]] = {
        "nearest g128": ours("nearest", 128),
        "search g128": ours("search", 128),
        "clip |e|^1.5 g128": each(grid_search, 128, 1.5, fine, None),
        "clip |e|^2 g128": each(grid_search, 128, 2.0, fine, None),
        "clip |e|^2.4 g128": each(grid_search, 128, 2.4, fine, None),
        "clip |e|^3 g128": each(grid_search, 128, 3.0, fine, None),
        "clip min and max apart, |e|^2 g128": each(grid_search, 128, 2.0, coarse, coarse),
        "HQQ, zero of any value, g128": each(hqq, 128, False),
        "HQQ, integer zero, g128": each(hqq, 128, True),
        "nearest g64": ours("nearest", 64),
        "search g64": ours("search", 64),
        "search g32": ours("search", 32),
        "gptq g128, 32 x 128 random tokens": ours("gptq", 128, random),
        "gptq g128, 32 x 128 sampled tokens": ours("gptq", 128, lambda: sampled(32, 128)),
        "gptq g128, 64 x 256 sampled tokens": ours("gptq", 128, lambda: sampled(64, 256)),
        "gptq g64, 64 x 256 sampled tokens": ours("gptq", 64, lambda: sampled(64, 256)),
    }
    if args.rotation:
        methods = {
            "search g128": ours("search", 128),
            "search g128, rotated": ours("search", 128, rotated=True),
            "gptq g128": ours("gptq", 128, lambda: sampled(64, 256)),
            "gptq g128, rotated": ours("gptq", 128, lambda: sampled(64, 256), rotated=True),
            "gptq g32, rotated": ours("gptq", 32, lambda: sampled(64, 256), rotated=True),
        } | {
            f"gptq g128, rotated in blocks of {size}": lambda size=size: {
                k: in_blocks(w, size, sampled(64, 256)[k]) for k, w in linears.items()
            }
            for size in (8, 16, rotation.SIZE, 128, 512)
        }
    ways: dict[str, Callable | None] = {"": None}
    if args.inputs:
        methods = {"search g128": methods["search g128"], "gptq g128": ours("gptq", 128, lambda: sampled(64, 256))}
        ways |= {f", inputs in {what}": e4m3(parts) for what, parts in (("two e4m3 parts", 2), ("e4m3", 1))}
    targets = [model.logits(ids, linears) for ids in texts]
    results = []
    print(f"{'method':48s} {'greedy':>7s} {'sampling':>8s} {'T=0.7':>8s} {'KL':>8s} {'error':>8s} {'seconds':>8s}")
    for method, (way, inputs) in itertools.product(args.methods or methods, ways.items()):
        name = method + way
        started = time.perf_counter()
        quantized = methods[method]()
        if device == "cuda":
            torch.cuda.synchronize()
        seconds = time.perf_counter() - started
        sums, tokens = torch.zeros(4, dtype=torch.float64), 0
        for ids, exact in zip(texts, targets, strict=True):
            logits = model.logits(ids, quantized, inputs)
            sums[3] += torch.minimum((logits / 0.7).softmax(-1), (exact / 0.7).softmax(-1)).sum().item()
            draft, target = logits.log_softmax(-1), exact.log_softmax(-1)
            sums[0] += (draft.argmax(-1) == target.argmax(-1)).sum().item()
            sums[1] += torch.minimum(draft, target).exp().sum().item()
            sums[2] += (draft.exp() * (draft - target)).sum().item()
            tokens += len(ids)
        greedy, sampling, kl, cold = (sums / tokens).tolist()
        error = sum((quantized[k] - w).square().sum() for k, w in linears.items()) / sum(
            w.square().sum() for w in linears.values()
        )
        row = {"method": name, "greedy": greedy, "sampling": sampling, "sampling_0.7": cold, "kl": kl, "error": float(error)}
        results.append(row | {"seconds": seconds})
        print(f"{name:48s} {greedy:7.4f} {sampling:8.4f} {cold:8.4f} {kl:8.5f} {error:8.5f} {seconds:8.2f}", flush=True)
    kind = "weight_rotation" if args.rotation else "input_precision" if args.inputs else "weight_rounding"
    output = args.json or ROOT / f"benchmarks/results/{kind}-{args.model.name}.json"
    output.parent.mkdir(parents=True, exist_ok=True)
    record = {
        "model": args.model.name,
        "context": args.context,
        "tokens": sum(len(t) for t in texts),
        "machine": machine(),
        "results": results,
    }
    output.write_text(json.dumps(record, indent=1) + "\n")


if __name__ == "__main__":
    main()
