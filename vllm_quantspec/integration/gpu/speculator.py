"""The speculator of model runner V2: the target's INT4 view, on the target's own KV cache, drafting in one CUDA graph.

It starts where the target stopped: every verified token's keys and values are in the cache, so there is nothing to
prefill, and all draft steps are alike: one query token per request, the first the one just sampled. vLLM's base class
captures such a loop, sampling included; here it begins at draft position 0 rather than 1.

Where the plan of a step says so (``ngram: auto``), n-grams take the place of drafts: of some requests after the loop, or of
all, without it.
"""

from __future__ import annotations

import copy
import itertools
import math
from collections.abc import Sequence
from typing import Any

import torch
from torch import nn
from vllm.config import VllmConfig
from vllm.config.compilation import CUDAGraphMode
from vllm.forward_context import BatchDescriptor, set_forward_context
from vllm.logger import init_logger
from vllm.v1.worker.gpu.dp_utils import DPSyncState, dispatch_cg_and_sync_dp
from vllm.v1.worker.gpu.input_batch import InputBatch
from vllm.v1.worker.gpu.spec_decode.speculator import DraftModelSpeculator
from vllm.v1.worker.gpu.spec_decode.target_dependent_ar.cudagraph_utils import (
    SpeculatorBatchDescriptor,
    SpeculatorCudaGraphManager,
)
from vllm.v1.worker.gpu.spec_decode.target_dependent_ar.speculator import (
    TargetDependentARSpeculator,
    prepare_decode_inputs,
)
from vllm.v1.worker.gpu.states import RequestState

from vllm_quantspec.draft_length import Plan
from vllm_quantspec.integration.cache.metadata import WINDOW_SUFFIX
from vllm_quantspec.integration.draft import weight_updates
from vllm_quantspec.integration.draft.build import build_configured_draft
from vllm_quantspec.integration.draft.model import DraftModel
from vllm_quantspec.integration.draft.rotary import RotaryPositions, make_rotary_positions
from vllm_quantspec.integration.gpu import sparse_drafts
from vllm_quantspec.integration.gpu.draft_numbers import numbers_of_drafts
from vllm_quantspec.integration.gpu.ngram_drafts import NgramDrafts
from vllm_quantspec.integration.gpu.step_graphs import PlainGraphs

logger = init_logger("vllm.quantspec.speculator")

# Batch sizes up to which drafts have a graph of every size that vLLM has.
ALL_SIZES = 64


def any_request_samples(input_batch: InputBatch) -> bool:
    """False where a step computes nothing but parts of prompts without their ends: drafts would be thrown away."""
    computed = input_batch.num_computed_prefill_tokens_np + input_batch.num_scheduled_tokens
    return bool((computed >= input_batch.prefill_len_np).any())


def draft_capture_sizes(sizes: Sequence[int]) -> list[int]:
    """Those of vLLM's ``sizes`` that drafts have graphs of: all up to `ALL_SIZES`, then every size a fifth above the last.

    The largest is always one of them, so sizes must be those that a batch may have.

    A graph is of all draft steps, for each number of drafts: capturing them takes much of an engine's start. Padding costs
    next to nothing beyond the sizes that INT4 linears are made for: a request that is not there has no pages to read.
    """
    sizes = sorted(sizes)
    kept = [size for size in sizes if size <= ALL_SIZES]
    for size, larger in itertools.pairwise([size for size in sizes if size > ALL_SIZES] + [math.inf]):
        if larger == math.inf or not kept or larger > 1.2 * kept[-1]:
            kept.append(size)
    return kept


class DraftCudaGraphManager(SpeculatorCudaGraphManager, PlainGraphs):
    """Captures a graph for each number of drafts in the schedule, 1 included, of fewer batch sizes than the target has.

    vLLM's own leaves 1 out: its first draft comes from a prefill, which has graphs of its own. Ours is part of the loop.
    """

    def _init_candidates(self) -> None:
        whole = self.compilation_config
        self.compilation_config = copy.copy(whole)
        possible = [size for size in whole.cudagraph_capture_sizes or [] if size <= self.max_num_reqs]
        self.compilation_config.cudagraph_capture_sizes = draft_capture_sizes(possible)
        try:
            super()._init_candidates()
        finally:
            self.compilation_config = whole

    def capture(self, *args, specialize_spec_tokens: bool = False, **kwargs) -> None:
        if specialize_spec_tokens:
            numbers = numbers_of_drafts(self.vllm_config, self.max_num_reqs)
            self._capture_descs = {
                mode: [SpeculatorBatchDescriptor(**vars(d), num_speculative_tokens=n) for d in descriptors for n in numbers]
                for mode, descriptors in self._capture_descs.items()
            }
        super().capture(*args, **kwargs)


