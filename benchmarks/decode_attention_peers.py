"""Decode attention from 4k to 256k tokens: the hierarchical cache against what else reads a quantized or BF16 cache.

    python benchmarks/decode_attention_peers.py                      # everything, results/decode_attention_peers.{json,png}
    python benchmarks/decode_attention_peers.py --peers xformers-int4 draft --points '32/8 *' --json part.json
    python benchmarks/decode_attention_peers.py --plot               # the plot again, from the JSON

Needs a Hopper GPU and vLLM for its FlashAttention 3 and its Triton kernels; xformers (0.0.35; its Python files are enough)
for the two peers of that name. A peer that fails says so and the others go on.

    fa3, fa3-fp8           FlashAttention 3, BF16 (the baseline) and FP8 with an FP8 query
    xformers, -int4        xformers' ``triton_splitk``: BF16, and int4 with an fp16 scale and minimum per token and head
    triton-fp8, -int4      vLLM's Triton backend: FP8 with an FP8 query, and ``int4_per_token_head``
    draft, target          the hierarchical cache: its upper 4 bits, and all 8

One query token is a draft step (or decoding without speculation), five are the verification of four drafts. Requests of a
point are equally long. First every kernel's output on three requests of 1000 tokens is compared with attention in plain
PyTorch over the same bytes; one that is off by more than its limit is not timed.

Times are medians of CUDA graph replays. All methods read from one pool of pages in random order; launches in a row read
other pages, up to 1 GiB in turn, so that nothing comes from L2. Ratios are to ``fa3`` at the same point in the same run.
Bytes are those of codes, scales and minima that must be read (BF16 for the newest tokens of ``draft`` and ``target``).
"""

import argparse
import json
import time
from concurrent.futures import ThreadPoolExecutor
from fnmatch import fnmatch
from pathlib import Path

import torch
from attention_methods import DIM, FORMATS, METHODS, PAGE, Batch, Point, check
from common import write_json
from decode_attention import copy_bandwidth, page_reads

from vllm_quantspec.format import PageFormat

RESULTS = Path(__file__).parent / "results" / "decode_attention_peers.json"
HEADS = [(32, 8), (32, 32)]  # query heads, KV heads
LENGTHS = [n << 10 for n in (4, 8, 16, 32, 64, 128, 256)]
BATCHES = [1, 4, 16, 64]
MAX_TOKENS = {8: 2 << 20, 32: 512 << 10}  # of all requests of a point, by KV heads
BETWEEN = 1 << 30  # bytes read between two reads of one page
COLORS = ["#444444", "#999999", "#8f5fbf", "#c9a0dc", "#e0a030", "#b5651d", "#2a6fb0", "#3a9e6f"]


def all_points(patterns):
    points = [Point(*heads, n, r) for heads in HEADS for r in BATCHES for n in LENGTHS]
    return [p for p in points if any(fnmatch(p.name, pattern) for pattern in patterns)]


def pool_tokens(heads, methods, free_bytes):
    """Tokens of the pool that all points of these KV heads share; a larger point is skipped."""
    formats = {METHODS[m].format for m in methods}
    token = heads * sum(FORMATS[f].bytes_per_token for f in formats)
    return min(MAX_TOKENS[heads], int(0.7 * free_bytes / token)) // PAGE * PAGE


def bytes_read(method, point, query_tokens):
    if METHODS[method].format == "quantspec":
        fmt = PageFormat(point.heads, DIM, PAGE)
        return int(page_reads(fmt, [point.length] * point.requests, query_tokens, 4 if method == "draft" else 8)[0])
    return point.tokens * point.heads * FORMATS[METHODS[method].format].bytes_per_token


