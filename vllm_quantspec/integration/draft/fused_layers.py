"""A view of the draft whose linears are launched together with the norm or the activation in front of them.

For more sequences than `joined_layers` has one launch for. A layer's norms and its activation become launches of
`kernels.fused_linear`, under which the linear behind them begins to read its weight, and which leave its inputs in the form
that it reads: without them those are kernels of torch.compile's and, from 9 sequences on, a conversion more.
"""

from __future__ import annotations

from collections.abc import Callable

import torch
from torch import nn
from vllm.config import VllmConfig
from vllm.platforms import current_platform

from vllm_quantspec.integration.draft.joined_layers import Given, stack_of, why_not_known, with_layers
from vllm_quantspec.integration.draft.linears import (
    ORIGINAL,
    SCALES,
    WEIGHT,
    FastInt4LinearMethod,
    FastInt8LinearMethod,
)
from vllm_quantspec.kernels import fused_linear
from vllm_quantspec.kernels.draft_layer import MIN_CAPABILITY


class FusedLayer(nn.Module):
    """A decoder layer that computes what ``layer`` does. ``attention``: ``layer``'s, without its first linear."""

    def __init__(self, layer: nn.Module, attention: nn.Module) -> None:
        super().__init__()
        self.attention = attention
        self.input_layernorm, self.qkv_proj = layer.input_layernorm, layer.self_attn.qkv_proj
        self.norm = layer.post_attention_layernorm
        self.gate_up_proj, self.down_proj = layer.mlp.gate_up_proj, layer.mlp.down_proj

    def forward(
        self, positions: torch.Tensor, hidden_states: torch.Tensor, residual: torch.Tensor | None, t_cond: None = None
    ) -> tuple[torch.Tensor, torch.Tensor]:
        """The MLP's result and the residual, both [rows, hidden], as the layer's own; ``t_cond`` as of `JoinedLayer`."""
        if residual is None:
            residual = hidden_states
            qkv, _ = self.qkv_proj(self.input_layernorm(hidden_states))
        else:
            qkv, residual = _normalized(hidden_states, residual, self.input_layernorm, self.qkv_proj)
        hidden_states = self.attention(positions=positions, hidden_states=qkv)
        gate_up, residual = _normalized(hidden_states, residual, self.norm, self.gate_up_proj)
        linear = self.down_proj
        weights = getattr(linear, WEIGHT), getattr(linear, SCALES), getattr(linear, ORIGINAL)
        return torch.ops.vllm_quantspec.activated_linear(gate_up, *weights, linear.quant_method.fp8_inputs), residual


def _normalized(
    x: torch.Tensor, residual: torch.Tensor, norm: nn.Module, linear: nn.Module
) -> tuple[torch.Tensor, torch.Tensor]:
    weights = getattr(linear, WEIGHT), getattr(linear, SCALES), linear.bias, getattr(linear, ORIGINAL)
    return torch.ops.vllm_quantspec.normalized_linear(
        x, residual, norm.weight, norm.variance_epsilon, *weights, linear.quant_method.fp8_inputs
    )


def fuse_layers(draft: nn.Module, vllm_config: VllmConfig, clone: Callable[[nn.Module], nn.Module]) -> nn.Module | str:
    """The view of ``draft``, or why it cannot be had; arguments as of `join_layers`."""
    stack = stack_of(draft, vllm_config)
    if isinstance(stack, str):
        return stack
    layers = nn.ModuleList()
    for layer in stack:
        if (reason := _problem_of(layer, vllm_config.model_config.dtype)) is not None:
            return reason
        attention = clone(layer.self_attn)
        attention._modules["qkv_proj"] = Given()
        layers.append(FusedLayer(layer, attention))
    return with_layers(draft, stack, layers, clone)


def _problem_of(layer: nn.Module, dtype: torch.dtype) -> str | None:
    """Why a layer cannot be a `FusedLayer`, or None."""
    capability = current_platform.get_device_capability()
    if capability is None or (capability.major, capability.minor) < MIN_CAPABILITY:
        return "its launches would not begin under one another here"
    if (reason := why_not_known(layer, dtype)) is not None:
        return reason
    if any(norm.weight.data_ptr() % 16 for norm in (layer.input_layernorm, layer.post_attention_layernorm)):
        return "a norm's weight does not begin at a multiple of 16 bytes"
    for linear in (layer.self_attn.qkv_proj, layer.mlp.gate_up_proj, layer.mlp.down_proj):
        method = linear.quant_method
        if type(method) not in (FastInt4LinearMethod, FastInt8LinearMethod) or method.rotated:
            return "not all linears are on this package's GPU kernel and without rotation"
        if linear.skip_bias_add or (linear is layer.mlp.down_proj and linear.bias is not None):
            return "its linears have biases"
        if (reason := fused_linear.supported(method.in_features)) is not None:
            return reason.rstrip(".")
    return None
