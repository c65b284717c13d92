"""Complete a file of prompts with QuantSpec on Ray Data, on one machine or on a cluster; run it again to resume.

    python examples/ray_batch.py prompts.jsonl completions.jsonl --model MODEL

Each input line is a JSON object with "id" (a string or an integer, unique), "prompt", and optionally sampling parameters
of its own, such as "max_tokens" or "temperature". Each output line has "id", "text", "num_prompt_tokens" and
"num_generated_tokens", or "id" and "error" where the engine refused the prompt (delete that line to try it again). Lines
come in the order of completion.

The output file is also the record of what is done: lines are appended and synced block by block, and a later run with the
same arguments skips the ids that are there, after cutting off a line that a kill left unfinished.

With GPUs every engine takes --tensor-parallel-size of them, as Ray Data decides. Without a GPU in the cluster an engine
takes a CPU per worker and starts its workers as processes, because vLLM's Ray executor does not know its CPU platform.
"""

from __future__ import annotations

import argparse
import fcntl
import json
import os
import sys
from pathlib import Path
from typing import Any, BinaryIO

# vLLM's defaults. Every row is given all of them: rows of one block share a schema, where a missing value becomes None.
SAMPLING = {
    "max_tokens": 16,
    "min_tokens": 0,
    "temperature": 1.0,
    "top_p": 1.0,
    "top_k": 0,
    "min_p": 0.0,
    "seed": None,
    "presence_penalty": 0.0,
    "frequency_penalty": 0.0,
    "repetition_penalty": 1.0,
    "ignore_eos": False,
    "stop": [],
    "stop_token_ids": [],
}
PASSED_ON = ("VLLM_", "HF_", "OMP_", "KMP_")  # environment variables that the engines get from this process


