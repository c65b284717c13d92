#!/usr/bin/env python3
"""How many drafted tokens the engine accepts, by position, on three novels; and with --kl what the 8-bit cache costs.

Acceptance at position i: of all drafts verified, the share whose first i tokens were accepted (as vLLM's metrics count).
KL: of the next-token distributions of the QUANTSPEC cache from those of vLLM's exact cache, over the same text.

    python benchmarks/acceptance.py [--model DIR] [--contexts 4096 16384] [--excerpts 8] [--tokens 256] [--temperature T]
        [--draft-weights target] [--draft-kv int8] [--weight-group-size 64] [--group-size 64] [--kl]
"""

import argparse
import os
from pathlib import Path

os.environ.setdefault("VLLM_ENABLE_V1_MULTIPROCESSING", "0")  # the model is at hand, for --kl
os.environ.setdefault("VLLM_CPU_KVCACHE_SPACE", "2")
os.environ.setdefault("VLLM_LOGGING_LEVEL", "WARNING")

import torch
from common import TEXT_HELP, engine, excerpts, read_texts, write_json

ROOT = Path(__file__).resolve().parents[1]
SHARED = ROOT.parent / "shared"


# --- Acceptance -------------------------------------------------------------------------------------------------------


def counts(llm) -> list[int]:
    """Drafts so far, then how many of them were accepted at each position."""
    metrics = {m.name: m for m in llm.get_metrics() if m.name.startswith("vllm:spec_decode")}
    accepted = metrics["vllm:spec_decode_num_accepted_tokens_per_pos"].values
    return [int(metrics["vllm:spec_decode_num_drafts"].value), *map(int, accepted)]


def measure(llm, prompts: list[list[int]], num_tokens: int, temperature: float) -> list[int]:
    """Continue the prompts; the drafts of it, and how many were accepted at each position."""
    from vllm import SamplingParams

    before = counts(llm)
    params = SamplingParams(temperature=temperature, max_tokens=num_tokens, ignore_eos=True, detokenize=False, seed=1)
    llm.generate([{"prompt_token_ids": p} for p in prompts], params, use_tqdm=False)
    return [a - b for a, b in zip(counts(llm), before, strict=True)]


def rates(numbers: list[int]) -> list[float]:
    return [n / numbers[0] for n in numbers[1:]]


# --- KL of the 8-bit cache --------------------------------------------------------------------------------------------


@torch.inference_mode()
def final_hidden_states(llm, tokens: list[int]) -> torch.Tensor:
    """What the model's last layer says at each position of ``tokens``, [tokens, hidden_size], as the engine computes it."""
    from vllm import SamplingParams

    model = llm.llm_engine.collective_rpc(lambda worker: worker.model_runner)[0].get_model()
    seen = []
    # Of this prompt only: its tokens, in order, before the one that is generated has a position of its own.
    hook = model.register_forward_hook(lambda module, args, kwargs, output: seen.append(output.clone()), with_kwargs=True)
    try:
        params = SamplingParams(temperature=0.0, max_tokens=1, detokenize=False)
        llm.generate([{"prompt_token_ids": tokens}], params, use_tqdm=False)
    finally:
        hook.remove()
    return torch.cat(seen)[: len(tokens)]


@torch.inference_mode()
def divergence(llm, exact: torch.Tensor, other: torch.Tensor, rows: int = 512) -> dict[str, float]:
    """KL(exact || other) in nats and greedy agreement of two sets of hidden states, with the model's own output layer."""
    model = llm.llm_engine.collective_rpc(lambda worker: worker.model_runner)[0].get_model()
    kl, same = [], 0
    for i in range(0, len(exact), rows):
        p, q = (model.compute_logits(h[i : i + rows]).double().log_softmax(-1) for h in (exact, other))
        kl.append((p.exp() * (p - q)).sum(-1))
        same += (p.argmax(-1) == q.argmax(-1)).sum().item()
    kl = torch.cat(kl)
    return {
        "tokens": len(exact),
        "mean_kl": kl.mean().item(),
        "p99_kl": kl.quantile(0.99).item(),
        "max_kl": kl.max().item(),
        "greedy_agreement": same / len(exact),
    }


def cache_error(model: str, tokens: list[int], chunk: int, quantspec: dict, dtype: str = "auto") -> dict[str, float]:
    """``divergence`` of the QUANTSPEC cache from the exact one on ``tokens``, prefilled in chunks of ``chunk``."""
    arguments = {
        "dtype": dtype,
        "enable_prefix_caching": False,
        "max_num_batched_tokens": chunk,
        "max_num_seqs": 1,
        "async_scheduling": False,  # or a step after the prompt's last is in flight when the hook is gone
    }
    with engine(model, len(tokens) + 16, **arguments) as llm:
        exact = final_hidden_states(llm, tokens)
    with engine(model, len(tokens) + 16, **arguments, **quantspec) as llm:
        return divergence(llm, exact, final_hidden_states(llm, tokens))


