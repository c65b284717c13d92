#!/usr/bin/env python3
"""What each choice of QuantSpec costs in acceptance: bits of the cache and of the weights, window, groups, symmetry.

Plain PyTorch in float32 and teacher-forced, because most of these choices are not options of the engine. For each excerpt
the model computes its keys and values once, with an exact cache, stored in bfloat16. Then the last --scored positions are
read again, as decoding reads them: a position sees older tokens quantized, the window exact, and its own key and value as
they are; the target with its own weights and 8 bits, the draft with INT4 weights and the upper 4 bits. So each position is
the first one of a draft; what later ones lose by their own drafted keys is in benchmarks/acceptance.py.

A window of k groups of G tokens: position p reads exact from (p // G - (k - 1)) * G on, that is the newest (k - 1) * G to
k * G tokens. k = 2 is QuantSpec. Target and draft have the same window. Reported against the target: greedy agreement,
acceptance when sampling at temperature 1 (sum of min(p, q)), and KL of the draft from the target in nats.

Attention sinks lie in the first page: --first-page compares ways to read it more exactly, with the target's own weights,
against an exact cache instead of one in 8 bits.

    python benchmarks/ablations.py [--model DIR] [--text DIR] [--contexts 4096 16384 32768] [--variants NAME ...]
    python benchmarks/ablations.py --first-page --contexts 2048 --model CHAT_MODEL
    python benchmarks/ablations.py --plot        # the plot again, from the JSON
"""

import argparse
import json
import time
from dataclasses import dataclass, replace
from pathlib import Path

import torch
import torch.nn.functional as F
from common import TEXT_HELP, excerpts, read_texts, write_json
from weight_rounding import ROOT, SHARED, Llama

from vllm_quantspec import weights as rounding
from vllm_quantspec.format import PageFormat, dequantize_keys, dequantize_values, quantize_keys, quantize_values
from vllm_quantspec.kernels import search_range

SCORES = 1 << 28  # attention scores held at a time, elements: 1 GiB


# --- The cache, as decoding reads it ----------------------------------------------------------------------------------


