"""What choosing pages costs a sparse draft: scores of every layer, one plan, one selection for all layers.

    python benchmarks/page_selection.py           # the table, benchmarks/results/page_selection.json
    python benchmarks/page_selection.py --tune    # launch configurations

8B shape: 32 layers, 8 KV heads, 4 query heads of each, 5 query tokens; pages of 128 tokens, of which 1/16 are chosen. Times
are medians of CUDA graph replays. The reduction reads the same memory for every layer, as in an engine, where attention has
just written it: it comes from L2. `us_per_cycle` is a reduction for each layer, a plan and a selection.
"""

import argparse
from functools import partial
from pathlib import Path

import torch
from cache_kernels import DEVICE, ints, median_us
from common import write_json

from vllm_quantspec.kernels import page_selection
from vllm_quantspec.kernels import reduce_scores as reduction
from vllm_quantspec.kernels.page_selection import plan_selection, select_pages
from vllm_quantspec.kernels.reduce_scores import reduce_scores
from vllm_quantspec.kernels.snapkv import plan_snapkv, select_snapkv

LAYERS, HEADS, GROUP, QUERIES, PAGE = 32, 8, 4, 5, 128
SHAPES = ((128, 1), (96, 8), (32, 16))  # thousands of tokens, requests
MAX_PAGES = 1024  # what an engine for 128k tokens captures its graphs for
MAX_REQUESTS = 256
LIMITS = {"pages": 16, "fraction": 1 / 16, "min_pages": 32, "min_total_pages": 0}
RESULT = Path(__file__).parent / "results/page_selection.json"


