"""The proposer of model runner V1: the target's INT4 view, on the target's own KV cache.

It starts where the target stopped: every verified token's keys and values are in the cache, so there is nothing to
prefill and the first step has one query token per request, the one just sampled.

Where the plan of a step says so (``ngram: auto``), drafts are n-grams: of some requests, or of all, without a draft step.
"""

from __future__ import annotations

import torch
from torch import nn
from vllm.config import VllmConfig
from vllm.forward_context import set_forward_context
from vllm.v1.attention.backend import CommonAttentionMetadata
from vllm.v1.kv_cache_interface import KVCacheConfig
from vllm.v1.sample.metadata import SamplingMetadata
from vllm.v1.sample.sampler import _SAMPLING_EPS
from vllm.v1.spec_decode.draft_model import DraftModelProposer
from vllm.v1.spec_decode.llm_base_proposer import SpecDecodeBaseProposer

from vllm_quantspec.draft_length import Plan
from vllm_quantspec.integration.cache.metadata import WINDOW_SUFFIX, QuantSpecMetadata, WindowMetadata
from vllm_quantspec.integration.cpu.ngram_drafts import NgramDrafts, write_one_hot
from vllm_quantspec.integration.cpu.page_scores import PageScores, make_page_scores
from vllm_quantspec.integration.draft import weight_updates
from vllm_quantspec.integration.draft.build import build_configured_draft
from vllm_quantspec.integration.draft.model import DraftModel
from vllm_quantspec.integration.draft.rotary import make_rotary_positions
from vllm_quantspec.kernels.cpu_page_selection import PageSelection


