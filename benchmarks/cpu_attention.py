"""Attention on the CPU: our kernels on quantized pages, vLLM's CPU kernel on BF16, in the same run.

    python benchmarks/cpu_attention.py                        # the table
    python benchmarks/cpu_attention.py --json OUT --plot OUT  # and the files

Every row calls its candidates in turn and reports medians in milliseconds: CPU time with one thread (the default),
which other work on the machine hardly changes, else elapsed time. `spread` is the row's largest third / first quartile.
`draft` and `target` are kernels/cpu_decode.py with 4 and 8 bits; for prefill, `target` is kernels/cpu_prefill.py, PyTorch's
own attention on dequantized pages.

Decode in plain PyTorch (words of 8 codes moved by `gather` and converted into a scratch buffer, the best of what was tried)
stays bound by several passes over every code; hence the compiled kernel, which makes one.
"""

import argparse
import statistics
import time
from functools import partial

import torch
from common import machine, write_json

from vllm_quantspec.format import PageFormat
from vllm_quantspec.kernels import cpu_decode, cpu_prefill, reference, step

HEAD_SIZE = 128
DTYPE = torch.bfloat16
DECODE = [(hq, h, batch, tokens) for hq, h in ((4, 2), (32, 8)) for batch in (1, 4) for tokens in (1, 5)]
PREFILL = [(4, 2)]


