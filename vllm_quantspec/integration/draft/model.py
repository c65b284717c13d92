"""The draft model: a second view of the loaded target, with INT4 linears and attention layers of its own.

The module tree of the target is *cloned structurally*: every module that has a linear, an attention layer or INT4 experts
below it becomes a new object of the same class whose attributes are the target's, by reference; the modules without any
(norms, embeddings, rotary caches, activations, other experts) are the target's own objects. Building a second model from the
configuration would need to allocate it first, would run constructors with side effects (registering layers, reading
the configuration of a checkpoint), and would have to find the counterpart of each tensor by name; a clone keeps what
the target became after loading, for any architecture made of vLLM's linears and under any tensor or pipeline
parallelism, since it only ever sees local shards.
"""

from __future__ import annotations

import copy
import functools
import itertools
import types
from collections.abc import Callable
from contextlib import nullcontext
from dataclasses import dataclass, field
from typing import TypeVar

import torch
from torch import nn
from vllm.compilation import backends
from vllm.compilation.wrapper import TorchCompileWithNoGuardsWrapper
from vllm.config import VllmConfig, set_current_vllm_config
from vllm.distributed import get_tp_group
from vllm.logger import init_logger
from vllm.lora.layers import BaseLayerWithLoRA
from vllm.model_executor.layers.attention import Attention
from vllm.model_executor.layers.attention_layer_base import AttentionLayerBase
from vllm.model_executor.layers.fused_moe.runner.moe_runner import MoERunner
from vllm.model_executor.layers.fused_moe.runner.moe_runner_interface import MoERunnerInterface
from vllm.model_executor.layers.linear import LinearBase
from vllm.model_executor.layers.vocab_parallel_embedding import ParallelLMHead, VocabParallelEmbedding
from vllm.model_executor.models.interfaces import supports_multimodal
from vllm.platforms import current_platform
from vllm.utils import torch_utils

from vllm_quantspec.integration.draft import losses, one_copy
from vllm_quantspec.integration.draft.choose_bits import choose_bits
from vllm_quantspec.integration.draft.experts import (
    Int4ExpertsMethod,
    choose_experts_method,
    experts_bytes,
    round_experts,
    why_no_room,
)
from vllm_quantspec.integration.draft.finite import with_finite_logits
from vllm_quantspec.integration.draft.fused_layers import fuse_layers
from vllm_quantspec.integration.draft.joined_layers import Joined, join_layers
from vllm_quantspec.integration.draft.linears import choose_int4_method
from vllm_quantspec.integration.draft.loaded import effective_weight, is_plain, loaded_bytes, local_shape
from vllm_quantspec.integration.draft.own_linear import OwnLinear
from vllm_quantspec.integration.draft.rounding import round_by_gptq
from vllm_quantspec.integration.draft.stored import KeptLosses, Stored, fingerprint
from vllm_quantspec.memory import LENGTH, TEXTS

logger = init_logger("vllm.quantspec.draft_model")

DRAFT_PREFIX = "draft_model."
# A mixture's router decides which experts run: 4 bits would save nothing there and change much.
_KEPT_LINEARS = ("gate", "router", "shared_expert_gate")
_TARGET_TAG = "backbone"
_View = TypeVar("_View")
# torch's own attributes of a module: its children, tensors and hooks.
_MODULE_STATE = nn.Module().__dict__.keys()


@dataclass
class DraftModel:
    """What `build_draft_model` (`draft.build`) built.

    model: called like the target (``input_ids``, ``positions``, ``inputs_embeds``) and has its ``compute_logits``.
    joined: what computes the same for few tokens, where that is faster, or None; fused: likewise for more, or None.
    attention_layers: name of each of the draft's attention layers -> the target's layer whose KV cache it reads.
    int4_bytes: device bytes of the weights in 4 and 8 bits, scales and zero points; target_bytes: of the same as loaded.
    quantized: names of the linears that run in INT4 or INT8; experts: of the mixtures' layers whose experts do.
    wide_share: of the weights of these linears, the output layer's aside, those in 8 bits on this rank.
    one_copy: names of the linears whose 4-bit weights are the target's own (`draft.one_copy`).
    shared: names of the linears, and of the layers of experts, that are the target's, with the reason.
    updates: each rounds some weights again, as the target has them now; stale: they are due (`weight_updates`).
    """

    model: nn.Module | None = None
    joined: Joined | None = None
    fused: nn.Module | None = None
    attention_layers: dict[str, str] = field(default_factory=dict)
    int4_bytes: int = 0
    target_bytes: int = 0
    quantized: list[str] = field(default_factory=list)
    experts: list[str] = field(default_factory=list)
    wide_share: float = 0.0
    one_copy: list[str] = field(default_factory=list)
    shared: dict[str, str] = field(default_factory=dict)
    updates: list[Callable[[], None]] = field(default_factory=list)
    stale: bool = False

    def forward_of(self, num_tokens: int) -> nn.Module:
        """What computes the hidden states of so many tokens: ``joined``, ``fused`` or ``model``."""
        if self.joined is not None and num_tokens <= self.joined.max_rows:
            return self.joined.model
        return self.model if self.fused is None else self.fused


