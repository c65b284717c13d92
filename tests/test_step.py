"""Which pages a step completes and where its tokens go, against a loop over requests and tokens."""

import random

import pytest
import torch

from vllm_quantspec.format import PageFormat, window_start
from vllm_quantspec.kernels import reference, step
from vllm_quantspec.kernels.step import plan_step, quantize_completed

FMT = PageFormat(num_kv_heads=2, head_size=64, group_size=64, dtype=torch.bfloat16)
G, W = FMT.group_size, FMT.window_block_size


def make_batch(rng: random.Random, num_reqs: int, max_drafts: int):
    """Random requests: (first position, query length, drafts, tokens of a prefix-cache hit) and their tables."""
    rows = []
    for _ in range(num_reqs):
        hit = rng.choice([0, 0, G, 3 * G])
        first = hit + rng.choice([0, 1, G - 1, G, G + 1, 2 * G, rng.randrange(5 * G)])
        drafts = rng.randrange(max_drafts + 1) if rng.random() < 0.5 else 0
        length = drafts + (1 if drafts or rng.random() < 0.5 else rng.randrange(1, 4 * G))
        rows.append((first, length, drafts, hit))
    width = max(first + length for first, length, _, _ in rows) // G + 2
    pages = torch.arange(1, num_reqs * width + 1, dtype=torch.int32).view(num_reqs, width)
    window = torch.zeros(num_reqs, width * G // W, dtype=torch.int32)
    next_block = 1
    for r, (first, length, _, hit) in enumerate(rows):
        kept = window_start(max(first + length - max_drafts, 0), G)
        for position in range(0, first + length, W):
            held = position >= hit and (window_start(first, G) <= position < first or position + W > max(kept, 0))
            held = held and (position + W <= first or position + W > kept or position < first)
            if held:
                window[r, position // W] = next_block
                next_block += 1
    return rows, pages, window, next_block


@pytest.mark.parametrize("seed", range(40))
def test_plan_against_a_loop(seed):
    rng = random.Random(seed)
    torch.manual_seed(seed)
    max_drafts = rng.choice([0, 1, 4, 8])
    rows, tables, window_table, num_window_blocks = make_batch(rng, rng.randrange(1, 6), max_drafts)
    lengths = torch.tensor([length for _, length, _, _ in rows])
    starts = torch.cat([torch.zeros(1, dtype=torch.long), lengths.cumsum(0)]).int()
    seq_lens = torch.tensor([first + length for first, length, _, _ in rows], dtype=torch.int32)
    drafts = torch.tensor([d for _, _, d, _ in rows], dtype=torch.int32)

    # Every token ever seen has a value of its own; the window pool starts as garbage.
    exact = [torch.randn(int(n), 2, 2, FMT.head_size).bfloat16() for n in seq_lens]
    window = torch.full((num_window_blocks, 2, W, 2 * FMT.head_size), float("nan")).bfloat16()
    for r, (first, _, _, _) in enumerate(rows):
        for position in range(first):
            if block := int(window_table[r, position // W]):
                window[block, :, position % W] = exact[r][position].transpose(0, 1).reshape(2, -1)
    fresh = torch.cat([exact[r][first:] for r, (first, _, _, _) in enumerate(rows)])
    key, value = fresh[:, 0], fresh[:, 1]

    plan = plan_step(FMT, starts, seq_lens, drafts, tables, window_table, max_unverified=max_drafts)
    step.write_window(FMT, window, plan.window_slots, key, value)
    pages = torch.full((int(tables.max()) + 1, 2, FMT.head_bytes), 0xA5, dtype=torch.uint8)
    untouched = pages[0, 0].clone()
    quantize_completed(FMT, plan, pages, window, key, value)

    due = set()
    for r, (first, length, num_drafts, _) in enumerate(rows):
        for position in range(first, first + length):
            if block := int(window_table[r, position // W]):
                stored = window[block, :, position % W]
                assert torch.equal(stored, exact[r][position].transpose(0, 1).reshape(2, -1))
        for page in range(tables.shape[1]):
            last = (page + 1) * G - 1
            completed_now = first <= last < first + length - num_drafts
            if completed_now:
                due.add((r, page))
    written = set(plan.page_ids.tolist())
    for r, page in due:
        assert int(tables[r, page]) in written
        tokens = exact[r][page * G : (page + 1) * G]
        expected = torch.zeros(1, 2, FMT.head_bytes, dtype=torch.uint8)
        exact_page = tokens[None, :, 0], tokens[None, :, 1]
        reference.quantize_pages(FMT, expected, torch.tensor([0]), *exact_page, is_first=torch.tensor([page == 0]))
        assert torch.equal(pages[int(tables[r, page])], expected[0])
    for r, (first, _, _, hit) in enumerate(rows):
        for page in range(tables.shape[1]):
            block, last = int(tables[r, page]), (page + 1) * G - 1
            if block not in written:
                assert torch.equal(pages[block, 0], untouched)
            elif (r, page) not in due:  # completed by drafts that the step before could not know to be accepted
                assert first - max_drafts <= last < first and page * G >= hit


def test_the_draft_writes_no_page():
    table = torch.ones(1, 4, dtype=torch.int32)
    plan = plan_step(
        FMT,
        torch.tensor([0, 1]),
        torch.tensor([G]),
        torch.tensor([1]),
        table,
        table.repeat(1, 4),
        max_unverified=4,
        quantize=False,
    )
    assert plan.page_ids.numel() == 0 and plan.window_slots.tolist() == [W + (G - 1) % W]


@pytest.mark.parametrize("size", [64, 128])
def test_window_slots_and_write(size):
    fmt = PageFormat(2, 64, size, torch.bfloat16)
    w = fmt.window_block_size
    window = torch.randn(6, 2, w, 128).bfloat16()
    before = window.clone()
    table = torch.tensor([[3, 0, 5], [0, 2, 1]], dtype=torch.int32)
    rows = torch.tensor([0, 0, 0, 1, 1, 1])
    positions = torch.tensor([1, w, 2 * w + 3, 5, 2 * w - 1, 3 * w])  # the last one is beyond the table
    slots = step.window_slots(fmt, table, rows, positions)
    assert slots.tolist() == [3 * w + 1, -1, 5 * w + 3, -1, 2 * w + w - 1, -1]
    key, value = torch.randn(2, 6, 2, 64).bfloat16()
    slots[4] = w - 1  # a slot of the null block
    step.write_window(fmt, window, slots, key, value)
    for token, (block, offset) in {0: (3, 1), 2: (5, 3)}.items():
        assert torch.equal(window[block, :, offset, :64], key[token])
        assert torch.equal(window[block, :, offset, 64:], value[token])
        before[block, :, offset] = window[block, :, offset]
    assert torch.equal(window, before)


def test_exact_start():
    fmt = PageFormat(1, 64, 128, torch.bfloat16)
    w = fmt.window_block_size
    assert w == 64
    table = torch.arange(1, 11, dtype=torch.int32).repeat(6, 1)
    table[1, :4] = 0  # a hit of 256 tokens
    table[2, :4] = 0
    table[3, :] = 0
    table[4, :2] = 0  # older than what the window holds
    table[5, 5] = 0  # a hole: exact only after it
    first = torch.tensor([300, 300, 256, 384, 300, 400], dtype=torch.int32)
    start = step.exact_start(fmt, table, first)
    assert start.tolist() == [128, 256, 256, 384, 128, 384]
    assert [reference.exact_start(fmt, row, int(p)) for row, p in zip(table, first, strict=True)] == start.tolist()
    for width in (3, 6):  # the table ends before the window does
        short = table[:, :width]
        expected = [reference.exact_start(fmt, row, int(p)) for row, p in zip(short, first, strict=True)]
        assert step.exact_start(fmt, short, first).tolist() == expected
