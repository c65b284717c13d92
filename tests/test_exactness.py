"""What the running engine computes, layer by layer, against the rule; and its logits against an exact cache's."""

import sys
from dataclasses import dataclass

import pytest
import torch
from conftest import ROOT, shared_path
from engine_tools import (
    LONG_DTYPE,
    QUANTSPEC_CACHE,
    engine,
    generate,
    put_errors_into_drafts,
    quantspec,
    speculation_counts,
)

from vllm_quantspec.format import dequantize_keys, dequantize_values, quantize_keys, quantize_values, window_start
from vllm_quantspec.integration.cache.backend import QuantSpecImpl
from vllm_quantspec.integration.draft.model import DRAFT_PREFIX

sys.path.insert(0, str(ROOT / "benchmarks"))
from acceptance import cache_error  # noqa: E402  (what the published numbers are measured with)

# Largest error of an output element, as a share of the layer's largest. Prefill in 16 bits rounds the keys and values
# that it reads from pages, and the probabilities, to the model's dtype.
TOLERANCE = {torch.bfloat16: 1e-2, torch.float32: 1e-5}


# --- The engine's attention against an oracle -------------------------------------------------------------------------


@dataclass
class Call:
    """One call of one layer's attention for a single request: its tokens are at positions ``first``, ``first`` + 1, ..."""

    first: int
    is_decode: bool
    scale: float
    query: torch.Tensor
    key: torch.Tensor
    value: torch.Tensor
    output: torch.Tensor


def record(monkeypatch, layers: set[str]) -> dict[str, list[tuple[int, Call]]]:
    """{layer: [(number of the call, the call)]} of the named layers, from now on."""
    calls: dict[str, list[tuple[int, Call]]] = {name: [] for name in layers}
    forward, number = QuantSpecImpl.forward, iter(range(10**9))

    def recording(self, layer, query, key, value, kv_cache, attn_metadata, output, *args, **kwargs):
        result = forward(self, layer, query, key, value, kv_cache, attn_metadata, output, *args, **kwargs)
        if layer.layer_name in layers and attn_metadata is not None:
            md = attn_metadata
            assert md.seq_lens.shape[0] == 1
            n = md.num_actual_tokens
            tensors = [t[:n].clone() for t in (query, key, value, output.view_as(query))]
            call = Call(int(md.seq_lens[0]) - n, md.num_decodes == 1, self.scale, *tensors)
            calls[layer.layer_name].append((next(number), call))
        return result

    monkeypatch.setattr(QuantSpecImpl, "forward", recording)
    return calls