class QuantSpecProposer(DraftModelProposer):
    def __init__(self, vllm_config: VllmConfig, device: torch.device, runner=None):
        # Not DraftModelProposer's: that one checks a second model's vocabulary and tensor parallelism.
        SpecDecodeBaseProposer.__init__(
            self, vllm_config=vllm_config, device=device, pass_hidden_states_to_model=False, runner=runner
        )
        self.runner = runner
        self.draft = DraftModel()
        self.page_scores: PageScores | None = None
        self.plan: Plan | None = None  # of the step that is being computed, where n-grams may be drafted
        self.ngrams: NgramDrafts | None = None
        self.rotary = make_rotary_positions(vllm_config.model_config, self.max_num_tokens, device)

    def _raise_if_mrope(self) -> None:
        """A second model would have to number a prompt's images; this draft goes on from the target's numbers."""

    def _warn_if_multimodal(self) -> None:
        """A draft is text, but it reads what the target has made of the images."""

    def load_model(self, target_model: nn.Module) -> None:
        self.draft = build_configured_draft(self.vllm_config, target_model)
        weight_updates.watch(target_model, self.draft)
        layers = self.vllm_config.compilation_config.static_forward_context
        self.page_scores = make_page_scores(self.vllm_config, target_model, self.draft, layers)
        self.model = self.draft.model
        if self.speculative_config.ngram == "auto":
            lengths = self.speculative_config.prompt_lookup_min, self.speculative_config.prompt_lookup_max
            self.ngrams = NgramDrafts(self.runner, *lengths, self.max_model_len)
        self._draft_attn_layer_names = set(self.draft.attention_layers)
        self.supports_mm_inputs = False  # images are in the prompt, which the target computes: a draft is text

    def validate_same_kv_cache_group(self, kv_cache_config: KVCacheConfig) -> None:
        """Draft layers share their target layer's group, whichever it is."""

    def initialize_attn_backend(self, kv_cache_config: KVCacheConfig, kernel_block_sizes: list[int] | None = None) -> None:
        group_of = {name: gid for gid, group in enumerate(kv_cache_config.kv_cache_groups) for name in group.layer_names}
        # {draft layer: (its own name's page group, its target's window name, the window's group)}
        self._groups = {
            draft: (group_of[target], target + WINDOW_SUFFIX, group_of[target + WINDOW_SUFFIX])
            for draft, target in self.draft.attention_layers.items()
        }
        self.kv_cache_gid, _, _ = next(iter(self._groups.values()))
        self.block_size = kv_cache_config.kv_cache_groups[self.kv_cache_gid].kv_cache_spec.block_size

    def propose(
        self,
        num_speculative_tokens: int,
        target_token_ids: torch.Tensor,
        target_positions: torch.Tensor,
        target_hidden_states: torch.Tensor,
        next_token_ids: torch.Tensor,
        token_indices_to_sample: torch.Tensor | None,
        common_attn_metadata: CommonAttentionMetadata,
        sampling_metadata: SamplingMetadata,
        mm_embed_inputs=None,
        num_rejected_tokens_gpu: torch.Tensor | None = None,
        slot_mappings=None,
    ) -> torch.Tensor | list[list[int]]:
        """Draft ``num_speculative_tokens`` tokens for each request; int64 [batch_size, num_speculative_tokens].

        With n-grams among them: a list of token ids for each request, as many as were found, and none for a request without
        if the plan has nothing but n-grams.
        """
        weight_updates.refresh(self.draft)
        by_ngrams = self.plan is not None and self.plan.drafts.by_ngrams
        self.num_speculative_tokens = 0 if by_ngrams else num_speculative_tokens
        self._last_draft_probs = None
        batch_size = common_attn_metadata.batch_size()
        verified = common_attn_metadata.seq_lens[:batch_size].clone()
        if num_rejected_tokens_gpu is not None:
            verified -= num_rejected_tokens_gpu
        tables = {
            gid: self.runner.input_batch.block_table[gid].get_device_tensor(batch_size)
            for pages_gid, _, window_gid in self._groups.values()
            for gid in (pages_gid, window_gid)
        }
        selection = self._select_pages(common_attn_metadata, num_rejected_tokens_gpu, verified, tables)
        if self.rotary is not None:
            requests = (self.runner.requests[r] for r in self.runner.input_batch.req_ids[:batch_size])
            self.rotary.set_deltas(torch.tensor([request.mrope_position_delta for request in requests]))

        token_ids = next_token_ids
        drafts: list[torch.Tensor] = []
        probs: list[torch.Tensor] = []
        for step in range(self.num_speculative_tokens):
            hidden_states = self._run_step(token_ids, verified + step, tables, selection)
            token_ids, step_probs = self._sample_draft_tokens(hidden_states, sampling_metadata)
            drafts.append(token_ids.long())
            if step_probs is not None:
                probs.append(step_probs)
        if probs:
            self._last_draft_probs = torch.stack(probs, dim=1).contiguous()
        by_model = torch.stack(drafts, dim=1) if drafts else torch.empty(batch_size, 0, dtype=torch.long)
        if self.plan is None or not (by_ngrams or self.plan.ngram_requests):
            return by_model
        computing_prompt = torch.from_numpy(self.runner.discard_request_mask.np[:batch_size])
        found = self.ngrams.find(self.plan, verified, next_token_ids, computing_prompt)
        if self._last_draft_probs is not None:
            write_one_hot(self._last_draft_probs, found)
        return [found.get(row, tokens) for row, tokens in enumerate(by_model.tolist())]

    def _sample_from_logits(
        self, logits: torch.Tensor, sampling_metadata: SamplingMetadata
    ) -> tuple[torch.Tensor, torch.Tensor | None]:
        """Sample drafts at each request's temperature: [batch_size], and their distributions [batch_size, vocab_size].

        As the parent does, but a request with a seed draws from its own generator: the same seed gives the same answer.
        """
        temperature = sampling_metadata.temperature
        is_greedy = temperature < _SAMPLING_EPS
        probs = (logits.float() / torch.where(is_greedy, 1.0, temperature)[:, None]).softmax(dim=-1)
        noise = torch.empty_like(probs).exponential_()
        for row, generator in sampling_metadata.generators.items():
            noise[row].exponential_(generator=generator)
        return torch.where(is_greedy, probs.argmax(dim=-1), (probs / noise).argmax(dim=-1)), probs

    def _select_pages(
        self,
        common: CommonAttentionMetadata,
        num_rejected: torch.Tensor | None,
        verified: torch.Tensor,
        tables: dict[int, torch.Tensor],
    ) -> PageSelection | None:
        """What the draft steps of this cycle read of the old pages; None for all of them."""
        if self.page_scores is None:
            return None
        batch_size = len(verified)
        num_rows = common.query_start_loc[: batch_size + 1].diff()
        if num_rejected is not None:
            num_rows = num_rows - num_rejected
        computing_prompt = torch.from_numpy(self.runner.discard_request_mask.np[:batch_size])
        requests = self.runner.input_batch.req_ids[:batch_size]
        selection = self.page_scores.select(num_rows, tables[self.kv_cache_gid], requests, computing_prompt)
        self.page_scores.count_reading(selection, verified[~computing_prompt], self.num_speculative_tokens)
        return selection

    def _run_step(
        self,
        token_ids: torch.Tensor,
        positions: torch.Tensor,
        tables: dict[int, torch.Tensor],
        selection: PageSelection | None,
    ) -> torch.Tensor:
        """One draft forward pass: ``token_ids`` [batch_size] at ``positions`` [batch_size], to hidden states."""
        batch_size = token_ids.shape[0]
        # Past the model's length the draft is thrown away; it only must not read beyond the position table.
        positions = positions.clamp_max(self.max_model_len - 1)
        self.input_ids[:batch_size] = token_ids
        self._set_positions(batch_size, positions if self.rotary is None else self.rotary(positions))
        by_group: dict[int, QuantSpecMetadata] = {}
        metadata: dict[str, object] = {}
        for draft, (pages_gid, window_name, window_gid) in self._groups.items():
            if pages_gid not in by_group:
                by_group[pages_gid] = QuantSpecMetadata(
                    num_actual_tokens=batch_size,
                    query_start_loc=self.arange[: batch_size + 1],
                    seq_lens=positions + 1,
                    num_unverified=torch.ones_like(positions),
                    block_table=tables[pages_gid],
                    num_decodes=batch_size,
                    num_decode_tokens=batch_size,
                    selection=selection,
                )
            metadata[draft] = by_group[pages_gid]
            metadata[window_name] = WindowMetadata(tables[window_gid])
        with set_forward_context(metadata, self.vllm_config, num_tokens=batch_size, slot_mapping={}):
            return self.draft.forward_of(batch_size)(
                input_ids=self.input_ids[:batch_size],
                positions=self._get_positions(batch_size),
                inputs_embeds=None,
            )[:batch_size]
