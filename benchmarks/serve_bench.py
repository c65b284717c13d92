#!/usr/bin/env python3
"""A model of real size under load, on a GPU: `vllm serve` with random weights, serve_load.py's clients, `vllm bench serve`.

    python benchmarks/serve_bench.py                        # 8B shape: QuantSpec, then BF16 KV, one GPU
    python benchmarks/serve_bench.py --configs quantspec --seconds 60
    python benchmarks/serve_bench.py --configs drafts-auto quantspec bf16   # the number of drafts chosen, 4, and none
    python benchmarks/serve_bench.py --configs cache-int4 fp8 bf16 --concurrency 64 --prompts 64 --input 16384

Calls may run at once into one --json, each with a configuration and a GPU (CUDA_VISIBLE_DEVICES) of its own.

For every configuration: a server is started, asked by the clients of serve_load.py (with their checks: as many tokens as
asked for, stated and streamed; the text is that of the tokens; nothing left in the KV cache; memory), and then by `vllm
bench serve`, which must complete every request with all its tokens.

The load of serve_load.py is mostly prompts: up to --max-prompt tokens for at most 96 of answer. ``over_bf16`` has its
answers and its tokens per second, and the tokens per second of `vllm bench serve`, over those of the row ``bf16``.
``drafts-auto`` is QuantSpec with ``num_speculative_tokens: auto``.

With random weights nearly all tokens are tied, so drafts are accepted by vLLM's synthetic rejection sampler (as in
end_to_end.py), and a streamed answer is not compared with the same answer in one piece (serve_load.py does that, with a
model that has something to say). The tokenizer knows as many words as the model has tokens, "<17>" for 17, so a lost or
doubled token shows in the text.
"""

import argparse
import json
import math
import os
import random
import subprocess
import sys
import tempfile
import urllib.parse
from pathlib import Path

from common import QUANTSPEC, RESULTS, write_json
from end_to_end_configs import DRAFTS_AUTO, synthetic
from model_shapes import SHAPES, model_config
from serve_load import VLLM, Load, start_server, stop_server

# {configuration that drafts: its num_speculative_tokens}
DRAFTING = {"quantspec": 4, "int4": 4, DRAFTS_AUTO: "auto"}
BENCH_SECONDS = 3600  # longest that `vllm bench serve` may take
# {configuration: its --kv-cache-dtype}
CONFIGS = {
    "quantspec": "quantspec_int8",
    DRAFTS_AUTO: "quantspec_int8",
    "int4": "quantspec_int4",
    "cache": "quantspec_int8",
    "cache-int4": "quantspec_int4",
    "fp8": "fp8",
    "bf16": None,
}


def write_model(folder: Path, shape: dict) -> None:
    """The config.json ``shape`` and a tokenizer of words."""
    from tokenizers import Regex, Tokenizer, decoders, models, pre_tokenizers

    (folder / "config.json").write_text(json.dumps(shape))
    tokenizer = Tokenizer(models.WordLevel({f"<{i}>": i for i in range(shape["vocab_size"])}, unk_token="<0>"))
    tokenizer.pre_tokenizer = pre_tokenizers.Split(Regex(r"<\d+>"), "isolated")
    tokenizer.decoder = decoders.Fuse()  # no spaces: a server does not send one before the first word
    tokenizer.save(str(folder / "tokenizer.json"))
    # No special tokens: a server leaves these out of the text.
    (folder / "tokenizer_config.json").write_text(json.dumps({"tokenizer_class": "PreTrainedTokenizerFast"}))


def server_arguments(config: str, acceptance: float) -> list[str]:
    """`vllm serve` arguments of one of ``CONFIGS``."""
    arguments = ["--load-format", "dummy"]
    if CONFIGS[config]:
        arguments += ["--kv-cache-dtype", CONFIGS[config]]
    if config in DRAFTING:
        number = DRAFTING[config]
        rates = synthetic(DRAFTS_AUTO if number == "auto" else str(number), acceptance)
        options = {**QUANTSPEC, "num_speculative_tokens": number, **rates}
        arguments += ["--speculative-config", json.dumps(options)]
    return arguments


def bench(url: str, folder: Path, args) -> dict:
    """`vllm bench serve` against a server: its result, and what is wrong with it."""
    address = urllib.parse.urlsplit(url)
    command = [*VLLM, "bench", "serve", "--host", address.hostname, "--port", str(address.port), "--model", str(folder)]
    command += ["--dataset-name", "random", "--random-input-len", str(args.input), "--random-output-len", str(args.output)]
    command += ["--num-prompts", str(args.prompts), "--max-concurrency", str(args.concurrency), "--num-warmups", "2"]
    command += ["--ignore-eos", "--temperature", "0", "--disable-tqdm", "--save-result", "--result-dir", str(folder)]
    command += ["--result-filename", "bench.json"]
    try:
        done = subprocess.run(command, stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True, timeout=BENCH_SECONDS)
    except subprocess.TimeoutExpired as error:
        return {"errors": [f"vllm bench serve did not end within {BENCH_SECONDS} s: {str(error.output)[-2000:]}"]}
    if done.returncode:
        return {"errors": [f"vllm bench serve ended with {done.returncode}: {done.stdout[-2000:]}"]}
    result = json.loads((folder / "bench.json").read_text())
    keys = ("completed", "failed", "total_output_tokens", "duration", "output_throughput", "total_token_throughput")
    keys += ("mean_ttft_ms", "p99_ttft_ms", "mean_tpot_ms", "p99_tpot_ms", "p99_itl_ms")
    row = {key: result[key] for key in keys if key in result} | {"errors": []}
    if row["completed"] != args.prompts or row["failed"]:
        row["errors"].append(f"{row['completed']} of {args.prompts} requests completed, {row['failed']} failed")
    if row["total_output_tokens"] != args.prompts * args.output:
        row["errors"].append(f"{row['total_output_tokens']} tokens, asked for {args.prompts * args.output}")
    return row


