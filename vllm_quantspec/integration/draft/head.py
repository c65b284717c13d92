"""The draft's output layer: in INT4, with the logits that matter computed again from the target's weight.

Reading a vocabulary's weight in 16 bits is a tenth of a draft step (Llama-3.1-8B's shape). In INT4 it takes a third of
that, and the candidates' exact logits cost little and give back nearly all of the acceptance (`kernels.rescore_logits`).
"""

from __future__ import annotations

import torch
import torch.nn.functional as F
from vllm.model_executor.layers.linear import LinearMethodBase

from vllm_quantspec.integration.draft.linears import Int4LinearMethod
from vllm_quantspec.kernels import rescore_logits

# Beyond them an H200 is as fast with the 16-bit weight, which needs no logits computed again (results/int4_linear.json).
MAX_FASTER_TOKENS = 32


class RescoringHeadMethod(LinearMethodBase):
    """Runs an output layer on which ``linear`` is installed.

    Args:
        linear: the INT4 method of the layer.
        weight: [vocab_size of this rank, hidden_size], the target's own tensor.
    """

    def __init__(self, linear: Int4LinearMethod, weight: torch.Tensor) -> None:
        self.linear, self.weight = linear, weight

    def create_weights(self, layer: torch.nn.Module, *args, **kwargs) -> None:
        raise NotImplementedError("The draft's output layer is made from a loaded one.")

    def apply(self, layer: torch.nn.Module, x: torch.Tensor, bias: torch.Tensor | None = None) -> torch.Tensor:
        """Logits [num_tokens, vocab_size] of ``x`` [num_tokens, hidden_size]."""
        if not x.is_cuda:
            return rescore_logits.reference(self.linear.apply(layer, x, bias), x, self.weight, bias)
        if x.shape[0] > MAX_FASTER_TOKENS:
            return F.linear(x, self.weight, bias)
        return rescore_logits.rescore_logits(self.linear.apply(layer, x, bias), x, self.weight, bias)
