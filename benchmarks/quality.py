"""What each KV cache costs in quality: perplexity on novels, and agreement of 512 generated tokens with the exact cache.

    python benchmarks/quality.py [--model DIR_OR_HUB_ID] [--text DIR] [--contexts 4096 16384 32768] [--json OUT]
    python benchmarks/quality.py --plot        # the plot again, from the JSON

Perplexity is of the last --scored tokens of each excerpt. A prompt is computed in chunks of --chunk tokens: a chunk reads
its own tokens exact and all before them from the cache, as every serving engine does, so a small chunk shows the cache's
error. Agreement counts generated tokens before the first that differs, and the share of all that are the same.
"""

import argparse
import json
import math
import os
import time
from pathlib import Path

os.environ.setdefault("VLLM_ENABLE_V1_MULTIPROCESSING", "0")  # engines start faster in this process
os.environ.setdefault("VLLM_CPU_KVCACHE_SPACE", "2")
os.environ.setdefault("VLLM_LOGGING_LEVEL", "WARNING")

import torch
from common import KV_HELP, TEXT_HELP, engine, excerpts, prefill_chunks, read_texts, small_model_on_gpu, write_json
from end_to_end_configs import PEER_CACHES

ROOT = Path(__file__).resolve().parents[1]
SHARED = ROOT.parent / "shared"
# On an H200 vLLM takes FlashAttention 3 for the exact cache and fp8, and its Triton backend for int4_per_token_head.
CACHES = {
    "exact": {},
    "quantspec": {"attention_backend": "QUANTSPEC"},
    "quantspec_int4": {"kv_cache_dtype": "quantspec_int4"},
    "fp8": {"kv_cache_dtype": "fp8"},
    **{name: {"kv_cache_dtype": name} for name in PEER_CACHES},
}
# For nvfp4 vLLM has no kernel on Hopper. Its CPU backend does not list int4_per_token_head, but starts with it and reads
# the bytes as fp8.
DEFAULT_CACHES = [c for c in CACHES if c != "nvfp4" and (torch.cuda.is_available() or c not in PEER_CACHES)]


def token_scores(llm, prompts: list[list[int]], scored: int) -> list[list[tuple[float, bool]]]:
    """Of the last ``scored`` tokens of each prompt: log p in nats, and whether the token was the likeliest."""
    from vllm import SamplingParams

    params = SamplingParams(temperature=0.0, max_tokens=1, prompt_logprobs=0, detokenize=False)
    outputs = llm.generate([{"prompt_token_ids": p} for p in prompts], params, use_tqdm=False)
    scores = []
    for prompt, output in zip(prompts, outputs, strict=True):
        said = [at[token] for token, at in list(zip(prompt, output.prompt_logprobs, strict=True))[-scored:]]
        scores.append([(s.logprob, s.rank == 1) for s in said])
    return scores


def prompt_scores(llm, prompts: list[list[int]], scored: int) -> list[tuple[float, float]]:
    """Of the last ``scored`` tokens of each prompt: mean of -log p in nats, and the share that were the likeliest."""
    return [
        (-sum(log_p for log_p, _ in said) / len(said), sum(first for _, first in said) / len(said))
        for said in token_scores(llm, prompts, scored)
    ]


def continuations(llm, prompts: list[list[int]], tokens: int, temperature: float = 0.0) -> list[list[int]]:
    """``tokens`` more tokens of every prompt; where they are sampled, each with a seed of its own."""
    from vllm import SamplingParams

    sampling = {"temperature": temperature, "max_tokens": tokens, "ignore_eos": True, "detokenize": False}
    params = [SamplingParams(seed=i if temperature else None, **sampling) for i in range(len(prompts))]
    outputs = llm.generate([{"prompt_token_ids": p} for p in prompts], params, use_tqdm=False)
    return [list(output.outputs[0].token_ids) for output in outputs]


def agreement(expected: list[list[int]], actual: list[list[int]]) -> tuple[float, float]:
    """Mean number of tokens before the first difference, and the share of equal tokens."""
    first, same, total = 0, 0, 0
    for e, a in zip(expected, actual, strict=True):
        first += next((i for i, (x, y) in enumerate(zip(e, a, strict=True)) if x != y), len(e))
        same += sum(x == y for x, y in zip(e, a, strict=True))
        total += len(e)
    return first / len(expected), same / total


