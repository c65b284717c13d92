"""What the ablations and the acceptance table compute apart from a model: the same cache as the product's, valid options."""

import sys
from pathlib import Path

import pytest
import torch

from vllm_quantspec.config import parse_options
from vllm_quantspec.format import PageFormat, dequantize_keys, quantize_keys, window_start
from vllm_quantspec.kernels import reference, step

sys.path.insert(0, str(Path(__file__).parent.parent / "benchmarks"))
import ablations  # noqa: E402
import acceptance  # noqa: E402
import needle  # noqa: E402
import page_ranges  # noqa: E402


@pytest.mark.parametrize("group", [64, 128])
@pytest.mark.parametrize("bits", [4, 8])
def test_the_emulated_cache_reads_as_the_products(bits, group, length=700, queries=9):
    """Two groups of window: attention over pages and window blocks as the product's reference computes it."""
    torch.manual_seed(0)
    fmt = PageFormat(2, 64, group)
    size, first = fmt.window_block_size, length - queries
    keys, values = (torch.randn(2, length, 64).bfloat16() for _ in range(2))
    query = torch.randn(4, queries, 64)

    full = first // group
    pages = torch.zeros(full + 1, 2, fmt.head_bytes, dtype=torch.uint8)
    groups = [x[:, : full * group].transpose(0, 1).unflatten(0, (full, group)) for x in (keys, values)]
    reference.quantize_pages(fmt, pages, torch.arange(1, full + 1), *groups, is_first=torch.arange(full) == 0)
    window_table = torch.arange(1, length // size + 2)[None].int()
    window = torch.zeros(window_table.shape[1] + 1, 2, size, 128, dtype=torch.bfloat16)
    slots = step.window_slots(fmt, window_table, torch.zeros(length, dtype=torch.long), torch.arange(length))
    step.write_window(fmt, window, slots, keys.transpose(0, 1), values.transpose(0, 1))
    expected = reference.decode_attention(
        fmt,
        pages,
        window,
        query.transpose(0, 1),
        torch.tensor([0, queries]),
        torch.tensor([length]),
        torch.arange(1, full + 1)[None].int(),
        window_table,
        64**-0.5,
        bits,
    ).transpose(0, 1)

    own = keys[:, first:].float(), values[:, first:].float()
    old = ablations.read_quantized(keys, values, group, bits)
    actual = ablations.attend(query, own, (keys, values), old, first, group, 2)
    torch.testing.assert_close(actual, expected, atol=1e-5, rtol=1e-5)
    other = ablations.attend(query, own, (keys, values), old, first, group, 4)
    assert (other - expected).abs().max() > 1e-4  # the window matters


def test_attention_without_a_quantized_cache_is_causal_attention(monkeypatch):
    monkeypatch.setattr(ablations, "SCORES", 4 * 50 * 7)  # several blocks of rows
    q, k, v = torch.randn(4, 50, 32), torch.randn(2, 50, 32), torch.randn(2, 50, 32)
    expected = torch.nn.functional.scaled_dot_product_attention(q, k, v, is_causal=True, enable_gqa=True)
    torch.testing.assert_close(ablations.attend(q, (k, v), (k, v), None, 0, 1, 1), expected, atol=1e-5, rtol=1e-5)


@pytest.mark.parametrize("group", [64, 128])
def test_window(group):
    positions = torch.arange(1000)
    starts = {k: torch.tensor([ablations.window_start(p, group, k) for p in positions.tolist()]) for k in (1, 2, 4)}
    assert torch.equal(starts[2], window_start(positions, group))
    for k, start in starts.items():
        exact = (positions - start)[positions >= k * group] + 1  # with the position itself
        assert (exact.min(), exact.max()) == ((k - 1) * group + 1, k * group)


@pytest.mark.parametrize("way", ablations.FIRST_PAGE)
def test_ways_to_read_the_first_page(way, group=128):
    """Tokens that are exact are so, other pages are as before, and without a sink's range the others lose far less."""
    torch.manual_seed(0)
    exact = tuple(torch.randn(2, 3 * group, 64).bfloat16() for _ in range(2))
    for x in exact:
        x[:, 0] *= 50  # a sink
    old = ablations.read_quantized(*exact, group, 4, sink=False)
    read = ablations.read_first_page(exact, old, way, group)
    bits, tokens, spared, sink = ablations.FIRST_PAGE[way]
    for x, before, after in zip(exact, old, read, strict=True):
        assert torch.equal(after[:, group:], before[:, group:])
        assert torch.equal(after[:, :tokens], x[:, :tokens].float())
    keys, before, after = exact[0][:, tokens:group].float(), old[0][:, tokens:group], read[0][:, tokens:group]
    errors = [(y - keys).square().sum() for y in (before, after)]
    if bits == 8 or spared:  # the keys of a page share their ranges
        assert errors[1] < 0.01 * errors[0]
    elif sink:  # the key itself, up to the rounding of the minimum
        assert (after[:, 0] - keys[:, 0]).abs().max() < 0.01 * (before[:, 0] - keys[:, 0]).abs().max()
    else:
        assert torch.equal(before, after)


@pytest.mark.parametrize("head_size", [64, 128])
def test_pages_with_the_ranges_of_the_product_are_the_products(head_size, group=page_ranges.GROUP):
    torch.manual_seed(0)
    exact = tuple(torch.randn(2, 3 * group + 5, head_size).bfloat16() for _ in range(2))
    both, query_size = page_ranges.variants(2, [0.5], parts=True)[0], torch.rand(2, head_size)
    expected = ablations.read_quantized(*exact, group, 4)
    for read, wanted in zip(page_ranges.read_pages(*exact, both, 0, query_size)[:2], expected, strict=True):
        torch.testing.assert_close(read, wanted, atol=1e-6, rtol=1e-6)
    half = page_ranges.Variant("keys", values=None, layer=1, part=(0, 0.5))
    alone = page_ranges.read_pages(*exact, half, 1, query_size)
    assert torch.equal(alone[1], exact[1][:, : 3 * group].float())
    assert torch.equal(alone[0][:, group:], exact[0][:, group : 3 * group].float())
    assert (alone[0][:, :group] - expected[0][:, :group]).abs().max() < 1e-6


@pytest.mark.parametrize("inset", [0.25, 0.5, 1.0])
def test_an_inset_leaves_every_number_within_half_a_step(inset):
    torch.manual_seed(0)
    x = torch.randn(2, 5, 1, 128, 16)
    read, step = page_ranges.read(x, page_ranges.Variant("inset"), inset)
    torch.testing.assert_close(step, (x.amax(3, keepdim=True) - x.amin(3, keepdim=True)) / (15 + inset), rtol=1e-3, atol=0)
    assert ((read - x).abs() <= 0.505 * step + 4e-3).all()  # and the rounding of minimum and scale


def test_ways_to_read_keys():
    """What each way promises: a squared error, or a page's mean and variance, on keys with channels of unlike size."""
    torch.manual_seed(0)
    keys = torch.randn(2, 4 * 128, 64) * torch.linspace(0.1, 4, 64) + 3 * torch.randn(64)
    ways, query_size = {v.name: v for v in page_ranges.WAYS}, torch.rand(2, 64) + 0.1
    plain = page_ranges.read_keys(keys, page_ranges.Variant("plain"), query_size)[0]
    read = {name: page_ranges.read_keys(keys, v, query_size) for name, v in ways.items()}
    error = {name: (x[0] - keys).square().mean() / (plain - keys).square().mean() for name, x in read.items()}
    assert error["fit squares"] < error["fit variance"] < 1.02 and error["fit squares"] < 1
    assert error["40 of 5 bits"] < error["32 of 5 bits"] < 0.5 and error["groups of 64"] < 0.85
    pages, kept = (x.unflatten(1, (-1, 128))[:, 1:] for x in (keys, read["fit variance"][0]))
    torch.testing.assert_close(kept.var(2), pages.var(2), rtol=2e-3, atol=0)
    torch.testing.assert_close(kept.mean(2), pages.mean(2), rtol=1e-3, atol=5e-3)  # fp16 minima
    assert (plain.unflatten(1, (-1, 128))[:, 1:].var(2) / pages.var(2)).mean() > 1.004
    upper, _, scale, minimum = quantize_keys(keys.unflatten(1, (-1, 128)), torch.arange(4).expand(2, -1) == 0, bits=4)
    expected = dequantize_keys(upper, None, scale, minimum).flatten(1, 2)
    torch.testing.assert_close(read["fit codes"][0], expected, rtol=0, atol=1e-2)  # fp16 minima, rounded twice
    rotated = read["rotated"][0] - keys  # an error is spread over all channels
    assert rotated.square().mean((0, 1)).max() < 1.5 * rotated.square().mean((0, 1)).min()


def test_half_the_variance_leaves_the_scores():
    """Attention with `less variance` is that of scores less sum of (q step)^2 / 24 D."""
    torch.manual_seed(0)
    size, group = 32, page_ranges.GROUP
    q, own = torch.randn(2, 1, size), (torch.randn(1, 1, size), torch.zeros(1, 1, size))
    cache = [(torch.randn(1, 4 * group, size).bfloat16(), torch.randn(1, 4 * group, size).bfloat16())]
    seen = []

    class Model:
        linears, head = None, torch.eye(2 * size)

        def hidden_states(self, ids, linears, attend, first):
            seen.append(attend(0, q, *own))
            return seen[-1].transpose(0, 1).flatten(1)

    reader = page_ranges.Reader(Model(), torch.zeros(4 * group, dtype=torch.long), 1, cache)
    less = page_ranges.Variant("less variance", less_variance=True)
    _, mass = reader(less)
    keys, values, steps = page_ranges.read_pages(*cache[0], less, 0, torch.ones(1, size))
    start = 2 * group
    every_key = torch.cat([keys[0, :start], cache[0][0][0, start:-1].float(), own[0][0].bfloat16().float()])
    every_value = torch.cat([values[0, :start], cache[0][1][0, start:-1].float(), own[1][0]])
    scores = q[:, 0] @ every_key.T * size**-0.5
    scores[:, :start] -= q[:, 0].square() @ steps[0, :start].square().T / (24 * size)
    expected = scores.softmax(-1)
    torch.testing.assert_close(seen[0][:, 0], expected @ every_value)
    assert abs(mass - expected[:, :start].sum(-1).mean()) < 1e-6


def test_symmetric_weights():
    torch.manual_seed(0)
    weight = torch.randn(16, 256) + 0.3
    rounded = {m: ablations.round_symmetric(weight, 128, m, torch.bfloat16) for m in ("nearest", "search")}
    errors = {m: (r - weight).square().sum() for m, r in rounded.items()}
    assert errors["search"] < errors["nearest"]
    for group in rounded["search"].unflatten(-1, (-1, 128)).flatten(0, 1):
        steps = group / group[group != 0].abs().min()
        # Multiples of one scale, from -8 to 7 of them.
        assert len(group.unique()) <= 16 and torch.allclose(steps, steps.round(), atol=1e-3)
        assert steps.min() >= -8 and steps.max() <= 7


def test_compare():
    target = torch.tensor([[0.5, 0.3, 0.2], [0.1, 0.8, 0.1]]).log()
    assert torch.allclose(ablations.compare(target, target), torch.tensor([2.0, 2.0, 0.0]).double(), atol=1e-6)
    draft = torch.tensor([[0.25, 0.5, 0.25], [0.1, 0.8, 0.1]]).log()
    kl = (target[0].exp() * (target[0] - draft[0])).sum().item()
    expected = torch.tensor([1.0, 0.25 + 0.3 + 0.2 + 1, kl]).double()
    assert torch.allclose(ablations.compare(target, draft), expected, atol=1e-6)


def test_configurations():
    for name, options in acceptance.CONFIGS.items():
        parsed, rest = parse_options({"method": "quantspec", **options})
        assert not rest, name
    assert len({str(o) for o in acceptance.CONFIGS.values()}) == len(acceptance.CONFIGS)
    assert len({v.name for v in ablations.VARIANTS}) == len(ablations.VARIANTS)
    assert ablations.QUANTSPEC in ablations.VARIANTS and ablations.WEIGHTS_ONLY in ablations.VARIANTS


def test_needle_summary():
    seen, unseen = [(1.0, 0.5), (2.0, 0.25)] * 2, [(3.0, 0.25), (1.5, 0.25)] * 2
    row = needle.summary(seen, unseen, depths=2)
    assert (row["needles"], row["gain"], row["found"], row["gain_by_depth"]) == (4, 0.75, 0.5, [2.0, -0.5])
    assert (row["greedy"], row["greedy_without"]) == (0.375, 0.25)
