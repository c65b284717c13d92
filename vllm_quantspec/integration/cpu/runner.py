"""Hooks into model runner V1 (the CPU engine's): the window's cache, the drafts of each row, the proposer.

vLLM has no public hook for any of them in 0.32; each replaces one method, and does nothing for other engines.
"""

from __future__ import annotations

import torch
from vllm.v1.kv_cache_interface import AttentionSpec, iter_layer_specs
from vllm.v1.spec_decode.draft_model import DraftModelProposer
from vllm.v1.worker.cpu_model_runner import CPUModelRunner
from vllm.v1.worker.gpu_model_runner import GPUModelRunner

from vllm_quantspec.integration.cache.backend import QuantSpecBackend, QuantSpecMetadataBuilder
from vllm_quantspec.integration.cache.window import add_window_specs
from vllm_quantspec.integration.cpu import generators
from vllm_quantspec.integration.cpu.proposer import QuantSpecProposer
from vllm_quantspec.integration.draft.ngram_plan import plan_of
from vllm_quantspec.integration.draft.sparse import reading_all
from vllm_quantspec.integration.startup.replace import replace
from vllm_quantspec.integration.startup.speculative_config import QuantSpecConfig
from vllm_quantspec.kernels import cpu_decode


def set_draft_counts(runner, scheduler_output) -> None:
    """Tell the metadata builders how many tokens of each row are drafts: exactly those the scheduler put there.

    And the proposer, the plan of the next ones; and sparse drafts, which requests are gone, and whose drafts shall read
    everything.
    """
    drafter = getattr(runner, "drafter", None)
    counts, page_scores = None, getattr(drafter, "page_scores", None)
    if isinstance(drafter, QuantSpecProposer):
        drafter.plan = plan_of(scheduler_output)
    for group in runner._attn_group_iterator():
        builder = group.get_metadata_builder()
        if isinstance(builder, QuantSpecMetadataBuilder):
            if counts is None:
                drafts = scheduler_output.scheduled_spec_decode_tokens
                counts = torch.tensor([len(drafts.get(r, ())) for r in runner.input_batch.req_ids], dtype=torch.int32)
            builder.num_unverified.zero_()
            builder.num_unverified[: len(counts)] = counts
    if page_scores is not None:
        page_scores.forget(scheduler_output.finished_req_ids | scheduler_output.scheduled_cached_reqs.resumed_req_ids)
        page_scores.begin_step(runner.input_batch.req_ids, reading_all(scheduler_output))


def give_placeholders_probs(runner, num_draft_tokens: list[int]) -> None:
    """Give requests that nobody drafted for a row of draft probabilities: zero, which rejects every token.

    The scheduler pads a request that has one token left to compute after a prefix-cache hit with placeholders for drafts.
    vLLM finds no probabilities for it, and then verifies the whole batch without: fewer drafts are accepted.
    """
    probs, known = runner._draft_probs, runner._draft_prob_req_ids
    if probs is None or known is None:
        return
    rows = zip(runner.input_batch.req_ids, num_draft_tokens, strict=False)
    missing = [req_id for req_id, num_draft in rows if num_draft and req_id not in known]
    if missing:
        runner._draft_probs = torch.cat([probs, probs.new_zeros(len(missing), *probs.shape[1:])])
        runner._draft_prob_req_ids = [*known, *missing]


def zero_blocks(runner, block_ids: list[int]) -> None:
    """Zero these blocks in the caches of all attention layers.

    vLLM does so where layers of several dtypes share its pool: what one leaves in a block may be no number to another, whose
    kernel multiplies the slots behind its last token by zero. Its CPU runner zeroes them in full layers alone, of which a
    model may have fewer than sliding ones.
    """
    layers, ids, done = runner.compilation_config.static_forward_context, torch.tensor(block_ids), set()
    for group in runner.kv_cache_config.kv_cache_groups:
        if not all(isinstance(spec, AttentionSpec) for spec in iter_layer_specs(group.kv_cache_spec)):
            continue
        for name in group.layer_names:
            cache = layers[name].kv_cache
            place = (cache.data_ptr(), cache[0].nbytes)
            if place not in done:
                cache[ids] = 0
                done.add(place)


def _in_all_layers(_zero_block_ids):
    def zero_block_ids_in_all_layers(self, block_ids):
        zero_blocks(self, block_ids)

    return zero_block_ids_in_all_layers


def _with_windows(get_kv_cache_spec):
    def get_kv_cache_spec_with_windows(self):
        specs = add_window_specs(self.vllm_config, get_kv_cache_spec(self))
        layers = self.compilation_config.static_forward_context.values()
        if any(getattr(layer, "attn_backend", None) is QuantSpecBackend for layer in layers):
            cpu_decode.warm_up()
        return specs

    return get_kv_cache_spec_with_windows


def _with_draft_counts(prepare_inputs):
    def prepare_inputs_with_draft_counts(self, scheduler_output, *args, **kwargs):
        set_draft_counts(self, scheduler_output)
        result = prepare_inputs(self, scheduler_output, *args, **kwargs)
        generators.remember(self)
        return result

    return prepare_inputs_with_draft_counts


def _of_all_requests(get_draft_probs):
    def get_draft_probs_of_all(self, spec_decode_metadata):
        give_placeholders_probs(self, spec_decode_metadata.num_draft_tokens)
        return get_draft_probs(self, spec_decode_metadata)

    return get_draft_probs_of_all


def _making_ours(_new):
    def new_proposer(cls, vllm_config, *args, **kwargs):
        ours = cls is DraftModelProposer and isinstance(vllm_config.speculative_config, QuantSpecConfig)
        return object.__new__(QuantSpecProposer if ours else cls)

    return new_proposer


def install() -> None:
    """Replace the five methods."""
    replace(GPUModelRunner, "get_kv_cache_spec", _with_windows)
    replace(GPUModelRunner, "_prepare_inputs", _with_draft_counts)
    replace(CPUModelRunner, "_zero_block_ids", _in_all_layers)
    replace(GPUModelRunner, "_get_spec_decode_draft_probs", _of_all_requests)
    replace(DraftModelProposer, "__new__", _making_ours)
