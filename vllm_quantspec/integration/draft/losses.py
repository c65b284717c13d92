"""What each linear of the draft loses in 4 bits, measured when the engine starts, on texts that the model writes itself.

One linear of the target at a time computes with the draft's weight while the texts go through the model, and its loss is the
KL divergence of the next-token distributions from the target's own. That takes a forward pass per linear: few tokens do. In
one pass more all of them compute so, and losses are scaled to add up to that pass's.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from contextlib import ExitStack, contextmanager

import torch
from torch import nn
from vllm.config import VllmConfig
from vllm.distributed import get_tp_group

from vllm_quantspec.integration.draft.calibration import Texts
from vllm_quantspec.integration.draft.own_linear import OwnLinear

# Texts, and their tokens.
TEXTS, LENGTH = 8, 48
# Rows of logits that are compared at a time.
_ROWS = 64


def measure_losses(vllm_config: VllmConfig, model: nn.Module, linears: Sequence[OwnLinear]) -> dict[str, float]:
    """Loss of each of ``linears``, whose clones have their weights, in nats per token; the same on every rank.

    ``model``: the loaded target of this rank; tensor-parallel ranks take part together. The sum is what all lose together.
    """
    losses = {}
    with Texts(vllm_config, model, TEXTS, LENGTH, "Choosing bits") as texts:
        exact = _log_probabilities(model, texts)
        for number, linear in enumerate(linears):
            with _computed_by_draft(linear):
                losses[linear.name] = _divergence(exact, _logits(model, texts))
            texts.progress("Choosing bits: measured %d of %d linears", number + 1, len(linears))
        with ExitStack() as all_linears:
            for linear in linears:
                all_linears.enter_context(_computed_by_draft(linear))
            together = _divergence(exact, _logits(model, texts))
    if (total := sum(losses.values())) > 0:
        losses = {name: loss * together / total for name, loss in losses.items()}
    group = get_tp_group()
    return group.broadcast_object(losses, src=0) if group.world_size > 1 else losses


@contextmanager
def _computed_by_draft(linear: OwnLinear) -> Iterator[None]:
    method = linear.layer.quant_method
    linear.layer.quant_method = _Draft(linear.clone)
    try:
        yield
    finally:
        linear.layer.quant_method = method


class _Draft:
    """A linear method that is another layer's, with its quantized weight: as many rows would take the target's own."""

    def __init__(self, clone: nn.Module) -> None:
        self.clone = clone

    def apply(self, layer: nn.Module, x: torch.Tensor, bias: torch.Tensor | None = None) -> torch.Tensor:
        return self.clone.quant_method.apply_own(self.clone, x, None if bias is None else self.clone.bias)


def _logits(model: nn.Module, texts: Texts) -> list[torch.Tensor]:
    """Of all tokens, in parts; nothing where another rank has them. Every rank computes."""
    logits = [model.compute_logits(rows) for hidden in texts.forward() for rows in hidden.split(_ROWS)]
    return [part for part in logits if part is not None]


def _log_probabilities(model: nn.Module, texts: Texts) -> list[torch.Tensor]:
    return [part.float().log_softmax(-1) for part in _logits(model, texts)]


def _divergence(exact: list[torch.Tensor], logits: list[torch.Tensor]) -> float:
    """KL of ``logits`` from the log-probabilities ``exact``, the mean over tokens; 0 without any."""
    sums = [(p.exp() * (p - q.float().log_softmax(-1))).sum(-1) for p, q in zip(exact, logits, strict=True)]
    return torch.cat(sums).mean().item() if sums else 0.0
