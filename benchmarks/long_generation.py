"""Does a quantized cache drift when a model writes thousands of tokens, which read each other from it?

    python benchmarks/long_generation.py [--model DIR_OR_HUB_ID] [--text DIR] [--tokens 4096] [--json OUT]
    python benchmarks/long_generation.py --plot        # the plot again, from the JSON

Each cache continues the same prompts, greedily and by sampling (temperature 1, where the text's mean of -log p is the
model's entropy). Then an engine with the exact cache reads what was written, its own text too: "nats" is the mean of
-log p there, "likeliest" the share of tokens that it would have chosen itself, each also by quarter of the text; "new" is
the share of 4-grams that the text did not have before. A cache that does not drift has the exact cache's own numbers, up to
the standard error beside them (of the mean over texts). "quantspec, drafts" is the 8-bit cache with speculation on.
"""

import argparse
import json
import os
import statistics
import time
from pathlib import Path

os.environ.setdefault("VLLM_ENABLE_V1_MULTIPROCESSING", "0")  # engines start faster in this process
os.environ.setdefault("VLLM_CPU_KVCACHE_SPACE", "2")
os.environ.setdefault("VLLM_LOGGING_LEVEL", "WARNING")

from common import KV_HELP, QUANTSPEC, TEXT_HELP, engine, excerpts, read_texts, small_model_on_gpu, write_json
from quality import CACHES, DEFAULT_CACHES, ROOT, SHARED, agreement, continuations, token_scores

DRAFTS = 4
WAYS = {name: CACHES[name] for name in DEFAULT_CACHES} | {
    "quantspec, drafts": {"speculative_config": {**QUANTSPEC, "num_speculative_tokens": DRAFTS}}
}
PARTS = 4
NGRAM = 4


def share_of_new(tokens: list[int]) -> float:
    """Share of a text's 4-grams that it did not have before."""
    ngrams = list(zip(*(tokens[i:] for i in range(NGRAM)), strict=False))
    return len(set(ngrams)) / len(ngrams)


def summary(scores: list[list[tuple[float, bool]]]) -> dict:
    """Of scores of texts of one length: what the module's docstring says."""
    size = len(scores[0])
    quarters = [slice(size * i // PARTS, size * (i + 1) // PARTS) for i in range(PARTS)]
    nats = [[-log_p for log_p, _ in text] for text in scores]
    first = [[likeliest for _, likeliest in text] for text in scores]
    means = [statistics.fmean(text) for text in nats]
    return {
        "nats": statistics.fmean(means),
        "standard_error": statistics.stdev(means) / len(means) ** 0.5 if len(means) > 1 else None,
        "nats_by_quarter": [statistics.fmean(v for text in nats for v in text[q]) for q in quarters],
        "likeliest": statistics.fmean(v for text in first for v in text),
        "likeliest_by_quarter": [statistics.fmean(v for text in first for v in text[q]) for q in quarters],
    }


def show(row: dict) -> None:
    quarters = " ".join(f"{v:.3f}" for v in row["nats_by_quarter"])
    error = f" ± {row['standard_error']:.3f}" if row["standard_error"] is not None else ""
    agreed = f", {row['same_tokens']:.1%} as with the exact cache" if "same_tokens" in row else ""
    print(
        f"{row['cache']:20s} T={row['temperature']:g}: {row['nats']:.3f}{error} nats ({quarters}), "
        f"{row['likeliest']:.1%} likeliest, {row['new']:.1%} new{agreed}",
        flush=True,
    )


def plot(path: Path) -> None:
    import matplotlib

    matplotlib.use("Agg")
    import matplotlib.pyplot as plt

    stored = json.loads(path.read_text())
    size, rows = stored["tokens"], stored["rows"]
    temperatures = sorted({row["temperature"] for row in rows})
    figure, axes = plt.subplots(1, len(temperatures), figsize=(4.8 * len(temperatures), 3.6), squeeze=False)
    for axis, temperature in zip(axes[0], temperatures, strict=True):
        for row in rows:
            if row["temperature"] == temperature:
                ends = [size * (i + 1) // PARTS for i in range(PARTS)]
                axis.plot(ends, row["nats_by_quarter"], marker="o", markersize=3, label=row["cache"])
        axis.set_title("greedily" if temperature == 0 else f"temperature {temperature:g}", fontsize=10)
        axis.set_xlabel("tokens written")
        axis.set_ylabel("nats per token, read by the exact cache")
        axis.grid(alpha=0.3)
    axes[0][0].legend(fontsize=8)
    figure.tight_layout()
    figure.savefig(path.with_suffix(".png"), dpi=140)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--model", default=str(SHARED / "models/books-30m"))
    parser.add_argument("--text", type=Path, default=SHARED / "data/books", help=TEXT_HELP)
    parser.add_argument("--context", type=int, default=512, help="tokens of a prompt")
    parser.add_argument("--tokens", type=int, default=4096, help="written after each")
    parser.add_argument("--excerpts", type=int, default=2, help="of each text")
    parser.add_argument("--temperatures", type=float, nargs="+", default=[0.0, 1.0])
    parser.add_argument("--caches", nargs="+", choices=WAYS, default=list(WAYS))
    parser.add_argument("--dtype", default="auto", help="of the model; float32 is faster on a CPU without bfloat16")
    parser.add_argument("--kv-gib", type=float, default=12, help=KV_HELP)
    parser.add_argument("--json", type=Path)
    parser.add_argument("--plot", action="store_true", help="only draw the plot from the JSON")
    args = parser.parse_args()
    path = args.json or ROOT / f"benchmarks/results/long_generation-{Path(args.model).name}.json"
    if args.plot:
        return plot(path)

    from transformers import AutoTokenizer

    tokenizer = AutoTokenizer.from_pretrained(args.model)
    texts = [tokenizer.encode(text) for text in read_texts(args.text).values()]
    prompts = [e for tokens in texts for e in excerpts(tokens, args.context, args.excerpts)]
    longest, number = args.context + args.tokens + 2 * DRAFTS, len(prompts)
    arguments = {"max_num_seqs": number, "enable_prefix_caching": False, "dtype": args.dtype}
    arguments |= small_model_on_gpu(args.kv_gib, number, 1 + DRAFTS)
    started = time.perf_counter()
    written: dict[tuple[str, float], list[list[int]]] = {}
    for cache in args.caches:
        try:
            with engine(args.model, longest, **arguments, **WAYS[cache]) as llm:
                for temperature in args.temperatures:
                    written[cache, temperature] = continuations(llm, prompts, args.tokens, temperature)
                    print(f"{time.perf_counter() - started:.0f} s: {cache}, temperature {temperature:g}", flush=True)
        except Exception as error:  # a cache that this device does not have must not lose the others' numbers
            print(f"{cache}: {str(error).splitlines()[0]}", flush=True)
    rows = []
    sizes = {key: getattr(args, key) for key in ("context", "tokens", "excerpts", "dtype")} | {"texts": number}
    with engine(args.model, longest, **arguments) as llm:
        for (cache, temperature), answers in written.items():
            scores = token_scores(llm, [p + a for p, a in zip(prompts, answers, strict=True)], args.tokens)
            row = {"cache": cache, "temperature": temperature, **summary(scores)}
            row["new"] = statistics.fmean(share_of_new(answer) for answer in answers)
            if temperature == 0 and ("exact", 0.0) in written:
                first, row["same_tokens"] = agreement(written["exact", 0.0], answers)
                row["tokens_before_first_difference"] = first
            rows.append(row)
            show(row)
            write_json(path, rows, model=Path(args.model).name, **sizes)
    plot(path)


if __name__ == "__main__":
    main()
