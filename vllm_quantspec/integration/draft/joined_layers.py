"""A view of the draft for few sequences: what it computes between two attentions is one launch (`kernels.draft_layer`).

Seven launches become one, whose weights are on their way while attention runs. The view's modules are the draft's own, but
for those from the model down to its decoder layers, which are cut elsewhere: a layer is given the query, keys and values of
its attention, and ends with those of the next one. So the model's loop over its layers stays as it is, and hands these on
in the place of hidden states. The first layer computes its own, and the last one ends as it always did.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import NamedTuple

import torch
from torch import nn
from vllm import envs
from vllm.config import VllmConfig
from vllm.model_executor.layers.activation import SiluAndMul
from vllm.model_executor.layers.layernorm import RMSNorm
from vllm.model_executor.models.llama import LlamaAttention, LlamaDecoderLayer, LlamaMLP, LlamaModel
from vllm.model_executor.models.mistral import MistralAttention, MistralDecoderLayer, MistralModel
from vllm.model_executor.models.qwen2 import Qwen2Attention, Qwen2DecoderLayer, Qwen2MLP, Qwen2Model
from vllm.model_executor.models.qwen3 import Qwen3Attention, Qwen3DecoderLayer, Qwen3Model
from vllm.platforms import current_platform

from vllm_quantspec.integration.draft import one_copy
from vllm_quantspec.integration.draft.linears import SCALES, WEIGHT, FastInt4LinearMethod
from vllm_quantspec.kernels import draft_layer
from vllm_quantspec.kernels.device import device_properties
from vllm_quantspec.kernels.draft_layer import Order

# Rows up to which one launch is the faster one (benchmarks/draft_layer.py).
MAX_ROWS = 3
# Of these models, and none derived from them, it is known that the loop hands on what a layer returns, and no more.
_MODELS = LlamaModel, MistralModel, Qwen2Model, Qwen3Model
# Likewise of layers: norm, attention, norm, MLP, each into the residual.
_LAYERS = LlamaDecoderLayer, MistralDecoderLayer, Qwen2DecoderLayer, Qwen3DecoderLayer
# An attention begins with `qkv_proj` and ends with `o_proj`.
_ATTENTIONS = LlamaAttention, MistralAttention, Qwen2Attention, Qwen3Attention
_MLPS = LlamaMLP, Qwen2MLP
_OTHER_LAYERS = "its decoder, or a layer of it, is of a class that is not known here"


class Joined(NamedTuple):
    """What `join_layers` made: ``model`` is called as the draft is, with up to ``max_rows`` tokens; first with several."""

    model: nn.Module
    max_rows: int


class Weights(NamedTuple):
    """Of a linear: the names of its attributes that the launch takes, and what they are."""

    names: tuple[str, ...]
    in_features: int
    out_features: int
    group_size: int
    order: Order


class Given(nn.Module):
    """In the place of a linear whose input is its result already."""

    def forward(self, x: torch.Tensor) -> tuple[torch.Tensor, None]:
        return x, None


class JoinedLayer(nn.Module):
    """A decoder layer that begins at its attention and ends before the next layer's, if there is one.

    Args:
        layer: the draft's decoder layer. following: the one after it, or None. attention: ``layer``'s, without linears.
        is_first: whether it is given hidden states as a decoder layer is, not the result of another `JoinedLayer`.
    """

    def __init__(self, layer: nn.Module, following: nn.Module | None, attention: nn.Module, is_first: bool) -> None:
        super().__init__()
        self.attention, self.is_first, self.is_last = attention, is_first, following is None
        if is_first:
            self.input_layernorm, self.qkv_proj = layer.input_layernorm, layer.self_attn.qkv_proj
        self.o_proj, self.norm, self.mlp = layer.self_attn.o_proj, layer.post_attention_layernorm, layer.mlp
        if following is not None:
            self.next_norm, self.next_qkv = following.input_layernorm, following.self_attn.qkv_proj
            linears = self.o_proj, self.mlp.gate_up_proj, self.mlp.down_proj, self.next_qkv
            self.names = tuple(_weights_of(linear).names for linear in linears)

    def forward(
        self, positions: torch.Tensor, hidden_states: torch.Tensor, residual: torch.Tensor | None, t_cond: None = None
    ) -> tuple[torch.Tensor, torch.Tensor]:
        """The next layer's qkv [rows, out], or of the last layer the MLP's result, and the residual [rows, hidden].

        ``hidden_states``: the qkv of this layer; of the first one, embeddings, with None as the residual. ``t_cond``:
        Mistral's models name it to their layers; those that use it are not joined.
        """
        qkv = hidden_states
        if self.is_first:
            residual = hidden_states
            qkv, _ = self.qkv_proj(self.input_layernorm(hidden_states))
        out = self.attention(positions=positions, hidden_states=qkv)
        if self.is_last:
            out, _ = self.o_proj(out)
            out, residual = self.norm(out, residual)
            return self.mlp(out), residual
        linears = self.o_proj, self.mlp.gate_up_proj, self.mlp.down_proj, self.next_qkv
        weights = [getattr(linears[i], name) for i in range(4) for name in self.names[i]]
        return torch.ops.vllm_quantspec.draft_layer(
            out,
            residual,
            weights,
            self.norm.weight,
            self.next_norm.weight,
            self.next_qkv.bias,
            self.norm.variance_epsilon,
            self.next_norm.variance_epsilon,
        )


def join_layers(draft: nn.Module, vllm_config: VllmConfig, clone: Callable[[nn.Module], nn.Module]) -> Joined | str:
    """The view of ``draft``, or why it cannot be had.

    Args:
        draft: the draft model, whose linears have their weights.
        clone: makes a new module of the same class with the same attributes, which is compiled anew.
    """
    stack = stack_of(draft, vllm_config)
    if isinstance(stack, str):
        return stack
    shapes = _shapes_of(list(stack), vllm_config.model_config.dtype)
    if isinstance(shapes, str):
        return shapes
    if (max_rows := _max_rows(shapes)) == 0:
        return "this GPU's shared memory cannot hold the launch"
    layers = nn.ModuleList()
    for i, layer in enumerate(stack):
        attention = clone(layer.self_attn)
        attention._modules |= {"qkv_proj": Given(), "o_proj": Given()}
        layers.append(JoinedLayer(layer, stack[i + 1] if i + 1 < len(stack) else None, attention, is_first=i == 0))
    return Joined(with_layers(draft, stack, layers, clone), max_rows)


def stack_of(draft: nn.Module, vllm_config: VllmConfig) -> nn.ModuleList | str:
    """The decoder layers of ``draft``, or why they cannot have other launches."""
    parallel = vllm_config.parallel_config
    if parallel.tensor_parallel_size > 1 or parallel.pipeline_parallel_size > 1:
        return "other GPUs compute a part of each layer"
    if envs.VLLM_BATCH_INVARIANT:
        return "VLLM_BATCH_INVARIANT is set, and other launches round elsewhere"
    decoders = [m for m in draft.modules() if type(m) in _MODELS]
    if len(decoders) != 1 or getattr(decoders[0], "aux_hidden_state_layers", ()) or len(decoders[0].layers) < 2:
        return _OTHER_LAYERS
    return decoders[0].layers


def with_layers(
    module: nn.Module, stack: nn.ModuleList, layers: nn.ModuleList, clone: Callable[[nn.Module], nn.Module]
) -> nn.Module:
    """``module``, or a clone of it that has ``layers`` in the place of ``stack`` somewhere below."""
    if module is stack:
        return layers
    children = {name: child and with_layers(child, stack, layers, clone) for name, child in module._modules.items()}
    if all(children[name] is child for name, child in module._modules.items()):
        return module
    copy = clone(module)
    copy._modules = children
    return copy


def why_not_known(layer: nn.Module, dtype: torch.dtype) -> str | None:
    """Why a decoder layer may compute something else between its linears than is known here; None if it does not."""
    if type(layer) not in _LAYERS or type(layer.self_attn) not in _ATTENTIONS or type(layer.mlp) not in _MLPS:
        return _OTHER_LAYERS
    if getattr(layer, "ada_rms_norm_t_cond", None) is not None or type(layer.mlp.act_fn) is not SiluAndMul:
        return "its MLP computes something else"
    for norm in (layer.input_layernorm, layer.post_attention_layernorm):
        is_plain = type(norm) is RMSNorm and norm.has_weight and norm.variance_size_override is None
        if not is_plain or norm.weight.dtype != dtype:
            return "its norms compute something else"
    return None


def _weights_of(linear: nn.Module) -> Weights | None:
    """None where the launch does not take them."""
    method = linear.quant_method
    if type(method) is FastInt4LinearMethod:
        names = None if method.rotated else (WEIGHT, SCALES)
        return names and Weights(names, method.in_features, method.out_features, method.group_size, Order.PACKED)
    if names := one_copy.weights_of(linear):
        codes, scales = (getattr(linear, name) for name in names[:2])
        in_features, (groups, out_features) = 16 * codes.shape[0], scales.shape
        order = Order.MARLIN if len(names) == 2 else Order.MARLIN_ZEROS
        return Weights(names, in_features, out_features, in_features // groups, order)
    return None


def _shapes_of(layers: list[nn.Module], dtype: torch.dtype) -> set[tuple[draft_layer.Shape, Order]] | str:
    """Of the launches, and their weights' orders, or why these layers cannot have them."""
    capability = current_platform.get_device_capability()
    if capability is None:
        return "one launch needs a GPU"
    shapes = set()
    for layer, following in zip(layers, [*layers[1:], layers[-1]], strict=True):
        if (reason := why_not_known(layer, dtype)) is not None:
            return reason
        inner = layer.self_attn.o_proj, layer.mlp.gate_up_proj, layer.mlp.down_proj
        linears = *inner, following.self_attn.qkv_proj
        weights = [_weights_of(linear) for linear in linears]
        if None in weights:
            return "not all linears are in 4 bits, on this package's GPU kernel and without rotation"
        for linear in linears:
            if linear.skip_bias_add or (linear in inner and linear.bias is not None):
                return "its linears have biases"
        o, gate_up, down, qkv = weights
        if len(orders := {w.order for w in weights}) > 1:
            return "some linears read the target's own 4 bits, and others in another order or without zero points"
        shape = draft_layer.Shape(o.in_features, o.out_features, down.in_features, qkv.out_features)
        (order,) = orders
        # One that the launch does not take, if there is such a one.
        group_size = next((w.group_size for w in weights if w.group_size != draft_layer.CHUNK), draft_layer.CHUNK)
        reason = draft_layer.supported(shape, group_size, dtype, (capability.major, capability.minor), order=order)
        if reason is not None:
            return reason.rstrip(".")
        shapes.add((shape, order))
    return shapes


def _max_rows(shapes: set[tuple[draft_layer.Shape, Order]]) -> int:
    most = min(MAX_ROWS, *(order.max_tokens for _, order in shapes))
    if not torch.cuda.is_available():
        return most  # the operator's twin, in a test
    gpu = device_properties(torch.cuda.current_device())
    for rows in range(most, 1, -1):  # torch.compile takes a single row for a constant
        try:
            for shape, order in shapes:
                draft_layer.plan_of(shape, rows, gpu, order=order)
        except RuntimeError:
            continue
        return rows
    return 0
