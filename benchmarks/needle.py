"""Does a quantized cache still find what was said long ago? A passage planted in a long text makes its repetition likelier.

    python benchmarks/needle.py [--model DIR_OR_HUB_ID] [--text DIR] [--contexts 1024 4096 16384] [--json OUT]

The needle is a passage of --needle tokens from another text, planted at even depths; the prompt ends with the same passage.
Its gain is how much likelier the repetition is than after the same text without the needle, in nats per token, both with the
same cache: a cache that had lost the needle would show none. (A model of 30 million parameters gains from what it has seen,
but does not answer with a random pair planted once: with the exact cache it says none of 12 such pairs.)
"""

import argparse
import os
from pathlib import Path

os.environ.setdefault("VLLM_CPU_KVCACHE_SPACE", "2")
os.environ.setdefault("VLLM_LOGGING_LEVEL", "WARNING")

from common import TEXT_HELP, engine, excerpts, read_texts, write_json
from quality import CACHES, ROOT, SHARED, negative_log_likelihood

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


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--model", default=str(SHARED / "models/books-30m"))
    parser.add_argument("--text", type=Path, default=SHARED / "data/books", help=f"two or more texts: {TEXT_HELP}")
    parser.add_argument("--contexts", type=int, nargs="+", default=[1024, 4096, 16384])
    parser.add_argument("--depths", type=int, default=8, help="needles in each text")
    parser.add_argument("--needle", type=int, default=64, help="tokens of the planted passage")
    parser.add_argument("--chunk", type=int, default=128, help="tokens of a prefill step, which are read exact")
    parser.add_argument("--caches", nargs="+", choices=CACHES, default=list(CACHES))
    parser.add_argument("--json", type=Path)
    args = parser.parse_args()

    from transformers import AutoTokenizer

    tokenizer = AutoTokenizer.from_pretrained(args.model)
    texts = [tokenizer.encode(text) for text in read_texts(args.text).values()]
    prompts = {c: prompts_of(texts, c, args.depths, args.needle) for c in args.contexts}
    rows = []
    for cache in args.caches:
        limits = {"max_num_batched_tokens": args.chunk, "enable_prefix_caching": False, "max_num_seqs": 8}
        try:
            with engine(args.model, max(args.contexts) + 1, **limits, **CACHES[cache]) as llm:
                for context in args.contexts:
                    scored = args.needle - UNSCORED
                    seen, unseen = (negative_log_likelihood(llm, p, scored) for p in prompts[context])
                    gains = [u - s for s, u in zip(seen, unseen, strict=True)]
                    by_depth = [gains[i :: args.depths] for i in range(args.depths)]
                    row = {"cache": cache, "context": context, "needles": len(gains), "gain": sum(gains) / len(gains)}
                    row["gain_by_depth"] = [sum(g) / len(g) for g in by_depth]
                    row["nats_without"] = sum(unseen) / len(unseen)
                    rows.append(row)
                    print({k: v for k, v in row.items() if k != "gain_by_depth"}, flush=True)
        except Exception as error:  # a cache that this device does not have must not lose the others' numbers
            print(f"{cache}: {str(error).splitlines()[0]}", flush=True)
    sizes = {k: getattr(args, k) for k in ("depths", "needle", "chunk")}
    write_json(args.json or ROOT / f"benchmarks/results/needle-{Path(args.model).name}.json", rows, **sizes)


if __name__ == "__main__":
    main()
