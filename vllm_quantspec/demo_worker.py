"""One engine of the demo, in a process of its own: ``python -m vllm_quantspec.demo_worker ENGINE FD``.

Reads a `Job` as JSON from standard input and writes one JSON object per line to the file descriptor FD:
``{"stage": str}`` while it prepares, ``{"computing": true}`` after each part of the prompt, ``{"text": str}`` while it
decodes, and at the end ``{"result": {...}}`` or ``{"error": str}``.
"""

import json
import math
import os
import re
import sys
import time
import traceback
from collections.abc import Callable
from dataclasses import asdict, dataclass, field
from typing import Any

GiB = 1 << 30


@dataclass
class Job:
    model: str  # directory or hub id
    prompt: str
    max_tokens: int
    num_speculative_tokens: int


@dataclass
class Result:
    """What one engine did with a job."""

    token_ids: list[int]
    text: str
    num_prompt_tokens: int
    num_prompt_tokens_cut: int  # from the front, to fit the model's context
    startup_seconds: float
    prefill_seconds: float
    decode_tokens_per_second: float  # after the first token
    kv_bytes: dict[str, float]  # of one token in all layers: "exact", "target" (stored), "draft" (of these, read by it)
    kv_dtype: str
    kv_capacity: int  # tokens that vLLM says fit into its KV cache
    device: str  # "cpu" or "cuda"
    num_drafts: int = 0
    accepted_per_position: list[int] = field(default_factory=list)


def work(engine: str, job: Job, send: Callable[[dict[str, Any]], None]) -> Result:
    """Build the engine ("quantspec", "cache" or "plain"), continue the prompt greedily, measure."""
    started = time.monotonic()
    send({"stage": "starting the engine"})
    prompt, cut = fit_prompt(job)
    llm = build(engine, job, max_model_len=len(prompt) + job.max_tokens + job.num_speculative_tokens + 1)

    from vllm import SamplingParams

    send({"stage": "warming up"})
    warm_up = SamplingParams(temperature=0, max_tokens=4 * (job.num_speculative_tokens + 1), ignore_eos=True)
    llm.generate({"prompt_token_ids": prompt[-32:]}, warm_up, use_tqdm=False)
    startup = time.monotonic() - started

    send({"stage": f"reading {len(prompt):,} tokens, then writing {job.max_tokens:,}"})
    before = draft_counts(llm)
    # As many tokens from every engine, wherever the model would end.
    greedy = SamplingParams(temperature=0, max_tokens=job.max_tokens, ignore_eos=True)
    begun = time.perf_counter()
    llm.llm_engine.add_request("demo", {"prompt_token_ids": prompt}, greedy)
    first = None
    while llm.llm_engine.has_unfinished_requests():
        outputs = llm.llm_engine.step()
        if not outputs:
            send({"computing": True})
        for output in outputs:
            completion, now = output.outputs[0], time.perf_counter()
            first = first or (now, len(completion.token_ids))
            send({"text": completion.text[-600:]})
    drafts, *accepted = (after - earlier for after, earlier in zip(draft_counts(llm), before, strict=True))
    return Result(
        token_ids=list(completion.token_ids),
        text=completion.text,
        num_prompt_tokens=len(prompt),
        num_prompt_tokens_cut=cut,
        startup_seconds=startup,
        prefill_seconds=first[0] - begun,
        decode_tokens_per_second=(len(completion.token_ids) - first[1]) / max(now - first[0], 1e-9),
        num_drafts=drafts,
        accepted_per_position=accepted,
        **memory(llm),
    )


def fit_prompt(job: Job) -> tuple[list[int], int]:
    """The prompt's last tokens, as many as fit the model beside the answer, and how many were cut from the front."""
    from transformers import AutoConfig, AutoTokenizer

    positions = AutoConfig.from_pretrained(job.model).get_text_config().max_position_embeddings
    tokens = AutoTokenizer.from_pretrained(job.model)(job.prompt, verbose=False)["input_ids"]
    room = positions - job.max_tokens - job.num_speculative_tokens - 1
    if room < 1:
        raise ValueError(f"--max-tokens {job.max_tokens} does not fit the model's context of {positions:,} tokens.")
    return tokens[-room:], max(len(tokens) - room, 0)


