#!/usr/bin/env python3
"""How many drafted tokens the engine accepts, by position, on novels: the left half of the paper's Table 3, and ablations.

Each configuration (--configs) is an engine of its own: 1 to 8 drafted tokens with the default options, then the 4-bit cache
alone ("kv-only": the draft has the target's weights), INT4 weights alone ("weights-only": the draft reads 8 bits), groups
of 64 tokens or weights, the output layer in 16 bits, and weights rounded by GPTQ; "ngram" is vLLM's own n-grams on the same
text. On a GPU all excerpts of a context are one batch; on a CPU each novel is, and "all" is their sum.

Acceptance at position i: of all drafts verified, the share whose first i tokens were accepted (as vLLM's metrics count).
"accepted" is the mean number of accepted tokens of a draft (a verification gives one more), "mean" the share of those
that were drafted, "tokens_per_step" counts steps without a draft, too, which n-grams have where they find nothing.

    python benchmarks/acceptance.py [--model DIR] [--text DIR] [--contexts 4096 8192 16384 32768] [--temperatures 0 0.7]
    python benchmarks/acceptance.py --jobs 3                     # three engines at a time on one GPU
    python benchmarks/acceptance.py --configs drafted-4 --contexts 4096 16384 --temperatures 0      # enough for a CPU
    python benchmarks/acceptance.py --configs drafted-4 --options '{"draft_kv": "int8"}' --json OUT
    python benchmarks/acceptance.py --chat --model CHAT_MODEL --configs drafted-4 --temperatures 0.7
    python benchmarks/acceptance.py --plot                       # the plot again, from the JSON
    python benchmarks/acceptance.py --kl                         # what the 8-bit cache costs instead
    python benchmarks/acceptance.py --configs drafted-4 --contexts 32768 --temperatures 0.7 --planted 512 \\
        --draft-context all 0.0625 0.125 --draft-selection attention window snapkv      # sparse drafts

Sparse drafts: each --draft-context but "all" with each --draft-selection is an engine of its own; at the end comes a table
of the first draft's acceptance against "all" of the same run. --planted N adds texts in whose middle N tokens of another
excerpt were planted and whose end begins to repeat them ("planted", which is not in "all"): what must be retrieved.

--chat: the 20 instructions of instructions.json, each in the model's chat template, answered until the model ends; a row is
of all of them, its context is 0.

KL: of the next-token distributions of the QUANTSPEC cache from those of vLLM's exact cache, over the same text.
"""

import argparse
import itertools
import json
import os
import subprocess
import sys
import tempfile
import time
from pathlib import Path

os.environ.setdefault("VLLM_ENABLE_V1_MULTIPROCESSING", "0")  # the model is at hand, for --kl
os.environ.setdefault("VLLM_CPU_KVCACHE_SPACE", "2")
os.environ.setdefault("VLLM_LOGGING_LEVEL", "WARNING")

import torch
from common import KV_HELP, QUANTSPEC, TEXT_HELP, engine, excerpts, read_texts, small_model_on_gpu, write_json
from quality import CACHES

from vllm_quantspec.config import DRAFT_SELECTIONS

ROOT = Path(__file__).resolve().parents[1]
SHARED = ROOT.parent / "shared"
# Options of the speculative config; ablations draft as many tokens as any, so that they show every position.
CONFIGS = {f"drafted-{n}": {"num_speculative_tokens": n} for n in (1, 2, 4, 6, 8)} | {
    name: {"num_speculative_tokens": 8, **options}
    for name, options in (
        ("kv-only", {"draft_weights": "target"}),
        ("weights-only", {"draft_kv": "int8"}),
        ("group-64", {"group_size": 64}),
        ("kv-only-group-64", {"draft_weights": "target", "group_size": 64}),
        ("weight-group-64", {"weight_group_size": 64}),
        ("head-16", {"quantize_lm_head": False}),
        ("gptq", {"weight_rounding": "gptq"}),
    )
}
# A peer: what vLLM's n-grams find in the same text.
CONFIGS["ngram"] = {"method": "ngram", "num_speculative_tokens": 5}


# --- Acceptance -------------------------------------------------------------------------------------------------------