def serve(config: str, folder: Path, args) -> dict:
    """One server from start to end; what was seen."""
    vocabulary = model_config(args.shape)["vocab_size"]
    tokens = random.Random(0).choices(range(3, vocabulary), k=args.max_prompt + 1)
    log = Path(tempfile.gettempdir()) / f"serve_bench-{config}-{os.getpid()}.log"
    longest = max(args.max_prompt, args.input + args.output) + 128
    arguments = server_arguments(config, args.acceptance)
    if args.gpu_memory_utilization:
        arguments += ["--gpu-memory-utilization", str(args.gpu_memory_utilization)]
    process, url = start_server(str(folder), longest, args.concurrency, log, arguments)
    try:
        load = Load(url, tokens, 2 * args.concurrency, args.seconds, args.max_prompt, math.inf, process.pid)
        summary = load.run()
        print(json.dumps({"config": config, "load": summary}, indent=1), flush=True)
        row = {"config": config, "load": summary, "bench": bench(url, folder, args)}
        load.sample(load.samples[-1]["seconds"], progress=False)
        row["kv_cache_usage_afterwards"] = load.wait_until_idle()
        row["memory_mib_after_bench"] = load.samples[-1]["memory_mib"]
    finally:
        stop_server(process)
    row["errors"] = summary["errors"] + row["bench"].pop("errors")
    if summary["kv_cache_usage_afterwards"] or row["kv_cache_usage_afterwards"]:
        row["errors"].append("blocks of the KV cache are in use when nothing runs")
    return row


def compare_with_bf16(rows: list[dict]) -> None:
    """To every row, where there is one of ``bf16``: what was answered over what that one answered."""
    base = next((row for row in rows if row["config"] == "bf16"), None)
    for row in rows if base else []:
        row["over_bf16"] = {
            "answers": row["load"]["requests"] / row["load"]["seconds"] * base["load"]["seconds"] / base["load"]["requests"],
            "tokens": row["load"]["generated_tokens"]
            / row["load"]["seconds"]
            * base["load"]["seconds"]
            / base["load"]["generated_tokens"],
        }
        if "output_throughput" in row["bench"] and "output_throughput" in base["bench"]:
            row["over_bf16"]["bench"] = row["bench"]["output_throughput"] / base["bench"]["output_throughput"]


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--shape", choices=SHAPES, default="8b")
    parser.add_argument("--configs", nargs="+", choices=CONFIGS, default=["quantspec", "bf16"])
    parser.add_argument("--acceptance", type=float, default=0.938, help="of each draft, as in end_to_end.py")
    parser.add_argument("--seconds", type=float, default=40, help="of serve_load.py's clients")
    parser.add_argument("--max-prompt", type=int, default=8000, help="tokens of their longest prompt")
    parser.add_argument("--concurrency", type=int, default=16, help="sequences at a time; twice as many clients")
    parser.add_argument("--prompts", type=int, default=32, help="of `vllm bench serve`, and so on:")
    parser.add_argument("--input", type=int, default=8192)
    parser.add_argument("--output", type=int, default=512)
    parser.add_argument("--gpu-memory-utilization", type=float, help="of the servers, e.g. to have a smaller GPU's memory")
    parser.add_argument("--json", type=Path, help="write the result here")
    args = parser.parse_args()
    path = args.json or RESULTS / f"serve_bench-{args.shape}.json"
    with tempfile.TemporaryDirectory() as folder:
        write_model(Path(folder), model_config(args.shape))
        for config in args.configs:
            row = serve(config, Path(folder), args)
            print(json.dumps(row, indent=1), flush=True)
            rows = json.loads(path.read_text())["rows"] if path.exists() else []  # others may have written meanwhile
            rows = [r for r in rows if r["config"] != config] + [row]
            compare_with_bf16(rows)
            settings = {k: v for k, v in vars(args).items() if k not in ("json", "configs")}
            write_json(path, rows, settings=settings)
    for row in rows:
        print(row["config"], {name: round(ratio, 3) for name, ratio in row.get("over_bf16", {}).items()}, flush=True)
    sys.exit(any(row["errors"] for row in rows))


if __name__ == "__main__":
    main()