class Case:
    """A batch after a verification step; masses fall off like those of a softmax over random logits."""

    def __init__(self, context_k, batch):
        pages = context_k * 1024 // PAGE
        self.context_k, self.batch, self.pages = context_k, batch, pages
        slots = batch * pages
        self.query_start_loc = ints([QUERIES * r for r in range(batch + 1)])
        self.begin, self.num_scored = ints([pages * r for r in range(batch)]), ints([pages] * batch)
        self.num_rows, self.idx_mapping = ints([3] * batch), ints(range(batch))
        rows = -(-QUERIES * GROUP // 8) * 8
        mass = (torch.randn(batch, pages, HEADS, rows, device=DEVICE) * 3).exp2()
        # A reader has some eight pages, and few are cut.
        had = mass.unflatten(1, (-1, 8)).cumsum(2).flatten(1, 2)
        self.raw = torch.stack((had, torch.zeros_like(had)), dim=-1)[:, :, :, None].repeat(1, 1, 1, 2, 1, 1).flatten(0, 1)
        fresh = (torch.arange(slots, device=DEVICE) % 8 == 0).byte()
        self.flags = (fresh + 2)[:, None, None].repeat(1, HEADS, rows // 8)
        whole = mass[..., : QUERIES * GROUP].sum(1).log2().unflatten(2, (QUERIES, GROUP))
        self.lse = whole.transpose(1, 2).reshape(batch * QUERIES, HEADS * GROUP).contiguous()
        self.scores = torch.zeros(LAYERS, HEADS, slots, QUERIES, dtype=torch.bfloat16, device=DEVICE)
        self.reduce()
        self.scores[1:] = self.scores[:1, :, torch.randperm(slots, device=DEVICE)]
        self.page_list = torch.zeros(LAYERS, HEADS, slots, dtype=torch.int32, device=DEVICE)
        self.block_table = torch.randperm(slots, device=DEVICE).int().view(batch, pages)
        self.count, self.dense_from, self.fresh = ints([[0] * MAX_REQUESTS] * 3)
        self.snap_pages, self.snap_count = ints([[0] * MAX_REQUESTS] * 2)
        self.snap = torch.zeros(LAYERS, HEADS, MAX_REQUESTS, MAX_PAGES // 32, dtype=torch.int32, device=DEVICE)

    def reduce(self, layer=0):
        raw, flags, lse = self.raw, self.flags, self.lse
        requests = self.query_start_loc, self.begin, self.num_scored
        reduce_scores(raw, flags, lse, *requests, self.scores[layer], max_pages=MAX_PAGES)

    def plan(self):
        plan_selection(self.num_scored.clone(), self.count, self.dense_from, **LIMITS)

    def select(self, scores):
        metadata = self.begin, self.num_rows, self.count, self.dense_from, self.block_table
        select_pages(scores, *metadata, self.page_list, max_pages=MAX_PAGES)

    def select_once(self, fresh):
        metadata = self.begin, self.num_rows, self.count, self.dense_from, fresh, self.idx_mapping
        select_snapkv(self.scores, *metadata, self.snap, self.block_table, self.page_list, max_pages=MAX_PAGES)

    def row(self):
        used_up = torch.zeros_like(self.num_scored)  # as fast: what is read is not looked at
        other = [torch.zeros_like(self.count) for _ in range(3)]
        state = self.idx_mapping, self.snap_pages, self.snap_count
        self.plan()
        row = {
            "name": f"{self.batch} x {self.context_k}k" if self.batch > 1 else f"{self.context_k}k",
            "context": self.context_k * 1024,
            "batch": self.batch,
            "pages_chosen": int(self.count[0]),
            "us_reduce": median_us([self.reduce]),
            "raw_mb": self.raw.numel() * 4 / 1e6,
            "us_plan": median_us([partial(plan_selection, used_up, *other[:2], **LIMITS)]),
            "us_select": median_us([partial(self.select, self.scores)]),
            "us_select_equal": median_us([partial(self.select, torch.ones_like(self.scores))]),
            "us_select_newest": median_us([partial(self.select, None)]),
            "us_snapkv_plan": median_us([partial(plan_snapkv, used_up, *state, *other, **LIMITS)]),
            "us_snapkv_choose": median_us([partial(self.select_once, torch.ones_like(self.fresh))]),
            "us_snapkv_keep": median_us([partial(self.select_once, torch.zeros_like(self.fresh))]),
        }
        row["us_per_cycle"] = LAYERS * row["us_reduce"] + row["us_plan"] + row["us_select"]
        self.count.zero_()
        row["us_select_nothing"] = median_us([partial(self.select, self.scores)])  # every request reads all pages
        return {k: round(v, 2) if isinstance(v, float) else v for k, v in row.items()}


def tune():
    for shape in SHAPES:
        case = Case(*shape)
        case.plan()
        for elements in (1024, 2048, 4096):
            for warps in (2, 4, 8):
                reduction.REDUCE_ELEMENTS, reduction.REDUCE_WARPS = elements, warps
                print(f"{shape}: reduce {elements} elements, {warps} warps: {median_us([case.reduce]):.2f} us", flush=True)
        for pages in (128, 256, 512):
            page_selection.SELECT_PAGES_PER_WARP = pages
            us = median_us([partial(case.select, case.scores)])
            print(f"{shape}: select {pages} pages per warp: {us:.2f} us", flush=True)


def main():
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--json", type=Path, default=RESULT, help="write the rows there")
    parser.add_argument("--tune", action="store_true", help="time launch configurations")
    args = parser.parse_args()
    if not torch.cuda.is_available():
        parser.error("measuring needs a CUDA GPU.")
    torch.manual_seed(0)
    if args.tune:
        return tune()
    rows = []
    for shape in SHAPES:
        rows.append(Case(*shape).row())
        print(*(f"{k}={v}" for k, v in rows[-1].items()), flush=True)
    shape = {"layers": LAYERS, "kv_heads": HEADS, "group": GROUP, "query_tokens": QUERIES, "max_pages": MAX_PAGES}
    write_json(args.json, rows, **shape, **LIMITS)


if __name__ == "__main__":
    main()
