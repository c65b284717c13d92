"""What sparse drafts cost and gain in attention: reading chosen pages, and leaving scores. Needs a CUDA GPU.

    python benchmarks/sparse_attention.py            # the tables, benchmarks/results/sparse_attention.json

Draft: one layer's decode attention over a share of its old pages (a random choice per KV head), against the dense kernel at
the same length, and against the dense kernel at a length with as many bytes: a list should cost nothing per byte.
Verification: the same with the attention mass of every page left behind, and with the kernel that makes scores of it.
Times are medians of CUDA graph replays; launches read different pages, 256 MiB or more in turn.
"""

import argparse
import json

import torch
from decode_attention import BETWEEN, DEVICE, RESULTS, copy_bandwidth, median, page_reads, random_cache

from vllm_quantspec.format import PageFormat, window_start

# query heads, KV heads, lengths; tokens that a draft reads, as shares of the old ones
SHAPES = [
    (32, 8, [131072]),
    (32, 8, [131072] * 4),
    (32, 8, [98304] * 8),
    (32, 8, [32768] * 8),
    (32, 8, [32768] * 16),
    (32, 32, [32768] * 4),
]
SHARES = [1 / 16, 1 / 8]
QUERY_LEN = 5


def prepare(fmt, query_heads, lengths, query_len, bits, share=None, scores=False, reduce=False):
    """A function that launches once per set of pages, and the number of sets."""
    from vllm_quantspec.kernels.decode_attention import PageSelection, ScoresOut, decode_attention, raw_rows
    from vllm_quantspec.kernels.reduce_scores import reduce_scores

    group, heads, requests = fmt.group_size, fmt.num_kv_heads, len(lengths)
    ours, _ = page_reads(fmt, lengths, query_len, bits)
    sets = min(32, -(-BETWEEN // int(ours * (share or 1))) + 1)
    pages, window, tables = random_cache(fmt, lengths, sets)
    query = torch.randn(requests * query_len, query_heads, fmt.head_size, dtype=fmt.dtype, device=DEVICE)
    out = torch.empty_like(query)
    starts = torch.arange(requests + 1, dtype=torch.int32, device=DEVICE) * query_len
    seq_lens = torch.tensor(lengths, dtype=torch.int32, device=DEVICE)
    old = [window_start(n - query_len, group) // group for n in lengths]
    begin = torch.tensor([sum(old[:r]) for r in range(requests)], dtype=torch.int32, device=DEVICE)
    dense = torch.tensor(old, dtype=torch.int32, device=DEVICE)
    selections, options = [None] * sets, {}
    if share:
        count = [max(1, round(share * n)) for n in old]
        counts = torch.tensor(count, dtype=torch.int32, device=DEVICE)
        selections = []
        for table, _ in tables:
            lists = torch.zeros(heads, sum(old), dtype=torch.int32, device=DEVICE)
            for r, (n, k) in enumerate(zip(old, count, strict=True)):
                for row in lists:
                    row[sum(old[:r]) : sum(old[:r]) + k] = table[r, torch.randperm(n, device=DEVICE)[:k].sort().values]
            selections.append(PageSelection(lists, begin, counts, dense))
    if scores:
        rows = raw_rows(fmt.head_size, fmt.group_size, query_len * query_heads // heads)
        raw = torch.zeros(sum(old), heads, 2, rows, 2, device=DEVICE)
        flags = torch.zeros(sum(old), heads, rows // 8, dtype=torch.uint8, device=DEVICE)
        lse = torch.zeros(len(query), query_heads, device=DEVICE)
        left = ScoresOut(raw, flags, lse, begin, dense)
        result = torch.zeros(heads, sum(old), query_len, dtype=torch.bfloat16, device=DEVICE)
        options["scores"] = left

    def run():
        for (table, window_table), selection in zip(tables, selections, strict=True):
            decode_attention(
                fmt, pages, window, query, starts, seq_lens, table, window_table, fmt.head_size**-0.5, bits,
                max_query_len=query_len, out=out, selection=selection, overlap=False, pages_may_change=bits == 8, **options,
            )  # fmt: skip
            if reduce:
                reduce_scores(raw, flags, lse, starts, left.begin, left.num_scored, result, max_pages=max(old))

    return run, sets


def main():
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--rows", type=int, nargs="*", help="only these shapes")
    args = parser.parse_args()
    torch.manual_seed(0)
    bandwidth = copy_bandwidth()
    results = {"gpu": torch.cuda.get_device_name(), "copy_bandwidth_tb_s": round(bandwidth / 1e12, 3), "rows": []}
    path = RESULTS.with_name("sparse_attention.json")

    def time_of(*arguments, **options):
        time = median(*prepare(*arguments, **options))
        torch.cuda.empty_cache()
        return time

    for query_heads, heads, lengths in [SHAPES[i] for i in args.rows] if args.rows else SHAPES:
        fmt = PageFormat(heads, 128)
        row = {"shape": f"{query_heads}/{heads} heads, {len(lengths)} x {lengths[0] // 1024}k"}
        verify = (fmt, query_heads, lengths, QUERY_LEN, 8)
        row["verify_us"] = time_of(*verify)
        row["verify_scores_us"] = time_of(*verify, scores=True)
        row["verify_scores_reduced_us"] = time_of(*verify, scores=True, reduce=True)
        draft = (fmt, query_heads, lengths, 1, 4)
        row["draft_us"] = time_of(*draft)
        for share in SHARES:
            read = [int(share * n) // 128 * 128 + n - window_start(n - 1, 128) for n in lengths]
            same_bytes, _ = page_reads(fmt, read, 1, 4)
            name = f"1/{round(1 / share)}"
            row[f"draft_{name}_us"] = time_of(*draft, share=share)
            row[f"draft_{name}_as_dense_us"] = time_of(fmt, query_heads, read, 1, 4)
            row[f"draft_{name}_floor_us"] = same_bytes / bandwidth * 1e6
        row = {k: round(v, 2) if isinstance(v, float) else v for k, v in row.items()}
        results["rows"].append(row)
        print(row, flush=True)
        path.write_text(json.dumps(results, indent=1) + "\n")


if __name__ == "__main__":
    main()
