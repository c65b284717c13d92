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
(0.938: books-30m at temperature 0.7, 4k to 32k tokens, benchmarks/results/acceptance-books-30m.json). ``ACCEPTANCE`` below
says what the others are given and why. Ratios use the expected tokens of a verification, not those that a run of some dozen
steps happened to draw (``ms_per_token`` has the latter). Whatever the acceptance, a verification must yield
``tokens_to_break_even`` tokens to be as fast as BF16.

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
import copy
import functools
import itertools
import json
import os
import statistics
import subprocess
import sys
import tempfile
import time
from collections import Counter
from collections.abc import Iterator
from pathlib import Path

from common import write_json

from vllm_quantspec.config import AUTO_NUMBERS
from vllm_quantspec.draft_length import Drafts, Plan
from vllm_quantspec.estimate import GIB, expected_tokens

RESULTS = Path(__file__).parent / "results"
SHAPES = {
    "8b": dict(hidden_size=4096, intermediate_size=14336, num_attention_heads=32, num_key_value_heads=8, vocab_size=128256),
    # The same, of a 4-bit checkpoint: linears but the output layer, in groups of 128 around 8.
    "8b-w4a16": dict(
        hidden_size=4096,
        intermediate_size=14336,
        num_attention_heads=32,
        num_key_value_heads=8,
        vocab_size=128256,
        quantization_config=dict(
            quant_method="compressed-tensors",
            format="pack-quantized",
            ignore=["lm_head"],
            config_groups=dict(
                all=dict(
                    targets=["Linear"],
                    weights=dict(num_bits=4, type="int", symmetric=True, strategy="group", group_size=128),
                    input_activations=None,
                )
            ),
        ),
    ),
    # To try the script out, also on a CPU.
    "tiny": dict(hidden_size=256, intermediate_size=512, num_attention_heads=4, num_key_value_heads=2, vocab_size=512),
    "tiny-moe": dict(
        architectures=["Qwen3MoeForCausalLM"],
        model_type="qwen3_moe",
        hidden_size=256,
        intermediate_size=512,
        num_hidden_layers=2,
        num_attention_heads=4,
        num_key_value_heads=2,
        head_dim=64,
        vocab_size=512,
        num_experts=16,
        num_experts_per_tok=4,
        moe_intermediate_size=128,
        norm_topk_prob=True,
    ),
    "7b": dict(hidden_size=4096, intermediate_size=11008, num_attention_heads=32, num_key_value_heads=32, vocab_size=32000),
    "qwen2.5-7b": dict(
        architectures=["Qwen2ForCausalLM"],
        model_type="qwen2",
        hidden_size=3584,
        intermediate_size=18944,
        num_hidden_layers=28,
        num_attention_heads=28,
        num_key_value_heads=4,
        vocab_size=152064,
    ),
    "qwen3-32b": dict(
        architectures=["Qwen3ForCausalLM"],
        model_type="qwen3",
        hidden_size=5120,
        intermediate_size=25600,
        num_hidden_layers=64,
        num_attention_heads=64,
        num_key_value_heads=8,
        head_dim=128,
        vocab_size=151936,
    ),
    "70b": dict(
        hidden_size=8192,
        intermediate_size=28672,
        num_hidden_layers=80,
        num_attention_heads=64,
        num_key_value_heads=8,
        vocab_size=128256,
    ),
    "qwen3-30b-a3b": dict(
        architectures=["Qwen3MoeForCausalLM"],
        model_type="qwen3_moe",
        hidden_size=2048,
        intermediate_size=6144,
        num_hidden_layers=48,
        num_attention_heads=32,
        num_key_value_heads=4,
        head_dim=128,
        vocab_size=151936,
        num_experts=128,
        num_experts_per_tok=8,
        moe_intermediate_size=768,
        norm_topk_prob=True,
    ),
}
# A public model of the same vocabulary that people draft with.
DRAFTS = {
    "8b": dict(
        hidden_size=2048, intermediate_size=8192, num_key_value_heads=8, num_hidden_layers=16, tie_word_embeddings=True
    ),
    "tiny": dict(hidden_size=128, intermediate_size=256, num_attention_heads=2, num_hidden_layers=1),
    "7b": dict(hidden_size=2048, intermediate_size=5632, num_key_value_heads=4, num_hidden_layers=22),
}
LLAMA = dict(
    architectures=["LlamaForCausalLM"],
    model_type="llama",
    num_hidden_layers=32,
    rms_norm_eps=1e-5,
    rope_theta=500000.0,
    hidden_act="silu",
    tie_word_embeddings=False,
    bos_token_id=1,
    eos_token_id=2,
    torch_dtype="bfloat16",
)
# Per token, of configurations other than QuantSpec's.
ACCEPTANCE = {
    # 3.4 tokens per step with 5 drafted: vLLM's ngram on books-30m's greedy text after 4k and 16k tokens of novels
    # (results/acceptance-books-30m-ngram.json). So small a model repeats itself when greedy; at temperature 0.7 it is 1.00.
    "ngram": 0.77,
    "draft": 0.8,  # assumed: that of a good small draft; books-30m has none of its vocabulary to measure one with
    "self": 1.0,
    # books-30m at 32k tokens and temperature 0.7, whose drafts read an eighth, a sixteenth of the old tokens; 0.938 in the
    # same run where they read all (results/sparse_acceptance-books-30m.json, 8 drafted: 6.57, 6.36 and 6.96 tokens).
    "sparse8": 0.919,
    "sparse16": 0.91,
    "auto": 0.91,  # where it is sparse
    "target16": 0.92,
}
# Of configurations that are QuantSpec with other options.
SPARSE = {
    "sparse8": {"draft_context": 1 / 8},
    "sparse16": {"draft_context": 1 / 16},
    "target16": {"draft_context": 1 / 16, "draft_weights": "target"},
    "auto": {"draft_context": "auto"},
}
# Bytes of a token against BF16's, with 8 KV heads of 128 or more of either.
CACHE_BYTES = {"bf16": 1.0, "marlin": 1.0, "fp8": 0.5, "cache-int4": 0.29, "int4": 0.29}
OUR_CACHE_BYTES = 0.54
# Longer than any context here; a step's time does not depend on it.
MAX_POSITIONS = 1 << 20
# QuantSpec that chooses the number of drafts, and of that engine's rows, those for which one was held.
DRAFTS_AUTO, HELD = "drafts-auto", "held"
CONFIGS = ["bf16", "fp8", "cache", "3", "5", "draft-5", "ngram-5"]
POINTS = [f"{kilo * 1024}x{batch}" for batch in (1, 4, 16) for kilo in (4, 8, 16, 32, 64, 128)]
WARM_UP = 16
# Tokens of the sequences that the policy of ``drafts-auto`` learns on, and how many times --repeats it is timed for.
LEARN_TOKENS, CHOSEN_REPEATS = 512, 4
# Room behind a context: the first sequences of a batch decode while the prompts of the last are still being skipped.
MAX_TOKENS = 2048
# What an engine says when it could be measured, with --together.
READY = "READY"
# A batch of at least so many tokens is a prompt, not a decode step.
PREFILL_TOKENS = 512