class QuantSpecSpeculator(TargetDependentARSpeculator):
    page_scores: sparse_drafts.SparseDrafts | None = None  # of an engine whose drafts choose their pages
    rotary: RotaryPositions | None = None  # of a model with M-RoPE
    ngrams: NgramDrafts | None = None  # of an engine that may draft them
    plan: Plan | None = None  # of the step that is being computed, in such an engine

    def __init__(self, vllm_config: VllmConfig, device: torch.device, req_states: RequestState) -> None:
        super().__init__(vllm_config, device)
        if vllm_config.speculative_config.ngram == "auto":
            self.ngrams = NgramDrafts(vllm_config, device, req_states)
        # The base class carries hidden states from step to step; a row per request is all that it touches here.
        self.hidden_states = self.hidden_states[: self.max_num_reqs].clone()
        self.draft = DraftModel()
        self.rotary = make_rotary_positions(vllm_config.model_config, self.max_num_tokens, device)

    def load_model(self, target_model: nn.Module) -> None:
        super().load_model(target_model)
        # Images are in the prompt, which the target computes: a draft is text, and its model embeds the tokens itself.
        self.supports_mm_inputs, self.inputs_embeds = False, None

    def load_draft_model(self, target_model: nn.Module, target_attn_layer_names: set[str]) -> nn.Module:
        self.draft = build_configured_draft(self.vllm_config, target_model)
        weight_updates.watch(target_model, self.draft)
        self.page_scores = sparse_drafts.make(self.vllm_config, target_model, self.draft, self.device)
        return self.draft.model

    def set_attn(self, *args, **kwargs) -> None:
        # The draft reads the target's windows, so it needs their block tables in its metadata as well.
        self.draft_attn_layer_names |= {target + WINDOW_SUFFIX for target in self.draft.attention_layers.values()}
        super().set_attn(*args, **kwargs)

    def _configure_decode_metadata_update(self) -> None:
        DraftModelSpeculator._configure_decode_metadata_update(self)  # one draft step is a loop here, too

    def init_cudagraph_manager(self, cudagraph_mode: CUDAGraphMode) -> None:
        if self.ngrams is not None:
            self.ngrams.warm_up(self.draft_tokens, self.draft_logits)
        full = cudagraph_mode.decode_mode() == CUDAGraphMode.FULL
        mode = CUDAGraphMode.FULL_DECODE_ONLY if full else CUDAGraphMode.NONE
        self.decode_cudagraph_manager = DraftCudaGraphManager(self.vllm_config, self.device, mode, decode_query_len=1)
        if self.page_scores is not None and self.page_scores.has_plain_steps:
            self.decode_cudagraph_manager.sparse = self.page_scores

    def capture(self) -> None:
        assert self.decode_cudagraph_manager is not None
        self.idx_mapping.zero_()
        self.decode_cudagraph_manager.capture(
            self._generate_fused_drafts,
            self.model_state,
            self.input_buffers,
            self.block_tables,
            self.attn_groups,
            self.kv_cache_config,
            progress_bar_desc="Capturing draft CUDA graphs",
            specialize_spec_tokens=self.speculative_config.uses_dynamic_speculative_decoding(),
        )

    @torch.inference_mode()
    def propose(
        self,
        input_batch: InputBatch,
        attn_metadata: dict[str, Any],
        slot_mappings: dict[str, torch.Tensor],
        last_hidden_states: torch.Tensor,
        aux_hidden_states: list[torch.Tensor] | None,
        num_sampled: torch.Tensor,
        num_rejected: torch.Tensor,
        last_sampled: torch.Tensor,
        next_prefill_tokens: torch.Tensor,
        temperature: torch.Tensor,
        seeds: torch.Tensor,
        dp_sync_state: DPSyncState | None = None,
        dummy_run: bool = False,
        skip_attn_for_dummy_run: bool = False,
        mm_inputs=None,
        is_profile: bool = False,
        num_speculative_tokens: int | None = None,
    ) -> torch.Tensor:
        """Draft ``num_speculative_tokens`` tokens for each request; int64 [num_reqs, num_speculative_steps].

        Args as in vLLM's ``BaseSpeculator.propose``; the target's hidden states and metadata are not needed.
        """
        num_reqs = input_batch.num_reqs
        if dummy_run and dp_sync_state is not None:
            # A dummy batch is padded; the ranks may have agreed on fewer requests, those that there really are.
            num_reqs = min(num_reqs, dp_sync_state.num_reqs)
        if num_speculative_tokens is None:
            num_speculative_tokens = self.num_speculative_steps
        # With data parallelism other ranks may draft, and wait for this one.
        if dp_sync_state is None and not dummy_run and not any_request_samples(input_batch):
            return self.draft_tokens[:num_reqs].zero_()
        weight_updates.refresh(self.draft)
        if num_speculative_tokens == 0:
            if self.page_scores is not None:
                self.page_scores.forget()
            self.draft_tokens[:num_reqs].fill_(-1)
            return self.draft_tokens[:num_reqs]
        plan = None if dummy_run else self.plan
        if plan is not None and plan.drafts.by_ngrams:
            if self.page_scores is not None:
                self.page_scores.forget()
            self.ngrams.write(plan, input_batch, num_sampled, last_sampled, self.draft_tokens, self.draft_logits)
            return self.draft_tokens[:num_reqs]
        seq_lens_upper_bound = input_batch.seq_lens_cpu_upper_bound
        self.draft_max_seq_len = min(int(seq_lens_upper_bound[:num_reqs].max()) + num_speculative_tokens, self.max_model_len)
        self._copy_request_inputs(num_reqs, input_batch.idx_mapping[:num_reqs], temperature, seeds, dummy_run=dummy_run)
        self._prepare_first_step(num_reqs, input_batch, num_sampled, num_rejected, last_sampled, next_prefill_tokens)
        if self.rotary is not None:
            self._set_rotary_deltas(input_batch.idx_mapping[:num_reqs], dummy_run)
        if self.page_scores is not None and not dummy_run:
            lengths = seq_lens_upper_bound[:num_reqs].numpy()
            self.page_scores.count_reading(lengths, input_batch.is_prefilling_np[:num_reqs], num_speculative_tokens)

        sync, num_batch_tokens = None, num_reqs
        if dp_sync_state is not None:
            sync, num_batch_tokens = self._build_uniform_batch_dp_sync(dp_sync_state, num_reqs, num_query_per_req=1)
        batch_desc, sync = dispatch_cg_and_sync_dp(
            self.decode_cudagraph_manager,
            num_reqs,
            num_batch_tokens,
            uniform_token_count=1,
            dp_size=self.dp_size,
            dp_rank=self.dp_rank,
            need_eager=is_profile,
            dp_sync_state=sync,
        )
        if self.decode_cudagraph_manager is not None:
            batch_desc = self.decode_cudagraph_manager.specialize_spec_tokens(batch_desc, num_speculative_tokens)
        self._fused_multi_step_decode(
            num_reqs,
            dummy_run and skip_attn_for_dummy_run,
            batch_desc,
            None if sync is None else sync.num_tokens_across_dp,
            seq_lens_upper_bound,
            num_speculative_tokens,
        )
        if is_profile and self.draft.joined is not None:
            # Compiled now: what that takes is part of the start, and the memory it takes is counted.
            for rows in range(min(self.draft.joined.max_rows, self.max_num_reqs), 0, -1):
                self._run_model(rows, None, None, None)
        if plan is not None and plan.ngram_requests:
            self.ngrams.write(plan, input_batch, num_sampled, last_sampled, self.draft_tokens, self.draft_logits)
        return self.draft_tokens[:num_reqs]

    def _set_rotary_deltas(self, rows: torch.Tensor, dummy_run: bool) -> None:
        """Take those of the requests ``rows`` from vLLM, whose buffer for them changes: no graph may read it."""
        if dummy_run:
            self.rotary.deltas.zero_()  # there are no requests, and in a profiling run no state of them
        else:
            self.rotary.set_deltas(self.model_state.rope_state.prefill_delta.gpu[rows])

    def _prepare_first_step(
        self,
        num_reqs: int,
        input_batch: InputBatch,
        num_sampled: torch.Tensor,
        num_rejected: torch.Tensor,
        last_sampled: torch.Tensor,
        next_prefill_tokens: torch.Tensor,
    ) -> None:
        """Write the draft's input buffers: the newest token of each request, at the position after its verified ones.

        A request in the middle of its prompt has sampled nothing; its drafts are thrown away, whatever they are.
        """
        if self.page_scores is not None and not self.page_scores.plain:
            self.page_scores.set_verified_rows(input_batch.query_start_loc[: num_reqs + 1], num_rejected[:num_reqs])
        rows = input_batch.idx_mapping[:num_reqs]
        tokens = torch.where(num_sampled[:num_reqs] > 0, last_sampled.view(-1)[rows], next_prefill_tokens[0][rows])
        last_verified = input_batch.seq_lens[:num_reqs] - num_rejected[:num_reqs] - 1
        # vLLM's kernel advances both by one, as between two draft steps, and pads every buffer for CUDA graphs.
        self.input_buffers.positions[:num_reqs] = last_verified
        self.sample_src_positions[:num_reqs] = last_verified
        self.current_draft_step.zero_()
        prepare_decode_inputs(
            tokens,
            input_batch.seq_lens,
            num_rejected,
            self.input_buffers,
            self.sample_src_positions,
            self.max_model_len,
            self.max_num_reqs,
        )

    def _generate_fused_drafts(
        self,
        num_reqs: int,
        num_tokens_padded: int,
        attn_metadata: dict[str, Any] | None,
        slot_mappings: dict[str, torch.Tensor] | None,
        num_tokens_across_dp: torch.Tensor | None,
        cudagraph_runtime_mode: CUDAGraphMode,
        num_speculative_steps: int,
    ) -> None:
        """All draft steps; what one CUDA graph captures. The kernels derive slots from positions: no slot mapping."""
        metadata = attn_metadata[next(iter(self.draft.attention_layers))] if self.page_scores and attn_metadata else None
        if metadata is not None and metadata.page_scores is not None:  # not a plain step
            metadata.page_scores.choose(
                num_reqs,
                self.input_buffers.seq_lens[:num_reqs],
                metadata.block_table[:num_reqs],
                self.idx_mapping[:num_reqs],
            )
        for step in range(num_speculative_steps):
            self.current_draft_step.fill_(step)
            self._generate_draft(
                num_reqs,
                num_tokens_padded,
                attn_metadata,
                slot_mappings,
                num_tokens_across_dp,
                cudagraph_runtime_mode,
                num_speculative_steps,
            )

    @torch.inference_mode()
    def _run_model(
        self,
        num_tokens: int,
        attn_metadata: dict[str, Any] | None,
        slot_mappings: dict[str, torch.Tensor] | None,
        num_tokens_across_dp: torch.Tensor | None,
        cudagraph_runtime_mode: CUDAGraphMode = CUDAGraphMode.NONE,
        mm_inputs=None,
    ) -> tuple[torch.Tensor, torch.Tensor]:
        positions = self.input_buffers.positions[:num_tokens]
        with set_forward_context(
            attn_metadata,
            self.vllm_config,
            num_tokens=num_tokens,
            cudagraph_runtime_mode=cudagraph_runtime_mode,
            num_tokens_across_dp=num_tokens_across_dp,
            slot_mapping=slot_mappings,
            batch_descriptor=BatchDescriptor(num_tokens=num_tokens),
        ):
            hidden_states = self.draft.forward_of(num_tokens)(
                input_ids=self.input_buffers.input_ids[:num_tokens],
                positions=positions if self.rotary is None else self.rotary(positions),
                inputs_embeds=None,
            )
        return hidden_states, hidden_states