def window_start(position: int, group: int, groups: int = 2) -> int:
    """The first position that a query at ``position`` reads exact, where the window is ``groups`` groups."""
    return max(0, (position // group - (groups - 1)) * group)


def read_quantized(
    keys: torch.Tensor, values: torch.Tensor, group: int, bits: int, sink: bool = True
) -> tuple[torch.Tensor, torch.Tensor]:
    """The full groups of keys and values [heads, tokens, head size], read with 4 or 8 bits.

    Without ``sink`` the first page is as any other.
    """
    heads, tokens, dim = keys.shape
    fmt = PageFormat(heads, dim, group)
    k, v = (x[:, : tokens // group * group].unflatten(1, (-1, group)) for x in (keys, values))
    is_first = (torch.arange(k.shape[1], device=k.device) == 0).expand(heads, -1)
    k_upper, k_lower, k_scale, k_min = quantize_keys(k, is_first if sink else None)
    v_upper, v_lower, v_scale, v_min = quantize_values(v, fmt.value_group_size)
    if bits == 4:
        k_lower = v_lower = None
    k = dequantize_keys(k_upper, k_lower, k_scale, k_min)
    v = dequantize_values(v_upper, v_lower, v_scale, v_min)
    return k.flatten(1, 2), v.flatten(1, 2)


def read_first_page(
    exact: tuple[torch.Tensor, torch.Tensor], old: tuple[torch.Tensor, torch.Tensor], way: str, group: int
) -> tuple[torch.Tensor, torch.Tensor]:
    """``old`` with its first page read in a ``way`` of `FIRST_PAGE`; keys and values [heads, tokens, head size]."""
    bits, tokens, spared, sink = FIRST_PAGE[way]
    page = [x[:, :group].float() for x in exact]
    rounded = page
    if spared:  # ranges are those of the other tokens: one of these stands in the place of each that is exact
        rounded = [torch.cat([x[:, tokens : tokens + 1].expand(-1, tokens, -1), x[:, tokens:]], 1) for x in page]
    rounded = read_quantized(*rounded, group, bits, sink)
    keys, values = (
        torch.cat([x[:, :tokens], y[:, tokens:], rest[:, group:]], 1)
        for x, y, rest in zip(page, rounded, old, strict=True)
    )
    return keys, values


def attend(
    q: torch.Tensor,
    own: tuple[torch.Tensor, torch.Tensor],
    exact: tuple[torch.Tensor, torch.Tensor],
    old: tuple[torch.Tensor, torch.Tensor] | None,
    first: int,
    group: int,
    groups: int,
) -> torch.Tensor:
    """Attention of queries [query heads, n, D] at positions from ``first`` on; the result has their shape (the values' D).

    Args:
        own: keys and values [heads, n, D] of the queries' positions, of the same stream as the queries.
        exact: keys and values [heads, at least first + n, D] of the target.
        old: the same, quantized, for what is older than the window; None: everything is read exact.
        group, groups: tokens of a group, and groups of the window.
    """
    heads, per_head = own[0].shape[0], q.shape[0] // own[0].shape[0]
    q = q.unflatten(0, (heads, per_head)) * q.shape[-1] ** -0.5
    end = first + q.shape[2]
    rows = max(1, SCORES // (q.shape[0] * per_head * end))
    output = q.new_empty(*q.shape[:-1], own[1].shape[-1])
    at = first
    while at < end:
        # Queries of one group share the window's start; without a cache read quantized there is none.
        stop = min(end, at + rows, end if old is None else (at // group + 1) * group)
        start = 0 if old is None else window_start(at, group, groups)
        here = slice(at - first, stop - first)
        k, v = (
            torch.cat([x[:, :start], y[:, start:stop].float()], 1) if start else y[:, :stop].float()
            for x, y in zip(old or exact, exact, strict=True)
        )
        query = q[:, :, here]
        scores = (query.flatten(1, 2) @ k.transpose(1, 2)).unflatten(1, (per_head, -1))
        position = torch.arange(at, stop, device=q.device)
        # A row's own key is its own stream's, not the target's.
        scores.masked_fill_(torch.arange(stop, device=q.device) >= position[:, None], -torch.inf)
        own_score = (query * own[0][:, None, here]).sum(-1, keepdim=True)
        probabilities = torch.cat([scores, own_score], -1).softmax(-1)
        past = (probabilities[..., :-1].flatten(1, 2) @ v).unflatten(1, (per_head, -1))
        output[:, :, here] = past + probabilities[..., -1:] * own[1][:, None, here]
        at = stop
    return output.flatten(0, 1)


class Excerpt:
    """A text's exact keys and values, and readings of its last ``scored`` positions against them."""

    def __init__(self, model: Llama, ids: torch.Tensor, scored: int) -> None:
        self.model, self.ids, self.first = model, ids[-scored:], len(ids) - scored
        self.exact: list[tuple[torch.Tensor, torch.Tensor]] = []

        def record(layer: int, q: torch.Tensor, k: torch.Tensor, v: torch.Tensor) -> torch.Tensor:
            self.exact.append((k.bfloat16(), v.bfloat16()))  # as the engine stores them
            return attend(q, (k, v), (k, v), None, 0, 1, 1)

        model.hidden_states(ids, model.linears, attend=record)
        self.quantized: dict[tuple[int, str], list[tuple[torch.Tensor, torch.Tensor]]] = {}

    def log_probabilities(self, linears: dict, bits: int, group: int, groups: int, first_page: str = "") -> torch.Tensor:
        """[scored, vocabulary], with ``linears`` and old tokens read with 4, 8 or (exactly) 16 bits."""
        if (group, bits) not in self.quantized and bits < 16:
            self.quantized = {(group, bits): [read_quantized(k, v, group, bits) for k, v in self.exact]}  # one: memory
        old = self.quantized[group, bits] if bits < 16 else [None] * len(self.exact)
        if first_page:
            old = [read_first_page(e, o, first_page, group) for e, o in zip(self.exact, old, strict=True)]

        def decode(layer: int, q: torch.Tensor, k: torch.Tensor, v: torch.Tensor) -> torch.Tensor:
            own = k.bfloat16().float(), v.bfloat16().float()
            return attend(q, own, self.exact[layer], old[layer], self.first, group, groups)

        hidden = self.model.hidden_states(self.ids, linears, attend=decode, first=self.first)
        return F.linear(hidden, self.model.head).log_softmax(-1)


# --- What is compared -------------------------------------------------------------------------------------------------


@dataclass(frozen=True)
class Variant:
    """One draft. ``weights``: None (the target's own), or symmetry, rounding method and group size. ``first_page``: one of
    `FIRST_PAGE`."""

    kv: str = "int4"
    weights: tuple[str, str, int] | None = ("asymmetric", "search", 128)
    group: int = 128
    window: int = 2
    first_page: str = ""

    @property
    def name(self) -> str:
        weights = "own weights"
        if self.weights:
            symmetry, method, group = self.weights
            weights = f"INT4 {symmetry} {method} g{group}"
        first_page = f", first page {self.first_page}" if self.first_page else ""
        return f"{self.kv} KV g{self.group} window {self.window}G{first_page}, {weights}"


QUANTSPEC = Variant()
KV_ONLY = replace(QUANTSPEC, weights=None)
WEIGHTS_ONLY = replace(QUANTSPEC, kv="int8")
WEIGHTS = [(s, m, g) for g in (128, 64) for m in ("search", "nearest") for s in ("asymmetric", "symmetric")]
VARIANTS = [
    *(replace(v, group=g, window=k) for v in (QUANTSPEC, KV_ONLY) for g in (128, 64) for k in (1, 2, 4)),
    *(replace(v, weights=w) for v in (QUANTSPEC, WEIGHTS_ONLY) for w in WEIGHTS if (v, w) != (QUANTSPEC, QUANTSPEC.weights)),
]


# {way to read the first page: (bits, tokens at its start that are exact, whether ranges are those of the others, whether
# the first key is on a code)}
FIRST_PAGE = {
    "": (4, 0, False, True),
    "as any other": (4, 0, False, False),
    "in 8 bits": (8, 0, False, False),
    "exact": (4, 128, False, False),
    **{f"but {n} exact tokens": (4, n, False, False) for n in (1, 4, 16, 64)},
    **{f"but {n} exact tokens, ranges without them": (4, n, True, False) for n in (1, 16)},
}
FIRST_PAGES = [replace(KV_ONLY, first_page=way) for way in FIRST_PAGE]


def round_symmetric(weight: torch.Tensor, group_size: int, method: str, dtype: torch.dtype) -> torch.Tensor:
    """As ``weights.quantize_weight``, but with the zero point 8 in every group: the range is the same to both sides."""
    x = weight.float().unflatten(-1, (-1, group_size))
    scale = search_range.stored(x.abs().amax(-1, keepdim=True) / 7.5, dtype)
    zero = torch.full_like(scale, 8)
    if method == "search":
        scale, zero = search_range.narrowed(x, scale, zero, None, dtype)
    return ((rounding._round(x, scale, zero, 4) - zero) * scale).flatten(-2)


def draft_linears(model: Llama, weights: tuple[str, str, int] | None) -> dict[str, torch.Tensor]:
    if weights is None:
        return model.linears
    symmetry, method, group = weights
    dtype = torch.bfloat16  # of scales: what vLLM's kernels take beside bfloat16 activations
    if symmetry == "symmetric":
        return {k: round_symmetric(w, group, method, dtype) for k, w in model.linears.items()}
    return {
        k: rounding.quantize_weight(w, group, method=method, scale_dtype=dtype).dequantize()
        for k, w in model.linears.items()
    }


def compare(target: torch.Tensor, draft: torch.Tensor) -> torch.Tensor:
    """Sums over positions, of log-probabilities [n, vocabulary]: greedy agreement, sum of min(p, q), KL(target || draft)."""
    agreed = (target.argmax(-1) == draft.argmax(-1)).sum()
    common = torch.minimum(target, draft).exp().sum()
    kl = (target.exp() * (target - draft)).sum()
    return torch.stack([agreed.double(), common.double(), kl.double()])


# --- Report -----------------------------------------------------------------------------------------------------------


def plot(path: Path) -> None:
    import matplotlib

    matplotlib.use("Agg")
    import matplotlib.pyplot as plt

    rows = json.loads(path.read_text())["rows"]
    contexts = sorted({r["context"] for r in rows})
    names = list(dict.fromkeys(r["variant"] for r in rows))[::-1]
    of = {(r["variant"], r["context"]): r for r in rows}
    figure, axes = plt.subplots(1, 2, figsize=(12, 1.2 + 0.26 * len(names)), sharey=True)
    quantities = ((axes[0], "acceptance", "acceptance when sampling, %"), (axes[1], "greedy", "greedy agreement, %"))
    for axis, key, title in quantities:
        for context, marker in zip(contexts, "os^Dv", strict=False):
            points = [(100 * of[n, context][key], i) for i, n in enumerate(names) if (n, context) in of]
            axis.plot(*zip(*points, strict=True), marker, alpha=0.8, label=f"{context / 1024:g}k")
        axis.set_xlabel(title)
        axis.grid(axis="both", alpha=0.3)
    axes[0].set_yticks(range(len(names)), names, fontsize=8)
    axes[1].legend(title="context")
    figure.tight_layout()
    figure.savefig(path.with_suffix(".png"), dpi=140)


def load(model: Path, text: Path) -> tuple[Llama, list[list[int]], str]:
    """The model, without gradients from here on, the token ids of each text, and the device that the model is on."""
    from tokenizers import Tokenizer

    torch.set_grad_enabled(False)
    device = "cuda" if torch.cuda.is_available() else "cpu"
    tokenizer = Tokenizer.from_file(str(model / "tokenizer.json"))
    texts = [tokenizer.encode(novel, add_special_tokens=False).ids for novel in read_texts(text).values()]
    return Llama(model, device), texts, device


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--model", type=Path, default=SHARED / "models/books-30m")
    parser.add_argument("--text", type=Path, default=SHARED / "data/books", help=TEXT_HELP)
    parser.add_argument("--contexts", type=int, nargs="+", default=[4096, 16384, 32768])
    parser.add_argument("--excerpts", type=int, default=2, help="of each text")
    parser.add_argument("--scored", type=int, default=2048, help="positions at the end of each excerpt")
    parser.add_argument("--variants", nargs="+", choices=[v.name for v in VARIANTS], help="default: all", metavar="NAME")
    parser.add_argument("--first-page", action="store_true", help="compare ways to read the first page")
    parser.add_argument("--json", type=Path)
    parser.add_argument("--plot", action="store_true", help="only draw the plot from the JSON")
    args = parser.parse_args()
    name = "first_page" if args.first_page else "ablations"
    path = args.json or ROOT / f"benchmarks/results/{name}-{args.model.name}.json"
    if args.plot:
        return plot(path)

    started = time.perf_counter()
    model, texts, device = load(args.model, args.text)
    # In this order the quantized cache of an excerpt is made once for each group size and reading.
    every = FIRST_PAGES if args.first_page else VARIANTS
    variants = sorted(
        (v for v in every if not args.variants or v.name in args.variants), key=lambda v: (v.group, v.kv != "int4")
    )
    linears = {w: draft_linears(model, w) for w in {v.weights for v in variants}}
    rows = []
    for context in args.contexts:
        sums = {v: torch.zeros(3, dtype=torch.float64, device=device) for v in variants}
        tokens = 0
        for ids in (e for text in texts for e in excerpts(text, context, args.excerpts)):
            excerpt = Excerpt(model, torch.tensor(ids, device=device), min(args.scored, context))
            windows = {(v.group, v.window) for v in variants}
            target_bits = 16 if args.first_page else 8
            targets = {w: excerpt.log_probabilities(model.linears, target_bits, *w) for w in sorted(windows)}
            for v in variants:
                bits = 4 if v.kv == "int4" else 8
                draft = excerpt.log_probabilities(linears[v.weights], bits, v.group, v.window, v.first_page)
                sums[v] += compare(targets[v.group, v.window], draft)
            tokens += min(args.scored, context)
            print(f"{context}: {tokens} positions, {time.perf_counter() - started:.0f} s", flush=True)
        for v in every:
            if v in sums:
                greedy, acceptance, kl = (sums[v] / tokens).tolist()
                row = {"context": context, "variant": v.name, "kv": v.kv, "weights": v.weights, "group": v.group}
                row |= {"window": v.window, "first_page": v.first_page, "positions": tokens}
                row |= {"greedy": greedy, "acceptance": acceptance, "kl": kl}
                rows.append(row)
                print(f"{context:6d}  {v.name:60s} {greedy:.4f} {acceptance:.4f} {kl:.5f}", flush=True)
    write_json(path, rows, model=args.model.name, dtype="float32", excerpts=args.excerpts, scored=args.scored)
    plot(path)


if __name__ == "__main__":
    main()
