"""Decode attention against FlashAttention 3 on the same shapes in BF16. Needs a Hopper GPU, and vLLM for its FA3.

    python benchmarks/decode_attention.py                    # the table, benchmarks/results/decode_attention.{json,png}
    python benchmarks/decode_attention.py --tune             # every launch configuration
    python benchmarks/decode_attention.py --groups --rows 16 17    # those of warp groups (Hopper), and FlashAttention 3
    python benchmarks/decode_attention.py --profile 0        # one row's launches, to run under ncu
    python benchmarks/decode_attention.py --plot             # the plot again, from the JSON
    python benchmarks/decode_attention.py --rows 8 10 --append decode_attention-wide.json    # some rows, to a list of runs

Times are medians of CUDA graph replays. Launches read different pages, 256 MiB or more in turn: nothing comes from L2.
"""

import argparse
import contextlib
import json
from pathlib import Path

import torch

from vllm_quantspec.format import PageFormat, window_start

RESULTS = Path(__file__).parent / "results" / "decode_attention"
DEVICE = "cuda"
BETWEEN = 256 << 20  # bytes read between two reads of one page

# bits read of each code, query tokens, query heads, KV heads, lengths, must reach, aim
UNEVEN = [131072, 65536, 32768, 16384, 8192, 8192, 4096, 4096, 2048, 2048, 1024, 1024, 512, 512, 256, 100]
READER = {4: "draft", 8: "target"}
ROWS = [
    (4, 1, 32, 8, [131072], 2.5, 3.3),
    (4, 1, 32, 32, [131072], 2.8, 3.3),
    (4, 1, 32, 8, [32768], 2.2, 3.0),
    (4, 1, 32, 8, [32768] * 8, 2.6, 3.3),
    (4, 1, 32, 8, [8192], None, None),
    (4, 1, 32, 8, [8192] * 8, None, None),
    (4, 1, 32, 8, UNEVEN, None, None),
    (4, 1, 32, 8, [2048] * 64, None, None),
    (8, 5, 32, 8, [131072], 1.4, 1.8),
    (8, 5, 32, 8, [32768], None, None),
    (8, 5, 32, 8, [32768] * 8, None, None),
    (8, 5, 32, 32, [131072], None, None),
    (8, 1, 32, 8, [131072], None, None),
    (8, 1, 32, 8, [32768] * 8, None, None),
    # The target on pages of 4 bits: verification, as decoding is the draft's reading.
    (4, 5, 32, 8, [131072], None, None),
    (4, 5, 32, 8, [32768] * 8, None, None),
    # More query rows per KV head than one warp has registers for: 35 to 80.
    (8, 5, 64, 8, [131072], 1.45, 1.8),
    (8, 5, 64, 8, [32768] * 8, 1.4, 1.8),
    (8, 5, 32, 4, [131072], None, None),
    (8, 5, 32, 4, [32768] * 8, 1.35, 1.7),
    (8, 5, 28, 4, [131072], None, None),
    (8, 5, 28, 4, [32768] * 8, 1.35, 1.7),
    (8, 9, 32, 8, [131072], None, None),
    (8, 9, 32, 8, [32768] * 8, 1.4, 1.8),
    (8, 9, 64, 8, [32768] * 8, None, None),
    (8, 5, 64, 4, [32768] * 8, None, None),
    (4, 5, 64, 8, [32768] * 8, None, None),
]


def random_pool(fmt, pages, windows):
    """Pages of random codes with scales like those of normal data, and window blocks; block 0 of both is spare."""
    pages = torch.randint(0, 256, (pages + 1, fmt.num_kv_heads, fmt.head_bytes), dtype=torch.uint8, device=DEVICE)
    for name, low, high in (("k_scale", 0.2, 0.5), ("k_min", -3, -2), ("v_scale", 0.2, 0.5), ("v_min", -3, -2)):
        field = fmt.field(pages, name)
        field.copy_(torch.empty(field.shape, device=DEVICE).uniform_(low, high))
    shape = (windows + 1, fmt.num_kv_heads, fmt.window_block_size, 2 * fmt.head_size)
    return pages, torch.randn(shape, dtype=fmt.dtype, device=DEVICE)