def model_config(shape: str) -> dict:
    """The config.json of a shape: a name among ``SHAPES``, or the path of such a file or of its folder.

    Raises:
        ValueError: one sentence, where it is neither.
    """
    if shape in SHAPES:
        return LLAMA | {"max_position_embeddings": MAX_POSITIONS} | SHAPES[shape]
    path = Path(shape).expanduser()
    path = path / "config.json" if path.is_dir() else path
    if not path.is_file():
        raise ValueError(f"--shape {shape}: neither one of {', '.join(SHAPES)} nor a config.json or its folder.")
    return json.loads(path.read_text()) | {"max_position_embeddings": MAX_POSITIONS}


def shape_name(shape: str) -> str:
    """What results are called by: the name of a shape, or of the folder that its config.json is in."""
    path = Path(shape).expanduser().resolve()
    return shape if shape in SHAPES else path.name if path.is_dir() else path.parent.name


def drafted(config: str) -> int:
    """Tokens that a configuration drafts per verification."""
    last = config.rpartition("-")[2]
    return int(last) if last.isdigit() else 0


def numbers_of(config: str) -> tuple[int, ...]:
    """Numbers of drafts that a step of a configuration's engine may verify."""
    return AUTO_NUMBERS if config == DRAFTS_AUTO else (drafted(config),)


