"""One layer's prefill attention over contexts of unlike length: pieces cut by their tokens, and by the longest context.

    python benchmarks/prefill_pieces.py --json results/prefill_pieces.json

A step's chunks attend to contexts that are dequantized in pieces of at most 256 MiB. "tokens" is the plan of the product;
"longest" cuts every context at the same positions, so that one long context beside many short ones makes many small pieces.
Each piece is a gather, an attention and a merge. 32 query and 8 KV heads x 128 channels, bfloat16, pages of 128 tokens; the
median of runs without a CUDA graph, as prefill runs, and the time that the host needs to launch one.
"""

import argparse
import statistics
import time
from pathlib import Path
from types import SimpleNamespace

import numpy as np
import torch
from common import write_json

from vllm_quantspec.format import PageFormat, window_start
from vllm_quantspec.integration.gpu import prefill

DEVICE = "cuda"
FMT = PageFormat(num_kv_heads=8, head_size=128)
H, D, G, W = FMT.num_kv_heads, FMT.head_size, FMT.group_size, FMT.window_block_size
HEADS = 32
# Name: requests of (tokens before the chunk, tokens of the chunk).
STEPS = {
    "128k and 63 x 2k, chunks of 128": [(131072, 128)] + [(2000, 128)] * 63,
    "63 x 2k and 128k, chunks of 128": [(2000, 128)] * 63 + [(131072, 128)],
    "128k with a chunk of 6144 and 31 x 2k with 64": [(131072, 6144)] + [(2000, 64)] * 31,
    "8 x 16k, chunks of 1024": [(16384, 1024)] * 8,
    "128k, chunk of 8192": [(131072, 8192)],
}


def split_by_the_longest(first, max_tokens):
    """The split that `split_context` replaced: every context is cut at the same positions."""
    with_context = int((first > 0).sum())
    step = max(1, max_tokens // with_context)
    pieces = []
    for start in range(0, int(first.max()), step):
        lengths = np.clip(first - start, 0, step)
        pieces.append((np.minimum(start, first).astype(np.int32), lengths.astype(np.int32)))
    return pieces


SPLITS = {"tokens": prefill.split_context, "longest": split_by_the_longest}


def plan_of(requests, split):
    """The plan of a step of these requests, on the GPU."""
    starts = torch.tensor([0, *np.cumsum([b for _, b in requests])], dtype=torch.int32)
    common = SimpleNamespace(
        query_start_loc=starts.to(DEVICE),
        query_start_loc_cpu=starts,
        seq_lens_cpu_upper_bound=torch.tensor([a + b for a, b in requests], dtype=torch.int32),
    )
    kept, prefill.split_context = prefill.split_context, SPLITS[split]
    try:
        plan = prefill.plan_prefill(SimpleNamespace(num_kv_heads=H, head_size=D), common, 0)
    finally:
        prefill.split_context = kept
    if split == "longest":  # it launched for all requests
        for piece in plan.pieces:
            piece.requests = slice(0, len(requests))
    return plan


class Step:
    """Pages, windows and a chunk's queries, keys and values for requests of (context, chunk)."""

    def __init__(self, requests):
        width = max(a + b for a, b in requests) // G + 1
        pages = [-(-a // G) for a, _ in requests]
        entries = [range(window_start(a, G) // W, -(-a // W)) for a, _ in requests]
        self.pages = torch.randint(0, 256, (sum(pages) + 1, H, FMT.head_bytes), dtype=torch.uint8, device=DEVICE)
        for name, low, high in (("k_scale", 0.01, 0.1), ("k_min", -1, 0), ("v_scale", 0.01, 0.1), ("v_min", -1, 0)):
            field = FMT.field(self.pages, name)
            field.copy_(torch.empty(field.shape, device=DEVICE).uniform_(low, high))
        blocks = sum(map(len, entries))
        self.window = torch.randn(blocks + 1, H, W, 2 * D, dtype=FMT.dtype, device=DEVICE)
        page_ids, block_ids = (torch.randperm(n, device=DEVICE).int() + 1 for n in (sum(pages), blocks))
        self.block_table = torch.zeros(len(requests), width, dtype=torch.int32, device=DEVICE)
        self.window_table = torch.zeros(len(requests), width * G // W, dtype=torch.int32, device=DEVICE)
        for r, (n, entry) in enumerate(zip(pages, entries, strict=True)):
            self.block_table[r, :n], page_ids = page_ids[:n], page_ids[n:]
            self.window_table[r, entry.start : entry.stop], block_ids = block_ids[: len(entry)], block_ids[len(entry) :]
        tokens = sum(b for _, b in requests)
        self.query = torch.randn(tokens, HEADS, D, dtype=FMT.dtype, device=DEVICE)
        self.key, self.value = torch.randn(2, tokens, H, D, dtype=FMT.dtype, device=DEVICE)

    def run(self, plan, fa_version):
        output = torch.empty_like(self.query)
        prefill.prefill_attention(
            FMT, plan, self.pages, self.window, self.query, self.key, self.value, self.block_table, self.window_table,
            D**-0.5, fa_version, output,
        )  # fmt: skip
        return output


def measure_ms(run, runs):
    """Medians of the GPU's and of the host's time of one run."""
    gpu, host = [], []
    for i in range(runs + 2):
        begin, end = (torch.cuda.Event(enable_timing=True) for _ in range(2))
        torch.cuda.synchronize()
        started = time.perf_counter()
        begin.record()
        run()
        end.record()
        launched = time.perf_counter() - started
        end.synchronize()
        if i >= 2:
            gpu.append(begin.elapsed_time(end))
            host.append(launched * 1e3)
    return statistics.median(gpu), statistics.median(host)


def measure(runs):
    from vllm.v1.attention.backends.fa_utils import get_flash_attn_version

    fa_version = get_flash_attn_version(head_size=D)
    rows = []
    for name, requests in STEPS.items():
        step, outputs = Step(requests), {}
        for split in SPLITS:
            plan = plan_of(requests, split)
            outputs[split] = step.run(plan, fa_version)
            gpu, host = measure_ms(lambda step=step, plan=plan: step.run(plan, fa_version), runs)
            row = {"step": name, "split": split, "pieces": len(plan.pieces), "ms": round(gpu, 3), "host_ms": round(host, 3)}
            rows.append(row)
            print(*(f"{k}={v}" for k, v in row.items()), flush=True)
        difference = (outputs["tokens"].float() - outputs["longest"].float()).abs().max().item()
        assert difference < 0.02 * outputs["longest"].float().abs().max().item(), f"{name}: they differ by {difference}"
        rows[-2]["largest_difference"] = difference
        del step, outputs
        torch.cuda.empty_cache()
    return fa_version, rows


def main():
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--json", type=Path, help="write the rows there")
    parser.add_argument("--runs", type=int, default=20, help="runs of each (%(default)s)")
    args = parser.parse_args()
    if not torch.cuda.is_available():
        parser.error("measuring needs a CUDA GPU.")
    torch.manual_seed(0)
    fa_version, rows = measure(args.runs)
    if args.json:
        write_json(args.json, rows, flash_attention=fa_version)


if __name__ == "__main__":
    main()
