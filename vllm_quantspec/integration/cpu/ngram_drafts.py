"""N-gram drafts of the CPU engine, of requests whose plan says so: by vLLM's own search, from the tokens the runner keeps.

Such a draft is what it is: its distribution is 1 at its token, and 0 elsewhere.
"""

from __future__ import annotations

import numpy as np
import torch
from vllm.v1.spec_decode.ngram_proposer import _find_longest_matched_ngram_and_propose_tokens

from vllm_quantspec.draft_length import Plan


class NgramDrafts:
    """Searches the texts of a runner's batch.

    Args:
        runner: whose ``input_batch.token_ids_cpu`` [rows, max_model_len] has the drafts of this step too.
        shortest, longest: tokens of the n-grams that are looked for.
        max_model_len: tokens of a request at most.
    """

    def __init__(self, runner, shortest: int, longest: int, max_model_len: int) -> None:
        self.runner, self.shortest, self.longest, self.max_model_len = runner, shortest, longest, max_model_len
        self._after(np.ones(4, dtype=np.int32), 1)  # compiles it

    def _after(self, tokens: np.ndarray, number: int) -> list[int]:
        return _find_longest_matched_ngram_and_propose_tokens(
            tokens, self.shortest, self.longest, self.max_model_len, number
        ).tolist()

    def find(
        self, plan: Plan, verified: torch.Tensor, next_token_ids: torch.Tensor, computing_prompt: torch.Tensor
    ) -> dict[int, list[int]]:
        """{row of the batch: its drafts, at least one, at most ``plan.drafts.number``}, of rows where one was found.

        Args:
            verified: tokens of each row whose keys and values are in the cache, [batch_size].
            next_token_ids: the token after those, [batch_size].
            computing_prompt: bool [batch_size]; such a row has sampled nothing.
        """
        found, batch = {}, self.runner.input_batch
        for row, request in enumerate(batch.req_ids[: len(verified)]):
            length = int(verified[row])
            if computing_prompt[row] or not (plan.drafts.by_ngrams or request in plan.ngram_requests):
                continue
            if length < self.max_model_len:
                tokens = np.append(batch.token_ids_cpu[row, :length], np.int32(next_token_ids[row]))
                if drafts := self._after(tokens, plan.drafts.number):
                    found[row] = drafts
        return found


def write_one_hot(probs: torch.Tensor, found: dict[int, list[int]]) -> None:
    """Set the rows of ``probs`` [batch_size, num_drafts, vocab_size], in place, to the distributions of n-gram drafts."""
    for row, drafts in found.items():
        probs[row, : len(drafts)] = 0.0
        probs[row, torch.arange(len(drafts)), torch.tensor(drafts)] = 1.0