def drafter(config: str) -> str:
    """What a configuration drafts with: "" for QuantSpec or nothing, "int4" for QuantSpec on the cache in 4 bits."""
    return config.removeprefix("v1-").rpartition("-")[0] if drafted(config) else ""


def is_held(config: str) -> bool:
    """Whether a row is one of ``drafts-auto`` with a number of drafts held."""
    return config.startswith(f"{HELD}-")


def acceptance_of(config: str, acceptance: float) -> float:
    """Probability that a draft is accepted, given that those before it were; ``acceptance`` is QuantSpec's."""
    return ACCEPTANCE.get(drafter(config), acceptance)


def engine_arguments(config: str, acceptance: float, quantspec: dict, folders: dict[str, str]) -> dict:
    """LLM arguments of a configuration; ``folders`` has those of the models "self" and "draft"."""
    if config == "bf16":
        return {}
    if config == "marlin":
        return {"linear_backend": "marlin"}
    if config == "fp8":
        return {"kv_cache_dtype": "fp8"}
    if config == "cache":
        return {"attention_backend": "QUANTSPEC"}
    if config == "cache-int4":
        return {"kv_cache_dtype": "quantspec_int4"}
    gamma = drafted(config)
    methods = {
        **{name: {"method": "quantspec", **quantspec, **options} for name, options in SPARSE.items()},
        "": {"method": "quantspec", **quantspec},
        "int4": {"method": "quantspec", **quantspec},
        "ngram": {"method": "ngram_gpu"},
        "draft": {"method": "draft_model", "model": folders["draft"]},
        "self": {"method": "draft_model", "model": folders["self"]},
    }
    if config == DRAFTS_AUTO:
        options = {**synthetic(config, acceptance), "method": "quantspec", **quantspec, "num_speculative_tokens": "auto"}
        return {"speculative_config": options}
    options = {"num_speculative_tokens": gamma, **synthetic(config, acceptance), **methods[drafter(config)]}
    cache = {"kv_cache_dtype": "quantspec_int4"} if drafter(config) == "int4" else {}
    return {"speculative_config": options, **cache}


def one_copy(config: str, wanted: bool) -> dict:
    """LLM arguments of those configurations that read the hierarchical cache, to keep a 4-bit checkpoint's weights once."""
    others = config in ("bf16", "fp8", "marlin") or drafter(config) in ("ngram", "draft", "self")
    return {"additional_config": {"quantspec": {"one_copy": True}}} if wanted and not others else {}


def synthetic(config: str, acceptance: float) -> dict:
    """Speculative options that accept each draft with a probability, given that those before it were."""
    import torch

    if not torch.cuda.is_available():
        return {}
    each = acceptance_of(config, acceptance)
    rates = [each ** (i + 1) for i in range(max(numbers_of(config)))]
    return {"rejection_sample_method": "synthetic", "synthetic_acceptance_rates": rates}


def cache_bytes(config: str, bf16_gib: float) -> int:
    """Bytes of a KV cache of as many tokens as BF16 has in ``bf16_gib``."""
    plain = drafter(config) in ("ngram", "draft", "self")
    return int(bf16_gib * GIB * CACHE_BYTES.get(drafter(config) or config, 1.0 if plain else OUR_CACHE_BYTES))


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