def counts(llm) -> list[int]:
    """Drafts so far, then how many of them were accepted at each position."""
    metrics = {m.name: m for m in llm.get_metrics() if m.name.startswith("vllm:spec_decode")}
    accepted = metrics["vllm:spec_decode_num_accepted_tokens_per_pos"].values
    return [int(metrics["vllm:spec_decode_num_drafts"].value), *map(int, accepted)]


def measure(
    llm, prompts: list[list[int]], num_tokens: int, temperature: float, seeded: bool, ends: bool = False
) -> tuple[list[int], int]:
    """Continue the prompts; the drafts of it and how many were accepted at each position, and the tokens written.

    ``ends``: an answer may end before ``num_tokens``.
    """
    from vllm import SamplingParams

    before = counts(llm)
    sampling = {"temperature": temperature, "max_tokens": num_tokens, "ignore_eos": not ends, "detokenize": False}
    params = [SamplingParams(seed=i if seeded else None, **sampling) for i in range(len(prompts))]
    answers = llm.generate([{"prompt_token_ids": p} for p in prompts], params, use_tqdm=False)
    written = sum(len(answer.outputs[0].token_ids) for answer in answers)
    return [a - b for a, b in zip(counts(llm), before, strict=True)], written


def chat_prompts(tokenizer) -> list[list[int]]:
    """The instructions in the model's chat template.

    Raises:
        SystemExit: one sentence, where the model has none.
    """
    if not tokenizer.chat_template:
        raise SystemExit("--chat: this model has no chat template; give a chat model, or leave --chat out.")
    instructions = json.loads(Path(__file__).with_name("instructions.json").read_text(encoding="utf-8"))
    chats = [[{"role": "user", "content": text}] for text in instructions]
    return [tokenizer.apply_chat_template(c, add_generation_prompt=True, tokenize=True, return_dict=False) for c in chats]


def read_of_cache(llm) -> tuple[int, int]:
    """Old pages that draft steps have read so far, and that there were; zeros where they read everything."""
    runner = llm.llm_engine.collective_rpc(lambda worker: [worker.model_runner])[0][0]
    proposer = getattr(runner, "drafter", None) or getattr(runner, "speculator", None)
    share = getattr(getattr(proposer, "page_scores", None), "share", None)
    return (share.read, share.old) if share else (0, 0)


