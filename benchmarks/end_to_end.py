"""Decode speed of whole engines on a model's shape: BF16 KV cache, the hierarchical cache alone, QuantSpec.

    python benchmarks/end_to_end.py                                # 8B shape, 8k to 128k, batch 1 and 8, one GPU
    python benchmarks/end_to_end.py --shape 7b --points 32768x1 --configs bf16 4
    python benchmarks/end_to_end.py --plot                         # the plot again, from the JSON

Weights are random (``load_format="dummy"``): the speed does not depend on them, but acceptance does. So drafts are
accepted by vLLM's ``synthetic`` rejection sampler, each with probability ``--acceptance`` given that the one before was
(0.938: the first position of books-30m at 16k tokens, benchmarks/results/acceptance-books-30m.json). Prompts are not
computed: a prefill step returns at once and leaves the cache as it is, since decoding takes as long whatever the cache
holds. Every configuration is an engine of its own, with torch.compile, CUDA graphs and async scheduling on; a number is
the median of ``--repeats`` stretches of ``--tokens`` tokens per sequence, after 16 tokens of warm-up.
"""

import argparse
import json
import os
import statistics
import subprocess
import sys
import tempfile
import time
from pathlib import Path

from common import write_json

from vllm_quantspec.estimate import expected_tokens

RESULTS = Path(__file__).parent / "results"
SHAPES = {
    "8b": dict(hidden_size=4096, intermediate_size=14336, num_attention_heads=32, num_key_value_heads=8, vocab_size=128256),
    # To try the script out, also on a CPU.
    "tiny": dict(hidden_size=256, intermediate_size=512, num_attention_heads=4, num_key_value_heads=2, vocab_size=512),
    "7b": dict(hidden_size=4096, intermediate_size=11008, num_attention_heads=32, num_key_value_heads=32, vocab_size=32000),
}
LLAMA = dict(
    architectures=["LlamaForCausalLM"],
    model_type="llama",
    num_hidden_layers=32,
    max_position_embeddings=1 << 20,
    rms_norm_eps=1e-5,
    rope_theta=500000.0,
    hidden_act="silu",
    tie_word_embeddings=False,
    bos_token_id=1,
    eos_token_id=2,
    torch_dtype="bfloat16",
)
WARM_UP = 16
# 96k is what eight sequences of the 8B shape can have in BF16 on an H200.
POINTS = ["8192x1", "32768x1", "131072x1", "8192x8", "32768x8", "98304x8"]
# A batch of at least so many tokens is a prompt, not a decode step.
PREFILL_TOKENS = 4096


def engine_arguments(config: str, acceptance: float, options: dict) -> dict:
    """LLM arguments of "bf16", "fp8", "cache" (the hierarchical cache alone) or a number of speculative tokens."""
    if config == "bf16":
        return {}
    if config == "fp8":
        return {"kv_cache_dtype": "fp8"}
    if config == "cache":
        return {"attention_backend": "QUANTSPEC"}
    gamma = int(config)
    return {
        "speculative_config": {
            "method": "quantspec",
            "num_speculative_tokens": gamma,
            "rejection_sample_method": "synthetic",
            "synthetic_acceptance_rates": [acceptance ** (i + 1) for i in range(gamma)],
            **options,
        }
    }


def skip_prompts(worker) -> None:
    """Make the target return at once where it would compute a prompt."""
    import torch

    model = worker.model_runner.model
    forward, hidden_size = model.forward, worker.model_runner.model_config.get_hidden_size()

    def decode_only(input_ids, positions, *args, **kwargs):
        if input_ids.shape[0] >= PREFILL_TOKENS:
            return torch.zeros(input_ids.shape[0], hidden_size, dtype=torch.bfloat16, device=input_ids.device)
        return forward(input_ids, positions, *args, **kwargs)

    model.forward = decode_only


