"""Decode speed and memory of whole engines on a model's shape: QuantSpec, its cache alone, and what vLLM has.

    python benchmarks/end_to_end.py                                # 8B shape, 4k to 128k, batch 1, 4 and 16, one GPU
    python benchmarks/end_to_end.py --configs self-5 --points 32768x1   # one more row for the same JSON
    python benchmarks/end_to_end.py --configs drafts-auto               # the number of drafts chosen, and each held
    python benchmarks/end_to_end.py --shape 7b --configs bf16 fp8 cache 3 5
    python benchmarks/end_to_end.py --shape qwen3-30b-a3b --configs bf16 3 --points 8192x1 131072x1 32768x8
    python benchmarks/end_to_end.py --shape qwen3-30b-a3b --configs 3 --options '{"draft_experts": "int4"}' --json OUT.json
    python benchmarks/end_to_end.py --shape MODEL/config.json --configs bf16 4
    python benchmarks/end_to_end.py --shape 8b-w4a16 --configs bf16 marlin cache 3 5 --one-copy    # a 4-bit checkpoint
    python benchmarks/end_to_end_report.py --shape 8b              # tables and the plot, from the JSON

A configuration is an engine of its own, with torch.compile and CUDA graphs on:

    bf16, fp8   vLLM's KV cache in 16 and 8 bits (FlashAttention 3 on Hopper)
    marlin      as bf16, with vLLM's Marlin for a 4-bit checkpoint (bf16 has what vLLM chooses: Machete on Hopper)
    int4_per_token_head, turboquant_4bit_nc, turboquant_k8v4, nvfp4     vLLM's other caches of fewer than 8 bits
    cache       the hierarchical cache alone
    cache-int4  the same in 4 bits (``--kv-cache-dtype quantspec_int4``)
    N           QuantSpec, N tokens drafted; "QuantSpec with γ searched" is the best N at each point
    int4-N      QuantSpec on the cache in 4 bits
    sparse8-N, sparse16-N   QuantSpec whose drafts read an eighth, a sixteenth of the old tokens (``draft_context``)
    target16-N  the same sixteenth with the target's own weights, as Vegas and MagicDec draft, but in 4 bits
    auto-N      QuantSpec with ``draft_context: auto``, which reads a sixteenth where that pays
    drafts-auto  QuantSpec with ``num_speculative_tokens: auto``; of the same engine and point also rows ``held-N``, for
                every N that it may choose: it drafts N tokens in every step then
    ngram-N     vLLM's n-gram speculation on the GPU (``ngram_gpu``: the proposer of ``ngram``, with async scheduling)
    draft-N     vLLM's ``draft_model`` with a second, smaller model: Llama-3.2-1B's shape for 8b, TinyLlama's for 7b
    self-N      vLLM's ``draft_model`` with the same model again as its draft: what self-speculation costs without QuantSpec
    v1-draft-N, v1-self-N   the same on vLLM's older model runner: the newer one (0.32) has no CUDA graphs for such drafts

Weights are random (``load_format="dummy"``): a step's time does not depend on them, but acceptance does. So drafts are
accepted by vLLM's ``synthetic`` rejection sampler, each with probability ``--acceptance`` given that the one before was
(0.938: books-30m at temperature 0.7, 4k to 32k tokens, benchmarks/results/acceptance-books-30m.json). ``ACCEPTANCE`` in
end_to_end_configs.py says what the others are given and why. Ratios use the expected tokens of a verification, not those
that a run of some dozen steps happened to draw (``ms_per_token`` has the latter). Whatever the acceptance, a verification
must yield ``tokens_to_break_even`` tokens to be as fast as BF16.

Prompts are not computed: a prefill step returns at once and leaves the cache as it is, since decoding takes as long
whatever the cache holds. A number is the median of ``--repeats`` stretches of ``--tokens`` tokens per sequence, with all
sequences running. A point for which the cache is too small is not run: ``sequences_that_fit`` says how many would.

``drafts-auto`` has learned for ``--learn`` steps at a point before it is timed, on sequences of its own; then it is timed
as a whole, with the steps in which it tries other numbers. While a number is held it learns nothing. ``numbers`` are the
steps with each number of drafts, by which the expected tokens of a step are counted, and ``over_best_fixed`` is its speed
over that of the best row ``held-N`` or ``N`` in the JSON.

On a CPU, where vLLM has no synthetic acceptance, the script can be tried (``--shape tiny``), not measured.

vLLM reserves the whole card, so ``peak_gib`` is what a point needs of it: the blocks of the KV cache that its sequences
hold, and everything else at its peak as vLLM's own profiling found it (weights, INT4 copy, a prompt chunk of 16k tokens,
sampling, CUDA graphs). ``start_s`` is the time of an engine's start (random weights, INT4 copy,
compilation, graphs; caches of compiled code as the machine has them), ``capacity_tokens`` what its KV cache holds.
"""

