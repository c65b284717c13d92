"""What each KV cache costs in quality: perplexity on novels, and agreement of 512 generated tokens with the exact cache.

    python benchmarks/quality.py [--model DIR_OR_HUB_ID] [--text DIR] [--contexts 4096 16384 32768] [--json OUT]

Perplexity is of the last --scored tokens of each excerpt. A prompt is computed in chunks of --chunk tokens: a chunk reads
its own tokens exact and all before them from the cache, as every serving engine does, so a small chunk shows the cache's
error. Agreement counts generated tokens before the first that differs, and the share of all that are the same.
"""

import argparse
import math
import os
from pathlib import Path

os.environ.setdefault("VLLM_CPU_KVCACHE_SPACE", "2")
os.environ.setdefault("VLLM_LOGGING_LEVEL", "WARNING")

from common import TEXT_HELP, engine, excerpts, read_texts, write_json

ROOT = Path(__file__).resolve().parents[1]
SHARED = ROOT.parent / "shared"
CACHES = {
    "exact": {},
    "quantspec": {"attention_backend": "QUANTSPEC"},
    "fp8": {"kv_cache_dtype": "fp8"},
    "int4_per_token_head": {"kv_cache_dtype": "int4_per_token_head"},
}


def negative_log_likelihood(llm, prompts: list[list[int]], scored: int) -> list[float]:
    """Mean over the last ``scored`` tokens of each prompt, in nats."""
    from vllm import SamplingParams

    params = SamplingParams(temperature=0.0, max_tokens=1, prompt_logprobs=0, detokenize=False)
    outputs = llm.generate([{"prompt_token_ids": p} for p in prompts], params)
    means = []
    for prompt, output in zip(prompts, outputs, strict=True):
        pairs = list(zip(prompt, output.prompt_logprobs, strict=True))[-scored:]
        means.append(-sum(at[token].logprob for token, at in pairs) / len(pairs))
    return means


def continuations(llm, prompts: list[list[int]], tokens: int) -> list[list[int]]:
    from vllm import SamplingParams

    params = SamplingParams(temperature=0.0, max_tokens=tokens, ignore_eos=True, detokenize=False)
    outputs = llm.generate([{"prompt_token_ids": p} for p in prompts], params)
    return [list(output.outputs[0].token_ids) for output in outputs]


def agreement(expected: list[list[int]], actual: list[list[int]]) -> tuple[float, float]:
    """Mean number of tokens before the first difference, and the share of equal tokens."""
    first, same, total = 0, 0, 0
    for e, a in zip(expected, actual, strict=True):
        first += next((i for i, (x, y) in enumerate(zip(e, a, strict=True)) if x != y), len(e))
        same += sum(x == y for x, y in zip(e, a, strict=True))
        total += len(e)
    return first / len(expected), same / total


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--model", default=str(SHARED / "models/books-30m"))
    parser.add_argument("--text", type=Path, default=SHARED / "data/books", help=TEXT_HELP)
    parser.add_argument("--contexts", type=int, nargs="+", default=[4096, 16384, 32768])
    parser.add_argument("--excerpts", type=int, default=2, help="of each text")
    parser.add_argument("--scored", type=int, default=1024)
    parser.add_argument("--chunk", type=int, default=256)
    parser.add_argument("--tokens", type=int, default=512, help="generated for the agreement; 0: none")
    parser.add_argument("--caches", nargs="+", choices=CACHES, default=list(CACHES))
    parser.add_argument("--json", type=Path)
    args = parser.parse_args()

    from transformers import AutoTokenizer

    tokenizer = AutoTokenizer.from_pretrained(args.model)
    texts = [tokenizer.encode(text) for text in read_texts(args.text).values()]
    prompts = {c: [e for tokens in texts for e in excerpts(tokens, c, args.excerpts)] for c in args.contexts}
    exact: dict[int, list[list[int]]] = {}
    rows = []
    for cache in args.caches:
        limits = {"max_num_batched_tokens": args.chunk, "enable_prefix_caching": False, "max_num_seqs": 8}
        try:
            with engine(args.model, max(args.contexts) + args.tokens + 1, **limits, **CACHES[cache]) as llm:
                for context in args.contexts:
                    losses = negative_log_likelihood(llm, prompts[context], args.scored)
                    row = {"cache": cache, "context": context, "perplexity": math.exp(sum(losses) / len(losses))}
                    if args.tokens:
                        generated = continuations(llm, prompts[context], args.tokens)
                        first, same = agreement(exact.setdefault(context, generated), generated)
                        row |= {"tokens_before_first_difference": first, "same_tokens": same}
                    rows.append(row)
                    print(row, flush=True)
        except Exception as error:  # a cache that this device does not have must not lose the others' numbers
            print(f"{cache}: {str(error).splitlines()[0]}", flush=True)
    sizes = {k: getattr(args, k) for k in ("excerpts", "scored", "chunk", "tokens")}
    write_json(args.json or ROOT / f"benchmarks/results/quality-{Path(args.model).name}.json", rows, **sizes)


if __name__ == "__main__":
    main()