class Builder:
    def __init__(
        self,
        vllm_config: VllmConfig,
        target_model: nn.Module,
        draft_weights: str,
        weights_asked: bool,
        draft_experts: str,
        experts_asked: bool,
        weight_group_size: int,
        quantize_lm_head: bool,
        weight_rounding: str,
        gptq_asked: bool,
        rotated: bool,
        weight_bits: float | None,
        join_layers: bool,
        fuse_layers: bool,
        fp8_inputs: bool,
    ) -> None:
        self.vllm_config = vllm_config
        self.layers = vllm_config.compilation_config.static_forward_context
        self.dtype = vllm_config.model_config.dtype
        self.draft_weights, self.weights_asked, self.weight_bits = draft_weights, weights_asked, weight_bits
        self.quantize = draft_weights != "target"
        self.chooses_bits = draft_weights in ("mixed", "auto")
        self.quantize_experts = self.quantize and draft_experts == "int4"
        self.group_size = weight_group_size
        self.quantize_lm_head = quantize_lm_head
        self.rounding, self.gptq_asked, self.rotated, self.fp8_inputs = weight_rounding, gptq_asked, rotated, fp8_inputs
        self.join_layers, self.fuse_layers = join_layers, fuse_layers
        self.own: list[OwnLinear] = []
        self.draft = DraftModel()
        self.clones: dict[int, nn.Module] = {}
        # Other modules found in the static forward context are called by name, and what they hold through them (a
        # mixture's shared experts, say, which the model's block has as well): clones of these would never run.
        # The draft's layers of experts have names of their own, where it has INT4 experts (`draft_experts`).
        by_name = [m for m in self.layers.values() if not isinstance(m, AttentionLayerBase | BaseLayerWithLoRA)]
        self.own_experts: dict[int, Int4ExpertsMethod] = {}
        self.kept_experts: dict[int, str] = {}
        if self.quantize:
            self._choose_experts([m for m in by_name if isinstance(m, MoERunnerInterface)], experts_asked)
        by_name = [m for m in by_name if id(m) not in self.own_experts]
        self.called_by_name = {id(m) for m in by_name}
        self.held_by_those = {id(m) for module in by_name for m in module.modules()} - self.called_by_name
        # Drafting is text: a vision or audio tower stays the target's.
        text_model = target_model.get_language_model() if supports_multimodal(target_model) else target_model
        self.scope = {id(m) for m in text_model.modules()}
        self.scope |= {id(m) for m in target_model.modules() if any(c is text_model for c in m.modules())}

    def _choose_experts(self, layers: list[nn.Module], asked: bool) -> None:
        for layer in layers:
            method, reason = None, "draft_experts='target'"
            if self.quantize_experts:
                method, reason = choose_experts_method(layer, self.dtype, self.group_size, asked)
            if method is None:
                self.kept_experts[id(layer)] = reason
            else:
                self.own_experts[id(layer)] = method
        if not asked and (reason := why_no_room(self.vllm_config, self.own_experts.values())) is not None:
            self.kept_experts |= dict.fromkeys(self.own_experts, reason)
            self.own_experts.clear()

    def build(self, target_model: nn.Module) -> DraftModel:
        self.draft.model = self._visit(target_model, "")
        if self.rounding == "gptq" and self.own:
            stored = Stored(self._what_decides(target_model, self.own), {x.name: x.layout for x in self.own})
            if not round_by_gptq(self.vllm_config, target_model, self.own, stored, self.gptq_asked):
                self.rounding = "search"
        if self.chooses_bits and (self.weights_asked or self.rounding == "gptq"):
            self._choose_bits(target_model)
        config = self._compile_config()
        for clone in self.clones.values():
            if id(clone) in self.clones:
                continue  # a module of the target, shared
            for name in clone.__dict__.keys() - _MODULE_STATE:
                clone.__dict__[name] = self._redirect(clone.__dict__[name])
            self._reset_compilation(clone, config)
        self.draft.int4_bytes += sum(linear.num_bytes for linear in self.own)
        weights = {bits: sum(x.num_weights for x in self.own if x.bits == bits and not x.is_head) for bits in (4, 8)}
        self.draft.wide_share = weights[8] / max(sum(weights.values()), 1)
        with_finite_logits(self.draft.model)
        if self.join_layers and (self.draft.quantized or self.draft.one_copy):
            self._join_layers()
        if self.fuse_layers and self.draft.quantized:
            self._fuse_layers()
        return self.draft

    def _join_layers(self) -> None:
        joined = self._view(join_layers, "joined")
        if isinstance(joined, str):
            log = logger.debug if current_platform.is_cpu() else logger.info
            log("Every linear and norm of a draft step is a launch of its own: %s", joined)
        else:
            logger.info("Draft steps of up to %d sequences compute all between attentions in one launch", joined.max_rows)
            self.draft.joined = joined

    def _fuse_layers(self) -> None:
        fused = self._view(fuse_layers, "fused")
        if isinstance(fused, str):
            logger.warning("quantspec: fuse_layers has no effect: %s", fused)
        else:
            logger.info("Draft steps of more sequences launch norms and activations with the linears behind them")
            self.draft.fused = fused

    def _view(self, make: Callable[..., _View], name: str) -> _View:
        """What ``make`` makes of the draft, compiled apart from it."""
        config = self._compile_config(name)

        def clone(module: nn.Module) -> nn.Module:
            copy = _shallow_clone(module)
            self._reset_compilation(copy, config)
            return copy

        with backends.set_model_tag(f"{DRAFT_PREFIX[:-1]}_{name}"):
            return make(self.draft.model, self.vllm_config, clone)

    def _choose_bits(self, target_model: nn.Module) -> None:
        """Give 8 bits to linears that are worth them: by search, as there is next to nothing left for GPTQ to win."""
        linears = [x for x in self.own if {4, 8} <= x.methods.keys() and not x.is_head]
        if not linears:
            return
        measured = {"losses": [losses.TEXTS, losses.LENGTH], "rounding": self.rounding}
        kept = KeptLosses(self._what_decides(target_model, linears) | measured)
        more = self.draft_weights, self.weight_bits, self.rounding, kept
        try:
            wide = choose_bits(self.vllm_config, target_model, linears, *more).wide
        except Exception as error:
            # Other ranks may be waiting for this one: they end with it.
            if self.weights_asked or get_tp_group().world_size > 1:
                raise
            logger.warning(
                "Bits cannot be chosen for this model, so all of the draft's weights have 4: %s: %s",
                type(error).__name__,
                " ".join(str(error).split()),
            )
            return
        for linear in linears:
            if linear.name in wide:
                linear.bits = 8
                linear.put(linear.rounded())

    def _what_decides(self, target_model: nn.Module, linears: list[OwnLinear]) -> dict:
        """All that roundings of ``linears`` depend on, but for versions."""
        names = {x.name for x in linears}
        others = ((n, p) for n, p in target_model.named_parameters() if n.rpartition(".")[0] not in names)
        weights = ((x.name, effective_weight(x.layer, self.dtype)[0]) for x in linears)
        config = self.vllm_config
        return {
            "weights": fingerprint(itertools.chain(others, weights)),
            "options": [self.group_size, self.rotated, self.quantize_lm_head, str(self.dtype)],
            "texts": [
                min(TEXTS, config.scheduler_config.max_num_batched_tokens),
                min(LENGTH, config.model_config.max_model_len),
            ],
            "kernels": [[x.name, *x.layout[:4]] for x in linears],
        }

    def _visit(self, module: nn.Module, name: str) -> nn.Module:
        """The draft's counterpart of ``module``: a clone, or ``module`` itself where nothing below it differs."""
        if id(module) in self.clones:
            return self.clones[id(module)]
        if isinstance(module, BaseLayerWithLoRA):
            # The draft has no adapters: which adapter a token has is set for the rows of the target's step.
            self.clones[id(module)] = self._visit(module.base_layer, name)
            return self.clones[id(module)]
        if id(module) in self.kept_experts:
            return self._share(module, name, self.kept_experts[id(module)])
        if id(module) not in self.scope or id(module) in self.called_by_name:
            return module
        if id(module) in self.held_by_those:
            for path, linear in module.named_modules(prefix=name):
                if isinstance(linear, LinearBase):
                    self._share(linear, path, "a mixture of experts calls it, and vLLM calls that by name")
            return module
        if isinstance(module, AttentionLayerBase):
            counterpart = self._attention(module)
        elif isinstance(module, LinearBase):
            counterpart = self._linear(module, name)
        elif id(module) in self.own_experts:
            counterpart = self._experts(module, name)
        else:
            counterpart = self._container(module, name)
        self.clones[id(module)] = counterpart
        return counterpart

    def _container(self, module: nn.Module, name: str) -> nn.Module:
        children = self._children(module, name)
        if all(children[n] is c for n, c in module._modules.items()):
            return module
        clone = _shallow_clone(module)
        clone._modules = children
        return clone

    def _children(self, module: nn.Module, name: str) -> dict[str, nn.Module | None]:
        children: dict[str, nn.Module | None] = {}
        for child_name, child in module._modules.items():
            path = f"{name}.{child_name}".lstrip(".")
            own_head = child.base_layer if isinstance(child, BaseLayerWithLoRA) else child
            if child is None:
                children[child_name] = None
            elif isinstance(own_head, ParallelLMHead) or (
                child_name == "lm_head" and isinstance(own_head, VocabParallelEmbedding)
            ):
                # Not by its identity: with tied weights it can be the embedding's own module.
                children[child_name] = self._head(own_head, path)
            else:
                children[child_name] = self._visit(child, path)
        return children

    def _attention(self, layer: nn.Module) -> nn.Module:
        if not isinstance(layer, Attention):
            raise ValueError(
                f"{layer.layer_name} is a {type(layer).__name__}, whose cache a draft cannot share; QuantSpec works "
                "with models that use standard attention in every layer."
            )
        # A layer that itself reads another layer's cache: the draft reads that one too.
        owner = layer.kv_sharing_target_layer_name or layer.layer_name
        clone = _shallow_clone(layer)
        clone.layer_name = DRAFT_PREFIX + layer.layer_name
        clone.kv_sharing_target_layer_name = owner
        clone.kv_cache = torch.tensor([])
        clone.impl = copy.copy(layer.impl)
        if hasattr(clone.impl, "kv_sharing_target_layer_name"):
            clone.impl.kv_sharing_target_layer_name = owner
        if clone.layer_name in self.layers:
            raise ValueError(f"Duplicate layer name: {clone.layer_name}")
        self.layers[clone.layer_name] = clone
        self.draft.attention_layers[clone.layer_name] = owner
        return clone

    def _linear(self, layer: nn.Module, name: str) -> nn.Module:
        if not self.quantize:
            return self._share(layer, name, "draft_weights='target'")
        if name.rpartition(".")[2] in _KEPT_LINEARS:
            return self._share(layer, name, "a router")
        if one_copy.is_shared(layer):
            self.draft.one_copy.append(name)
            return self._share(layer, name, one_copy.SHARED)
        in_features, out_features = local_shape(layer)
        # The output layer's largest logits are computed again exactly: 4 bits do.
        is_head = isinstance(layer, VocabParallelEmbedding)
        widths = (4,) if is_head or self.draft_weights == "int4" else (4, 8) if self.chooses_bits else (8,)
        methods, reasons = {}, []
        for bits in widths:
            method, reason = choose_int4_method(
                in_features, out_features, self.dtype, self.group_size, self.rotated, bits, self.fp8_inputs and bits == 4
            )
            if method is None:
                reasons.append(reason)
            else:
                methods[bits] = method
        if widths[0] not in methods:
            return self._share(layer, name, reasons[0])
        clone = _shallow_clone(layer)
        self.draft.quantized.append(name)
        self.draft.target_bytes += loaded_bytes(layer)
        linear = OwnLinear(name, layer, clone, methods, widths[0], self.rounding, self.dtype)
        self.own.append(linear)
        self.draft.updates.append(linear.round_again)
        if self.rounding != "gptq":
            linear.put(linear.rounded())
        return clone

    def _experts(self, layer: MoERunner, name: str) -> nn.Module:
        """A layer of experts that has a name of its own, INT4 weights, and the target's router."""
        method = self.own_experts[id(layer)]
        clone = _shallow_clone(layer)
        clone._modules = self._children(layer, name)
        clone.layer_name = DRAFT_PREFIX + layer.layer_name
        if not torch_utils._USE_LAYERNAME:
            # vLLM would count the calls of a step instead, in the order of the target's layers.
            clone._encode_layer_name = functools.partial(str, clone.layer_name)
        clone.router = copy.copy(layer.router)
        clone.router.capture_fn = None  # which experts were chosen is recorded of the target
        experts = self.clones[id(layer.routed_experts)] = _shallow_clone(layer.routed_experts)
        experts._parameters, experts._modules = {}, {}  # the target's method is a module
        experts.quant_method = method
        clone._modules["routed_experts"] = experts
        if (shared := layer._shared_experts) is not None:
            own = self.clones[id(shared)]
            own = self.clones[id(shared)] = _shallow_clone(shared) if own is shared else own
            own._output = [None, None]
            own._mk_can_overlap_shared_experts = lambda: method.mk_can_overlap_shared_experts
            clone._modules["_shared_experts"] = own
        if clone.layer_name in self.layers:
            raise ValueError(f"Duplicate layer name: {clone.layer_name}")
        self.layers[clone.layer_name] = clone
        self.draft.experts.append(name)

        def round_again() -> None:
            # No moments of single experts are taken: GPTQ's stay with search.
            rounding = "nearest" if self.rounding == "nearest" else "search"
            round_experts(method, layer.routed_experts, experts, rounding)

        round_again()
        self.draft.int4_bytes += experts_bytes(experts)
        self.draft.target_bytes += sum(p.nbytes for p in layer.routed_experts.parameters(recurse=False))
        self.draft.updates.append(round_again)
        return clone

    def _head(self, layer: VocabParallelEmbedding, name: str) -> nn.Module:
        if not self.quantize_lm_head:
            return self._share(layer, name, "quantize_lm_head=False")
        in_features, out_features = local_shape(layer)
        if not is_plain(layer) or layer.weight.shape != (out_features, in_features):
            return self._share(layer, name, "the target's is quantized, and a few exact logits are needed")
        if self.vllm_config.model_config.head_dtype != self.dtype:
            return self._share(layer, name, "its dtype is not the model's")
        return self._linear(layer, name)

    def _share(self, layer: nn.Module, name: str, reason: str) -> nn.Module:
        self.draft.shared[name] = reason
        return layer

    def _redirect(self, value: object) -> object:
        """``value`` with the target's modules replaced by the draft's (plain attributes, bound methods)."""
        if isinstance(value, nn.Module):
            return self.clones.get(id(value), value)
        if isinstance(value, types.MethodType):
            owner = self._redirect(value.__self__) if isinstance(value.__self__, nn.Module) else value.__self__
            return value if owner is value.__self__ else types.MethodType(value.__func__, owner)
        if isinstance(value, functools.partial):
            func, args, keywords = (self._redirect(v) for v in (value.func, value.args, value.keywords))
            same = func is value.func and args is value.args and keywords is value.keywords
            return value if same else functools.partial(func, *args, **keywords)
        if type(value) in (list, tuple):
            items = type(value)(self._redirect(v) for v in value)
            return value if all(a is b for a, b in zip(items, value, strict=True)) else items
        if type(value) is dict:
            items = {k: self._redirect(v) for k, v in value.items()}
            return value if all(items[k] is v for k, v in value.items()) else items
        return value

    def _compile_config(self, *more: str) -> VllmConfig:
        """The target's config with a different hash: compiled code on disk is looked up by it."""
        config = copy.copy(self.vllm_config)
        extra = config.additional_config
        base = dict(extra) if isinstance(extra, dict) else {"additional_config": extra.compute_hash()}
        config.additional_config = base | {
            "quantspec_draft": [
                self.quantize,
                self.group_size,
                self.rotated,
                self.fp8_inputs,
                self.quantize_lm_head,
                len(self.own_experts),
                sorted(linear.name for linear in self.own if linear.bits == 8),
                *more,
            ]
        }
        return config

    def _reset_compilation(self, module: nn.Module, config: VllmConfig) -> None:
        """Give a clone its own torch.compile state (see `vllm.compilation.decorators.support_torch_compile`)."""
        module._compiled_call_impl = None
        if not isinstance(module, TorchCompileWithNoGuardsWrapper) or not hasattr(module, "do_not_compile"):
            return
        for name in ("aot_compiled_fn", "_compiled_callable", "_compiled_bytecode", "_bytecode_hook_handle"):
            module.__dict__.pop(name, None)
        module.vllm_config = config
        if module.do_not_compile:
            return
        module.was_aot_compile_fn_loaded_from_disk = False
        # Compiled code is kept apart by tag; a caller may have set one already.
        tagged = nullcontext() if backends.model_tag != _TARGET_TAG else backends.set_model_tag(DRAFT_PREFIX[:-1])
        with set_current_vllm_config(config), tagged:
            module._compile_tag = backends.model_tag
            TorchCompileWithNoGuardsWrapper.__init__(
                module, compile_prefix=module._compile_prefix, is_encoder=module._is_encoder
            )


def _shallow_clone(module: nn.Module) -> nn.Module:
    """A new module of the same class whose parameters, buffers, children and attributes are those of ``module``."""
    clone = module.__class__.__new__(module.__class__)
    clone.__dict__ = {k: copy.copy(v) if k in _MODULE_STATE else v for k, v in module.__dict__.items()}
    return clone