import argparse
import contextlib
import itertools
import json
import subprocess
import sys
import time
from collections.abc import Iterator
from pathlib import Path

from common import RESULTS, write_json
from end_to_end_configs import DRAFTS_AUTO, acceptance_of, drafted, drafter, is_held
from end_to_end_engine import READY, ROW, child
from model_shapes import DRAFTS, SHAPES, model_config, shape_name

from vllm_quantspec.estimate import expected_tokens

CONFIGS = ["bf16", "fp8", "cache", "3", "5", "draft-5", "ngram-5"]
POINTS = [f"{kilo * 1024}x{batch}" for batch in (1, 4, 16) for kilo in (4, 8, 16, 32, 64, 128)]


def add_derived(rows: list[dict], acceptance: float) -> None:
    """To every measured row: speed at the expected tokens per verification, its ratio to BF16 KV, and peak memory."""
    base = {(r["context"], r["batch"]): r for r in rows if r["config"] == "bf16"}
    for row in rows:
        bf16 = base.get((row["context"], row["batch"]), {})
        if "prefill_s" in row and "prefill_s" in bf16:
            row["prefill_over_bf16"] = row["prefill_s"] / bf16["prefill_s"]
        if "ms_per_step" not in row:
            continue
        gamma = drafted(row["config"])

        def ms(each: float, row=row) -> float:
            return row["ms_per_step"] / tokens_of_a_step(row, each)

        each = acceptance_of(row["config"], acceptance)
        row["expected_ms_per_token"] = ms(each)
        row["decode_tokens_per_s"] = 1e3 * row["batch"] / ms(each)
        if "other_peak_gib" in row and "kv_gib" in row:
            row["peak_gib"] = row["other_peak_gib"] + row["kv_gib"]
        if "ms_per_step" in bf16:
            row["speedup"] = bf16["ms_per_step"] / ms(each)
            if gamma or "numbers" in row:
                row["tokens_to_break_even"] = row["ms_per_step"] / bf16["ms_per_step"]
                row["speedup_at_0.97"] = bf16["ms_per_step"] / ms(max(each, 0.97))


def tokens_of_a_step(row: dict, each: float) -> float:
    """Tokens that a step is expected to bring of a request, with drafts accepted ``each`` of the time after those before."""
    numbers = row.get("numbers") or {drafted(row["config"]): 1}
    return sum(steps * expected_tokens(each, int(number)) for number, steps in numbers.items()) / sum(numbers.values())


def compare_with_fixed(rows: list[dict]) -> None:
    """To every row of ``drafts-auto``: the best fixed number of the same point, and the speed over that one's."""
    fixed: dict[tuple[int, int], dict] = {}
    for row in rows:
        if "decode_tokens_per_s" in row and (row["config"].isdigit() or is_held(row["config"])):
            point = row["context"], row["batch"]
            fixed[point] = max(row, fixed.get(point, row), key=lambda r: r["decode_tokens_per_s"])
    for row in rows:
        best = fixed.get((row["context"], row["batch"]))
        if row["config"] == DRAFTS_AUTO and best and "decode_tokens_per_s" in row:
            row["best_fixed"] = best["config"]
            row["over_best_fixed"] = row["decode_tokens_per_s"] / best["decode_tokens_per_s"]


def start(config: str) -> subprocess.Popen:
    """The process of a configuration's engine; it imports what it needs, and then waits for a line."""
    command = [sys.executable, __file__, *sys.argv[1:], "--child", config]
    pipe = subprocess.PIPE
    return subprocess.Popen(command, stdin=pipe, stdout=pipe, stderr=subprocess.STDOUT, text=True)


def say_go(process: subprocess.Popen) -> None:
    with contextlib.suppress(BrokenPipeError):  # it has failed already: its output says why
        process.stdin.write("go\n")
        process.stdin.flush()


