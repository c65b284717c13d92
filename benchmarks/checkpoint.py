"""A real checkpoint on real text: acceptance, and decode speed over the same model on a BF16 cache (the paper's Table 3).

    python benchmarks/checkpoint.py --model togethercomputer/LLaMA-2-7B-32K --text pg19/test --contexts 4096 8192 16384 32000
    python benchmarks/checkpoint.py --model LargeWorldModel/LWM-Text-Chat-128K --text pg19/test --contexts 32768 65536 130000
    python benchmarks/checkpoint.py --model meta-llama/Llama-3.1-8B --text pg19/test --contexts 8192 32768 130000

The paper's setting is the default: greedy, one sequence at a time, 90 output tokens, groups of 128 tokens of which the
newest one to two stay exact, the number of drafted tokens searched. Decode speed counts the tokens after the first.
"""

import argparse
import os
import statistics
from pathlib import Path

os.environ.setdefault("VLLM_LOGGING_LEVEL", "WARNING")

from acceptance import counts, rates
from common import QUANTSPEC, TEXT_HELP, engine, excerpts, read_texts, write_json

ROOT = Path(__file__).resolve().parents[1]


def run(llm, prompts: list[list[int]], tokens: int, batch: int, temperature: float) -> float:
    """Milliseconds per generated token and sequence: the median over batches of ``batch`` prompts."""
    from vllm import SamplingParams

    params = SamplingParams(temperature=temperature, max_tokens=tokens, ignore_eos=True, detokenize=False, seed=1)
    times = []
    for i in range(0, len(prompts), batch):
        outputs = llm.generate([{"prompt_token_ids": p} for p in prompts[i : i + batch]], params, use_tqdm=False)
        metrics = [output.metrics for output in outputs]
        took = max(m.last_token_ts for m in metrics) - max(m.first_token_ts for m in metrics)
        times.append(1e3 * took / (tokens - 1))
    return statistics.median(times)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--model", required=True, help="a directory or hub id")
    parser.add_argument("--text", type=Path, required=True, help=TEXT_HELP)
    parser.add_argument("--contexts", type=int, nargs="+", default=[4096, 8192, 16384, 32000])
    parser.add_argument("--num-speculative-tokens", type=int, nargs="+", default=[4, 5, 6])
    parser.add_argument("--prompts", type=int, default=8, help="each from a text of its own, while there are enough")
    parser.add_argument("--tokens", type=int, default=90)
    parser.add_argument("--batch", type=int, default=1)
    parser.add_argument("--temperature", type=float, default=0.0)
    parser.add_argument("--tensor-parallel-size", type=int, default=1)
    parser.add_argument("--json", type=Path)
    args = parser.parse_args()

    from transformers import AutoTokenizer

    tokenizer = AutoTokenizer.from_pretrained(args.model)
    long_enough = 6 * max(args.contexts)  # characters; only as many texts as are needed are tokenized
    texts = [text for text in read_texts(args.text).values() if len(text) >= long_enough] or [
        *read_texts(args.text).values()
    ]
    tokens = [tokenizer.encode(text) for text in texts[: args.prompts]]
    each = -(-args.prompts // len(tokens))
    prompts = {c: [e for t in tokens for e in excerpts(t, c, each)][: args.prompts] for c in args.contexts}
    size = {
        "max_num_seqs": args.batch,
        "enable_prefix_caching": False,
        "tensor_parallel_size": args.tensor_parallel_size,
    }
    rows, baseline = [], {}
    for gamma in (0, *args.num_speculative_tokens):
        arguments = {"speculative_config": {**QUANTSPEC, "num_speculative_tokens": gamma}} if gamma else {}
        with engine(args.model, max(args.contexts) + args.tokens + 1, **size, **arguments) as llm:
            run(llm, [p[:512] for p in prompts[args.contexts[0]][: args.batch]], args.tokens, args.batch, args.temperature)
            for context in args.contexts:
                before = counts(llm) if gamma else []
                ms = run(llm, prompts[context], args.tokens, args.batch, args.temperature)
                row = {"context": context, "num_speculative_tokens": gamma, "ms_per_token": ms}
                row["speedup"] = baseline.setdefault(context, ms) / ms
                if gamma:
                    numbers = [a - b for a, b in zip(counts(llm), before, strict=True)]
                    row["acceptance"] = sum(rates(numbers)) / gamma
                    row["tokens_per_verification"] = 1 + sum(rates(numbers))
                rows.append(row)
                print({k: round(v, 3) if isinstance(v, float) else v for k, v in row.items()}, flush=True)
    settings = {k: getattr(args, k) for k in ("prompts", "tokens", "batch", "temperature", "tensor_parallel_size")}
    name = Path(args.model).name
    write_json(args.json or ROOT / f"benchmarks/results/checkpoint-{name}.json", rows, model=args.model, **settings)


if __name__ == "__main__":
    main()
