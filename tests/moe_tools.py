"""Mixtures of experts with random weights: small ones to serve, their weights as INT4 has them, and the arithmetic in plain
PyTorch."""

from __future__ import annotations

from pathlib import Path

import torch
import torch.nn.functional as F
from test_models import SIZES
from torch import nn
from vllm.model_executor.layers.fused_moe.activation import MoEActivation

from vllm_quantspec.integration.draft.experts import WEIGHTS, ExpertShapes, Int4ExpertsMethod
from vllm_quantspec.weights import QuantizedWeight, fit_group_size, quantize_weight

# Down projections in groups of 128, 64 and 32 channels; the second has a shared expert behind a gate.
MIXTURES = {
    "mixtral": {"num_local_experts": 4, "num_experts_per_tok": 2, "intermediate_size": 256},
    "qwen2_moe": {
        "num_experts": 8,
        "num_experts_per_tok": 2,
        "moe_intermediate_size": 192,
        "shared_expert_intermediate_size": 256,
    },
    "qwen3_moe": {"num_experts": 8, "num_experts_per_tok": 4, "moe_intermediate_size": 96, "head_dim": 64},
}


def save_mixture(name: str, folder: Path, dtype: torch.dtype, every_expert: bool = False) -> nn.Module:
    """Save a model of that architecture, of random weights, in ``folder``, and return it.

    With ``every_expert`` a token takes all of them. Where the last one that it takes is nearly tied with another, rounding
    decides, and on a GPU that depends on the shape of the batch: in 16 bits the answer then differs by far more than a
    near-tie of two tokens.
    """
    from transformers import AutoConfig, AutoModelForCausalLM

    torch.manual_seed(0)
    sizes = SIZES | MIXTURES[name]
    if every_expert:
        sizes["num_experts_per_tok"] = sizes.get("num_experts") or sizes["num_local_experts"]
    config = AutoConfig.for_model(name, **sizes)
    model = AutoModelForCausalLM.from_config(config, dtype=dtype)
    model.save_pretrained(folder)
    return model.eval()


def as_drafted(weight: torch.Tensor, group_size: int = 128) -> torch.Tensor:
    """``weight`` [..., out, in] as it reads back from 4 bits."""
    rows = weight.flatten(0, -2)
    group = fit_group_size(rows.shape[1], group_size)
    return quantize_weight(rows, group, scale_dtype=weight.dtype).dequantize().to(weight.dtype).view(weight.shape)


@torch.no_grad()
def round_as_drafts_are(model: nn.Module, *, experts: bool) -> None:
    """Round a model of `save_mixture` as its draft is: all but embeddings, norms, routers and the output layer; ``experts``,
    shared ones among them, if so."""
    kept = ("embed", "lm_head", "norm", ".gate.", "shared_expert_gate", "bias", *(() if experts else ("expert",)))
    for name, parameter in model.named_parameters():
        if not any(part in name for part in kept):
            assert "proj" in name, name
            parameter.copy_(as_drafted(parameter))


def random_experts(shapes: ExpertShapes, groups: dict[str, int], device: str) -> dict[str, list[QuantizedWeight]]:
    """Each expert's ``w13`` and ``w2``, rounded by the method of ``groups``."""
    generator = torch.Generator().manual_seed(shapes.number + shapes.width)

    def one(name: str) -> QuantizedWeight:
        weight = (torch.randn(shapes.of(name), generator=generator) * 0.1).to(device, shapes.dtype)
        return quantize_weight(weight, groups[name], scale_dtype=shapes.dtype)

    return {name: [one(name) for _ in range(shapes.number)] for name in WEIGHTS}


def layer_of(method: Int4ExpertsMethod, experts: dict[str, list[QuantizedWeight]], at_once: int) -> nn.Module:
    """A layer that has these experts, written some at a time."""
    layer = nn.Module()
    layer.activation = MoEActivation.SILU
    for name, weights in experts.items():
        for first in range(0, len(weights), at_once):
            part = weights[first : first + at_once]
            codes, scales, zeros = (torch.cat([getattr(w, field) for w in part]) for field in ("codes", "scales", "zeros"))
            method.write(layer, name, first, QuantizedWeight(codes, scales, zeros, part[0].group_size))
    return layer


def plain_experts(
    x: torch.Tensor, topk_weights: torch.Tensor, topk_ids: torch.Tensor, experts: dict[str, list[QuantizedWeight]]
) -> torch.Tensor:
    """float32 [tokens, hidden]: what the dequantized experts compute, token by token."""
    rows = []
    for token, weights, ids in zip(x.float(), topk_weights.float(), topk_ids, strict=True):
        row = torch.zeros_like(token)
        for weight, expert in zip(weights, ids.tolist(), strict=True):
            gate, up = (experts["w13"][expert].dequantize() @ token).chunk(2)
            row += weight * (experts["w2"][expert].dequantize() @ (F.silu(gate) * up))
        rows.append(row)
    return torch.stack(rows)


def random_tokens(
    shapes: ExpertShapes, tokens: int, chosen: int, device: str
) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
    """Inputs, and the experts of each with their weights, as a router gives them."""
    generator = torch.Generator().manual_seed(tokens)
    x = torch.randn(tokens, shapes.hidden, generator=generator).to(device, shapes.dtype)
    scores = torch.randn(tokens, shapes.number, generator=generator).softmax(-1)
    weights, ids = scores.topk(chosen, dim=-1)
    return x, weights.to(device), ids.to(device, torch.int32)