def plot(path: Path) -> None:
    import matplotlib

    matplotlib.use("Agg")
    import matplotlib.pyplot as plt

    rows = json.loads(path.read_text())["rows"]
    contexts = sorted({r["context"] for r in rows})
    of = {(r["cache"], r["context"]): r for r in rows}
    caches = [c for c in CACHES if c != "exact" and all((c, n) in of for n in contexts)]
    figure, (left, right) = plt.subplots(1, 2, figsize=(9.6, 3.6))
    for i, cache in enumerate(caches):
        at = [n + 0.8 * (i - (len(caches) - 1) / 2) / len(caches) for n in range(len(contexts))]
        more = [of[cache, n]["perplexity"] / of["exact", n]["perplexity"] - 1 for n in contexts]
        same = [of[cache, n].get("same_tokens", 0) for n in contexts]
        for axis, shares, digits in ((left, more, 2), (right, same, 0)):
            axis.margins(y=0.12)  # for the numbers on the bars
            bars = axis.bar(at, [100 * x for x in shares], 0.8 / len(caches), label=cache)
            axis.bar_label(bars, fmt=f"%.{digits}f", fontsize=7)
    for axis, title in (
        (left, "perplexity over the exact cache's, %"),
        (right, "tokens generated as with the exact cache, %"),
    ):
        axis.set_xticks(range(len(contexts)), [f"{n / 1024:g}k" for n in contexts])
        axis.set_xlabel("context")
        axis.set_title(title, fontsize=10)
    left.set_yscale("symlog", linthresh=1)  # from some thousandths to a multiple
    left.legend(fontsize=8)
    figure.tight_layout()
    figure.savefig(path.with_suffix(".png"), dpi=140)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--model", default=str(SHARED / "models/books-30m"))
    parser.add_argument("--text", type=Path, default=SHARED / "data/books", help=TEXT_HELP)
    parser.add_argument("--contexts", type=int, nargs="+", default=[4096, 16384, 32768])
    parser.add_argument("--excerpts", type=int, default=2, help="of each text")
    parser.add_argument("--scored", type=int, default=1024)
    parser.add_argument("--chunk", type=int, default=256)
    parser.add_argument("--tokens", type=int, default=512, help="generated for the agreement; 0: none")
    parser.add_argument("--caches", nargs="+", choices=CACHES, default=DEFAULT_CACHES)
    parser.add_argument("--kv-gib", type=float, default=12, help=KV_HELP)
    parser.add_argument("--json", type=Path)
    parser.add_argument("--plot", action="store_true", help="only draw the plot from the JSON")
    args = parser.parse_args()
    path = args.json or ROOT / f"benchmarks/results/quality-{Path(args.model).name}.json"
    if args.plot:
        return plot(path)

    from transformers import AutoTokenizer

    tokenizer = AutoTokenizer.from_pretrained(args.model)
    texts = [tokenizer.encode(text) for text in read_texts(args.text).values()]
    prompts = {c: [e for tokens in texts for e in excerpts(tokens, c, args.excerpts)] for c in args.contexts}
    exact: dict[int, list[list[int]]] = {}
    rows = []
    number = len(prompts[args.contexts[0]])
    arguments = prefill_chunks(args.chunk, number) | small_model_on_gpu(args.kv_gib, number)
    started = time.perf_counter()
    for cache in args.caches:
        try:
            with engine(args.model, max(args.contexts) + args.tokens + 1, **arguments, **CACHES[cache]) as llm:
                for context in args.contexts:
                    losses = [loss for loss, _ in prompt_scores(llm, prompts[context], args.scored)]
                    row = {"cache": cache, "context": context, "perplexity": math.exp(sum(losses) / len(losses))}
                    if args.tokens:
                        generated = continuations(llm, prompts[context], args.tokens)
                        first, same = agreement(exact.setdefault(context, generated), generated)
                        row |= {"tokens_before_first_difference": first, "same_tokens": same}
                    rows.append(row)
                    print(f"{time.perf_counter() - started:.0f} s: {row}", flush=True)
        except Exception as error:  # a cache that this device does not have must not lose the others' numbers
            print(f"{cache}: {str(error).splitlines()[0]}", flush=True)
    sizes = {k: getattr(args, k) for k in ("model", "excerpts", "scored", "chunk", "tokens")}
    write_json(path, rows, **sizes | {"model": Path(args.model).name})
    plot(path)


if __name__ == "__main__":
    main()