def planted(prompts: list[list[int]], number: int) -> list[list[int]]:
    """The prompts with ``number`` tokens of the next one's start in the middle of each, and the first half of these again at
    its end, as many tokens as before: a model that retrieves goes on with the second half."""
    texts = []
    for prompt, other in zip(prompts, prompts[1:] + prompts[:1], strict=True):
        passage = other[:number]
        half, middle = passage[: number // 2], (len(prompt) - len(passage)) // 2
        text = prompt[:middle] + passage + prompt[middle + len(passage) :]
        texts.append(text[: len(prompt) - len(half)] + half)
    return texts


def cases(configs: list[str], draft_contexts: list[str], selections: list[str]) -> list[tuple[str, dict]]:
    """(configuration, more options of the speculative config), an engine each."""
    found = []
    for name, context in itertools.product(configs, draft_contexts):
        if context == "all":
            found.append((name, {}))
        else:
            found += [(name, {"draft_context": context, "draft_selection": s}) for s in selections]
    return found


def rates(numbers: list[int]) -> list[float]:
    return [n / max(1, numbers[0]) for n in numbers[1:]]


def run_config(name: str, sparse: dict, novels: dict[str, list[int]], args) -> list[dict]:
    """One engine: a row for each context, temperature and batch of prompts."""
    options = CONFIGS[name] | args.options | sparse
    drafted = options["num_speculative_tokens"]
    batch = len(novels) * args.excerpts if torch.cuda.is_available() and not args.chat else args.excerpts
    arguments = {"max_num_seqs": batch, "enable_prefix_caching": False}
    arguments |= small_model_on_gpu(args.kv_gib, batch, 1 + drafted)
    started, rows = time.perf_counter(), []
    seeded = "method" not in options  # vLLM's CPU engine itself fails at a seed and a prompt of several chunks
    # Room for a draft beyond the last token: drafts are cut short at the model's length, and would count as rejected.
    # Of a chat the longest prompt counts.
    contexts = [0] if args.chat else args.contexts
    longest = max(contexts) + args.tokens + 2 * drafted
    if args.chat:
        longest += max(len(p) for p in novels["chat"])
    speculation = QUANTSPEC | options if seeded else options
    with engine(str(args.model), longest, **arguments, speculative_config=speculation) as llm:
        print(f"{name}: engine ready in {time.perf_counter() - started:.0f} s", flush=True)
        for context in contexts:
            prompts = (
                {"all": novels["chat"]}
                if args.chat
                else {novel: excerpts(tokens, context, args.excerpts) for novel, tokens in novels.items()}
            )
            if torch.cuda.is_available() and not args.chat:
                prompts = {"all": sum(prompts.values(), [])}
            if args.planted:
                texts = [excerpt for tokens in novels.values() for excerpt in excerpts(tokens, context, args.excerpts)]
                prompts["planted"] = planted(texts, args.planted)
            for temperature in args.temperatures:
                numbers, read, written = {}, {}, {}
                for novel, p in prompts.items():
                    before = read_of_cache(llm)
                    numbers[novel], written[novel] = measure(llm, p, args.tokens, temperature, seeded, args.chat)
                    read[novel] = [b - a for a, b in zip(before, read_of_cache(llm), strict=True)]
                for sums in (numbers, read):
                    of_novels = [n for novel, n in sums.items() if novel != "planted"]
                    sums.setdefault("all", [sum(n) for n in zip(*of_novels, strict=True)])
                written.setdefault("all", sum(n for novel, n in written.items() if novel != "planted"))
                for novel, n in numbers.items():
                    row = {"config": name, "context": context, "temperature": temperature, "novel": novel}
                    row |= {"drafts": n[0], "per_position": rates(n), "accepted": sum(rates(n))}
                    if sparse:
                        row |= sparse | {"read_share": read[novel][0] / max(1, read[novel][1])}
                    tokens = written[novel]
                    row["tokens_per_step"] = tokens / (tokens - sum(n[1:]))
                    rows.append(row | {"mean": sum(rates(n)) / drafted, "options": options})
                    show(rows[-1])
    print(f"{name}: {time.perf_counter() - started:.0f} s", flush=True)
    return rows


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
    positions = " ".join(f"{r:.3f}" for r in row["per_position"])
    print(
        f"{row['config']:16s} {row['context']:6d} T={row['temperature']:<3g} {row['novel']:12s} {row['drafts']:6d} "
        f" {positions}  mean {row['mean']:.3f}  {1 + row['accepted']:.2f} tokens per verification, "
        f"{row['tokens_per_step']:.2f} per step" + (f"  {sparse_label(row)}" if "draft_context" in row else ""),
        flush=True,
    )


def sparse_label(row: dict) -> str:
    return f"{row['draft_selection']} {row['draft_context']}, {read_share(row):.3f} of the cache read"


def read_share(row: dict) -> float:
    """Of the old tokens, what drafts read: as counted, or as asked for."""
    return row["read_share"] if "read_share" in row else float(row.get("draft_context", 1))


def sparse_table(rows: list[dict]) -> str:
    """Markdown: each policy and budget against "all" with the same configuration, context, temperature and text."""

    def key(row: dict) -> tuple:
        return row["config"], row["context"], row["temperature"], row["novel"]

    dense = {key(row): row for row in rows if "draft_context" not in row}
    lines = [
        "| context | temperature | text | selection | draft_context | cache read | first draft | points less | tokens per "
        "verification | of all |",
        "|---|---|---|---|---|---|---|---|---|---|",
    ]
    for row in rows:
        if row["novel"] not in ("all", "planted"):
            continue
        base = dense.get(key(row))
        first, tokens = row["per_position"][0], 1 + row["accepted"]
        less = f"{100 * (base['per_position'][0] - first):.1f}" if base else ""
        share = f"{100 * tokens / (1 + base['accepted']):.1f} %" if base else ""
        read = f"{100 * read_share(row):.1f} %"
        what = (row["context"], f"{row['temperature']:g}", row["novel"], row.get("draft_selection", ""))
        cells = (*what, row.get("draft_context", "all"), read, f"{first:.3f}", less, f"{tokens:.2f}", share)
        lines.append("| " + " | ".join(map(str, cells)) + " |")
    return "\n".join(lines)


def plot_sparse(path: Path, rows: list[dict]) -> None:
    """The first draft's acceptance against what drafts read, by policy."""
    import matplotlib

    matplotlib.use("Agg")
    import matplotlib.pyplot as plt

    texts = [text for text in ("all", "planted") if any(r["novel"] == text for r in rows)]
    figure, axes = plt.subplots(1, len(texts), figsize=(5.5 * len(texts), 4), squeeze=False)
    for axis, text in zip(axes[0], texts, strict=True):
        lines: dict[str, list[tuple[float, float]]] = {}
        for row in rows:
            if row["novel"] == text:
                where = f"{row['config']}, {row['context'] / 1024:g}k, T={row['temperature']:g}"
                label = f"{row.get('draft_selection', 'all')} ({where})"
                lines.setdefault(label, []).append((100 * read_share(row), 100 * row["per_position"][0]))
        for label, points in lines.items():
            axis.plot(*zip(*sorted(points), strict=True), marker="o", label=label)
        axis.set_xscale("log")
        axis.set_xlabel("old tokens that a draft step reads, %")
        axis.set_ylabel("first draft accepted, %")
        axis.set_title("novels" if text == "all" else "a planted passage repeated")
        axis.grid(alpha=0.3)
        axis.legend(fontsize=7)
    figure.tight_layout()
    figure.savefig(path.with_suffix(".png"), dpi=140)


def plot(path: Path) -> None:
    import matplotlib

    matplotlib.use("Agg")
    import matplotlib.pyplot as plt

    rows = json.loads(path.read_text())["rows"]
    if any("draft_context" in r for r in rows):
        return plot_sparse(path, rows)
    rows = [r for r in rows if r["novel"] == "all"]
    temperatures = sorted({r["temperature"] for r in rows})
    longest = max(r["context"] for r in rows)
    # Above: the default options with most tokens drafted, by context. Below: all options, at the longest context.
    drafted = [r for r in rows if r["config"].startswith("drafted-")] or rows
    default = max(drafted, key=lambda r: len(r["per_position"]))["config"]
    figure, axes = plt.subplots(2, len(temperatures), figsize=(5 * len(temperatures), 7), sharey=True, squeeze=False)
    for column, temperature in enumerate(temperatures):
        for row in rows:
            if row["temperature"] != temperature:
                continue
            context, is_default = f"{row['context'] / 1024:g}k", row["config"] == default
            lines = [(axes[0][column], context)] if is_default else []
            if row["context"] == longest and (is_default or not row["config"].startswith("drafted-")):
                lines.append((axes[1][column], "default" if is_default else row["config"]))
            for axis, label in lines:
                positions = range(1, len(row["per_position"]) + 1)
                axis.plot(positions, [100 * r for r in row["per_position"]], marker=".", label=label)
        axes[0][column].set_title(f"temperature {temperature:g}, default options")
        axes[1][column].set_title(f"temperature {temperature:g}, context {longest / 1024:g}k")
        axes[1][column].set_xlabel("position in the draft")
    for axis in axes.flat:
        axis.grid(alpha=0.3)
        axis.legend(fontsize=8)
    for axis in axes[:, 0]:
        axis.set_ylabel("accepted, % of drafts")
    figure.tight_layout()
    figure.savefig(path.with_suffix(".png"), dpi=140)


def run_jobs(args) -> list[dict]:
    """The engines divided among ``--jobs`` processes of this script; their rows."""
    every = cases(args.configs, args.draft_context, args.draft_selection)
    with tempfile.TemporaryDirectory() as folder:
        jobs = []
        for i in range(min(args.jobs, len(every))):
            part = Path(folder, f"{i}.json")
            more = ["--jobs", "1", "--json", str(part), "--cases", json.dumps(every[i :: args.jobs])]
            # Each compiles into a folder of its own: engines that start together would write the same files.
            environment = os.environ | {"VLLM_CACHE_ROOT": str(Path(folder, f"cache-{i}"))}
            jobs.append((subprocess.Popen([sys.executable, __file__, *sys.argv[1:], *more], env=environment), part))
        failed = [part.stem for process, part in jobs if process.wait()]
        rows = [row for _, part in jobs if part.exists() for row in json.loads(part.read_text())["rows"]]
    if failed:
        print(f"{len(failed)} of {len(jobs)} jobs failed; the rows of the others are kept", flush=True)
    sparse = ("draft_context", "draft_selection")
    return sorted(rows, key=lambda row: every.index((row["config"], {k: row[k] for k in sparse if k in row})))


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--model", type=Path, default=SHARED / "models/books-30m")
    parser.add_argument("--text", type=Path, default=SHARED / "data/books", help=TEXT_HELP)
    parser.add_argument("--configs", nargs="+", choices=CONFIGS, default=list(CONFIGS))
    parser.add_argument("--options", type=json.loads, default={}, help="more options of the speculative config, as JSON")
    parser.add_argument("--draft-context", nargs="+", default=["all"], help="all, auto, tokens or fractions")
    parser.add_argument("--draft-selection", nargs="+", choices=DRAFT_SELECTIONS, default=["attention"])
    parser.add_argument("--planted", type=int, default=0, metavar="N", help="tokens planted in the middle of more texts")
    parser.add_argument("--contexts", type=int, nargs="+", default=[4096, 8192, 16384, 32768])
    parser.add_argument("--temperatures", type=float, nargs="+", default=[0.0, 0.7])
    parser.add_argument("--excerpts", type=int, default=8, help="of each novel")
    parser.add_argument("--tokens", type=int, default=256, help="generated from each excerpt")
    parser.add_argument("--kv-gib", type=float, default=12, help=KV_HELP)
    parser.add_argument("--jobs", type=int, default=1, help="engines at a time")
    parser.add_argument("--kl", action="store_true", help="measure the cache's error, not acceptance")
    parser.add_argument("--kl-caches", nargs="+", choices=CACHES, default=["quantspec"])
    parser.add_argument("--kl-dtype", default="auto", help="float32 leaves out what 16-bit arithmetic differs by itself")
    parser.add_argument("--kl-tokens", type=int, default=16384)
    parser.add_argument("--kl-decode-tokens", type=int, default=2048, help="of these through the decode path")
    parser.add_argument("--json", type=Path, help="default: benchmarks/results/acceptance-MODEL.json")
    parser.add_argument("--chat", action="store_true", help="answer instructions in the model's chat template, no novels")
    parser.add_argument("--plot", action="store_true", help="only draw the plot from the JSON")
    parser.add_argument("--cases", type=json.loads, help=argparse.SUPPRESS)  # of one of the jobs
    args = parser.parse_args()
    is_sparse = args.draft_context != ["all"]
    names = {"cache_error": args.kl, "acceptance-chat": args.chat, "sparse_acceptance": is_sparse, "acceptance": True}
    kind = next(name for name, applies in names.items() if applies)
    path = args.json or ROOT / f"benchmarks/results/{kind}-{args.model.name}.json"
    if args.plot:
        return plot(path)
    sizes = {"model": args.model.name, "excerpts": args.excerpts, "tokens": args.tokens}
    if args.jobs > 1 and not args.kl:
        rows = run_jobs(args)
        write_json(path, rows, **sizes)
        if is_sparse:
            print(sparse_table(rows))
        return None if args.chat else plot(path)

    from transformers import AutoTokenizer

    tokenizer = AutoTokenizer.from_pretrained(args.model)
    if args.chat:
        novels = {"chat": chat_prompts(tokenizer)}
    else:
        novels = {name: tokenizer.encode(text) for name, text in read_texts(args.text).items()}
    rows = []
    if args.kl:
        speculating = {"speculative_config": {**QUANTSPEC, "num_speculative_tokens": 4}}
        for novel, cache in itertools.product(novels, args.kl_caches):
            tokens, arguments = novels[novel], CACHES[cache]
            ways = [("prefill", args.kl_tokens, 512, arguments)]
            if cache.startswith("quantspec"):
                # No more tokens in a step than a verification has: these take the way of the decode rows.
                ways.append(("decode", args.kl_decode_tokens, 5, arguments | speculating))
            for way, size, chunk, arguments in ways:
                start = (len(tokens) - size) // 2
                error = cache_error(str(args.model), tokens[start : start + size], chunk, arguments, args.kl_dtype)
                rows.append({"cache": cache, "novel": novel, "path": way, **error})
                print(rows[-1], flush=True)
                write_json(path, rows, model=args.model.name, dtype=args.kl_dtype)
        return
    for name, sparse in args.cases or cases(args.configs, args.draft_context, args.draft_selection):
        rows += run_config(name, sparse, novels, args)
        write_json(path, rows, **sizes)
    if is_sparse:
        print(sparse_table(rows))
    if not args.chat:
        plot(path)


if __name__ == "__main__":
    main()
