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
import dataclasses
import functools
import itertools
import time
import types
from collections.abc import Callable
from contextlib import nullcontext
from dataclasses import dataclass, field
from typing import NamedTuple

import torch
from torch import nn
from vllm.compilation import backends
from vllm.compilation.wrapper import TorchCompileWithNoGuardsWrapper
from vllm.config import VllmConfig, set_current_vllm_config
from vllm.logger import init_logger
from vllm.lora.layers import BaseLayerWithLoRA
from vllm.model_executor.layers.attention import Attention
from vllm.model_executor.layers.attention_layer_base import AttentionLayerBase
from vllm.model_executor.layers.fused_moe.runner.moe_runner import MoERunner
from vllm.model_executor.layers.fused_moe.runner.moe_runner_interface import MoERunnerInterface
from vllm.model_executor.layers.linear import LinearBase, UnquantizedLinearMethod
from vllm.model_executor.layers.vocab_parallel_embedding import (
    ParallelLMHead,
    UnquantizedEmbeddingMethod,
    VocabParallelEmbedding,
)
from vllm.model_executor.models.interfaces import supports_multimodal
from vllm.platforms import current_platform
from vllm.utils import torch_utils

from vllm_quantspec.integration.draft import one_copy
from vllm_quantspec.integration.draft.calibration import calibrate
from vllm_quantspec.integration.draft.experts import (
    Int4ExpertsMethod,
    choose_experts_method,
    experts_bytes,
    round_experts,
)
from vllm_quantspec.integration.draft.finite import with_finite_logits
from vllm_quantspec.integration.draft.head import RescoringHeadMethod
from vllm_quantspec.integration.draft.linears import Int4LinearMethod, choose_int4_method, int4_bytes
from vllm_quantspec.integration.draft.stored import Stored, fingerprint
from vllm_quantspec.memory import LENGTH, TEXTS, draft_logits_bytes, gptq_bytes
from vllm_quantspec.weights import QuantizedWeight, quantize_weight

logger = init_logger("vllm.quantspec.draft_model")

DRAFT_PREFIX = "draft_model."
# A mixture's router decides which experts run: 4 bits would save nothing there and change much.
_KEPT_LINEARS = ("gate", "router", "shared_expert_gate")
_IDENTITY_ROWS = 1024
_TARGET_TAG = "backbone"
# torch's own attributes of a module: its children, tensors and hooks.
_MODULE_STATE = nn.Module().__dict__.keys()


@dataclass
class DraftModel:
    """What `build_draft_model` built.

    model: called like the target (``input_ids``, ``positions``, ``inputs_embeds``) and has its ``compute_logits``.
    attention_layers: name of each of the draft's attention layers -> the target's layer whose KV cache it reads.
    int4_bytes: device bytes of the INT4 weights, scales and zero points; target_bytes: of the same weights as loaded.
    quantized: names of the linears that run in INT4; experts: of the mixtures' layers whose experts do.
    one_copy: names of the linears whose 4-bit weights are the target's own (`draft.one_copy`).
    shared: names of the linears, and of the layers of experts, that are the target's, with the reason.
    updates: each rounds some weights again, as the target has them now; stale: they are due (`weight_updates`).
    """

    model: nn.Module | None = None
    attention_layers: dict[str, str] = field(default_factory=dict)
    int4_bytes: int = 0
    target_bytes: int = 0
    quantized: list[str] = field(default_factory=list)
    experts: list[str] = field(default_factory=list)
    one_copy: list[str] = field(default_factory=list)
    shared: dict[str, str] = field(default_factory=dict)
    updates: list[Callable[[], None]] = field(default_factory=list)
    stale: bool = False