def main() -> None:
    args = parse_arguments()
    # A second run at the same time would repeat the work and the rows: whoever holds the lock is the only writer.
    args.output.parent.mkdir(parents=True, exist_ok=True)
    with args.output.open("a+b") as output:
        try:
            fcntl.flock(output, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except OSError:
            sys.exit(f"{args.output} is being written by another run")
        done = finished_ids(output)
        rows = read_rows(args.input, args.sampling_params)
        pending = [row for row in rows if row["id"] not in done]
        say(f"{len(rows)} rows, {len(rows) - len(pending)} of them done before")
        if pending:
            complete(pending, output, done, args)
    missing = sum(row["id"] not in done for row in rows)
    if missing:
        sys.exit(f"{missing} of {len(rows)} rows are missing; run the same command again")


def parse_arguments() -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("input", type=Path, help="JSON lines of prompts")
    parser.add_argument("output", type=Path, help="JSON lines of completions, appended to")
    parser.add_argument("--model", required=True, help="name or path; a path must exist on every node")
    parser.add_argument("--concurrency", type=int, default=1, help="engines, each with a copy of the model (%(default)s)")
    parser.add_argument("--tensor-parallel-size", type=int, default=1, help="workers of an engine (%(default)s)")
    parser.add_argument(
        "--speculative-config", type=word_or_json, default="quantspec", help="quantspec, JSON, or none (%(default)s)"
    )
    parser.add_argument("--sampling-params", type=json.loads, default={}, help="JSON; what a row says of itself goes before")
    parser.add_argument("--engine-kwargs", type=json.loads, default={}, help="JSON: further arguments of vLLM's engine")
    parser.add_argument("--batch-size", type=int, default=32, help="rows that are saved together (%(default)s)")
    parser.add_argument("--address", default="local", help="'auto' or HOST:PORT of a Ray cluster; default: start one here")
    parser.add_argument("--return-token-ids", action="store_true", help='add "token_ids" to each line')
    parser.add_argument("--verbose", action="store_true", help="show the engines' logs")
    return parser.parse_args()


def word_or_json(text: str) -> Any:
    return json.loads(text) if text.startswith("{") else None if text == "none" else text


def finished_ids(output: BinaryIO) -> set[str | int]:
    """Ids of the complete lines of the output; whatever follows them is cut off."""
    output.seek(0)
    ids, end = set(), 0
    for line in output:
        try:
            if not line.endswith(b"\n"):
                break
            ids.add(json.loads(line)["id"])
        except (ValueError, TypeError, KeyError):
            break
        end += len(line)
    rest = os.fstat(output.fileno()).st_size - end
    if rest:
        output.seek(end)
        if b"\n" in output.read().rstrip(b"\n"):  # a kill leaves one bad line, the last
            sys.exit(f"{output.name}: the line at byte {end} is not a completion; repair or move the file")
        say(f"cutting off an unfinished line of {rest} bytes")
        output.truncate(end)
    return ids


def read_rows(path: Path, defaults: dict[str, Any]) -> list[dict[str, Any]]:
    """Validated rows: id, prompt, sampling_params. A mistake ends the run before an engine starts."""
    rows, seen = [], set()
    check_sampling(defaults, "--sampling-params")
    with path.open(encoding="utf-8") as lines:
        for number, line in enumerate(lines, start=1):
            if not line.strip():
                continue
            where = f"{path}:{number}"
            try:
                row = json.loads(line)
            except ValueError as error:
                sys.exit(f"{where}: not JSON ({error})")
            if not isinstance(row, dict) or type(row.get("id")) not in (str, int) or not isinstance(row.get("prompt"), str):
                sys.exit(f'{where}: needs "id" (a string or an integer) and "prompt" (a string)')
            key, prompt = row.pop("id"), row.pop("prompt")
            if key in seen:
                sys.exit(f"{where}: the id {key!r} is there twice")
            seen.add(key)
            check_sampling(row, where)
            sampling = {**SAMPLING, **defaults, **row}
            if isinstance(sampling["stop"], str):
                sampling["stop"] = [sampling["stop"]]
            rows.append({"id": key, "prompt": prompt, "sampling_params": sampling})
    return rows


def check_sampling(params: dict[str, Any], where: str) -> None:
    unknown = sorted(params.keys() - SAMPLING.keys())
    if unknown:
        sys.exit(f"{where}: unknown sampling parameters {', '.join(unknown)}; known are {', '.join(SAMPLING)}")


def complete(pending: list[dict[str, Any]], output: BinaryIO, done: set[str | int], args: argparse.Namespace) -> None:
    """Run the pending rows through the engines and append what comes back."""
    if not args.verbose:
        os.environ.setdefault("VLLM_LOGGING_LEVEL", "WARNING")
    import ray
    from ray.data.llm import build_processor, vLLMEngineProcessorConfig

    workers = args.concurrency * args.tensor_parallel_size
    if args.address == "local":
        # Without a GPU a worker takes a CPU of Ray's; one more is for reading and writing the rows.
        cpus = max(os.cpu_count() or 1, workers + 1)
        ray.init(address="local", num_cpus=cpus, include_dashboard=False)
    else:
        ray.init(address=args.address)
    ray.data.DataContext.get_current().enable_progress_bars = False

    engine = {"tensor_parallel_size": args.tensor_parallel_size, "speculative_config": args.speculative_config}
    placement = None  # Ray Data's own: a GPU for every worker
    if not ray.cluster_resources().get("GPU"):
        placement = {"bundle_per_worker": {"CPU": 1}}
        engine["distributed_executor_backend"] = "mp"
    path = Path(args.model)
    config = vLLMEngineProcessorConfig(
        model_source=str(path.resolve()) if path.exists() else args.model,
        engine_kwargs={**engine, **args.engine_kwargs},
        concurrency=(args.concurrency, args.concurrency),
        batch_size=args.batch_size,
        placement_group_config=placement,
        runtime_env={"env_vars": {k: v for k, v in os.environ.items() if k.startswith(PASSED_ON)}},
        should_continue_on_error=True,  # a prompt that is too long must not end the run
        log_engine_metrics=False,  # they need ray[default]
        # The engine itself does both, and base models have no chat template.
        chat_template_stage=False,
        tokenize_stage=False,
        detokenize_stage=False,
    )
    return_token_ids = args.return_token_ids

    def completion(row: dict[str, Any]) -> dict[str, str]:
        line = {
            "id": json.loads(row["key"]),
            "text": row["generated_text"],
            "num_prompt_tokens": int(row["num_input_tokens"]),
            "num_generated_tokens": int(row["num_generated_tokens"]),
        }
        if return_token_ids:
            line["token_ids"] = [int(token) for token in row["generated_tokens"]]
        return {"line": json.dumps(line, ensure_ascii=False)}

    processor = build_processor(config, preprocess=lambda row: json.loads(row["request"]), postprocess=completion)
    # JSON, because ids may be of two types and a column is of one.
    items = [{"key": json.dumps(row.pop("id")), "request": json.dumps(row)} for row in [dict(row) for row in pending]]
    blocks = -(-len(items) // args.batch_size)
    finished, errors = 0, 0
    for table in processor(ray.data.from_items(items, override_num_blocks=blocks)).iter_batches(
        batch_size=None, batch_format="pyarrow", prefetch_batches=0
    ):
        lines = []
        for row in table.to_pylist():
            if row["__inference_error__"]:
                row["line"] = json.dumps({"id": json.loads(row["key"]), "error": row["__inference_error__"]})
                errors += 1
            key = json.loads(row["line"])["id"]
            if key not in done:  # Ray may run a block again after a node is lost
                done.add(key)
                lines.append(row["line"] + "\n")
        output.write("".join(lines).encode())
        output.flush()
        os.fsync(output.fileno())
        finished += len(lines)
        say(f"{finished} of {len(items)} rows" + (f", {errors} with an error" if errors else ""))
    ray.shutdown()


def say(message: str) -> None:
    print(f"[ray_batch] {message}", file=sys.stderr, flush=True)


if __name__ == "__main__":
    main()