def one_by_one(configs: list[str]) -> Iterator[tuple[str, subprocess.Popen, list[str]]]:
    """An engine after the other; the next one already imports what it needs. (configuration, process, output so far)"""
    waiting = start(configs[0])
    for config, following in zip(configs, [*configs[1:], None], strict=True):
        process, waiting = waiting, start(following) if following else None
        say_go(process)
        yield config, process, []


def all_started(configs: list[str]) -> Iterator[tuple[str, subprocess.Popen, list[str]]]:
    """All engines are started at once, and measured one after the other when all are ready."""
    processes = [start(config) for config in configs]
    for process in processes:
        say_go(process)
    outputs = [list(itertools.takewhile(lambda line: line.strip() != READY, process.stdout)) for process in processes]
    for config, process, output in zip(configs, processes, outputs, strict=True):
        say_go(process)
        yield config, process, output[-40:]


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--shape", default="8b", help=f"{', '.join(SHAPES)}, or a config.json or its folder")
    parser.add_argument("--layers", type=int, help="fewer layers, to try the script out")
    parser.add_argument("--points", nargs="+", default=POINTS, help="CONTEXTxBATCH, e.g. 131072x1")
    parser.add_argument("--configs", nargs="+", default=CONFIGS, help="added to what the JSON has, see above")
    parser.add_argument("--acceptance", type=float, default=0.938)
    parser.add_argument("--options", default="{}", help="more options of QuantSpec's speculative config, as JSON")
    parser.add_argument("--one-copy", action="store_true", help="of a 4-bit checkpoint, with QuantSpec and its cache alone")
    parser.add_argument("--tokens", type=int, default=32)
    parser.add_argument("--repeats", type=int, default=3)
    parser.add_argument("--learn", type=int, default=320, help="steps that drafts-auto has at a point before it is timed")
    parser.add_argument("--tensor-parallel-size", type=int, default=1, help="a profile sees one process only")
    parser.add_argument(
        "--together",
        type=float,
        metavar="GIB",
        help="start all engines at once (the GPUs must hold all), with room for the tokens that BF16 has in so many GiB",
    )
    parser.add_argument("--prefill", action="store_true", help="also time the longest context's prompt (batch 0)")
    parser.add_argument("--profile", nargs="*", default=[], metavar="CONFIG", help="of these, say where a step's time goes")
    parser.add_argument("--json", type=Path)
    parser.add_argument("--child", help=argparse.SUPPRESS)
    args = parser.parse_args()
    try:
        model_config(args.shape)
    except ValueError as error:
        parser.error(str(error))
    if wrong := [config for config in args.configs if is_held(config)]:
        parser.error(f"{wrong[0]} is no configuration but a row of {DRAFTS_AUTO}, which holds every number; name that one.")
    if args.shape not in DRAFTS and any(drafter(config) == "draft" for config in args.configs):
        parser.error(f"draft-N needs a second model's shape, which there is for {', '.join(DRAFTS)}, not for {args.shape}.")
    path = args.json or RESULTS / f"end_to_end-{shape_name(args.shape)}.json"
    if args.child:
        return child(args)
    rows = json.loads(path.read_text())["rows"] if path.exists() else []
    engines = all_started if args.together else one_by_one
    for config, process, tail in engines(args.configs):
        started = time.perf_counter()
        for line in process.stdout:
            tail = [*tail[-40:], line]
            if line.startswith(ROW):
                row = json.loads(line.removeprefix(ROW))
                rows = [r for r in rows if any(r[k] != row[k] for k in ("config", "context", "batch"))] + [row]
                print({k: round(v, 4) if isinstance(v, float) else v for k, v in row.items()}, flush=True)
                # After every row: a run that is cut off keeps what it has.
                add_derived(rows, args.acceptance)
                compare_with_fixed(rows)
                sizes = {"shape": shape_name(args.shape), "tensor_parallel_size": args.tensor_parallel_size}
                write_json(path, rows, **sizes, acceptance=args.acceptance, options=json.loads(args.options))
        if process.wait():
            print(f"{config} failed:\n" + "".join(tail), flush=True)
        print(f"{config}: {time.perf_counter() - started:.0f} s", flush=True)


if __name__ == "__main__":
    main()