class Cache:
    """The KV cache of an engine that runs in this process."""

    def __init__(self, llm):
        self.vllm_config = llm.llm_engine.vllm_config
        self.scheduler = llm.llm_engine.engine_core.engine_core.scheduler
        self.config = self.scheduler.kv_cache_config
        # Groups of layers share the memory of the pool: one group's tensors are all of it.
        layers = set(self.config.kv_cache_groups[0].layer_names)
        self.gib = sum(t.size for t in self.config.kv_cache_tensors if layers & set(t.layers)) / GIB

    def sequences(self, length: int) -> float:
        """How many of `length` tokens fit, by vLLM's own count."""
        from vllm.v1.core.kv_cache_utils import get_max_concurrency_for_kv_cache_config

        config = copy.copy(self.vllm_config)
        config.model_config = copy.copy(config.model_config)
        config.model_config.max_model_len = length
        return get_max_concurrency_for_kv_cache_config(config, self.config)

    def used_gib(self) -> float:
        free = self.scheduler.kv_cache_manager.block_pool.get_num_free_blocks()
        return self.gib * (1 - free / self.config.num_blocks)


@contextlib.contextmanager
def draft_numbers(scheduler, held: int | None) -> Iterator[list[int]]:
    """With the number of drafts held, and nothing learned, or, with None, chosen.

    Yields the numbers of all steps with requests, as they come.
    """
    policy, numbers = scheduler.draft_length, []
    choose = policy.choose

    def choose_or_hold(requests, context, with_prompts=False):
        plan = choose(requests, context, with_prompts) if held is None else Plan(Drafts(held if requests else 0))
        if requests:
            numbers.append(plan.drafts.number)
        return plan

    put = {"choose": choose_or_hold}
    if held is not None:
        put |= dict.fromkeys(("observe_acceptance", "observe_time"), lambda *seen: None)
    vars(policy).update(put)
    try:
        yield numbers
    finally:
        for name in put:
            delattr(policy, name)


def measure_draft_numbers(llm, cache: Cache, context: int, batch: int, args) -> Iterator[dict]:
    """The rows of ``drafts-auto`` at one point: the number of drafts chosen, and each number held."""
    size = llm, cache, context, batch
    with draft_numbers(cache.scheduler, None) as numbers:
        while len(numbers) < args.learn:
            measure(*size, LEARN_TOKENS, 1, False)
        learned = len(numbers)
        row = measure(*size, args.tokens, args.repeats * CHOSEN_REPEATS, DRAFTS_AUTO in args.profile, numbers)
    yield {"config": DRAFTS_AUTO, "learned_steps": learned, **row}
    for number in AUTO_NUMBERS:
        with draft_numbers(cache.scheduler, number):
            row = measure(*size, args.tokens, args.repeats, f"{HELD}-{number}" in args.profile)
        yield {"config": f"{HELD}-{number}", **row}