class Problem:
    """The same random keys and values as quantized pages and windows, and as vLLM's BF16 blocks."""

    def __init__(self, num_heads: int, kv_heads: int, batch: int, context: int, query_len: int):
        self.fmt = fmt = PageFormat(kv_heads, HEAD_SIZE, 128, DTYPE)
        group, size = fmt.group_size, fmt.window_block_size
        self.seq_len, self.query_len, self.num_heads = context, query_len, num_heads
        blocks, entries = -(-context // group), -(-context // size)
        key = torch.randn(batch, blocks * group, kv_heads, HEAD_SIZE).to(DTYPE)
        value = torch.randn_like(key)
        self.query = torch.randn(batch * query_len, num_heads, HEAD_SIZE).to(DTYPE)
        self.query_start_loc = torch.arange(batch + 1, dtype=torch.int32) * query_len
        self.seq_lens = torch.full((batch,), context, dtype=torch.int32)
        self.block_table = torch.randperm(batch * blocks).add_(1).int().view(batch, blocks)
        self.window_table = torch.randperm(batch * entries).add_(1).int().view(batch, entries)
        self.scale = HEAD_SIZE**-0.5

        self.pages = torch.zeros(batch * blocks + 1, kv_heads, fmt.head_bytes, dtype=torch.uint8)
        grouped = [x.view(-1, group, kv_heads, HEAD_SIZE) for x in (key, value)]
        reference.quantize_pages(fmt, self.pages, self.block_table.flatten().long(), *grouped)
        self.window = torch.zeros(batch * entries + 1, kv_heads, size, 2 * HEAD_SIZE, dtype=DTYPE)
        recent = torch.arange(max(0, context - query_len - 2 * group), context)
        self.own = slice(context - query_len, context)
        self.key, self.value = key, value
        for r in range(batch):
            slots = step.window_slots(fmt, self.window_table, torch.full_like(recent, r), recent)
            step.write_window(fmt, self.window, slots, key[r, recent], value[r, recent])
        self._fill_vllm(key, value, group)

    def _fill_vllm(self, key: torch.Tensor, value: torch.Tensor, block_size: int) -> None:
        from vllm import _custom_ops as ops
        from vllm.v1.attention.backends.cpu_attn import _get_attn_isa

        self.ops, isa = ops, _get_attn_isa(DTYPE, block_size, HEAD_SIZE)
        kv_heads = self.fmt.num_kv_heads
        cache = torch.zeros(self.block_table.numel() + 1, kv_heads, block_size * 2, HEAD_SIZE, dtype=DTYPE)
        self.key_cache, self.value_cache = cache.chunk(2, dim=2)
        slots = (self.block_table.long()[..., None] * block_size + torch.arange(block_size)).flatten()
        ops.cpu_attn_reshape_and_cache(key.flatten(0, 1), value.flatten(0, 1), self.key_cache, self.value_cache, slots, isa)
        self.vllm_metadata = ops.cpu_attn_get_scheduler_metadata(
            num_reqs=len(self.seq_lens),
            num_heads=self.num_heads,
            num_kv_heads=kv_heads,
            head_dim=HEAD_SIZE,
            seq_lens=self.seq_lens,
            dtype=DTYPE,
            query_start_loc=self.query_start_loc,
            causal=True,
            sliding_window_size=-1,
            isa=isa,
            enable_kv_split=True,
        )

    def vllm(self) -> torch.Tensor:
        output = torch.empty_like(self.query)
        self.ops.cpu_attention_with_kv_cache(
            query=self.query,
            key_cache=self.key_cache,
            value_cache=self.value_cache,
            output=output,
            query_start_loc=self.query_start_loc,
            seq_lens=self.seq_lens,
            scale=self.scale,
            causal=True,
            alibi_slopes=None,
            sliding_window=-1,
            block_table=self.block_table,
            softcap=0,
            scheduler_metadata=self.vllm_metadata,
            s_aux=None,
        )
        return output

    def decode(self, bits: int) -> torch.Tensor:
        caches = (self.fmt, self.pages, self.window, self.query, self.query_start_loc, self.seq_lens)
        return cpu_decode.decode_attention(*caches, self.block_table, self.window_table, self.scale, bits)

    def prefill(self) -> torch.Tensor:
        own = (self.query, self.key[0, self.own], self.value[0, self.own], self.seq_len)
        tables = (self.block_table[0], self.window_table[0])
        return cpu_prefill.prefill_attention(self.fmt, self.pages, self.window, *own, *tables, self.scale)


def measure(candidates: dict, seconds: float) -> dict:
    """Median milliseconds of each candidate, called in turn; and the row's spread."""
    times = {name: [] for name in candidates}
    clock = time.thread_time if torch.get_num_threads() == 1 else time.perf_counter
    end = time.perf_counter() + seconds
    while time.perf_counter() < end or len(next(iter(times.values()))) < 5:
        for name, call in candidates.items():
            call()  # the measured call finds its own data in the cache, as the others do
            start = clock()
            call()
            times[name].append((clock() - start) * 1e3)
    quartiles = [statistics.quantiles(t, n=4) for t in times.values()]
    row = {name: round(statistics.median(t), 3) for name, t in times.items()}
    return {**row, "spread": round(max(q[2] / q[0] for q in quartiles), 2)}


def run(context: int, seconds: float) -> list[dict]:
    rows = []
    for num_heads, kv_heads, batch, tokens in DECODE:
        problem = Problem(num_heads, kv_heads, batch, context, tokens)
        exact = problem.vllm().float()
        error = (problem.decode(8).float() - exact).abs().max() / exact.abs().max()
        assert error < 0.05, f"decode_attention and vLLM disagree: {error}"
        calls = {"vllm_bf16": problem.vllm, "draft": partial(problem.decode, 4), "target": partial(problem.decode, 8)}
        shape = {"kind": "decode", "heads": f"{num_heads}/{kv_heads}", "batch": batch, "context": context}
        rows.append({**shape, "tokens": tokens, **measure(calls, seconds)})
        show(rows[-1])
    for num_heads, kv_heads in PREFILL:
        problem = Problem(num_heads, kv_heads, 1, 2 * context + 2048, 2048)
        shape = {"kind": "prefill", "heads": f"{num_heads}/{kv_heads}", "batch": 1, "context": problem.seq_len}
        calls = {"vllm_bf16": problem.vllm, "target": problem.prefill}
        rows.append({**shape, "tokens": 2048, **measure(calls, seconds)})
        show(rows[-1])
    return rows


CANDIDATES = ("vllm_bf16", "draft", "target")
COLUMNS = ("kind", "heads", "batch", "context", "tokens", *CANDIDATES, "spread")


def show(row: dict) -> None:
    print("".join(f"{row.get(name, ''):>{max(9, len(name) + 2)}}" for name in COLUMNS), flush=True)


def plot(rows: list[dict], path: str) -> None:
    import matplotlib

    matplotlib.use("Agg")
    import matplotlib.pyplot as plt

    rows = [row for row in rows if row["kind"] == "decode"]
    figure, axes = plt.subplots(figsize=(9, 4), constrained_layout=True)
    labels = {"vllm_bf16": "vLLM's CPU kernel, BF16", "draft": "QuantSpec, draft", "target": "QuantSpec, target"}
    for i, (name, label) in enumerate(labels.items()):
        axes.bar([x + (i - 1) * 0.27 for x in range(len(rows))], [row[name] for row in rows], 0.27, label=label)
    ticks = [f"{row['heads']}\nbatch {row['batch']}\n{row['tokens']} tokens" for row in rows]
    axes.set_xticks(range(len(rows)), ticks, fontsize=8)
    axes.set_yscale("log")
    axes.set_ylabel("ms per layer")
    axes.set_title(f"Decode attention on the CPU, {rows[0]['context']} tokens of context, head size {HEAD_SIZE}")
    axes.legend(frameon=False)
    axes.spines[["top", "right"]].set_visible(False)
    figure.savefig(path, dpi=130)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--context", type=int, default=8192, help="tokens of context of the decode rows")
    parser.add_argument("--seconds", type=float, default=3, help="measuring time per row")
    parser.add_argument("--threads", type=int, default=1)
    parser.add_argument("--json", help="write the result here")
    parser.add_argument("--plot", help="write a plot here (needs matplotlib)")
    arguments = parser.parse_args()
    torch.set_num_threads(arguments.threads)
    torch.manual_seed(0)
    torch.cpu._init_amx()  # asks Linux for the tile registers; vLLM's kernel only uses them
    print(machine())
    show(dict(zip(COLUMNS, COLUMNS, strict=True)))
    rows = run(arguments.context, arguments.seconds)
    if arguments.json:
        write_json(arguments.json, rows, unit="milliseconds per layer, median")
    if arguments.plot:
        plot(rows, arguments.plot)


if __name__ == "__main__":
    main()
