"""Hooks into model runner V2 (the GPU engine's): the window's cache, what a step's drafts are, the speculator, graphs.

vLLM has no public hook for any of them in 0.32; each replaces one function, and does nothing for other engines.
"""

from __future__ import annotations

import contextlib

import numpy as np
from vllm.utils.torch_utils import async_tensor_h2d
from vllm.v1.worker.gpu import cudagraph_utils, model_runner
from vllm.v1.worker.gpu.model_runner import GPUModelRunner

from vllm_quantspec.integration.cache.backend import QuantSpecMetadataBuilder
from vllm_quantspec.integration.cache.window import add_window_specs
from vllm_quantspec.integration.draft.ngram_plan import plan_of
from vllm_quantspec.integration.draft.sparse import reading_all
from vllm_quantspec.integration.gpu.draft_numbers import with_every_number
from vllm_quantspec.integration.gpu.speculator import QuantSpecSpeculator
from vllm_quantspec.integration.gpu.step_graphs import with_plain_graphs
from vllm_quantspec.integration.startup.replace import replace
from vllm_quantspec.integration.startup.speculative_config import QuantSpecConfig


def set_draft_counts(runner: GPUModelRunner, num_draft_tokens: np.ndarray | None) -> None:
    """Tell the metadata builders how many tokens of each row are drafts: ``num_draft_tokens`` [num_reqs], None for none.

    The builders' tensors are what CUDA graphs read, so they are written in place, on the runner's stream.
    """
    for groups in runner.attn_groups:
        for group in groups:
            for builder in group.metadata_builders:
                if not isinstance(builder, QuantSpecMetadataBuilder):
                    continue
                if num_draft_tokens is None:
                    builder.num_unverified.zero_()
                    continue
                counts = np.zeros(len(builder.num_unverified), dtype=np.int32)
                counts[: len(num_draft_tokens)] = num_draft_tokens
                async_tensor_h2d(counts, out=builder.num_unverified)


def _with_windows(get_kv_cache_spec):
    def get_kv_cache_spec_with_windows(self):
        return add_window_specs(self.vllm_config, get_kv_cache_spec(self))

    return get_kv_cache_spec_with_windows


def _with_draft_counts(prepare_inputs):
    def prepare_inputs_with_draft_counts(self, scheduler_output, *args, **kwargs):
        input_batch = prepare_inputs(self, scheduler_output, *args, **kwargs)
        set_draft_counts(self, input_batch.num_draft_tokens_per_req)
        sparse = getattr(self.speculator, "page_scores", None)
        if sparse is not None:  # before metadata are built, and graphs replayed
            num_reqs = input_batch.num_reqs
            sparse.begin_step(
                input_batch.req_ids,
                input_batch.seq_lens_cpu_upper_bound[:num_reqs].numpy(),
                reading_all(scheduler_output),
            )
        if isinstance(self.speculator, QuantSpecSpeculator):
            self.speculator.plan = plan_of(scheduler_output)
        return input_batch

    return prepare_inputs_with_draft_counts


def _with_quantspec(init_speculator):
    def init_quantspec_speculator(vllm_config, device, req_states):
        if isinstance(vllm_config.speculative_config, QuantSpecConfig):
            return QuantSpecSpeculator(vllm_config, device, req_states)
        return init_speculator(vllm_config, device, req_states)

    return init_quantspec_speculator


def install() -> None:
    """Replace the five functions, and Marlin's methods for `one_copy`."""
    replace(GPUModelRunner, "get_kv_cache_spec", _with_windows)
    replace(GPUModelRunner, "prepare_inputs", _with_draft_counts)
    replace(model_runner, "init_speculator", _with_quantspec)
    replace(model_runner, "ModelCudaGraphManager", with_plain_graphs)
    replace(cudagraph_utils, "build_dynamic_sd_schedule_lookup", with_every_number)
    # A vLLM whose Marlin is another refuses the option at the start (`startup/one_copy.py`); other engines must go on.
    with contextlib.suppress(ImportError):
        from vllm_quantspec.integration.gpu import marlin_linears

        marlin_linears.install()
