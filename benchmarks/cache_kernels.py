"""The cache kernels (store, quantize, gather_context) against their bytes and, where vLLM is installed, its cache write.

    python benchmarks/cache_kernels.py --json OUT.json --plot OUT.png    # without a GPU: the plot again, from the JSON
    python benchmarks/cache_kernels.py --tune                            # launch configurations

8 KV heads x 128 channels, bfloat16, pages of 128 tokens. Times are medians of CUDA graph replays; launches that follow one
another use other memory, 256 MiB or more in turn, so that nothing comes from L2.
"""

import argparse
import json
import statistics
from pathlib import Path

import torch
from common import write_json

from vllm_quantspec.format import PageFormat
from vllm_quantspec.kernels import cache_update, gather_context

DEVICE = "cuda"
FMT = PageFormat(num_kv_heads=8, head_size=128)
H, D, G, W = FMT.num_kv_heads, FMT.head_size, FMT.group_size, FMT.window_block_size
TOKEN = 2 * H * D * 2  # bytes of one token's exact keys and values
BETWEEN = 256 << 20
MAX_UNVERIFIED = 8


def median_us(launches, replays=40):
    """Microseconds per launch: `launches` captured in one graph, repeated to at least 64, median of replays."""
    stream = torch.cuda.Stream()
    with torch.cuda.stream(stream):
        for launch in launches[:2]:
            launch()
        torch.cuda.synchronize()
        rounds = max(1, 64 // len(launches))
        graph = torch.cuda.CUDAGraph()
        with torch.cuda.graph(graph, stream=stream):
            for _ in range(rounds):
                for launch in launches:
                    launch()
        times = []
        for i in range(replays + 3):
            begin, end = (torch.cuda.Event(enable_timing=True) for _ in range(2))
            begin.record()
            graph.replay()
            end.record()
            end.synchronize()
            if i >= 3:
                times.append(begin.elapsed_time(end))
    return statistics.median(times) * 1e3 / (rounds * len(launches))


def ints(values):
    return torch.tensor(values, dtype=torch.int32, device=DEVICE)


def sets_for(read_and_written):
    return int(max(2, min(32, BETWEEN // max(1, read_and_written) + 1)))


class Steps:
    """`sets` equal steps over one pool: requests of (first position, query tokens, drafts)."""

    def __init__(self, rows, sets):
        lengths, queries = [a + b for a, b, _ in rows], [b for _, b, _ in rows]
        self.max_query_len = max(queries)
        self.query_start_loc, self.seq_lens = ints([0, *queries]).cumsum(0).int(), ints(lengths)
        self.num_unverified = ints([c for *_, c in rows])
        width, entries = max(lengths) // G + 1, max(lengths) // W + 1
        first_page = [max(0, first // G - 2) for first, *_ in rows]
        pages = sum(width - p for p in first_page) * sets
        self.pages = torch.zeros(pages + 1, H, FMT.head_bytes, dtype=torch.uint8, device=DEVICE)
        held = []
        for first, query_len, _ in rows:
            n = first + query_len
            begin = first if query_len <= 9 else n  # a prefill keeps the newest tokens of its chunk
            held.append(range(max(0, (begin // G - 1) * G) // W, -(-n // W)))
        blocks = sum(map(len, held)) * sets
        self.window = torch.randn(blocks + 1, H, W, 2 * D, dtype=FMT.dtype, device=DEVICE)
        page_ids = torch.randperm(pages, device=DEVICE).int() + 1
        block_ids = torch.randperm(blocks, device=DEVICE).int() + 1
        tokens = sum(queries)
        self.qkv = [torch.randn(tokens, 6 * H, D, dtype=FMT.dtype, device=DEVICE) for _ in range(sets)]
        self.tables, self.written = [], blocks * W // sets
        for _ in range(sets):
            table = torch.zeros(len(rows), width, dtype=torch.int32, device=DEVICE)
            window_table = torch.zeros(len(rows), entries, dtype=torch.int32, device=DEVICE)
            for r, entry in enumerate(held):
                n = width - first_page[r]
                table[r, first_page[r] :], page_ids = page_ids[:n], page_ids[n:]
                window_table[r, entry.start : entry.stop], block_ids = block_ids[: len(entry)], block_ids[len(entry) :]
            self.tables.append((table, window_table))

    def stores(self):
        for qkv, (_, window_table) in zip(self.qkv, self.tables, strict=True):
            yield lambda k=qkv[:, 4 * H : 5 * H], v=qkv[:, 5 * H :], table=window_table: cache_update.store(
                FMT, self.window, k, v, self.query_start_loc, self.seq_lens, table, max_query_len=self.max_query_len
            )

    def quantizes(self):
        for qkv, tables in zip(self.qkv, self.tables, strict=True):
            yield lambda k=qkv[:, 4 * H : 5 * H], v=qkv[:, 5 * H :], tables=tables: cache_update.quantize(
                FMT, self.pages, self.window, k, v, self.query_start_loc, self.seq_lens, self.num_unverified, *tables,
                max_query_len=self.max_query_len, max_unverified=MAX_UNVERIFIED,
            )  # fmt: skip

    def vllm_stores(self):
        """vLLM's cache write of the same tokens, to random slots of a pool of blocks of 16 tokens."""
        from vllm import _custom_ops as ops

        tokens = self.qkv[0].shape[0]
        blocks = max(1024, -(-tokens * len(self.qkv) // 16))
        caches = torch.empty(2, blocks, 16, H, D, dtype=FMT.dtype, device=DEVICE)
        slots = torch.randperm(blocks * 16, device=DEVICE)
        one = torch.ones((), device=DEVICE)
        for i, qkv in enumerate(self.qkv):
            yield (
                lambda k=qkv[:, 4 * H : 5 * H], v=qkv[:, 5 * H :], at=slots[i * tokens : (i + 1) * tokens]: (
                    ops.reshape_and_cache_flash(k, v, caches[0], caches[1], at, "auto", one, one)
                )
            )


def contexts(length, sets):
    """Launches that gather `length` tokens before a chunk, of one request, and the bytes that each reads and writes."""
    count = -(-length // G)
    pages = torch.randint(0, 256, (count * sets + 1, H, FMT.head_bytes), dtype=torch.uint8, device=DEVICE)
    for name, low, high in (("k_scale", 0.2, 0.5), ("k_min", -3, -2), ("v_scale", 0.2, 0.5), ("v_min", -3, -2)):
        field = FMT.field(pages, name)
        field.copy_(torch.empty(field.shape, device=DEVICE).uniform_(low, high))
    boundary = (length // G - 1) * G
    entries = range(boundary // W, -(-length // W))
    window = torch.randn(len(entries) * sets + 1, H, W, 2 * D, dtype=FMT.dtype, device=DEVICE)
    page_ids, block_ids = (torch.randperm(len(x) - 1, device=DEVICE).int() + 1 for x in (pages, window))
    out = [torch.empty(2, length, H, D, dtype=FMT.dtype, device=DEVICE) for _ in range(2)]
    launches = []
    for i in range(sets):
        window_table = torch.zeros(1, -(-length // W), dtype=torch.int32, device=DEVICE)
        window_table[0, entries.start :] = block_ids[i * len(entries) : (i + 1) * len(entries)]
        tables = page_ids[None, i * count : (i + 1) * count], window_table
        lengths = ints([0, length]), ints([0]), ints([length])
        launches.append(
            lambda o=out[i % 2], lengths=lengths, tables=tables: gather_context.gather_context(
                FMT, pages, window, o[0], o[1], *lengths, *tables, max_len=length
            )
        )
    moved = boundary * FMT.bytes_per_token() + (length - boundary) * TOKEN + length * TOKEN
    return launches, moved, out


def copy_bandwidth():
    """Bytes per second that a large copy reads and writes."""
    x = torch.randint(-99, 99, (1 << 29,), dtype=torch.int32, device=DEVICE)
    y = torch.empty_like(x)
    return 8 * x.numel() / (median_us([lambda: torch.neg(x, out=y)], 10) * 1e-6)


def store_rows():
    for requests, query_len in [(r, q) for q in (1, 5) for r in (1, 8, 64, 256)]:
        plural = "s" if query_len > 1 else ""
        name = f"store: decode, batch {requests}, {query_len} query token{plural}"
        yield name, [(1000 + 3 * r, query_len, 0) for r in range(requests)]
    yield "store: prefill 8192", [(0, 8192, 0)]


def quantize_rows():
    """Name, requests, pages that each step completes."""
    for requests in (1, 64, 256):
        # first - MAX_UNVERIFIED and the end of the step lie in one page
        yield f"quantize: decode, batch {requests}, no page complete", [(1024 + 20, 5, 4)] * requests, 0
    yield "quantize: decode, batch 1, one page complete", [(1023, 5, 4)], 1
    yield "quantize: decode, batch 64, one page complete", [(1023, 5, 4)] + [(1024 + 20, 5, 4)] * 63, 1
    yield "quantize: decode, batch 256, 10 pages complete", [(1023, 5, 4)] * 10 + [(1024 + 20, 5, 4)] * 246, 10
    yield "quantize: prefill 8192", [(0, 8192, 0)], 64
    yield "quantize: prefill 8192, 4 requests", [(0, 2048, 0)] * 4, 64


def measure(peer):
    bandwidth = copy_bandwidth()
    rows = []

    def add(name, us, moved, **more):
        row = {"name": name, "us": us, "floor_us": moved / bandwidth * 1e6, "mb": moved / 1e6, **more}
        rows.append({k: round(v, 2) if isinstance(v, float) else v for k, v in row.items()})
        print(*(f"{k}={v}" for k, v in rows[-1].items()), flush=True)
        torch.cuda.empty_cache()

    for name, requests in store_rows():
        tokens = sum(b for _, b, _ in requests)
        steps = Steps(requests, sets_for(tokens * TOKEN * 3))
        stored = min(tokens, steps.written)
        more = {"vllm_us": median_us(list(steps.vllm_stores()))} if peer else {}
        add(name, median_us(list(steps.stores())), 2 * stored * TOKEN, **more)
    for name, requests, count in quantize_rows():
        moved = count * (G * TOKEN + FMT.page_bytes)
        tokens = sum(b for _, b, _ in requests)
        add(name, median_us(list(Steps(requests, sets_for(moved + tokens * TOKEN * 3)).quantizes())), moved)
    for length in (16384, 65536):
        launches, moved, out = contexts(length, 4 if length > 20000 else 8)
        us = median_us(launches)
        source = torch.randn_like(out[0])
        copy_us = median_us([lambda o=o, x=source: o.copy_(x) for o in out])
        add(f"gather_context {length // 1024}k", us, moved, copy_us=copy_us)
    return bandwidth, rows


def tune():
    cases = [(name, list(Steps(requests, 4).quantizes())) for name, requests, _ in quantize_rows()]
    print("quantize:", "; ".join(name for name, _ in cases))
    for warps, registers in ((4, None), (4, 96), (8, None), (8, 64)):
        cache_update.QUANTIZE_WARPS, cache_update.QUANTIZE_REGISTERS = warps, registers
        for ctas in (264, 528, 792, 1056):
            cache_update.QUANTIZE_CTAS = cache_update.QUANTIZE_DECODE_CTAS = ctas
            times = " ".join(f"{median_us(launches, 8):.2f}" for _, launches in cases)
            print(f"quantize: {warps} warps, {registers} registers, {ctas} CTAs: {times}", flush=True)
    for name, requests in list(store_rows())[::4]:
        launches = list(Steps(requests, 4).stores())
        for warps in (1, 2, 4, 8):
            cache_update.STORE_WARPS = warps
            print(f"{name}: warps {warps}: {median_us(launches, 10):.2f} us", flush=True)
    launches, *_ = contexts(65536, 3)
    for units in (1, 2, 4):
        for warps in (1, 2, 4, 8):
            if units * 32 // warps in (8, 16, 32):
                gather_context.UNITS, gather_context.WARPS = units, warps
                print(f"gather_context 64k: units {units} warps {warps}: {median_us(launches, 6):.1f} us", flush=True)


def plot(path, rows, gpu):
    import matplotlib

    matplotlib.use("Agg")
    import matplotlib.pyplot as plt

    rows = rows[::-1]
    at = range(len(rows))
    figure, axis = plt.subplots(figsize=(9, 0.36 * len(rows) + 1.4))
    axis.barh(at, [r["us"] for r in rows], color="#2a6fb0", label="measured")
    axis.scatter(
        [max(r["floor_us"], 0.1) for r in rows], at, marker="|", s=140, color="#444", label="moving the bytes alone"
    )
    for key, label, color in (
        ("vllm_us", "vLLM's reshape_and_cache_flash", "#d1495b"),
        ("copy_us", "copy of the same output", "#edae49"),
    ):
        marks = [(r[key], i) for i, r in enumerate(rows) if key in r]
        if marks:
            axis.scatter(*zip(*marks, strict=True), marker="|", s=140, color=color, label=label)
    axis.set_yticks(at, [r["name"] for r in rows])
    axis.set_xscale("log")
    axis.set_xlabel("microseconds per launch, in a CUDA graph")
    axis.set_title(f"Cache kernels, 8 KV heads x 128, {gpu}")
    axis.legend(loc="upper right", fontsize=8)
    figure.tight_layout()
    figure.savefig(path, dpi=140)


def main():
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--json", type=Path, help="write the rows there")
    parser.add_argument("--plot", type=Path, help="draw them there; alone with --json: from that file")
    parser.add_argument("--tune", action="store_true", help="time launch configurations")
    args = parser.parse_args()
    if not torch.cuda.is_available():
        if not (args.json and args.plot):
            parser.error("measuring needs a CUDA GPU.")
        results = json.loads(args.json.read_text())
        return plot(args.plot, results["rows"], results["machine"]["gpu"])
    torch.manual_seed(0)
    if args.tune:
        return tune()
    try:
        from vllm import _custom_ops  # noqa: F401

        peer = bool(torch.ops._C_cache_ops.reshape_and_cache_flash)
    except (ImportError, AttributeError):
        peer = False
    bandwidth, rows = measure(peer)
    if args.json:
        write_json(args.json, rows, copy_bandwidth_tb_s=round(bandwidth / 1e12, 3))
    if args.plot:
        plot(args.plot, rows, torch.cuda.get_device_name())


if __name__ == "__main__":
    main()
