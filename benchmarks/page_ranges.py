#!/usr/bin/env python3
"""Where the 4-bit cache's error comes from, and what other ways to fill its pages would change.

Plain PyTorch in float32 and teacher-forced, as `ablations.py` reads a cache: the last --scored positions of each excerpt are
read again with the model's own weights, once exactly and once per variant. Keys are in ranges per channel and page, values
per token. Variants of the keys, all with values as they are:

inset I         the smallest and largest number lie half a step times I beyond the first and last code, which makes a step
                smaller: range / (15 + I); with 1 every code has as much of the range. Values too.
fit F           scale and minimum are fitted to the codes: they keep the page's mean of a channel, and its variance
                ("variance") or the least square error ("squares"), or the variance of the codes less a twelfth of a step
                squared ("codes"), as pages of 4 bits are now. None costs a byte.
groups of N     ranges of N tokens
N of 5 bits     so many channels of a page have a bit more: those with the largest step ("by query": times the query's size)
rotated         query and key by a Hadamard matrix over a head's channels
less variance   scores of page tokens less half the variance that rounding gives them

"mass" is the share of attention that goes to tokens in pages, beyond what the exact cache gives them: errors of scores make
it larger, as the exponential of an error is more than 1 on average. Standard errors are over blocks of 128 positions.

    python benchmarks/page_ranges.py [--model DIR] [--text DIR] [--contexts 32768] [--variants NAME ...]
"""

import argparse
import math
import time
from dataclasses import dataclass
from pathlib import Path

import ablations
import torch
import torch.nn.functional as F
from common import TEXT_HELP, excerpts, write_json
from weight_rounding import ROOT, SHARED, Llama

from vllm_quantspec.format import PageFormat

GROUP = 128


@dataclass(frozen=True)
class Variant:
    """What is read in 4 bits: keys and values with an inset each (None: exact), in some layers, of a part of the context."""

    name: str
    keys: float | None = 0.0
    values: float | None = 0.0
    layer: int | None = None
    part: tuple[float, float] = (0.0, 1.0)
    group: int = GROUP  # of keys
    fit: str = ""  # of keys: "", "variance", "squares" or "codes"
    spare: int = 0  # channels of keys with 5 bits
    by_query: bool = False
    rotated: bool = False
    less_variance: bool = False


WAYS = [
    Variant("fit codes", fit="codes"),
    Variant("fit variance", fit="variance"),
    Variant("fit squares", fit="squares"),
    Variant("less variance", less_variance=True),
    Variant("groups of 64", group=64),
    Variant("groups of 64, fit variance", group=64, fit="variance"),
    Variant("32 of 5 bits", spare=32),
    Variant("32 of 5 bits, fit variance", spare=32, fit="variance"),
    Variant("32 of 5 bits, less variance", spare=32, less_variance=True),
    Variant("40 of 5 bits", spare=40),
    Variant("40 of 5 bits by query", spare=40, by_query=True),
    Variant("rotated", rotated=True),
    Variant("rotated, fit variance", rotated=True, fit="variance"),
]


def variants(num_layers: int, insets: list[float], parts: bool) -> list[Variant]:
    found = [Variant("keys and values"), Variant("keys alone", values=None), Variant("values alone", keys=None)]
    if parts:
        found += [Variant(f"keys of layer {i} alone", values=None, layer=i) for i in range(num_layers)]
        found += [
            Variant("keys of the oldest half alone", values=None, part=(0, 0.5)),
            Variant("keys of the newest half alone", values=None, part=(0.5, 1)),
        ]
    return found + [Variant(f"inset {i:g}", keys=i, values=i) for i in insets] + WAYS


def read(
    x: torch.Tensor, v: Variant, inset: float, top: float | torch.Tensor = 15.0, keys: bool = False
) -> tuple[torch.Tensor, torch.Tensor]:
    """``x`` in ranges along dim 3, as 4 bits have it, and the steps. ``top``: the last code. The first key is on a code, see
    `format.quantize_keys`."""
    low, high = x.aminmax(dim=3, keepdim=True)
    top = torch.as_tensor(top, device=x.device).expand_as(low)
    scale = ((high - low) / (top + inset)).half().float()
    minimum = (low + scale * (inset / 2)).half().float()
    divisor = torch.where(scale == 0, 1.0, scale)
    sink = x[:, 0, 0, 0]
    if keys:
        code = ((sink - minimum[:, 0, 0, 0]) / divisor[:, 0, 0, 0]).round().clamp_min(0).minimum(top[:, 0, 0, 0])
        minimum[:, 0, 0, 0] = (sink - code * scale[:, 0, 0, 0]).half().float()
    code = ((x - minimum) / divisor).round().clamp_min(0).minimum(top)
    if keys and v.fit:
        mean, code_mean = x.mean(3, keepdim=True), code.mean(3, keepdim=True)
        spread = (code - code_mean).square().sum(3, keepdim=True)
        least = ((x - mean) * (code - code_mean)).sum(3, keepdim=True) / spread
        kept = ((x - mean).square().sum(3, keepdim=True) / spread).sqrt()
        fitted = {"variance": kept, "squares": least, "codes": scale * (1 - x.shape[3] / 24 / spread)}[v.fit]
        if v.fit == "codes":  # of which the mean is kept, not the keys'
            mean = code_mean * scale + minimum
        scale = torch.where(spread == 0, scale, fitted).half().float()
        minimum = (mean - scale * code_mean).half().float()
        minimum[:, 0, 0, 0] = (sink - code[:, 0, 0, 0] * scale[:, 0, 0, 0]).half().float()
    return code * scale + minimum, scale


