"""One engine of end_to_end.py, in a process of its own: it starts, skips prompts, and is measured at all points."""

import functools
import json
import os
import sys
import tempfile
import time
from pathlib import Path

from end_to_end_configs import DRAFTS_AUTO, cache_bytes, engine_arguments, numbers_of, one_copy
from end_to_end_measure import MAX_TOKENS, Cache, measure, measure_draft_numbers
from model_shapes import DRAFTS, model_config

from vllm_quantspec.estimate import GIB

# What an engine says: that it could be measured, with --together; and before the JSON of a row.
READY, ROW = "READY", "ROW "
# A batch of at least so many tokens is a prompt, not a decode step.
PREFILL_TOKENS = 512


def skip_prompts(worker) -> None:
    """Make the target, and a draft model that reads prompts too, return at once where they would compute one."""
    import torch

    runner = worker.model_runner
    speculator = getattr(runner, "speculator", None) or getattr(runner, "drafter", None)
    models = [(runner.model, runner.model_config)]
    if getattr(speculator, "model", None) is not None:
        models.append((speculator.model, runner.vllm_config.speculative_config.draft_model_config))

    def decode_only(forward, width, input_ids, positions, *args, **kwargs):
        if input_ids.shape[0] >= PREFILL_TOKENS:
            return torch.zeros(input_ids.shape[0], width, dtype=torch.bfloat16, device=input_ids.device)
        return forward(input_ids, positions, *args, **kwargs)

    for model, config in models:
        model.forward = functools.partial(decode_only, model.forward, config.get_hidden_size())


def memory_without_cache(worker) -> dict:
    """GiB of weights, and of everything but the KV cache at its peak, as vLLM found it before it sized the cache."""
    if not hasattr(worker, "available_kv_cache_memory_bytes"):  # a CPU
        return {}
    other = worker.requested_memory - worker.available_kv_cache_memory_bytes
    return {"weights_gib": worker.model_runner.model_memory_usage / GIB, "other_peak_gib": other / GIB}


def time_to_first_token(llm, context: int) -> float:
    """Seconds to compute a prompt of `context` tokens, in chunks, and sample one token."""
    from vllm import SamplingParams

    params = SamplingParams(temperature=0, max_tokens=1, detokenize=False)
    for length in (min(3 * 16384, context), context):  # the first compiles what is compiled on demand
        started = time.perf_counter()
        llm.generate([{"prompt_token_ids": [7 + i % 400 for i in range(length)]}], params, use_tqdm=False)
    return time.perf_counter() - started


def child(args) -> None:
    """One engine, all points; prints a JSON line for each."""
    os.environ.setdefault("VLLM_ENABLE_V1_MULTIPROCESSING", "0")
    if args.child.startswith("v1-"):
        os.environ["VLLM_USE_V2_MODEL_RUNNER"] = "0"
    if args.tensor_parallel_size > 1:  # skip_prompts goes to other processes
        os.environ.setdefault("VLLM_ALLOW_INSECURE_SERIALIZATION", "1")
    import torch
    import vllm
    from vllm import LLM

    if not sys.stdin.readline():  # the engine before this one still has the GPU
        return
    points = [tuple(map(int, point.split("x"))) for point in args.points]
    batches = {batch for _, batch in points}
    longest = max(context for context, _ in points)
    rows = {1, *(1 + number for number in numbers_of(args.child))}  # of a request, in a draft step or a verification
    shape = model_config(args.shape) | ({"num_hidden_layers": args.layers} if args.layers else {})
    fixed = {"kv_cache_memory_bytes": cache_bytes(args.child, args.together)} if args.together else {}
    started = time.perf_counter()
    with tempfile.TemporaryDirectory() as folder:
        folders = {"self": f"{folder}/self", "draft": f"{folder}/draft"}
        for name, config in (("self", shape), ("draft", shape | DRAFTS.get(args.shape, {}))):
            Path(folders[name]).mkdir()
            Path(folders[name], "config.json").write_text(json.dumps(config))
        llm = LLM(
            folders["self"],
            load_format="dummy",
            skip_tokenizer_init=True,
            max_model_len=longest + MAX_TOKENS,
            max_num_seqs=max(batches),
            max_num_batched_tokens=4096 if fixed else 16384,
            gpu_memory_utilization=0.05 if fixed else 0.94,  # with a cache of fixed size only checked at the start
            enable_prefix_caching=False,
            disable_log_stats=True,
            tensor_parallel_size=args.tensor_parallel_size,
            enforce_eager=not torch.cuda.is_available(),
            compilation_config={"cudagraph_capture_sizes": sorted({b * n for b in batches for n in rows})},
            **fixed,
            **engine_arguments(args.child, args.acceptance, json.loads(args.options), folders),
            **one_copy(args.child, args.one_copy),
        )
    cache = Cache(llm)
    engine = {"config": args.child, "vllm": vllm.__version__, "blocks": cache.config.num_blocks}
    engine |= {"start_s": time.perf_counter() - started, "capacity_tokens": int(cache.sequences(longest) * longest)}
    if args.together:
        print(READY, flush=True)
        if not sys.stdin.readline():
            return
    else:
        engine |= llm.collective_rpc(memory_without_cache)[0]
    if args.prefill:
        seconds = time_to_first_token(llm, longest)
        print(ROW + json.dumps(engine | {"context": longest, "batch": 0, "prefill_s": seconds}), flush=True)
    llm.collective_rpc(skip_prompts)
    for context, batch in points:
        point = engine | {"context": context, "batch": batch}
        fit = int(cache.sequences(context + MAX_TOKENS // 2))
        if fit < batch:
            found = [{"sequences_that_fit": fit}]
        elif args.child == DRAFTS_AUTO:
            found = measure_draft_numbers(llm, cache, context, batch, args)
        else:
            found = [measure(llm, cache, context, batch, args.tokens, args.repeats, args.child in args.profile)]
        for row in found:
            print(ROW + json.dumps(point | row), flush=True)
