#!/usr/bin/env python3
"""Where the 4-bit cache's error comes from, and what other ranges of a page's groups would change at the same bytes.

Plain PyTorch in float32 and teacher-forced, as `ablations.py` reads a cache: the last --scored positions of each excerpt are
read again with the model's own weights, once exactly and once per variant. A group's smallest and largest number lie on its
first and last code ("0"), or half a step times --insets beyond them, which makes a step smaller: range / (15 + inset); with
"1" every code has as much of the range. Keys are in ranges per channel and page, values per token.

"mass" is the share of attention that goes to tokens in pages, beyond what the exact cache gives them: errors of scores make
it larger, as the exponential of an error is more than 1 on average.

    python benchmarks/page_ranges.py [--model DIR] [--text DIR] [--contexts 32768] [--parts]
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


def variants(num_layers: int, insets: list[float], parts: bool) -> list[Variant]:
    found = [Variant("keys and values"), Variant("keys alone", values=None), Variant("values alone", keys=None)]
    if parts:
        found += [Variant(f"keys of layer {i} alone", values=None, layer=i) for i in range(num_layers)]
        found += [
            Variant("keys of the oldest half alone", values=None, part=(0, 0.5)),
            Variant("keys of the newest half alone", values=None, part=(0.5, 1)),
        ]
    return found + [Variant(f"inset {i:g}", keys=i, values=i) for i in insets]


def read(x: torch.Tensor, dim: int, inset: float, first: bool) -> torch.Tensor:
    """``x`` in ranges along ``dim``, as 4 bits have it. ``first``: along the first dim of pages, the first begins a text."""
    x = x.float()
    low, high = x.aminmax(dim=dim, keepdim=True)
    scale = ((high - low) / (15 + inset)).half().float()
    minimum = (low + scale * (inset / 2)).half().float()
    divisor = torch.where(scale == 0, 1.0, scale)
    if first:  # the first key is on a code, see `format.quantize_keys`
        sink = x[:, :1, :1]
        code = ((sink - minimum[:, :1]) / divisor[:, :1]).round().clamp(0, 15)
        minimum[:, :1] = (sink - code * scale[:, :1]).half().float()
    return ((x - minimum) / divisor).round().clamp(0, 15) * scale + minimum


def read_pages(keys: torch.Tensor, values: torch.Tensor, v: Variant, layer: int) -> tuple[torch.Tensor, torch.Tensor]:
    """The full groups of keys and values [heads, tokens, head size] in float32, as the variant reads them."""
    full = keys.shape[1] // GROUP * GROUP
    exact = [x[:, :full].float() for x in (keys, values)]
    if v.layer not in (None, layer):
        return exact[0], exact[1]
    width = PageFormat(keys.shape[0], keys.shape[2], GROUP).value_group_size
    rounded = list(exact)
    if v.keys is not None:
        rounded[0] = read(exact[0].unflatten(1, (-1, GROUP)), 2, v.keys, first=True).flatten(1, 2)
    if v.values is not None:
        rounded[1] = read(exact[1].unflatten(-1, (-1, width)), 3, v.values, first=False).flatten(2, 3)
    start, end = (int(full * share) // GROUP * GROUP for share in v.part)
    for x, y in zip(exact, rounded, strict=True):
        x[:, start:end] = y[:, start:end]
    return exact[0], exact[1]


class Reader:
    """The last ``scored`` positions of a text, read with variants of what is older than the window."""

    def __init__(self, model: Llama, ids: torch.Tensor, scored: int) -> None:
        self.model, self.ids, self.first, self.cache = model, ids[-scored:], len(ids) - scored, []

        def record(layer: int, q: torch.Tensor, k: torch.Tensor, v: torch.Tensor) -> torch.Tensor:
            self.cache.append((k.bfloat16(), v.bfloat16()))  # as the engine stores them
            return F.scaled_dot_product_attention(q[None], k[None], v[None], is_causal=True, enable_gqa=True)[0]

        model.hidden_states(ids, model.linears, attend=record)

    def __call__(self, variant: Variant | None) -> tuple[torch.Tensor, float]:
        """Log-probabilities [scored, vocabulary], and the attention that pages get; None: an exact cache."""
        masses = []

        def decode(layer: int, q: torch.Tensor, k: torch.Tensor, v: torch.Tensor) -> torch.Tensor:
            own, exact = (k.bfloat16().float(), v.bfloat16().float()), self.cache[layer]
            old = [x.float() for x in exact] if variant is None else read_pages(*exact, variant, layer)
            # As if values told pages (1) from the window (0): what comes out of a head is the share of the pages.
            ones = torch.ones_like(old[1][..., :1]), torch.zeros_like(exact[1][..., :1])
            told = [torch.cat([x, y], -1) for x, y in zip((old[1], exact[1].float()), ones, strict=True)]
            own_values = torch.cat([own[1], torch.zeros_like(own[1][..., :1])], -1)
            caches = (own[0], own_values), (exact[0], told[1]), (old[0], told[0])
            result = ablations.attend(q, *caches, self.first, GROUP, 2)
            masses.append(result[..., -1].mean())
            return result[..., :-1]

        hidden = self.model.hidden_states(self.ids, self.model.linears, attend=decode, first=self.first)
        return F.linear(hidden, self.model.head).log_softmax(-1), torch.stack(masses).mean().item()


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--model", type=Path, default=SHARED / "models/books-30m")
    parser.add_argument("--text", type=Path, default=SHARED / "data/books", help=TEXT_HELP)
    parser.add_argument("--contexts", type=int, nargs="+", default=[32768])
    parser.add_argument("--excerpts", type=int, default=1, help="of each text")
    parser.add_argument("--scored", type=int, default=1024, help="positions at the end of each excerpt")
    parser.add_argument("--insets", type=float, nargs="+", default=[0.25, 0.5, 0.75, 1])
    parser.add_argument("--parts", action="store_true", help="layers, and halves of the context, one at a time too")
    parser.add_argument("--json", type=Path)
    args = parser.parse_args()

    started = time.perf_counter()
    model, texts, device = ablations.load(args.model, args.text)
    every, rows = variants(model.num_layers, args.insets, args.parts), []
    for context in args.contexts:
        kls, losses, masses = ({v: [] for v in every} for _ in range(3))
        for ids in (e for text in texts for e in excerpts(text, context, args.excerpts)):
            reader = Reader(model, torch.tensor(ids, device=device), min(args.scored, context))
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
            row |= {"kl_of_each_text": [x.mean().item() for x in kls[v]], "median_kl": kl.median().item()}
            row |= {"share_of_largest_percent": (kl.topk(len(kl) // 100).values.sum() / kl.sum()).item()}
            row |= {"perplexity_more": math.expm1(loss.mean().item()), "mass": sum(masses[v]) / len(masses[v])}
            rows.append(row)
            print(
                f"{context:6d}  {v.name:32s} KL {row['kl']:.2e}, median {row['median_kl']:.1e}, perplexity "
                f"{100 * row['perplexity_more']:+.3f} %, mass {row['mass']:+.1e}",
                flush=True,
            )
    path = args.json or ROOT / f"benchmarks/results/page_ranges-{args.model.name}.json"
    write_json(path, rows, model=args.model.name, dtype="float32", excerpts=args.excerpts, scored=args.scored)


if __name__ == "__main__":
    main()