# --- Report -----------------------------------------------------------------------------------------------------------


def show(row: dict) -> None:
    positions = " ".join(f"{r:6.3f}" for r in row["per_position"])
    print(
        f"{row['novel']:14s} {row['context']:7d} {row['drafts']:7d}  {positions}  mean {row['mean']:.3f}"
        f"  per draft {1 + sum(row['per_position']):.2f} tokens",
        flush=True,
    )


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--model", type=Path, default=SHARED / "models/books-30m")
    parser.add_argument("--text", type=Path, default=SHARED / "data/books", help=TEXT_HELP)
    parser.add_argument("--contexts", type=int, nargs="+", default=[4096, 16384])
    parser.add_argument("--excerpts", type=int, default=8, help="of each novel")
    parser.add_argument("--tokens", type=int, default=256, help="generated from each excerpt")
    parser.add_argument("--temperature", type=float, default=0.0)
    parser.add_argument("--num-speculative-tokens", type=int, default=4)
    parser.add_argument("--draft-weights", choices=["int4", "target"], default="int4")
    parser.add_argument("--draft-kv", choices=["int4", "int8"], default="int4")
    parser.add_argument("--weight-group-size", type=int, default=128)
    parser.add_argument("--group-size", type=int, default=128, help="tokens per page, and per group of keys")
    parser.add_argument("--quantize-lm-head", action="store_true")
    parser.add_argument("--kl", action="store_true", help="measure the cache's error, not acceptance")
    parser.add_argument("--kl-tokens", type=int, default=16384)
    parser.add_argument("--kl-decode-tokens", type=int, default=2048, help="of these through the decode path")
    parser.add_argument("--output", type=Path, help="default: benchmarks/results/acceptance-MODEL.json")
    args = parser.parse_args()

    from transformers import AutoTokenizer

    tokenizer = AutoTokenizer.from_pretrained(args.model)
    novels = {name: tokenizer.encode(text) for name, text in read_texts(args.text).items()}
    kind = "cache_error" if args.kl else "acceptance"
    output = args.output or ROOT / f"benchmarks/results/{kind}-{args.model.name}.json"

    if args.kl:
        rows = []
        cache = {"attention_backend": "QUANTSPEC"}
        speculating = {"speculative_config": {"method": "quantspec", "num_speculative_tokens": 4}}
        for novel, tokens in novels.items():
            for path, size, chunk, arguments in (
                ("prefill", args.kl_tokens, 512, cache),
                # No more tokens in a step than a verification has: these take the way of the decode rows.
                ("decode", args.kl_decode_tokens, 5, speculating),
            ):
                start = (len(tokens) - size) // 2
                error = cache_error(str(args.model), tokens[start : start + size], chunk, arguments)
                rows.append({"novel": novel, "path": path, **error})
                print(rows[-1], flush=True)
        write_json(output, rows, model=args.model.name)
        return

    options = {
        "num_speculative_tokens": args.num_speculative_tokens,
        "draft_weights": args.draft_weights,
        "draft_kv": args.draft_kv,
        "weight_group_size": args.weight_group_size,
        "group_size": args.group_size,
        "quantize_lm_head": args.quantize_lm_head,
    }
    rows = []
    longest = max(args.contexts) + args.tokens
    with engine(str(args.model), longest, speculative_config={"method": "quantspec", **options}) as llm:
        for context in args.contexts:
            total = [0] * (1 + args.num_speculative_tokens)
            for novel, tokens in novels.items():
                numbers = measure(llm, excerpts(tokens, context, args.excerpts), args.tokens, args.temperature)
                total = [a + b for a, b in zip(total, numbers, strict=True)]
                rows.append({"novel": novel, "context": context, "drafts": numbers[0], "per_position": rates(numbers)})
                rows[-1]["mean"] = sum(rows[-1]["per_position"]) / args.num_speculative_tokens
                show(rows[-1])
            rows.append({"novel": "all", "context": context, "drafts": total[0], "per_position": rates(total)})
            rows[-1]["mean"] = sum(rows[-1]["per_position"]) / args.num_speculative_tokens
            show(rows[-1])
    sizes = {"excerpts": args.excerpts, "tokens": args.tokens, "temperature": args.temperature}
    write_json(output, rows, model=args.model.name, **options, **sizes)


if __name__ == "__main__":
    main()