def build_draft_model(
    vllm_config: VllmConfig,
    target_model: nn.Module,
    *,
    draft_weights: str = "int4",
    draft_experts: str = "target",
    weight_group_size: int = 128,
    quantize_lm_head: bool = True,
    weight_rounding: str = "search",
    weight_rotation: str = "none",
) -> DraftModel:
    """Build the draft model out of ``target_model``, whose weights are loaded and processed.

    The new attention layers are registered in ``vllm_config``'s static forward context under ``draft_model.<name>``.

    Args:
        vllm_config: the target's; the draft shares its compilation config.
        target_model: the loaded model of this rank.
        draft_weights: ``"int4"``, or ``"target"`` to share every linear.
        draft_experts: of a mixture: ``"target"`` to share its experts, or ``"int4"`` for INT4 ones, see `draft.experts`.
        weight_group_size: input channels per INT4 scale: 128, 64 or 32. A linear whose input is not divisible by it
            takes the next smaller group.
        quantize_lm_head: also run the output projection in INT4, see `draft.head`.
        weight_rounding: ``"search"``, ``"nearest"`` or ``"gptq"``, see `vllm_quantspec.weights.quantize_weight`; GPTQ
            goes by the inputs that the linears have while the model writes texts of its own, see `calibration`.
        weight_rotation: ``"hadamard"`` for weights of rotated inputs, see `vllm_quantspec.rotation`, or ``"none"``.

    Raises:
        ValueError: an unknown option, or a layer whose cache cannot be shared (MLA, Mamba, linear attention).
    """
    if draft_weights not in ("int4", "target"):
        raise ValueError(f"draft_weights must be 'int4' or 'target', not {draft_weights!r}.")
    if draft_experts not in ("target", "int4"):
        raise ValueError(f"draft_experts must be 'target' or 'int4', not {draft_experts!r}.")
    if weight_group_size not in (128, 64, 32):
        raise ValueError(f"weight_group_size must be 128, 64 or 32, not {weight_group_size}.")
    started = time.perf_counter()
    if weight_rotation not in ("hadamard", "none"):
        raise ValueError(f"weight_rotation must be 'none' or 'hadamard', not {weight_rotation!r}.")
    builder = _Builder(
        vllm_config,
        target_model,
        draft_weights,
        draft_experts,
        weight_group_size,
        quantize_lm_head,
        weight_rounding,
        weight_rotation == "hadamard",
    )
    with torch.no_grad():
        draft = builder.build(target_model)
    if not draft.attention_layers:
        raise ValueError("The target model has no attention layer with a KV cache, so there is nothing to draft with.")
    if draft_weights == "int4":
        if not draft.quantized and not draft.one_copy:
            name, reason = next(iter(draft.shared.items()), ("the model", "it has no linear layers"))
            raise ValueError(
                f"quantspec: no linear layer of this model can run in INT4 here ({name}: {reason}); set draft_weights to "
                "'target' in the speculative config."
            )
        logger.info(
            "INT4 draft weights: %.2f GiB (%.0f%% of the target's), %d linears%s%s, took %.1f s",
            draft.int4_bytes / 2**30,
            100 * draft.int4_bytes / max(draft.target_bytes, 1),
            len(draft.quantized),
            f" and the experts of {len(draft.experts)} layers" if draft.experts else "",
            f"; {len(draft.one_copy)} linears read the target's own 4 bits" if draft.one_copy else "",
            time.perf_counter() - started,
        )
        for name, reason in draft.shared.items():
            logger.debug("%s stays in the target's precision: %s", name, reason)
        if draft_experts == "int4":
            for reason in dict.fromkeys(builder.kept_experts.values()):
                logger.warning("quantspec: the draft reads the target's experts as they are: %s", reason)
            if not draft.experts and not builder.kept_experts:
                logger.warning("quantspec: draft_experts 'int4' has no effect: this model has no mixture of experts")
    return draft


def build_configured_draft(vllm_config: VllmConfig, target_model: nn.Module) -> DraftModel:
    """``build_draft_model`` with the options of the engine's ``QuantSpecConfig``."""
    config = vllm_config.speculative_config
    if config.draft_sample_method == "probabilistic" and not current_platform.is_cpu():
        log_draft_logits(vllm_config)
    with backends.set_model_tag("quantspec_draft"):
        return build_draft_model(
            vllm_config,
            target_model,
            draft_weights=config.draft_weights,
            draft_experts=config.draft_experts,
            weight_group_size=config.weight_group_size,
            quantize_lm_head=config.quantize_lm_head,
            weight_rounding=config.weight_rounding,
            weight_rotation=config.weight_rotation,
        )


def log_draft_logits(vllm_config: VllmConfig) -> None:
    """Say what vLLM's model runner V2 has allocated to verify sampled drafts by: nothing else does."""
    model, num_seqs = vllm_config.model_config, vllm_config.scheduler_config.max_num_seqs
    num_drafts = vllm_config.speculative_config.num_speculative_tokens
    num_bytes = draft_logits_bytes(num_seqs, num_drafts, model.get_vocab_size(), model.head_dtype.itemsize)
    logger.info(
        "Draft logits: %.2f GiB, for %d drafts of %d sequences; a smaller --max-num-seqs makes them less, and with "
        "draft_sample_method 'greedy' there are none",
        num_bytes / 2**30,
        num_drafts,
        num_seqs,
    )