def build(engine: str, job: Job, max_model_len: int):
    from vllm import LLM
    from vllm.platforms import current_platform

    speculation = {"method": "quantspec", "num_speculative_tokens": job.num_speculative_tokens}
    choice = {
        "quantspec": {"speculative_config": speculation},
        "cache": {"attention_backend": "QUANTSPEC"},
        "plain": {},
    }[engine]
    if current_platform.is_cpu():  # compiling takes longer than the demo, and a share of all memory is not needed
        choice |= {"enforce_eager": True, "kv_cache_memory_bytes": cpu_cache_bytes(job.model, max_model_len)}
    return LLM(job.model, max_model_len=max_model_len, disable_log_stats=False, **choice)


def cpu_cache_bytes(model: str, max_model_len: int) -> int:
    """Room for two requests with an exact cache, in whole GiB."""
    from transformers import AutoConfig

    config = AutoConfig.from_pretrained(model).get_text_config()
    heads = config.num_attention_heads
    kv_heads = getattr(config, "num_key_value_heads", None) or heads
    head_size = getattr(config, "head_dim", None) or config.hidden_size // heads
    return math.ceil(2 * max_model_len * config.num_hidden_layers * 2 * kv_heads * head_size * 2 / GiB) * GiB


def draft_counts(llm) -> list[int]:
    """Drafts so far and, for each position, the draft tokens accepted; [0] without speculation."""
    metrics = {metric.name: metric for metric in llm.get_metrics()}
    if "vllm:spec_decode_num_drafts" not in metrics:
        return [0]
    drafts = metrics["vllm:spec_decode_num_drafts"].value
    return [drafts, *metrics["vllm:spec_decode_num_accepted_tokens_per_pos"].values]


def memory(llm) -> dict[str, Any]:
    """The fields of `Result` about memory: the model's shape, in bytes, and vLLM's own count of what fits."""
    from vllm_quantspec.format import PageFormat

    config = llm.llm_engine.vllm_config
    model, parallel = config.model_config, config.parallel_config
    heads, size, layers = model.get_num_kv_heads(parallel), model.get_head_size(), model.get_num_layers(parallel)
    page = PageFormat(heads, size, dtype=model.dtype)
    return {
        "kv_bytes": {
            "exact": layers * 2 * heads * size * model.dtype.itemsize,
            "target": layers * page.bytes_per_token(8),
            "draft": layers * page.bytes_per_token(4),
        },
        "kv_dtype": str(model.dtype).removeprefix("torch."),
        "kv_capacity": config.cache_config.kv_cache_size_tokens or 0,
        "device": config.device_config.device_type,
    }


def one_sentence(error: BaseException) -> str:
    """What went wrong, without pydantic's frame around it and without the lines that follow."""
    text = str(error).strip() or type(error).__name__
    framed = re.search(r"(?:Value|Assertion) error, (.*?)(?: \[type=|$)", text, re.DOTALL)
    return (framed.group(1) if framed else text).strip().splitlines()[0]


def main(engine: str, descriptor: int) -> int:
    os.set_inheritable(descriptor, False)
    with os.fdopen(descriptor, "w") as events:

        def send(event: dict[str, Any]) -> None:
            events.write(json.dumps(event) + "\n")
            events.flush()

        try:
            send({"result": asdict(work(engine, Job(**json.load(sys.stdin)), send))})
        except Exception as error:
            traceback.print_exc()
            send({"error": one_sentence(error)})
            return 1
    return 0


if __name__ == "__main__":
    sys.exit(main(sys.argv[1], int(sys.argv[2])))
