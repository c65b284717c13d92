"""Hooks into model runner V1 (the CPU engine's): the window's cache, the number of drafts per row, the proposer.

vLLM has no public hook for any of the three in 0.32; each replaces one method, and does nothing for other engines.
"""

from __future__ import annotations

import functools

import torch
from vllm.model_executor.layers.attention import Attention
from vllm.v1.kv_cache_interface import KVCacheSpec
from vllm.v1.spec_decode.draft_model import DraftModelProposer
from vllm.v1.worker.gpu_model_runner import GPUModelRunner

from vllm_quantspec.format import PageFormat
from vllm_quantspec.integration.backend import (
    WINDOW_SUFFIX,
    QuantSpecBackend,
    QuantSpecMetadataBuilder,
    RecentWindow,
    num_speculative_tokens,
)
from vllm_quantspec.integration.proposer import QuantSpecProposer
from vllm_quantspec.integration.specs import make_specs
from vllm_quantspec.integration.speculative_config import QuantSpecConfig
from vllm_quantspec.kernels import cpu_decode


def add_window_specs(runner, specs: dict[str, KVCacheSpec]) -> dict[str, KVCacheSpec]:
    """Give each QuantSpec attention layer its page spec, and a window layer beside it."""
    layers = runner.compilation_config.static_forward_context
    if any(getattr(layer, "attn_backend", None) is QuantSpecBackend for layer in layers.values()):
        cpu_decode.warm_up()
    result: dict[str, KVCacheSpec] = {}
    for name, spec in specs.items():
        layer = layers[name]
        if isinstance(layer, RecentWindow):
            continue  # a second call: added again with its layer
        if not isinstance(layer, Attention) or layer.attn_backend is not QuantSpecBackend:
            result[name] = spec
            continue
        page_format = PageFormat(spec.num_kv_heads, spec.head_size, spec.block_size, layer.kv_cache_torch_dtype)
        pages, window = make_specs(page_format, num_speculative_tokens(runner.vllm_config))
        layers.setdefault(name + WINDOW_SUFFIX, RecentWindow(window))
        result[name], result[name + WINDOW_SUFFIX] = pages, window
    return result


def set_draft_counts(runner, scheduler_output) -> None:
    """Tell the metadata builders how many tokens of each row are drafts: exactly those the scheduler put there."""
    counts = None
    for group in runner._attn_group_iterator():
        builder = group.get_metadata_builder()
        if isinstance(builder, QuantSpecMetadataBuilder):
            if counts is None:
                drafts = scheduler_output.scheduled_spec_decode_tokens
                counts = torch.tensor([len(drafts.get(r, ())) for r in runner.input_batch.req_ids], dtype=torch.int32)
            builder.num_draft_tokens = counts


def install() -> None:
    """Replace the three methods, once per process."""
    if getattr(GPUModelRunner, "_quantspec_installed", False):
        return
    GPUModelRunner._quantspec_installed = True

    get_kv_cache_spec = GPUModelRunner.get_kv_cache_spec
    prepare_inputs = GPUModelRunner._prepare_inputs

    @functools.wraps(get_kv_cache_spec)
    def get_kv_cache_spec_with_windows(self):
        return add_window_specs(self, get_kv_cache_spec(self))

    @functools.wraps(prepare_inputs)
    def prepare_inputs_with_draft_counts(self, scheduler_output, *args, **kwargs):
        set_draft_counts(self, scheduler_output)
        return prepare_inputs(self, scheduler_output, *args, **kwargs)

    def new_proposer(cls, vllm_config, *args, **kwargs):
        ours = cls is DraftModelProposer and isinstance(vllm_config.speculative_config, QuantSpecConfig)
        return object.__new__(QuantSpecProposer if ours else cls)

    GPUModelRunner.get_kv_cache_spec = get_kv_cache_spec_with_windows
    GPUModelRunner._prepare_inputs = prepare_inputs_with_draft_counts
    DraftModelProposer.__new__ = new_proposer