class _Waiting(NamedTuple):
    """A linear of the target whose counterpart waits for its weight.

    shape: (out, in, group size) and the dtype of scales. rounded: the weight in 4 bits, by the moments of its inputs if
    there are any; put: gives it to the counterpart.
    """

    name: str
    layer: nn.Module
    shape: tuple[int, int, int, torch.dtype]
    rounded: Callable[[torch.Tensor | None], QuantizedWeight]
    put: Callable[[QuantizedWeight], None]


class _Builder:
    def __init__(
        self,
        vllm_config: VllmConfig,
        target_model: nn.Module,
        draft_weights: str,
        draft_experts: str,
        weight_group_size: int,
        quantize_lm_head: bool,
        weight_rounding: str,
        rotated: bool,
    ) -> None:
        self.vllm_config = vllm_config
        self.layers = vllm_config.compilation_config.static_forward_context
        self.dtype = vllm_config.model_config.dtype
        self.quantize = draft_weights == "int4"
        self.quantize_experts = self.quantize and draft_experts == "int4"
        self.group_size = weight_group_size
        self.quantize_lm_head = quantize_lm_head
        self.rounding, self.rotated = weight_rounding, rotated
        # Linears that wait for the moments of their inputs.
        self.waiting: dict[nn.Module, _Waiting] = {}
        self.draft = DraftModel()
        self.clones: dict[int, nn.Module] = {}
        # Other modules found in the static forward context are called by name, and what they hold through them (a
        # mixture's shared experts, say, which the model's block has as well): clones of these would never run.
        # The draft's layers of experts have names of their own, where it has INT4 experts (`draft_experts`).
        by_name = [m for m in self.layers.values() if not isinstance(m, AttentionLayerBase | BaseLayerWithLoRA)]
        self.own_experts: dict[int, Int4ExpertsMethod] = {}
        self.kept_experts: dict[int, str] = {}
        if self.quantize:
            self._choose_experts([m for m in by_name if isinstance(m, MoERunnerInterface)])
        by_name = [m for m in by_name if id(m) not in self.own_experts]
        self.called_by_name = {id(m) for m in by_name}
        self.held_by_those = {id(m) for module in by_name for m in module.modules()} - self.called_by_name
        # Drafting is text: a vision or audio tower stays the target's.
        text_model = target_model.get_language_model() if supports_multimodal(target_model) else target_model
        self.scope = {id(m) for m in text_model.modules()}
        self.scope |= {id(m) for m in target_model.modules() if any(c is text_model for c in m.modules())}

    def _choose_experts(self, layers: list[nn.Module]) -> None:
        for layer in layers:
            method, reason = None, "draft_experts='target'"
            if self.quantize_experts:
                method, reason = choose_experts_method(layer, self.dtype, self.group_size)
            if method is None:
                self.kept_experts[id(layer)] = reason
            else:
                self.own_experts[id(layer)] = method

    def build(self, target_model: nn.Module) -> DraftModel:
        self.draft.model = self._visit(target_model, "")
        config = self._compile_config()
        for clone in self.clones.values():
            if id(clone) in self.clones:
                continue  # a module of the target, shared
            for name in clone.__dict__.keys() - _MODULE_STATE:
                clone.__dict__[name] = self._redirect(clone.__dict__[name])
            self._reset_compilation(clone, config)
        if self.waiting:
            self._round_by_gptq(target_model)
        with_finite_logits(self.draft.model)
        return self.draft

    def _round_by_gptq(self, target_model: nn.Module) -> None:
        """Put the weights of all linears that wait, as the last start has left them on disk or newly rounded."""
        stored = Stored(self._what_decides(target_model), {w.name: w.shape for w in self.waiting.values()})
        device = next(target_model.parameters()).device
        if (kept := stored.load(device)) is not None:
            logger.info("INT4 draft weights as GPTQ rounded them at an earlier start: %s", stored.path)
            for waiting in self.waiting.values():
                waiting.put(dataclasses.replace(kept(waiting.name), rotated=self.rotated))
            return
        logger.info(
            "Rounding INT4 draft weights by GPTQ, on texts that the model writes for it; takes up to about %.1f GiB "
            "beside the weights until it is done",
            self._gptq_bytes() / 2**30,
        )
        with stored.writer() as writer:

            def take(layer: nn.Module, moments: torch.Tensor | None) -> None:
                waiting = left.pop(layer)
                weight = waiting.rounded(moments)
                writer.put(waiting.name, weight)
                waiting.put(weight)

            left = dict(self.waiting)
            calibrate(self.vllm_config, target_model, {layer: functools.partial(take, layer) for layer in left})
            for layer in list(left):
                take(layer, None)  # it was not called: the output layer, say, which is never called as a module

    def _what_decides(self, target_model: nn.Module) -> dict:
        """All that GPTQ's result depends on, but for versions."""
        linears = {w.name: w for w in self.waiting.values()}
        others = ((n, p) for n, p in target_model.named_parameters() if n.rpartition(".")[0] not in linears)
        weights = ((name, _effective_weight(w.layer, self.dtype)[0]) for name, w in linears.items())
        config = self.vllm_config
        return {
            "weights": fingerprint(itertools.chain(others, weights)),
            "options": [self.group_size, self.rotated, self.quantize_lm_head, str(self.dtype)],
            "texts": [
                min(TEXTS, config.scheduler_config.max_num_batched_tokens),
                min(LENGTH, config.model_config.max_model_len),
            ],
            "kernels": [[w.name, *w.shape[:3]] for w in linears.values()],
        }

    def _gptq_bytes(self) -> int:
        shapes = [_local_shape(linear) for linear in self.waiting]
        layer = self.layers[next(iter(self.draft.attention_layers))]
        return gptq_bytes(
            num_layers=len(set(self.draft.attention_layers.values())),
            num_heads=layer.num_heads,
            num_kv_heads=layer.num_kv_heads,
            head_size=layer.head_size,
            widest=max(in_features for in_features, _ in shapes),
            largest_weight=max(in_features * out_features for in_features, out_features in shapes),
            tokens=self.vllm_config.scheduler_config.max_num_batched_tokens,
            itemsize=self.dtype.itemsize,
        )

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
        in_features, out_features = _local_shape(layer)
        method, reason = choose_int4_method(in_features, out_features, self.dtype, self.group_size, self.rotated)
        if method is None:
            return self._share(layer, name, reason)
        clone = _shallow_clone(layer)
        self.draft.quantized.append(name)
        self.draft.target_bytes += loaded_bytes(layer)

        def rounded(second_moments: torch.Tensor | None = None) -> QuantizedWeight:
            if second_moments is not None and len(second_moments) != in_features:
                second_moments = None  # a linear that splits its input among ranks itself
            return self._rounded(name, _effective_weight(layer, self.dtype)[0], method, second_moments)

        def put(quantized: QuantizedWeight) -> None:
            weight, bias = _effective_weight(layer, self.dtype)
            clone._parameters = {"bias": bias}
            original = weight if weight.data_ptr() == _data_ptr(layer) else None
            method.install(clone, quantized, original)
            if isinstance(layer, VocabParallelEmbedding):
                clone.quant_method = RescoringHeadMethod(method, weight)
            self.draft.int4_bytes += int4_bytes(clone)

        def round_again() -> None:
            _, bias = _effective_weight(layer, self.dtype)
            fresh = nn.Module()
            fresh.register_parameter("bias", bias)
            method.install(fresh, rounded())
            for name, parameter in fresh.named_parameters():
                getattr(clone, name).copy_(parameter)

        self.draft.updates.append(round_again)
        if self.rounding == "gptq":
            shape = (out_features, in_features, method.group_size, self.dtype)
            self.waiting[layer] = _Waiting(name, layer, shape, rounded, put)
        else:
            put(rounded())
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

    def _rounded(
        self, name: str, weight: torch.Tensor, method: Int4LinearMethod, second_moments: torch.Tensor | None
    ) -> QuantizedWeight:
        options = {"scale_dtype": self.dtype, "rotated": method.rotated}
        if self.rounding != "gptq":
            return quantize_weight(weight, method.group_size, method=self.rounding, **options)
        if second_moments is not None:
            try:
                return quantize_weight(weight, method.group_size, method="gptq", second_moments=second_moments, **options)
            except (torch.linalg.LinAlgError, torch.OutOfMemoryError) as error:
                logger.warning("%s is rounded by search, as GPTQ cannot: %s", name, " ".join(str(error).split()))
        return quantize_weight(weight, method.group_size, **options)

    def _head(self, layer: VocabParallelEmbedding, name: str) -> nn.Module:
        if not self.quantize_lm_head:
            return self._share(layer, name, "quantize_lm_head=False")
        in_features, out_features = _local_shape(layer)
        if not _is_plain(layer) or layer.weight.shape != (out_features, in_features):
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

    def _compile_config(self) -> VllmConfig:
        """The target's config with a different hash: compiled code on disk is looked up by it."""
        config = copy.copy(self.vllm_config)
        extra = config.additional_config
        base = dict(extra) if isinstance(extra, dict) else {"additional_config": extra.compute_hash()}
        config.additional_config = base | {
            "quantspec_draft": [
                self.quantize,
                self.group_size,
                self.rotated,
                self.quantize_lm_head,
                len(self.own_experts),
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


def _local_shape(layer: nn.Module) -> tuple[int, int]:
    """(in, out) of this rank's shard of a linear or an output projection."""
    if isinstance(layer, VocabParallelEmbedding):
        return layer.embedding_dim, layer.num_embeddings_per_partition
    return (
        getattr(layer, "input_size_per_partition", layer.input_size),
        getattr(layer, "output_size_per_partition", layer.output_size),
    )


def _is_plain(layer: nn.Module) -> bool:
    return isinstance(layer.quant_method, UnquantizedLinearMethod | UnquantizedEmbeddingMethod)


def loaded_bytes(layer: nn.Module) -> int:
    """Of this rank's shard of a linear or an output projection; a CPU may have packed its weight elsewhere since."""
    if _is_plain(layer):
        in_features, out_features = _local_shape(layer)
        return in_features * out_features * layer.params_dtype.itemsize
    return sum(p.numel() * p.element_size() for p in layer.parameters(recurse=False))


def _data_ptr(layer: nn.Module) -> int | None:
    weight = getattr(layer, "weight", None)
    return weight.data_ptr() if isinstance(weight, torch.Tensor) else None


def _effective_weight(layer: nn.Module, dtype: torch.dtype) -> tuple[torch.Tensor, nn.Parameter | None]:
    """The [out, in] weight that ``layer`` applies, and its bias as a new parameter of ``dtype`` (or None)."""
    in_features, out_features = _local_shape(layer)
    weight, bias = getattr(layer, "weight", None), getattr(layer, "bias", None)
    if not (_is_plain(layer) and weight is not None and weight.shape == (out_features, in_features)):
        # Prepacked (CPU) or quantized: the layer's output for the rows of the identity is its transposed weight, and
        # its output for a row of zeros is its bias.
        device = next((p.device for p in layer.parameters(recurse=False) if p is not None), None)
        weight = torch.empty(out_features, in_features, dtype=dtype, device=device)
        probe = _exact_input(layer)
        for start in range(0, in_features, _IDENTITY_ROWS):
            rows = torch.arange(start, min(start + _IDENTITY_ROWS, in_features), device=device)
            one_hot = torch.zeros(len(rows), in_features, dtype=dtype, device=device)
            one_hot[torch.arange(len(rows), device=device), rows] = probe
            columns = layer.quant_method.apply(layer, one_hot, None).t()
            weight[:, rows[0] : rows[-1] + 1] = columns.float() / probe
        if bias is not None:
            bias = layer.quant_method.apply(layer, torch.zeros(1, in_features, dtype=dtype, device=device), bias)[0]
    if bias is not None:
        # A copy: kernels permute or convert the bias of their layer in place.
        bias = nn.Parameter(bias.detach().to(dtype, copy=True), requires_grad=False)
    return weight.detach(), bias


def _exact_input(layer: nn.Module) -> float:
    """A value that ``layer`` takes as it is, though it may round its inputs to 8 or 4 bits.

    A static scale s makes x a whole number of steps of s: 64 of them are exact in e4m3 and in int8 (and the rounding of
    this value to 16 bits is not seen there). Scales that are found per token or per block make a single value the
    largest of its kind, or a power of two where they are powers of two, so that 1 is exact. It is negative where it may
    be: a CPU without VNNI adds pairs of products of int8 inputs, counted from -128 up, in 16 bits, and cuts off what the
    largest of these make with large weights.
    """
    scale, zero_point = getattr(layer, "input_scale", None), getattr(layer, "input_zero_point", None)
    if isinstance(scale, torch.Tensor) and scale.numel():
        # The side of an int8 zero point on which there are 64 steps.
        below = not isinstance(zero_point, torch.Tensor) or zero_point.min().item() >= 0
        return (-64 if below else 64) * scale.max().item()
    units = getattr(layer, "input_global_scale_inv", None)
    if isinstance(units, torch.Tensor) and units.numel():
        # NVFP4: the largest value of a block, 6, times a block scale in e4m3, in units of one over this.
        return 6 / units.max().item()
    return -1.0
