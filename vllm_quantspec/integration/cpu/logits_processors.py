"""``min_p`` and ``logit_bias`` in the CPU engine's verification, exactly as without speculation.

vLLM's model runner V1 has no processors for the two where it speculates. Given them, its sampler applies both to the row
that follows the drafts; the drafts' own rows are done here, in the order of that sampler: biases before penalties, ``min_p``
after everything that removes tokens, relative to the likeliest one at the request's temperature.
"""

from __future__ import annotations

import math

import torch
from vllm.v1.sample.logits_processor import (
    BUILTIN_LOGITS_PROCESSORS,
    LogitBiasLogitsProcessor,
    LogitsProcessors,
    MinPLogitsProcessor,
)
from vllm.v1.sample.rejection_sampler import RejectionSampler
from vllm.v1.worker import gpu_model_runner

from vllm_quantspec.integration.startup.replace import replace
from vllm_quantspec.integration.startup.speculative_config import QuantSpecConfig


def add_biases(logits: torch.Tensor, biases: dict[int, dict[int, float]], num_draft_tokens: list[int]) -> None:
    """Add ``biases`` {request: {token: bias}} to the rows of their requests, in place.

    ``logits`` [sum of num_draft_tokens, vocab_size] holds ``num_draft_tokens`` rows of each request, one after the other.
    """
    starts = [0]
    for count in num_draft_tokens:
        starts.append(starts[-1] + count)
    for request, of_tokens in biases.items():
        if request < len(num_draft_tokens) and num_draft_tokens[request]:
            tokens = torch.tensor(list(of_tokens), device=logits.device)
            values = torch.tensor(list(of_tokens.values()), dtype=logits.dtype, device=logits.device)
            logits[starts[request] : starts[request + 1], tokens] += values


def drop_below_min_p(
    logits: torch.Tensor, min_p: torch.Tensor, temperature: torch.Tensor, num_draft_tokens: list[int]
) -> None:
    """Set to -inf, in place, what is less likely than ``min_p`` [num_requests] times the row's likeliest token.

    ``logits`` [sum of num_draft_tokens, vocab_size] are those before ``temperature`` [num_requests] divides them. Rows of
    requests with ``min_p`` 0 stay as they are.
    """
    counts = torch.tensor(num_draft_tokens, device=logits.device)
    # p / p of the likeliest = exp((logit - largest logit) / temperature)
    log_min_p = torch.where(min_p > 0, min_p, 1.0).log() * temperature
    margin = torch.where(min_p > 0, log_min_p, -math.inf).repeat_interleave(counts)[:, None]
    logits.masked_fill_(logits < logits.amax(-1, keepdim=True) + margin, -math.inf)


def _with_both(build_logitsprocs):
    def build_logitsprocs_with_both(vllm_config, device, is_pin_memory, is_pooling_model, custom_logitsprocs=()):
        if custom_logitsprocs or is_pooling_model or not isinstance(vllm_config.speculative_config, QuantSpecConfig):
            return build_logitsprocs(vllm_config, device, is_pin_memory, is_pooling_model, custom_logitsprocs)
        return LogitsProcessors(processor(vllm_config, device, is_pin_memory) for processor in BUILTIN_LOGITS_PROCESSORS)

    return build_logitsprocs_with_both


def _of_drafts_too(apply_logits_processors):
    def apply_logits_processors_of_drafts(self, logits, sampling_metadata, metadata):
        counts = metadata.num_draft_tokens
        for processor in sampling_metadata.logitsprocs.non_argmax_invariant:
            if isinstance(processor, LogitBiasLogitsProcessor):
                add_biases(logits, processor.biases, counts)
        logits = apply_logits_processors(self, logits, sampling_metadata, metadata)
        for processor in sampling_metadata.logitsprocs.argmax_invariant:
            if isinstance(processor, MinPLogitsProcessor) and processor.min_p_count and not sampling_metadata.all_greedy:
                min_p = processor.min_p_cpu_tensor[: len(counts)].to(logits.device)
                drop_below_min_p(logits, min_p, sampling_metadata.temperature, counts)
        return logits

    return apply_logits_processors_of_drafts


def install() -> None:
    """Replace the two functions."""
    replace(gpu_model_runner, "build_logitsprocs", _with_both)
    replace(RejectionSampler, "apply_logits_processors", _of_drafts_too)