def measure(
    llm, cache: Cache, context: int, batch: int, tokens: int, repeats: int, profile: bool, numbers: list[int] | None = None
) -> dict:
    """Decode `batch` sequences at about `context` tokens: ms per token, per engine step, and tokens per step.

    ``numbers``: of `draft_numbers`, where steps differ; then ms per step are the mean of all, not the median of stretches.
    """
    from vllm import SamplingParams

    engine = llm.llm_engine
    params = SamplingParams(temperature=0, ignore_eos=True, max_tokens=MAX_TOKENS, detokenize=False)
    prompt = [7 + i % 400 for i in range(context - (WARM_UP + repeats * tokens) // 2)]
    names = [f"{context}-{batch}-{i}-{time.time()}" for i in range(batch)]
    for name in names:
        engine.add_request(name, {"prompt_token_ids": prompt}, params)
    counts: dict[str, int] = {}
    marks: list[tuple[float, int, int]] = []
    first_number = last_number = 0
    steps, trace, first = 0, None, 0
    while len(marks) <= repeats or (profile and "stop" not in trace):
        for output in engine.step():
            counts[output.request_id] = len(output.outputs[0].token_ids)
        steps += 1
        if len(counts) < batch:
            continue
        done = min(counts.values())
        first = first or done  # all prompts are through
        if done >= first + WARM_UP + len(marks) * tokens and len(marks) <= repeats:
            marks.append((time.perf_counter(), sum(counts.values()), steps))
            if numbers is not None:
                first_number, last_number = first_number if len(marks) > 1 else len(numbers), len(numbers)
            running = len(cache.scheduler.running)
            assert running == batch, f"{running} of {batch} sequences of {context} tokens run: raise MAX_TOKENS?"
        if profile and trace is None and len(marks) > repeats:
            trace = start_profile(steps)
        if trace is not None and steps >= trace["first"] + 8:
            stop_profile(trace, steps)
    kv_gib = cache.used_gib()
    engine.abort_request(names)
    while engine.has_unfinished_requests():
        engine.step()
    stretches = [(b[0] - a[0], (b[1] - a[1]) / batch, b[2] - a[2]) for a, b in zip(marks[:-1], marks[1:], strict=True)]
    result = {
        "ms_per_token": 1e3 * statistics.median(t / n for t, n, _ in stretches),
        "ms_per_step": 1e3 * statistics.median(t / s for t, _, s in stretches),
        "tokens_per_step": sum(n for _, n, _ in stretches) / sum(s for _, _, s in stretches),
        "kv_gib": kv_gib,
    }
    if numbers is not None:
        result["ms_per_step"] = 1e3 * (marks[-1][0] - marks[0][0]) / (marks[-1][2] - marks[0][2])
        result["numbers"] = dict(sorted(Counter(numbers[first_number:last_number]).items()))
    if trace is not None:
        result |= trace["result"]
    return result


def start_profile(step: int) -> dict:
    import torch

    profiler = torch.profiler.profile(activities=[torch.profiler.ProfilerActivity.CUDA])
    profiler.start()
    return {"profiler": profiler, "first": step}


def stop_profile(trace: dict, step: int) -> None:
    """Where a step's time goes: kernels by name, and how long the GPU had nothing to do."""
    import torch

    torch.cuda.synchronize()
    profiler, cycles = trace["profiler"], step - trace["first"]
    profiler.stop()
    events = [
        e for e in profiler.events() if e.device_type == torch.autograd.DeviceType.CUDA and e.time_range.elapsed_us() > 0
    ]
    spans = sorted((e.time_range.start, e.time_range.end) for e in events)
    idle_host, idle_all, end = 0.0, 0.0, spans[0][1]
    for first, last in spans[1:]:
        gap = first - end
        if gap > 0:
            idle_all += gap
            idle_host += gap if gap > 10 else 0  # shorter ones lie between two kernels of one graph
        end = max(end, last)
    by_name: dict[str, float] = {}
    for e in events:
        by_name[e.name] = by_name.get(e.name, 0) + e.time_range.elapsed_us()
    top = sorted(by_name.items(), key=lambda item: -item[1])[:14]
    trace["stop"] = True
    trace["result"] = {
        "gpu_idle_ms_per_step": idle_host / cycles / 1e3,
        "gaps_between_kernels_ms_per_step": (idle_all - idle_host) / cycles / 1e3,
        "kernels_ms_per_step": {name[:70]: round(t / cycles / 1e3, 4) for name, t in top},
    }


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
        print("ROW " + json.dumps(engine | {"context": longest, "batch": 0, "prefill_s": seconds}), flush=True)
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
            print("ROW " + json.dumps(point | row), flush=True)


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
            if line.startswith("ROW "):
                row = json.loads(line[4:])
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