def measure(llm, context: int, batch: int, tokens: int, repeats: int, profile: bool) -> dict:
    """Decode `batch` sequences at about `context` tokens: ms per token, per engine step, and tokens per step."""
    from vllm import SamplingParams

    engine = llm.llm_engine
    total = WARM_UP + (repeats + 1) * (tokens + 16)
    params = SamplingParams(temperature=0, ignore_eos=True, max_tokens=total, detokenize=False)
    prompt = [7 + i % 400 for i in range(context - total // 2)]
    for i in range(batch):
        engine.add_request(f"{context}-{batch}-{i}-{time.time()}", {"prompt_token_ids": prompt}, params)
    counts: dict[str, int] = {}
    marks: list[tuple[float, int, int]] = []
    steps, trace = 0, None
    while engine.has_unfinished_requests():
        for output in engine.step():
            counts[output.request_id] = len(output.outputs[0].token_ids)
        steps += 1
        done = min(counts.values()) if len(counts) == batch else 0
        if done >= WARM_UP + len(marks) * tokens and len(marks) <= repeats:
            marks.append((time.perf_counter(), sum(counts.values()), steps))
        if profile and trace is None and len(marks) > repeats:
            trace = start_profile(steps)
        if trace is not None and "stop" not in trace and steps >= trace["first"] + 8:
            stop_profile(trace, steps)
    stretches = [(b[0] - a[0], (b[1] - a[1]) / batch, b[2] - a[2]) for a, b in zip(marks[:-1], marks[1:], strict=True)]
    result = {
        "ms_per_token": 1e3 * statistics.median(t / n for t, n, _ in stretches),
        "ms_per_step": 1e3 * statistics.median(t / s for t, _, s in stretches),
        "tokens_per_step": sum(n for _, n, _ in stretches) / sum(s for _, _, s in stretches),
    }
    if trace is not None:
        result |= trace["result"]
    return result


def start_profile(step: int) -> dict:
    import torch

    profiler = torch.profiler.profile(activities=[torch.profiler.ProfilerActivity.CUDA])
    profiler.start()
    return {"profiler": profiler, "first": step}


def stop_profile(trace: dict, step: int) -> None:
    """Where a step's time goes: kernels by name, and how long the GPU had nothing to do."""
    import torch

    torch.cuda.synchronize()
    profiler, cycles = trace["profiler"], step - trace["first"]
    profiler.stop()
    events = [
        e for e in profiler.events() if e.device_type == torch.autograd.DeviceType.CUDA and e.time_range.elapsed_us() > 0
    ]
    spans = sorted((e.time_range.start, e.time_range.end) for e in events)
    idle_host, idle_all, end = 0.0, 0.0, spans[0][1]
    for first, last in spans[1:]:
        gap = first - end
        if gap > 0:
            idle_all += gap
            idle_host += gap if gap > 10 else 0  # shorter ones lie between two kernels of one graph
        end = max(end, last)
    by_name: dict[str, float] = {}
    for e in events:
        by_name[e.name] = by_name.get(e.name, 0) + e.time_range.elapsed_us()
    top = sorted(by_name.items(), key=lambda item: -item[1])[:14]
    trace["stop"] = True
    trace["result"] = {
        "gpu_idle_ms_per_step": idle_host / cycles / 1e3,
        "gaps_between_kernels_ms_per_step": (idle_all - idle_host) / cycles / 1e3,
        "kernels_ms_per_step": {name[:70]: round(t / cycles / 1e3, 4) for name, t in top},
    }


def time_to_first_token(llm, context: int) -> float:
    """Seconds to compute a prompt of `context` tokens, in chunks, and sample one token."""
    from vllm import SamplingParams

    params = SamplingParams(temperature=0, max_tokens=1, detokenize=False)
    for length in (3 * 16384, context):  # the first compiles what is compiled on demand
        started = time.perf_counter()
        llm.generate([{"prompt_token_ids": [7 + i % 400 for i in range(length)]}], params, use_tqdm=False)
    return time.perf_counter() - started


def child(args) -> None:
    """One engine, all points; prints a JSON line for each."""
    os.environ.setdefault("VLLM_ENABLE_V1_MULTIPROCESSING", "0")
    from vllm import LLM

    points = [tuple(map(int, point.split("x"))) for point in args.points]
    batches = {batch for _, batch in points}
    longest = max(context for context, _ in points)
    query_len = 1 + (int(args.child) if args.child.isdigit() else 0)
    shape = LLAMA | SHAPES[args.shape] | ({"num_hidden_layers": args.layers} if args.layers else {})
    with tempfile.TemporaryDirectory() as folder:
        Path(folder, "config.json").write_text(json.dumps(shape))
        llm = LLM(
            folder,
            load_format="dummy",
            skip_tokenizer_init=True,
            max_model_len=longest + 1024,
            max_num_seqs=max(batches),
            max_num_batched_tokens=16384,
            gpu_memory_utilization=0.94,
            enable_prefix_caching=False,
            disable_log_stats=True,
            compilation_config={"cudagraph_capture_sizes": sorted({b * n for b in batches for n in (1, query_len)})},
            **engine_arguments(args.child, args.acceptance, json.loads(args.options)),
        )
    engine = {"config": args.child, "blocks": llm.llm_engine.vllm_config.cache_config.num_gpu_blocks}
    if args.prefill:
        seconds = time_to_first_token(llm, longest)
        print("ROW " + json.dumps(engine | {"context": longest, "batch": 0, "prefill_s": seconds}), flush=True)
    llm.collective_rpc(skip_prompts)
    for context, batch in points:
        row = measure(llm, context, batch, args.tokens, args.repeats, args.profile)
        print("ROW " + json.dumps(engine | {"context": context, "batch": batch} | row), flush=True)


def add_ratios(rows: list[dict]) -> None:
    """Speedup over BF16 KV of the same context and batch, and what it would be at 0.97 per token."""
    for row in rows:
        base = next(
            (r for r in rows if r["config"] == "bf16" and (r["context"], r["batch"]) == (row["context"], row["batch"])), None
        )
        if base is None:
            continue
        if "prefill_s" in row:
            row["prefill_over_bf16"] = row["prefill_s"] / base["prefill_s"]
            continue
        row["speedup"] = base["ms_per_token"] / row["ms_per_token"]
        if row["config"].isdigit():
            gamma = int(row["config"])
            row["speedup_at_0.97"] = base["ms_per_token"] * expected_tokens(0.97, gamma) / row["ms_per_step"]


def plot(path: Path) -> None:
    import matplotlib

    matplotlib.use("Agg")
    import matplotlib.pyplot as plt

    results = json.loads(path.read_text())
    rows = [r for r in results["rows"] if "speedup" in r]
    batches = sorted({r["batch"] for r in rows})
    figure, axes = plt.subplots(1, len(batches), figsize=(5.2 * len(batches), 3.6), squeeze=False, sharey=True)
    for axis, batch in zip(axes[0], batches, strict=True):
        contexts = sorted({r["context"] for r in rows if r["batch"] == batch})
        of = {(r["config"], r["context"]): r for r in rows if r["batch"] == batch}
        best = [max((r for (c, n), r in of.items() if n == x and c.isdigit()), key=lambda r: r["speedup"]) for x in contexts]
        labels = [f"{x // 1024}k" for x in contexts]
        axis.plot(labels, [r["speedup"] for r in best], marker="o", color="#d1495b", label="QuantSpec")
        axis.plot(
            labels, [r["speedup_at_0.97"] for r in best], marker=".", ls=":", color="#d1495b", label="at 0.97 per token"
        )
        cache = [of[("cache", x)]["speedup"] for x in contexts if ("cache", x) in of]
        axis.plot(labels[: len(cache)], cache, marker="o", color="#2a6fb0", label="cache alone")
        for x, r in zip(labels, best, strict=True):
            axis.annotate(f"γ={r['config']}", (x, r["speedup"]), textcoords="offset points", xytext=(0, 6), ha="center")
        axis.axhline(1, color="#999", linewidth=0.8)
        axis.set_title(f"batch {batch}")
        axis.set_xlabel("context")
    axes[0][0].set_ylabel("decode speed over BF16 KV")
    axes[0][-1].legend()
    figure.suptitle(f"{results['shape']} shape, {results['machine']['gpu']}, acceptance {results['acceptance']} per token")
    figure.tight_layout()
    figure.savefig(path.with_suffix(".png"), dpi=140)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--shape", choices=SHAPES, default="8b")
    parser.add_argument("--layers", type=int, help="fewer layers, to try the script out")
    parser.add_argument("--points", nargs="+", default=POINTS, help="CONTEXTxBATCH, e.g. 131072x1")
    parser.add_argument("--configs", nargs="+", default=["bf16", "cache", "3", "5"])
    parser.add_argument("--acceptance", type=float, default=0.938)
    parser.add_argument("--options", default="{}", help="more options of the speculative config, as JSON")
    parser.add_argument("--tokens", type=int, default=64)
    parser.add_argument("--repeats", type=int, default=3)
    parser.add_argument("--prefill", action="store_true", help="also time the longest context's prompt (batch 0)")
    parser.add_argument("--profile", action="store_true", help="also say where a step's time goes")
    parser.add_argument("--json", type=Path)
    parser.add_argument("--plot", action="store_true", help="only draw the plot from the JSON")
    parser.add_argument("--child", help=argparse.SUPPRESS)
    args = parser.parse_args()
    path = args.json or RESULTS / f"end_to_end-{args.shape}.json"
    if args.plot:
        return plot(path)
    if args.child:
        return child(args)
    rows = json.loads(path.read_text())["rows"] if path.exists() else []
    for config in args.configs:
        command = [sys.executable, __file__, *sys.argv[1:], "--child", config]
        process = subprocess.Popen(command, stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True)
        tail: list[str] = []
        for line in process.stdout:
            tail = [*tail[-40:], line]
            if line.startswith("ROW "):
                row = json.loads(line[4:])
                rows = [r for r in rows if any(r[k] != row[k] for k in ("config", "context", "batch"))] + [row]
                print({k: round(v, 4) if isinstance(v, float) else v for k, v in row.items()}, flush=True)
        if process.wait():
            print(f"{config} failed:\n" + "".join(tail), flush=True)
        add_ratios(rows)
        write_json(path, rows, shape=args.shape, acceptance=args.acceptance)
    for row in sorted(rows, key=lambda r: (r["batch"], r["context"])):
        if "speedup" in row:
            where = f"{row['config']:>6} {row['context']:>7} batch {row['batch']:>2}"
            print(f"{where}: {row['ms_per_token']:.2f} ms, {row['speedup']:.2f}x")


if __name__ == "__main__":
    main()