def random_cache(fmt, lengths, sets):
    """A pool, and `sets` pairs of block tables that share no page."""
    group, size = fmt.group_size, fmt.window_block_size
    counts = [-(-n // group) for n in lengths]
    total = sum(counts) * sets
    pages, window = random_pool(fmt, total, 4 * group // size * len(lengths) * sets)
    order, recent = (torch.randperm(n, device=DEVICE).int() + 1 for n in (total, len(window) - 1))
    tables = []
    for _ in range(sets):
        table = torch.zeros(len(lengths), max(counts), dtype=torch.int32, device=DEVICE)
        window_table = torch.zeros(len(lengths), max(lengths) // size + 4, dtype=torch.int32, device=DEVICE)
        for r, (n, count) in enumerate(zip(lengths, counts, strict=True)):
            table[r, :count], order = order[:count], order[count:]
            last = -(-n // size)
            first = max(0, last - 3 * group // size)
            window_table[r, first:last], recent = recent[: last - first], recent[last - first :]
        tables.append((table, window_table))
    return pages, window, tables


def page_reads(fmt, lengths, query_len, bits):
    """Bytes that must be read: pages below each boundary, window, query; and what BF16 attention reads."""
    token = fmt.num_kv_heads * 2 * fmt.head_size * 2
    ours = 0
    for n in lengths:
        start = window_start(n - query_len, fmt.group_size)
        ours += start * fmt.bytes_per_token(bits) + (n - start) * token
    return ours, sum(lengths) * token


def median(run, sets):
    from triton.testing import do_bench_cudagraph

    return do_bench_cudagraph(run, rep=60, return_mode="median") / sets * 1e3


def prepare(fmt, row):
    """A function (plan, warps, stages) that launches once per set of pages, and the number of sets."""
    from vllm_quantspec.kernels.decode_attention import decode_attention

    bits, query_len, query_heads, _, lengths, *_ = row
    ours, _ = page_reads(fmt, lengths, query_len, bits)
    sets = min(32, -(-BETWEEN // int(ours)) + 1)
    pages, window, tables = random_cache(fmt, lengths, sets)
    query = torch.randn(len(lengths) * query_len, query_heads, fmt.head_size, dtype=fmt.dtype, device=DEVICE)
    out = torch.empty_like(query)
    starts = torch.arange(len(lengths) + 1, dtype=torch.int32, device=DEVICE) * query_len
    seq_lens = torch.tensor(lengths, dtype=torch.int32, device=DEVICE)

    def run(configuration=(None,)):
        plan, *configuration = configuration
        for table, window_table in tables:
            decode_attention(
                fmt, pages, window, query, starts, seq_lens, table, window_table, fmt.head_size**-0.5, bits,
                max_query_len=query_len, out=out, plan=plan, warps_and_stages=tuple(configuration) or None, overlap=False,
            )  # fmt: skip
        return out  # of the last set

    return run, sets


def time_groups(row, configurations):
    """Every configuration of warp groups against one warp's result and FlashAttention 3's time."""
    from vllm_quantspec.kernels.decode_attention import row_plans

    fmt = PageFormat(row[3], 128)
    plans = row_plans(128, 128, row[1] * row[2] // row[3], True)
    plan, alone = plans[0], plans[-1]
    if not plan.wgmma:  # too few query rows for groups
        return
    baseline = None
    with contextlib.suppress(ImportError):  # times of plans without vLLM
        baseline = flash_attention_time(fmt, row, 16)
    run, sets = prepare(fmt, row)
    expected, line = run((alone,)).float(), []
    for warps, stages in configurations:
        configuration = plan, warps, stages
        try:
            error = ((run(configuration).float() - expected).norm(dim=-1) / expected.norm(dim=-1)).max().item()
        except RuntimeError:  # does not fit
            continue
        us = median(lambda configuration=configuration: run(configuration), sets)
        ratio = f" {baseline / us:.2f}x" if baseline else ""
        line.append(f"{warps}x{stages}: {us:.1f}{ratio} (error {error:.1e})")
    print(name_of(row), f"FA3 {baseline:.1f}" if baseline else "", "  ".join(line), flush=True)


def flash_attention_time(fmt, row, block_size):
    from vllm.vllm_flash_attn import flash_attn_varlen_func

    _, query_len, query_heads, heads, lengths, *_ = row
    _, read_bytes = page_reads(fmt, lengths, query_len, 4)
    sets = min(32, -(-BETWEEN // read_bytes) + 1)
    counts = [-(-n // block_size) for n in lengths]
    shape = (sum(counts) * sets, block_size, heads, fmt.head_size)
    keys, values = (torch.randn(shape, dtype=fmt.dtype, device=DEVICE) for _ in range(2))
    order, tables = torch.randperm(shape[0], device=DEVICE).int(), []
    if block_size < 128:  # blocks of vLLM's pool are mostly neighbours: 128 tokens in a row
        eights = torch.randperm(shape[0] // 8, device=DEVICE)[:, None] * 8 + torch.arange(8, device=DEVICE)
        order = torch.cat((eights.flatten(), torch.arange(eights.numel(), shape[0], device=DEVICE))).int()
    for _ in range(sets):
        table = torch.zeros(len(lengths), max(counts), dtype=torch.int32, device=DEVICE)
        for r, count in enumerate(counts):
            table[r, :count], order = order[:count], order[count:]
        tables.append(table)
    query = torch.randn(len(lengths) * query_len, query_heads, fmt.head_size, dtype=fmt.dtype, device=DEVICE)
    starts = torch.arange(len(lengths) + 1, dtype=torch.int32, device=DEVICE) * query_len
    seq_lens = torch.tensor(lengths, dtype=torch.int32, device=DEVICE)
    out = torch.empty_like(query)

    def run():
        for table in tables:
            flash_attn_varlen_func(
                q=query, k=keys, v=values, out=out, causal=True, softmax_scale=fmt.head_size**-0.5, fa_version=3,
                cu_seqlens_q=starts, max_seqlen_q=query_len, seqused_k=seq_lens, max_seqlen_k=max(lengths),
                block_table=table,
            )  # fmt: skip

    return median(run, sets)


def copy_bandwidth():
    """Bytes per second that a large copy reads and writes."""
    x = torch.randint(-99, 99, (1 << 30,), dtype=torch.int32, device=DEVICE)
    y = torch.empty_like(x)
    return 8 * x.numel() / (median(lambda: torch.neg(x, out=y), 1) * 1e-6)


def name_of(row):
    bits, query_len, query_heads, heads, lengths, *_ = row
    size = f"{lengths[0] // 1024}k" if len(set(lengths)) == 1 else "uneven"
    reader = READER[bits] if bits == 8 or query_len == 1 else "target, 4 bits"
    return f"{reader} q{query_len} {query_heads}/{heads} {size} batch {len(lengths)}"


def plot(results):
    import matplotlib

    matplotlib.use("Agg")
    import matplotlib.pyplot as plt

    rows = results["rows"][::-1]
    figure, axis = plt.subplots(figsize=(8, 0.38 * len(rows) + 1.4))
    axis.barh([r["name"] for r in rows], [r["speedup"] for r in rows], color="#2a6fb0", label="measured")
    at = range(len(rows))
    floors = [r["fa3_us"] / r["floor_us"] for r in rows]
    axis.scatter(floors, at, marker="|", s=160, color="#444", label="reading the bytes alone")
    marks = [(r["must"], i) for i, r in enumerate(rows) if r["must"]]
    axis.scatter(*zip(*marks, strict=True), marker="|", s=160, color="#d1495b", label="must reach")
    axis.axvline(1, color="#999", linewidth=0.8)
    axis.set_xlabel("times faster than FlashAttention 3 in BF16")
    axis.set_title(f"Decode attention, {results['gpu']}")
    axis.legend(loc="lower right")
    figure.tight_layout()
    figure.savefig(RESULTS.with_suffix(".png"), dpi=140)


def main():
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--tune", action="store_true", help="time every launch configuration")
    parser.add_argument("--groups", nargs="*", metavar="WARPS,STAGES", help="time warp groups with these")
    parser.add_argument("--profile", type=int, help="only launch this row twice")
    parser.add_argument("--plot", action="store_true", help="only draw the plot from the JSON")
    parser.add_argument("--rows", type=int, nargs="*", help="only these rows")
    parser.add_argument("--append", metavar="NAME", help="add this run to the list in benchmarks/results/NAME")
    args = parser.parse_args()
    if args.plot:
        return plot(json.loads(RESULTS.with_suffix(".json").read_text()))
    from vllm_quantspec.kernels.decode_attention import row_plans
    from vllm_quantspec.kernels.device import device_properties

    torch.manual_seed(0)
    rows = [ROWS[i] for i in args.rows] if args.rows else ROWS
    if args.profile is not None:
        row = ROWS[args.profile]
        prepare(PageFormat(row[3], 128), row)[0]()
        return torch.cuda.synchronize()
    if args.groups is not None:
        groups = args.groups or ["8,8", "4,12"]
        for row in rows:
            time_groups(row, [tuple(map(int, x.split(","))) for x in groups])
            torch.cuda.empty_cache()
        return
    if args.tune:
        has_wgmma = device_properties(torch.cuda.current_device()).has_wgmma
        for row in rows:
            options = [(7, 3), (8, 2), (8, 3), (8, 4), (10, 3), (12, 2), (12, 3), (14, 3), (16, 2)]
            *teams, alone = row_plans(128, 128, row[1] * row[2] // row[3], has_wgmma)
            options = [(alone, *option) for option in options]
            options += [(plan, *option) for plan in teams for option in ((8, 8), (8, 12), (8, 16), (4, 8), (4, 12), (12, 8))]
            (run, sets), times = prepare(PageFormat(row[3], 128), row), {}
            for option in options:
                try:
                    run(option)
                except RuntimeError:  # does not fit, or there is no such kernel
                    continue
                times[option] = median(lambda run=run, option=option: run(option), sets)
            best = sorted(times, key=times.get)
            names = [f"{p.passes}x{p.tiles}/{p.team}{'w' * p.wgmma}/{w}x{s}:{times[p, w, s]:.1f}" for p, w, s in best]
            print(name_of(row), " ".join(names), flush=True)
        return
    bandwidth = copy_bandwidth()
    results = {"gpu": torch.cuda.get_device_name(), "copy_bandwidth_tb_s": round(bandwidth / 1e12, 3), "rows": []}
    print(f"copy: {bandwidth / 1e12:.2f} TB/s")
    print(f"{'':34}{'FA3 us':>9}{'(128)':>8}{'ours us':>9}{'ratio':>7}{'must':>6}{'aim':>6}{'floor us':>9}{'TB/s':>6}")
    for row in rows:
        fmt = PageFormat(row[3], 128)
        read_bytes, _ = page_reads(fmt, row[4], row[1], row[0])
        baseline, blocks_128 = flash_attention_time(fmt, row, 16), flash_attention_time(fmt, row, 128)
        torch.cuda.empty_cache()
        ours = median(*prepare(fmt, row))
        torch.cuda.empty_cache()
        floor = read_bytes / bandwidth * 1e6
        result = {
            "name": name_of(row), "fa3_us": baseline, "fa3_block_128_us": blocks_128, "ours_us": ours,
            "speedup": baseline / ours, "must": row[5], "aim": row[6], "floor_us": floor,
            "tb_per_s": read_bytes / ours / 1e6,
        }  # fmt: skip
        result = {k: round(v, 3) if isinstance(v, float) else v for k, v in result.items()}
        results["rows"].append(result)
        print(
            f"{result['name']:34}{baseline:9.1f}{blocks_128:8.1f}{ours:9.1f}{baseline / ours:7.2f}{row[5] or '':>6}"
            f"{row[6] or '':>6}{floor:9.1f}{result['tb_per_s']:6.2f}",
            flush=True,
        )
    RESULTS.parent.mkdir(exist_ok=True)
    if args.append:
        path = RESULTS.with_name(args.append)
        runs = json.loads(path.read_text()) if path.exists() else []
        path.write_text(json.dumps([*runs, results], indent=1) + "\n")
    elif not args.rows:
        RESULTS.with_suffix(".json").write_text(json.dumps(results, indent=1) + "\n")
        plot(results)


if __name__ == "__main__":
    main()
