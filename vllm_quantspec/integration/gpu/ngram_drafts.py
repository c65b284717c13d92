"""N-gram drafts of model runner V2, of requests whose plan says so: by vLLM's own search, on the device.

vLLM's ``NgramGPUSpeculator`` searches the token ids that the runner keeps there (`QuantSpecConfig.use_ngram`), the newest of
which the host does not know yet; what it finds takes the place of the model's drafts. Only requests that the plan names are
searched, and no step waits for the device.
"""

from __future__ import annotations

from types import SimpleNamespace

import numpy as np
import torch
from vllm.config import VllmConfig
from vllm.utils.torch_utils import async_tensor_h2d
from vllm.v1.worker.gpu.input_batch import InputBatch
from vllm.v1.worker.gpu.spec_decode.ngram.speculator import NgramGPUSpeculator
from vllm.v1.worker.gpu.states import RequestState

from vllm_quantspec.draft_length import Drafts, Plan
from vllm_quantspec.kernels.ngram_drafts import write_ngram_drafts


class NgramDrafts:
    """Searches the texts of requests for what followed their last tokens before."""

    def __init__(self, vllm_config: VllmConfig, device: torch.device, req_states: RequestState) -> None:
        self.device = device
        self.search = NgramGPUSpeculator(vllm_config, device, req_states)

    def warm_up(self, draft_tokens: torch.Tensor, draft_logits: torch.Tensor | None) -> None:
        """Compile what `write` launches, in an engine that has no requests yet."""
        num_sampled = torch.zeros(1, dtype=torch.int32, device=self.device)
        batch = SimpleNamespace(num_reqs=1, req_ids=["none"], idx_mapping=torch.zeros_like(num_sampled))
        last_sampled = self.search.req_states.last_sampled_tokens
        for plan in (Plan(Drafts(1, by_ngrams=True)), Plan(Drafts(1), frozenset(batch.req_ids))):
            self.write(plan, batch, num_sampled, last_sampled, draft_tokens, draft_logits)

    def rows(self, plan: Plan, input_batch: InputBatch) -> torch.Tensor:
        """Rows of the batch whose requests draft by n-grams: int64, on the device."""
        requests = input_batch.req_ids[: input_batch.num_reqs]
        chosen = [row for row, request in enumerate(requests) if plan.drafts.by_ngrams or request in plan.ngram_requests]
        return async_tensor_h2d(np.array(chosen, dtype=np.int64), device=self.device)

    def write(
        self,
        plan: Plan,
        input_batch: InputBatch,
        num_sampled: torch.Tensor,
        last_sampled: torch.Tensor,
        draft_tokens: torch.Tensor,
        draft_logits: torch.Tensor | None,
    ) -> None:
        """Write n-gram drafts over those of the plan's requests.

        Where nothing is found, a model's drafts stay; in a step that has none, the last token takes their place, and is
        verified like any draft. A request in the middle of its prompt has sampled nothing, and nothing is found for it.

        Args:
            num_sampled: tokens that each row of the batch has sampled, [num_reqs].
            last_sampled: the newest token of each request, by its slot.
            draft_tokens: int64 [rows of the batch at least, most drafts].
            draft_logits: [slots, most drafts, vocabulary], or None.
        """
        rows = self.rows(plan, input_batch)
        if len(rows) == 0:
            return
        slots = input_batch.idx_mapping[rows].long()
        # The search reads these of a batch alone.
        batch = SimpleNamespace(num_reqs=len(rows), idx_mapping=slots)
        unused = dict.fromkeys(
            (
                "attn_metadata",
                "slot_mappings",
                "last_hidden_states",
                "aux_hidden_states",
                "num_rejected",
                "next_prefill_tokens",
                "temperature",
                "seeds",
            )
        )
        drafts = self.search.propose(batch, num_sampled=num_sampled[rows], last_sampled=last_sampled, **unused)
        # A search leaves the best match of each part of a text, 0 where there is none.
        found = None if plan.drafts.by_ngrams else self.search.scratch[: len(rows)].amax(1) > 0
        write_ngram_drafts(drafts, found, rows, slots, plan.drafts.number, draft_tokens, draft_logits)
