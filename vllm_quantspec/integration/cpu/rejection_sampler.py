"""Three repairs of vLLM 0.32's rejection sampler on the CPU, without which drafts are only right at temperature 0.

- `expand_batch_to_tokens` gives each draft token its request's temperature, top-k or top-p. The CPU's kernel for it writes
  into an integer copy of its output, so the sampler divides the logits by uninitialized memory.
- `apply_sampling_constraints` with top-k alone fails in a step without drafts: it asks for the maximum of nothing.
- `_rejection_random_sample` must reject a placeholder (-1: the scheduler expected a draft and nobody made one). The CPU's
  kernel reads the number before the placeholder's row as its probability: it may accept it, and a wrong token follows.
"""

import math

import torch
from vllm.v1.sample import rejection_sampler

from vllm_quantspec.integration.startup.replace import replace


def expand_batch_to_tokens(
    x: torch.Tensor, cu_num_tokens: torch.Tensor, num_tokens: int, replace_from: int = 0, replace_to: int = 0
) -> torch.Tensor:
    """Repeat ``x`` [batch_size] for each request's tokens: [num_tokens]; see vLLM's function of this name."""
    counts = cu_num_tokens.diff(prepend=cu_num_tokens.new_zeros(1))
    x = torch.where(x == replace_from, torch.full_like(x, replace_to), x)
    return x.repeat_interleave(counts, output_size=num_tokens)


class RejectPlaceholders:
    """Launches vLLM's `_rejection_random_sample`; an object because vLLM asks that launcher for other things as well."""

    __slots__ = ("launcher", "__dict__")

    def __init__(self, launcher):
        self.launcher = launcher
        # vLLM looks there for the kernel that is launched, to exchange it for the CPU's when an engine starts.
        self.__dict__ = launcher.__dict__

    def __getattr__(self, name):
        return getattr(self.launcher, name)

    def __call__(self, output_token_ids, cu_num_draft_tokens, draft_token_ids, draft_probs, target_probs, *args):
        bonus_token_ids, recovered_token_ids, uniform_probs, *others = args
        self.launcher(
            output_token_ids,
            cu_num_draft_tokens,
            draft_token_ids.clamp_min(0),
            draft_probs,
            target_probs,
            bonus_token_ids,
            recovered_token_ids,
            uniform_probs.masked_fill(draft_token_ids < 0, math.inf),  # no ratio of probabilities reaches it
            *others,
        )


def _not_of_nothing(apply_sampling_constraints):
    def apply_constraints_if_any(logits, cu_num_draft_tokens, sampling_metadata):
        if logits.shape[0] == 0:
            return logits
        return apply_sampling_constraints(logits, cu_num_draft_tokens, sampling_metadata)

    return apply_constraints_if_any


def _in_its_own_dtype(_expand_batch_to_tokens):
    return expand_batch_to_tokens


def install() -> None:
    """Replace the three functions."""
    replace(rejection_sampler, "_rejection_random_sample", RejectPlaceholders)
    replace(rejection_sampler, "apply_sampling_constraints", _not_of_nothing)
    replace(rejection_sampler, "expand_batch_to_tokens", _in_its_own_dtype)