class Oracle:
    """The cache of one request and layer: exact keys and values by position, read by the rule, naively, in float64."""

    def __init__(self, group_size: int) -> None:
        self.group_size = group_size
        self.exact: dict[int, tuple[torch.Tensor, torch.Tensor]] = {}  # of the target's last pass over each position
        self.drafted: dict[int, tuple[torch.Tensor, torch.Tensor]] = {}  # of this round's drafts
        self.pages: dict[tuple[int, bool], tuple[torch.Tensor, torch.Tensor]] = {}
        self.pages_read = 0

    def window_start(self, position: int) -> int:
        return window_start(position, self.group_size)

    def page(self, block: int, draft: bool) -> tuple[torch.Tensor, torch.Tensor]:
        """Keys and values [group_size, H, D] of a page as they are read, from exact ones; quantized once."""
        self.pages_read += 1
        if (block, draft) in self.pages:
            return self.pages[block, draft]
        positions = range(block * self.group_size, (block + 1) * self.group_size)
        keys, values = (torch.stack([self.exact[p][i] for p in positions]).transpose(0, 1) for i in (0, 1))
        group = next(n for n in range(self.group_size, 0, -16) if keys.shape[-1] % n == 0)
        read = []
        for quantize, dequantize, x in (
            (quantize_keys, dequantize_keys, (keys, torch.full(keys.shape[:1], block == 0))),
            (quantize_values, dequantize_values, (values, group)),
        ):
            upper, lower, scale, minimum = quantize(*x)
            read.append(dequantize(upper, None if draft else lower, scale, minimum).transpose(0, 1))
        self.pages[block, draft] = read[0].double(), read[1].double()
        return self.pages[block, draft]

    def attend(self, call: Call, draft: bool) -> torch.Tensor:
        """The call's output [tokens, heads, D], float64; stores its keys and values where this pass stores them."""
        store = self.drafted if draft else self.exact
        if not draft:
            self.drafted.clear()
        store.update((call.first + i, (k, v)) for i, (k, v) in enumerate(zip(call.key, call.value, strict=True)))
        tokens = {**self.exact, **self.drafted}
        rows = []
        for i, query in enumerate(call.query):
            position = call.first + i
            boundary = self.window_start(position if call.is_decode else call.first)
            pages = [self.page(block, draft) for block in range(boundary // self.group_size)]
            newest = [tokens[p] for p in range(boundary, position + 1)]
            keys, values = (
                torch.cat([*(p[j] for p in pages), torch.stack([t[j] for t in newest]).double()]) for j in (0, 1)
            )
            repeat = query.shape[0] // keys.shape[1]
            keys, values = (x.repeat_interleave(repeat, dim=1) for x in (keys, values))
            scores = torch.einsum("hd,shd->hs", query.double(), keys) * call.scale
            rows.append(torch.einsum("hs,shd->hd", scores.softmax(-1), values))
        return torch.stack(rows)


@pytest.mark.parametrize(
    "dtype, group_size, draft_weights",
    [("bfloat16", 128, "int4"), ("bfloat16", 64, "int4"), ("float32", 128, "target"), ("float32", 64, "target")],
)
def test_attention_of_the_engine(dtype, group_size, draft_weights, books_4m, passage, monkeypatch):
    """Chunked prefill, verification with rejections, drafts; pages are completed in each, and read by all three."""
    from transformers import AutoTokenizer

    prompt = AutoTokenizer.from_pretrained(books_4m).encode(passage)[: 5 * group_size - 25]
    targets = [f"model.layers.{i}.self_attn.attn" for i in (0, 4)]
    put_errors_into_drafts(monkeypatch, 0.5, seed=5)
    # Chunks begin and end inside groups.
    size = {"max_model_len": 1024, "max_num_seqs": 1, "max_num_batched_tokens": 200, "enable_prefix_caching": False}
    options = {"group_size": group_size, "draft_weights": draft_weights}
    with engine(books_4m, dtype=dtype, **size, **quantspec(4, **options)) as llm:
        calls = record(monkeypatch, {*targets, *(DRAFT_PREFIX + name for name in targets)})
        generate(llm, [prompt], group_size + 40)
        drafts, accepted = speculation_counts(llm)
    assert 0.1 * drafts < accepted[-1] < 0.9 * drafts

    for target in targets:
        oracle = Oracle(group_size)
        in_order = sorted(
            [(n, call, False) for n, call in calls[target]] + [(n, call, True) for n, call in calls[DRAFT_PREFIX + target]],
            key=lambda item: item[0],
        )
        worst = {"prefill": 0.0, "verify": 0.0, "draft": 0.0}
        count, crossing, pages = dict.fromkeys(worst, 0), 0, dict.fromkeys(worst, 0)
        for _, call, is_draft in in_order:
            before = oracle.pages_read
            expected = oracle.attend(call, is_draft)
            kind = "draft" if is_draft else "verify" if call.is_decode else "prefill"
            error = (call.output.double() - expected).abs().max() / expected.abs().max()
            worst[kind] = max(worst[kind], error.item())
            count[kind] += 1
            pages[kind] += oracle.pages_read - before
            last = call.first + len(call.query) - 1
            crossing += kind == "verify" and oracle.window_start(call.first) != oracle.window_start(last)
        print(f"{target} {dtype} G={group_size}: calls {count}, largest error {worst}")
        assert max(worst.values()) < TOLERANCE[getattr(torch, dtype)], worst
        assert count["prefill"] >= 2 and count["verify"] > 20 and count["draft"] > 80
        assert min(pages.values()) > 0 and crossing > 0


class DraftReading(Oracle):
    def page(self, block: int, draft: bool) -> tuple[torch.Tensor, torch.Tensor]:
        return super().page(block, True)


class OneGroupLess(Oracle):
    def window_start(self, position: int) -> int:
        return position // self.group_size * self.group_size


def test_the_oracle_is_not_blind(books_4m, passage, monkeypatch):
    """What the tolerances must tell apart: the target's reading from the draft's, and one group boundary from another."""
    from transformers import AutoTokenizer

    prompt = AutoTokenizer.from_pretrained(books_4m).encode(passage)[: 4 * 128 + 30]
    target = "model.layers.4.self_attn.attn"
    with engine(books_4m, max_model_len=1024, max_num_seqs=1, **quantspec(4)) as llm:
        calls = record(monkeypatch, {target})
        generate(llm, [prompt], 30)
    oracles = [Oracle(128), DraftReading(128), OneGroupLess(128)]
    errors = [0.0] * 3
    for _, call in calls[target]:
        expected, *others = (oracle.attend(call, draft=False) for oracle in oracles)
        if call.is_decode:
            for i, output in enumerate([call.output, *others]):
                errors[i] = max(errors[i], ((output - expected).abs().max() / expected.abs().max()).item())
    print(errors)
    assert errors[0] < TOLERANCE[torch.bfloat16] < 0.5 * errors[1]
    assert errors[2] > 10 * TOLERANCE[torch.float32]


# --- INT8 logits against an exact cache -------------------------------------------------------------------------------


@pytest.fixture
def tokens_4m(books_4m, passage):
    from transformers import AutoTokenizer

    return AutoTokenizer.from_pretrained(books_4m).encode(passage)


@pytest.fixture
def decode_tokens(monkeypatch):
    """Counts, while it is used, the tokens that took the decode path and all tokens, of the first layer."""
    counts = [0, 0]
    forward = QuantSpecImpl.forward

    def counting(self, layer, query, key, value, kv_cache, attn_metadata, *args, **kwargs):
        if attn_metadata is not None and layer.layer_name == "model.layers.0.self_attn.attn":
            counts[0] += attn_metadata.num_decode_tokens
            counts[1] += attn_metadata.num_actual_tokens
        return forward(self, layer, query, key, value, kv_cache, attn_metadata, *args, **kwargs)

    monkeypatch.setattr(QuantSpecImpl, "forward", counting)
    return counts


def check(result: dict[str, float], record_property, limit: float = 1e-3) -> None:
    for name, value in result.items():
        record_property(name, value)
    print(result)
    assert result["mean_kl"] < limit
    assert result["greedy_agreement"] > 0.97


@pytest.mark.parametrize("dtype", ["bfloat16", "float32"])
def test_prefill_on_books_4m(dtype, books_4m, tokens_4m, record_property):
    check(cache_error(books_4m, tokens_4m[:4500], 512, QUANTSPEC_CACHE, dtype), record_property)


def test_decode_path_on_books_4m(books_4m, tokens_4m, record_property, decode_tokens):
    check(cache_error(books_4m, tokens_4m[:700], 5, quantspec(4)), record_property)
    assert decode_tokens[0] == decode_tokens[1] >= 700


def test_prefill_of_a_novel(books_30m, record_property):
    from transformers import AutoTokenizer

    tokens = AutoTokenizer.from_pretrained(books_30m).encode(shared_path("data/books/emma.txt").read_text("utf-8"))
    check(cache_error(books_30m, tokens[20000 : 20000 + 3000], 512, QUANTSPEC_CACHE, LONG_DTYPE), record_property)


def test_decode_path_on_a_novel(books_30m, record_property, decode_tokens):
    from transformers import AutoTokenizer

    tokens = AutoTokenizer.from_pretrained(books_30m).encode(shared_path("data/books/dracula.txt").read_text("utf-8"))
    check(cache_error(books_30m, tokens[20000 : 20000 + 700], 5, quantspec(4), LONG_DTYPE), record_property)
    assert decode_tokens[0] == decode_tokens[1] >= 700
