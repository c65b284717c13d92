"""Does a quantized cache still find what was said long ago? A passage planted in a long text makes its repetition likelier.

    python benchmarks/needle.py [--model DIR_OR_HUB_ID] [--text DIR] [--contexts 1024 4096 16384] [--json OUT]
    python benchmarks/needle.py --plot        # the plot again, from the JSON

The needle is a passage of --needle tokens from another text, planted at even depths; the prompt ends with the same passage.
Its gain is how much likelier the repetition is than after the same text without the needle, in nats per token, both with the
same cache: a cache that had lost the needle would show none. "found" is the share of needles whose repetition became
likelier at all (one that is lost: half of them), "greedy" the share of the repetition's tokens that were the likeliest.

Why not an answer: a model of 30 million parameters gains from what it has seen, but does not retrieve by itself. With the
exact cache at 1k tokens, books-30m says none of 12 random pairs planted once. Given the first 8 to 48 tokens of a passage
planted 1, 2 or 4 times, its next 16 greedy tokens are the passage's in at most 9 % (a novel's passage) or 3 % (random or
shuffled tokens) of places, and never all 16.
"""

import argparse
import json
import os
import time
from pathlib import Path

os.environ.setdefault("VLLM_ENABLE_V1_MULTIPROCESSING", "0")  # engines start faster in this process
os.environ.setdefault("VLLM_CPU_KVCACHE_SPACE", "2")
os.environ.setdefault("VLLM_LOGGING_LEVEL", "WARNING")

from common import KV_HELP, TEXT_HELP, engine, excerpts, prefill_chunks, read_texts, small_model_on_gpu, write_json
from quality import CACHES, DEFAULT_CACHES, ROOT, SHARED, prompt_scores

UNSCORED = 8  # of the repetition: until these are seen, no reader knows that it is one


def prompts_of(texts: list[list[int]], context: int, depths: int, needle: int) -> tuple[list[list[int]], list[list[int]]]:
    """Prompts of ``context`` tokens with a needle, and the same without it; for each text, one per depth."""
    with_needle, without = [], []
    for t, tokens in enumerate(texts):
        sources = excerpts(texts[(t + 1) % len(texts)], needle, depths)
        for i, text in enumerate(excerpts(tokens, context, depths)):
            passage, room = sources[i], context - 2 * needle
            at = int((i + 0.5) / depths * room)
            with_needle.append(text[:at] + passage + text[at:room] + passage)
            without.append(text[: room + needle] + passage)
    return with_needle, without


def summary(seen: list[tuple[float, float]], unseen: list[tuple[float, float]], depths: int) -> dict:
    """Of the scores (-log p, share of likeliest tokens) of repetitions with needle and without; depth is the inner index."""
    gains = [u - s for (s, _), (u, _) in zip(seen, unseen, strict=True)]
    by_depth = [gains[i::depths] for i in range(depths)]
    return {
        "needles": len(gains),
        "gain": sum(gains) / len(gains),
        "found": sum(g > 0 for g in gains) / len(gains),
        "greedy": sum(share for _, share in seen) / len(seen),
        "greedy_without": sum(share for _, share in unseen) / len(unseen),
        "nats_without": sum(loss for loss, _ in unseen) / len(unseen),
        "gain_by_depth": [sum(g) / len(g) for g in by_depth],
    }


def plot(path: Path) -> None:
    import matplotlib

    matplotlib.use("Agg")
    import matplotlib.pyplot as plt

    rows = json.loads(path.read_text())["rows"]
    contexts = sorted({r["context"] for r in rows})
    figure, axes = plt.subplots(1, len(contexts), figsize=(4.2 * len(contexts), 3.4), sharey=True, squeeze=False)
    for axis, context in zip(axes[0], contexts, strict=True):
        for row in (r for r in rows if r["context"] == context):
            gains = row["gain_by_depth"]
            depths = [100 * (i + 0.5) / len(gains) for i in range(len(gains))]
            style = {"color": "black", "linewidth": 2.5, "alpha": 0.5} if row["cache"] == "exact" else {"marker": "."}
            axis.plot(depths, gains, label=f"{row['cache']}: {row['gain']:.3f}", **style)
        axis.set_title(f"context {context / 1024:g}k")
        axis.set_xlabel("depth of the needle, %")
        axis.grid(alpha=0.3)
        axis.legend(fontsize=8)
    axes[0][0].set_ylabel("gain, nats per token")
    figure.tight_layout()
    figure.savefig(path.with_suffix(".png"), dpi=140)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--model", default=str(SHARED / "models/books-30m"))
    parser.add_argument("--text", type=Path, default=SHARED / "data/books", help=f"two or more texts: {TEXT_HELP}")
    parser.add_argument("--contexts", type=int, nargs="+", default=[1024, 4096, 16384])
    parser.add_argument("--depths", type=int, default=8, help="needles in each text")
    parser.add_argument("--needle", type=int, default=64, help="tokens of the planted passage")
    parser.add_argument("--chunk", type=int, default=128, help="tokens of a prefill step, which are read exact")
    parser.add_argument("--caches", nargs="+", choices=CACHES, default=DEFAULT_CACHES)
    parser.add_argument("--kv-gib", type=float, default=12, help=KV_HELP)
    parser.add_argument("--json", type=Path)
    parser.add_argument("--plot", action="store_true", help="only draw the plot from the JSON")
    args = parser.parse_args()
    path = args.json or ROOT / f"benchmarks/results/needle-{Path(args.model).name}.json"
    if args.plot:
        return plot(path)

    from transformers import AutoTokenizer

    tokenizer = AutoTokenizer.from_pretrained(args.model)
    texts = [tokenizer.encode(text) for text in read_texts(args.text).values()]
    prompts = {c: prompts_of(texts, c, args.depths, args.needle) for c in args.contexts}
    number = len(texts) * args.depths
    arguments = prefill_chunks(args.chunk, number) | small_model_on_gpu(args.kv_gib, number)
    started, rows = time.perf_counter(), []
    for cache in args.caches:
        try:
            with engine(args.model, max(args.contexts) + 1, **arguments, **CACHES[cache]) as llm:
                for context in args.contexts:
                    seen, unseen = (prompt_scores(llm, p, args.needle - UNSCORED) for p in prompts[context])
                    row = {"cache": cache, "context": context, **summary(seen, unseen, args.depths)}
                    rows.append(row)
                    shown = {k: v for k, v in row.items() if k != "gain_by_depth"}
                    print(f"{time.perf_counter() - started:.0f} s: {shown}", flush=True)
        except Exception as error:  # a cache that this device does not have must not lose the others' numbers
            print(f"{cache}: {str(error).splitlines()[0]}", flush=True)
    sizes = {k: getattr(args, k) for k in ("depths", "needle", "chunk")}
    write_json(path, rows, model=Path(args.model).name, **sizes)
    plot(path)


if __name__ == "__main__":
    main()