def read_keys(keys: torch.Tensor, v: Variant, query_size: torch.Tensor) -> list[torch.Tensor]:
    """Keys [heads, tokens, head size] of full groups as the variant has them, and their steps, of the same shape."""
    matrix = hadamard(keys.shape[-1], keys.device) if v.rotated else None
    x = (keys if matrix is None else keys @ matrix).unflatten(1, (-1, GROUP // v.group, v.group))
    top = torch.full((1, 1, 1, 1, 1), 15.0, device=x.device)
    if v.spare:
        low, high = x.aminmax(dim=3, keepdim=True)
        size = (high - low).square() * (query_size[:, None, None, None] if v.by_query else 1)
        top = torch.full_like(size, 15.0).scatter_(-1, size.topk(v.spare, -1).indices, 31.0)
    found = [y.expand_as(x).flatten(1, 3) for y in read(x, v, v.keys, top, keys=True)]
    return found if matrix is None else [found[0] @ matrix, found[1]]


def hadamard(size: int, device: torch.device) -> torch.Tensor:
    matrix = torch.ones(1, 1)
    while len(matrix) < size:
        matrix = torch.cat([torch.cat([matrix, matrix], 1), torch.cat([matrix, -matrix], 1)])
    return (matrix / size**0.5).to(device)


def read_pages(
    keys: torch.Tensor, values: torch.Tensor, v: Variant, layer: int, query_size: torch.Tensor
) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
    """The full groups of keys and values [heads, tokens, head size], float32, as the variant reads them, and keys' steps."""
    full = keys.shape[1] // GROUP * GROUP
    exact = [x[:, :full].float() for x in (keys, values)]
    steps = torch.zeros_like(exact[0])
    if v.layer not in (None, layer):
        return exact[0], exact[1], steps
    width = PageFormat(keys.shape[0], keys.shape[2], GROUP).value_group_size
    rounded = list(exact)
    if v.keys is not None:
        rounded[0], steps = read_keys(exact[0], v, query_size)
    if v.values is not None:
        rounded[1] = read(exact[1].unflatten(-1, (-1, width)), v, v.values)[0].flatten(2, 3)
    start, end = (int(full * share) // GROUP * GROUP for share in v.part)
    for x, y in zip(exact, rounded, strict=True):
        x[:, start:end] = y[:, start:end]
    return exact[0], exact[1], steps


class Reader:
    """The last ``scored`` positions of a text, read with variants of what is older than the window."""

    def __init__(self, model: Llama, ids: torch.Tensor, scored: int, cache: list | None = None) -> None:
        self.model, self.ids, self.first, self.cache = model, ids[-scored:], len(ids) - scored, cache or []

        def record(layer: int, q: torch.Tensor, k: torch.Tensor, v: torch.Tensor) -> torch.Tensor:
            self.cache.append((k.bfloat16(), v.bfloat16()))  # as the engine stores them
            return F.scaled_dot_product_attention(q[None], k[None], v[None], is_causal=True, enable_gqa=True)[0]

        if cache is None:
            model.hidden_states(ids, model.linears, attend=record)

    def __call__(self, variant: Variant | None) -> tuple[torch.Tensor, float]:
        """Log-probabilities [scored, vocabulary], and the attention that pages get; None: an exact cache."""
        masses = []

        def decode(layer: int, q: torch.Tensor, k: torch.Tensor, v: torch.Tensor) -> torch.Tensor:
            own, exact = [k.bfloat16().float(), v.bfloat16().float()], self.cache[layer]
            now, steps = exact, None
            if variant is None:
                old = [x.float() for x in exact]
            else:
                query_size = q.unflatten(0, (len(k), -1)).square().mean((1, 2))
                *old, steps = read_pages(*exact, variant, layer, query_size)
            if variant is not None and variant.less_variance:
                # Half the variance of q k / sqrt(D), sum of (q step)^2 / 24 D, as D more channels of queries and keys.
                size = q.shape[-1]
                q = torch.cat([q * 2**0.5, q.square() * (2 / size) ** 0.5], -1)
                old[0] = torch.cat([old[0], steps.square() / -24], -1)
                own[0], now = F.pad(own[0], (0, size)), (F.pad(exact[0], (0, size)), exact[1])
            # As if values told pages (1) from the window (0): what comes out of a head is the share of the pages.
            ones = torch.ones_like(old[1][..., :1]), torch.zeros_like(exact[1][..., :1])
            told = [torch.cat([x, y], -1) for x, y in zip((old[1], exact[1].float()), ones, strict=True)]
            own_values = torch.cat([own[1], torch.zeros_like(own[1][..., :1])], -1)
            caches = (own[0], own_values), (now[0], told[1]), (old[0], told[0])
            result = ablations.attend(q, *caches, self.first, GROUP, 2)
            masses.append(result[..., -1].mean())
            return result[..., :-1]

        hidden = self.model.hidden_states(self.ids, self.model.linears, attend=decode, first=self.first)
        return F.linear(hidden, self.model.head).log_softmax(-1), torch.stack(masses).mean().item()


def deviation(x: torch.Tensor, block: int = 128) -> float:
    """Standard error of the mean of ``x``, whose neighbours are not independent: over blocks of it."""
    means = torch.stack([b.mean() for b in x.split(block)])
    return (means.std() / len(means) ** 0.5).item()


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--model", type=Path, default=SHARED / "models/books-30m")
    parser.add_argument("--text", type=Path, default=SHARED / "data/books", help=TEXT_HELP)
    parser.add_argument("--contexts", type=int, nargs="+", default=[32768])
    parser.add_argument("--excerpts", type=int, default=1, help="of each text")
    parser.add_argument("--scored", type=int, default=1024, help="positions at the end of each excerpt")
    parser.add_argument("--insets", type=float, nargs="*", default=[0.25, 0.5, 0.75, 1])
    parser.add_argument("--parts", action="store_true", help="layers, and halves of the context, one at a time too")
    parser.add_argument("--variants", nargs="+", help="only these, by name")
    parser.add_argument("--kept", type=Path, help="a folder for exact keys and values, from one run to the next")
    parser.add_argument("--json", type=Path)
    args = parser.parse_args()

    started = time.perf_counter()
    model, texts, device = ablations.load(args.model, args.text)
    every, rows = variants(model.num_layers, args.insets, args.parts), []
    if args.variants:
        every = [v for v in every if v.name in args.variants]
    for context in args.contexts:
        kls, losses, masses = ({v: [] for v in every} for _ in range(3))
        for i, ids in enumerate(e for text in texts for e in excerpts(text, context, args.excerpts)):
            scored = min(args.scored, context)
            kept = args.kept and args.kept / f"{args.model.name}-{context}-{args.excerpts}-{i}.pt"
            cache = torch.load(kept, map_location=device) if kept and kept.exists() else None
            reader = Reader(model, torch.tensor(ids, device=device), scored, cache)
            if kept and cache is None:
                args.kept.mkdir(parents=True, exist_ok=True)
                torch.save(reader.cache, kept)
            exact, mass = reader(None)
            following = reader.ids[1:, None]
            for v in every:
                other, other_mass = reader(v)
                kls[v].append((exact.exp() * (exact - other)).sum(-1))
                losses[v].append((exact - other)[:-1].gather(1, following).flatten())
                masses[v].append(other_mass - mass)
            print(f"{context}: {len(kls[every[0]])} texts, {time.perf_counter() - started:.0f} s", flush=True)
        for v in every:
            kl, loss = torch.cat(kls[v]), torch.cat(losses[v])
            row = {"context": context, "variant": v.name, "positions": len(kl), "kl": kl.mean().item()}
            row |= {"kl_deviation": deviation(kl), "kl_of_each_text": [x.mean().item() for x in kls[v]]}
            row |= {"median_kl": kl.median().item()}
            row |= {"share_of_largest_percent": (kl.topk(len(kl) // 100).values.sum() / kl.sum()).item()}
            row |= {"perplexity_more": math.expm1(loss.mean().item()), "perplexity_deviation": deviation(loss)}
            row |= {"perplexity_more_of_each_text": [math.expm1(x.mean().item()) for x in losses[v]]}
            row |= {"mass": sum(masses[v]) / len(masses[v])}
            rows.append(row)
            print(
                f"{context:6d}  {v.name:28s} KL {row['kl']:.2e} +- {row['kl_deviation']:.1e}, "
                f"median {row['median_kl']:.1e}, perplexity {100 * row['perplexity_more']:+.3f} % "
                f"+- {100 * row['perplexity_deviation']:.3f}, mass {row['mass']:+.1e}",
                flush=True,
            )
    path = args.json or ROOT / f"benchmarks/results/page_ranges-{args.model.name}.json"
    write_json(path, rows, model=args.model.name, dtype="float32", excerpts=args.excerpts, scored=args.scored)


if __name__ == "__main__":
    main()