def sets_of(point, method, query_tokens, pool_size):
    needed = -(-BETWEEN // bytes_read(method, point, query_tokens))
    return max(1, min(64, needed, pool_size // (-(-point.length // PAGE) * PAGE * point.requests)))


def time_us(method, point, query_tokens, pool, pool_size):
    """Median microseconds of one launch."""
    sets = sets_of(point, method, query_tokens, pool_size)
    batch = Batch(point, query_tokens, pool_size, sets)
    launch = METHODS[method].prepare(batch, pool)
    launch(0)
    torch.cuda.synchronize()
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        for i in range(sets):
            launch(i)

    def replay(times):
        events = [torch.cuda.Event(enable_timing=True) for _ in range(times + 1)]
        events[0].record()
        for event in events[1:]:
            graph.replay()
            event.record()
        torch.cuda.synchronize()
        return sorted(a.elapsed_time(b) for a, b in zip(events, events[1:], strict=False))[times // 2]

    warm = replay(3)
    return replay(min(31, max(5, int(20 / warm)))) / sets * 1e3


def compile_all(methods, points, pools, pool_size):
    """Compile what Triton compiles for each point, several at a time: one after the other would take longer than timing."""

    def one(task):
        method, point, count = task
        try:
            METHODS[method].prepare(Batch(point, count, pool_size, 1), pools[METHODS[method].format])(0)
        except Exception:  # timing it will say so
            return

    tasks = [(m, p, n) for m in methods if METHODS[m].compiles for p in points for n in METHODS[m].query_tokens]
    with ThreadPoolExecutor(12) as executor:
        list(executor.map(one, tasks))
    torch.cuda.synchronize()


def measure_heads(points, methods, bandwidth):
    """Rows, checks and skipped points; all points have the same heads."""
    heads = points[0].query_heads, points[0].heads
    pool_size = pool_tokens(heads[1], methods, torch.cuda.mem_get_info()[0])
    skipped = [{"point": p.name, "tokens": p.tokens, "pool": pool_size} for p in points if p.tokens > pool_size]
    if skipped:
        print(f"skipped, more than the {pool_size} tokens of the pool: {', '.join(r['point'] for r in skipped)}", flush=True)
    points = [p for p in points if p.tokens <= pool_size]
    pools, rows, checks, broken = {}, [], [], set()
    for name in methods:
        form = METHODS[name].format
        for count in METHODS[name].query_tokens:
            try:
                if form not in pools:
                    pools[form] = FORMATS[form].pool(heads[1], pool_size)
                error = check(name, pools[form], pool_size, heads, count)
                why = None if error <= METHODS[name].limit else f"relative error {error:.3g}"
            except Exception as exception:  # whatever another project's kernel raises, the others go on
                error, why = None, f"{type(exception).__name__}: {' '.join(str(exception).split())[:300]}"
            shape = f"{heads[0]}/{heads[1]}"
            checks.append({"method": name, "heads": shape, "query_tokens": count, "error": error, "not_timed_because": why})
            print(f"check {name} {shape} q{count}: {f'NOT TIMED, {why}' if why else f'error {error:.2e}'}", flush=True)
            if why:
                broken.add((name, count))
    good = [m for m in methods if not broken & {(m, n) for n in METHODS[m].query_tokens}]
    start = time.time()
    compile_all(good, points, pools, pool_size)
    print(f"compiled in {time.time() - start:.0f} s", flush=True)
    for number, point in enumerate(points):
        for count in (1, 5):
            baseline, line = None, [f"[{number + 1}/{len(points)}] {point.name} q{count}:"]
            for name in methods:
                if (name, count) in broken or count not in METHODS[name].query_tokens:
                    continue
                try:
                    us = time_us(name, point, count, pools[METHODS[name].format], pool_size)
                except Exception as exception:
                    print(f"{name} {point.name} q{count}: {type(exception).__name__}: {exception}"[:300], flush=True)
                    continue
                baseline = us if name == "fa3" else baseline
                size = bytes_read(name, point, count)
                rows.append({
                    "method": name, "query_heads": heads[0], "kv_heads": heads[1], "length": point.length,
                    "batch": point.requests, "query_tokens": count, "us": round(us, 2), "bytes": size,
                    "tb_per_s": round(size / us / 1e6, 3), "floor_us": round(size / bandwidth * 1e6, 2),
                    "times_fa3": round(baseline / us, 3) if baseline else None,
                })  # fmt: skip
                ratio = f" ({baseline / us:.2f}x)" if baseline and name != "fa3" else ""
                line.append(f"{name} {us:.1f} us {rows[-1]['tb_per_s']:.2f}{ratio}")
            print("  ".join(line), flush=True)
    return rows, checks, skipped


def versions():
    found = {}
    for name in ("triton", "xformers"):
        try:
            found[name] = __import__(name).__version__
        except ImportError:
            found[name] = None
    return found


def plot(path):
    import matplotlib

    matplotlib.use("Agg")
    import matplotlib.pyplot as plt

    results = json.loads(path.read_text())
    rows, roof = results["rows"], results["copy_bandwidth_tb_s"]
    pairs = [h for h in HEADS if any((r["query_heads"], r["kv_heads"]) == h for r in rows)]
    figure, axes = plt.subplots(2, len(pairs), figsize=(6.4 * len(pairs), 9), squeeze=False)
    for column, pair in enumerate(pairs):
        top, bottom = axes[0, column], axes[1, column]
        mine = [r for r in rows if (r["query_heads"], r["kv_heads"]) == pair]
        for color, name in zip(COLORS, METHODS, strict=True):
            for count, marker in ((1, "o"), (5, "x")):
                some = [r for r in mine if r["method"] == name and r["query_tokens"] == count]
                label = METHODS[name].label + (", 5 query tokens" if count > 1 else "")
                sizes, speeds = ([r[key] for r in some] for key in ("bytes", "tb_per_s"))
                if some:
                    top.scatter([b / 1e6 for b in sizes], speeds, s=22, marker=marker, color=color, label=label)
                single = sorted((r["length"], r["times_fa3"]) for r in some if r["batch"] == 1 and r["times_fa3"])
                if single:
                    bottom.plot(*zip(*single, strict=True), marker=marker, color=color, linestyle="-" if count == 1 else ":")
        top.axhline(roof, color="#d1495b", linewidth=1, label=f"copy, {roof:.2f} TB/s")
        top.set(xscale="log", yscale="log", xlabel="MB that a launch must read", ylabel="TB/s of those")
        top.set_ylim(0.05, 1.3 * roof)
        top.set_yticks([0.1, 0.2, 0.5, 1, 2, 4], ["0.1", "0.2", "0.5", "1", "2", "4"], minor=False)
        top.set_title(f"{pair[0]} query heads, {pair[1]} KV heads, all lengths and batches")
        bottom.axhline(1, color="#444444", linewidth=0.8)
        bottom.set_xscale("log", base=2)
        ticks = sorted({r["length"] for r in mine})
        bottom.set_xticks(ticks, [f"{n >> 10}k" for n in ticks])
        bottom.set(xlabel="tokens, batch 1", ylabel="times as fast as FlashAttention 3 in BF16")
    entries = dict(zip(*reversed(axes[0, 0].get_legend_handles_labels()), strict=True))
    figure.legend(entries.values(), entries.keys(), fontsize=8, ncols=4, loc="lower center")
    figure.suptitle(f"Decode attention, {results['machine']['gpu']}")
    figure.tight_layout(rect=(0, 0.08, 1, 1))
    figure.savefig(path.with_suffix(".png"), dpi=140)


def main():
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--peers", nargs="*", choices=list(METHODS), default=list(METHODS), help="with fa3, the baseline")
    parser.add_argument("--points", nargs="*", default=["*"], help="patterns such as '32/8 *' or '* 128k x1'")
    parser.add_argument("--json", type=Path, default=RESULTS, help="where results go; the plot goes beside it")
    parser.add_argument("--plot", action="store_true", help="only draw the plot from the JSON")
    args = parser.parse_args()
    if args.plot:
        return plot(args.json)
    torch.manual_seed(0)
    methods = [m for m in METHODS if m in {"fa3", *args.peers}]
    points = all_points(args.points)
    if not points:
        parser.error(f"--points {' '.join(args.points)}: no such point; names are like '{Point(32, 8, 4096, 1).name}'")
    bandwidth = copy_bandwidth()
    torch.cuda.empty_cache()
    print(f"copy: {bandwidth / 1e12:.2f} TB/s", flush=True)
    rows, checks, skipped = [], [], []
    for heads in HEADS:
        chosen = [p for p in points if (p.query_heads, p.heads) == heads]
        if chosen:
            parts = measure_heads(chosen, methods, bandwidth)
            for all_of_them, part in zip((rows, checks, skipped), parts, strict=True):
                all_of_them += part
            more = {"copy_bandwidth_tb_s": round(bandwidth / 1e12, 3), "checks": checks, "skipped": skipped}
            write_json(args.json, rows, **versions(), **more)
            torch.cuda.empty_cache()
    plot(args.json)


if __name__ == "__main__":
    main()
