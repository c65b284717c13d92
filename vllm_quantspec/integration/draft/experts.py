"""The draft's experts in INT4: what a mixture's layer of the draft computes with, and how it comes from the target's.

A layer of vLLM's (`MoERunner`) routes, and calls the quantization method of its `RoutedExperts` with the experts that each
token chose. With ``draft_experts: int4`` the draft has a layer of its own (`model.Builder`) with the target's router; its
method is one of those here. Weights are rounded as linears are (`vllm_quantspec.weights`), some experts at a time, so that
what this takes beside the copy is bounded; weights that are exchanged later are written into the same tensors, which CUDA
graphs read.

On a GPU a few tokens run on `kernels/int4_experts`, more on vLLM's Marlin kernel, which reads the same tensors, if it runs
on that GPU; where this layout does not take the shape, all of them on vLLM's kernels of `moe_wna16`. On a CPU
`kernels/cpu_int4_experts` does it.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Collection
from dataclasses import dataclass
from functools import cache

import torch
from torch import nn
from vllm.config import VllmConfig, set_current_vllm_config
from vllm.distributed import get_tp_group
from vllm.model_executor.layers.fused_moe import FusedMoEMethodBase
from vllm.model_executor.layers.fused_moe.activation import MoEActivation
from vllm.model_executor.layers.fused_moe.config import FUSED_MOE_UNQUANTIZED_CONFIG, int4_w4a16_moe_quant_config
from vllm.model_executor.layers.fused_moe.oracle.unquantized import UnquantizedMoeBackend
from vllm.model_executor.layers.fused_moe.routed_experts import RoutedExperts
from vllm.model_executor.layers.fused_moe.router.zero_expert_router import ZeroExpertRouter
from vllm.model_executor.layers.fused_moe.runner.moe_runner import MoERunner
from vllm.model_executor.layers.fused_moe.unquantized_fused_moe_method import UnquantizedFusedMoEMethod
from vllm.platforms import current_platform
from vllm.scalar_type import scalar_types

from vllm_quantspec.integration.draft.room import left_for_cache
from vllm_quantspec.integration.gpu.trial import problem_of
from vllm_quantspec.kernels import int4_experts
from vllm_quantspec.memory import experts_fit
from vllm_quantspec.weights import QuantizedWeight, fit_group_size, quantize_weight

# Gate and up, one behind the other, and down: vLLM's names.
WEIGHTS = ("w13", "w2")
PARTS = ("codes", "scales", "zeros")
# Weights that are rounded and packed at a time.
_AT_ONCE = 1 << 25
# Rows in which the CPU's kernels lay out an expert's weight, each lot apart.
_CPU_TILE = 32
_ACTIVATIONS = (MoEActivation.SILU, MoEActivation.GELU, MoEActivation.GELU_TANH)


@dataclass(frozen=True)
class ExpertShapes:
    """Of this rank's shard: ``number`` experts of ``width`` hidden channels, on ``hidden`` channels of the model."""

    number: int
    hidden: int
    width: int
    dtype: torch.dtype

    def of(self, weight: str) -> tuple[int, int]:
        """(out, in) of one expert's ``w13`` or ``w2``."""
        return (2 * self.width, self.hidden) if weight == "w13" else (self.hidden, self.width)


class Int4ExpertsMethod(FusedMoEMethodBase):
    """Runs the routed experts of a layer in INT4, on weights that were computed in memory.

    Args:
        moe: the layer's configuration.
        shapes: of the layer.
        groups: input channels per scale, of w13 and w2.

    Raises:
        ValueError: the kernel does not take these shapes here; the message says why.
    """

    # The kernel, as the log calls it.
    runs_on = ""

    def __init__(self, moe, shapes: ExpertShapes, groups: dict[str, int]) -> None:
        super().__init__(moe)
        self.shapes, self.groups = shapes, groups
        # The layer asks for one until there is one.
        self.moe_quant_config = FUSED_MOE_UNQUANTIZED_CONFIG

    @property
    def copy_bytes(self) -> int:
        """Of the layer's weights in 4 bits, with a 16-bit scale and a zero point per group, about."""
        bits = {name: 4 + (16 + 4) / group for name, group in self.groups.items()}
        return round(sum(math.prod(self.shapes.of(name)) * bits[name] for name in WEIGHTS) * self.shapes.number / 8)

    def create_weights(self, layer: nn.Module, *args, **kwargs) -> None:
        raise NotImplementedError("The draft's experts are computed from loaded ones: use write().")

    def get_fused_moe_quant_config(self, layer: nn.Module):
        return self.moe_quant_config

    def write(self, layer: nn.Module, name: str, first: int, weight: QuantizedWeight) -> None:
        """Store ``weight`` ([n * out, in], of n experts) as that of the experts from ``first`` on.

        ``layer`` gets the tensors for all of its experts with the first call.
        """
        out_features, _ = self.shapes.of(name)
        codes, scales, zeros = (x.unflatten(0, (-1, out_features)) for x in (weight.codes, weight.scales, weight.zeros))
        packed = self._pack(codes, scales.to(self.shapes.dtype), zeros, weight.group_size)
        for part, tensor in zip(PARTS, packed, strict=True):
            parameter = f"int4_{name}_{part}"
            if not hasattr(layer, parameter):
                empty = tensor.new_empty(self.shapes.number, *tensor.shape[1:])
                layer.register_parameter(parameter, nn.Parameter(empty, requires_grad=False))
            getattr(layer, parameter).data[first : first + len(tensor)].copy_(tensor)

    def _pack(
        self, codes: torch.Tensor, scales: torch.Tensor, zeros: torch.Tensor, group: int
    ) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
        """As the kernel reads them: codes uint8 [n, out, in], scales and zeros [n, out, in / group]."""
        raise NotImplementedError

    def parts(self, layer: nn.Module, name: str) -> tuple[torch.Tensor, ...]:
        """Codes, scales and zeros of all experts, as the kernel reads them."""
        return tuple(getattr(layer, f"int4_{name}_{part}") for part in PARTS)


class MarlinExpertsMethod(Int4ExpertsMethod):
    """On ``kernels/int4_experts``, beyond its ``MAX_TOKENS`` on vLLM's Marlin kernel, which it runs 4-bit checkpoints on.

    Where Marlin does not run (`marlin_problem`), all tokens are computed by ``kernels/int4_experts``.
    """

    def __init__(self, moe, shapes: ExpertShapes, groups: dict[str, int]) -> None:
        # A weight with one group has another layout of its scales, that of one scale per row.
        groups = {name: group // 2 if group == shapes.of(name)[1] else group for name, group in groups.items()}
        super().__init__(moe, shapes, groups)
        if shapes.dtype not in (torch.bfloat16, torch.float16):
            raise ValueError(f"INT4 experts take bfloat16 or float16 activations, not {shapes.dtype}")
        if shapes.hidden % 128 or shapes.width % 64 or min(groups.values()) < 32:
            raise ValueError(
                "Marlin takes hidden sizes in multiples of 128 and experts in multiples of 64 channels, not "
                f"{shapes.hidden} and {shapes.width}"
            )
        problem = marlin_problem()
        self.has_marlin = problem is None
        more = f"beyond {int4_experts.MAX_TOKENS} tokens vLLM's Marlin kernel" if self.has_marlin else problem
        self.runs_on = f"this package's GPU kernel ({more})"

    def _pack(self, codes, scales, zeros, group):
        return int4_experts.pack(codes, scales, zeros)

    def apply(self, layer, x, topk_weights, topk_ids, shared_experts=None, shared_experts_input=None) -> torch.Tensor:
        from vllm.model_executor.layers.fused_moe.experts.marlin_moe import fused_marlin_moe

        if x.shape[0] <= int4_experts.MAX_TOKENS or not self.has_marlin:
            weights = (int4_experts.Packed(*self.parts(layer, name)) for name in WEIGHTS)
            return int4_experts.int4_experts(x, topk_weights, topk_ids, *weights, layer.activation.value)
        (w13, w13_scales, w13_zeros), (w2, w2_scales, w2_zeros) = (self.parts(layer, name) for name in WEIGHTS)
        return fused_marlin_moe(
            hidden_states=x,
            w1=w13,
            w2=w2,
            bias1=None,
            bias2=None,
            w1_scale=w13_scales,
            w2_scale=w2_scales,
            topk_weights=topk_weights,
            topk_ids=topk_ids,
            quant_type_id=scalar_types.uint4.id,
            global_num_experts=self.shapes.number,
            activation=layer.activation,
            w1_zeros=w13_zeros,
            w2_zeros=w2_zeros,
        )


@cache
def marlin_problem() -> str | None:
    """Why vLLM's Marlin kernel for experts does not run on this process's GPU; None if it does."""
    if not hasattr(torch.ops._moe_C, "moe_wna16_marlin_gemm"):
        return "this vLLM has no Marlin kernel for experts"
    return problem_of(try_marlin, "vLLM's Marlin kernel for experts")


def try_marlin(device: int) -> None:
    """Run vLLM's Marlin kernel once on small experts.

    Raises:
        RuntimeError: it does not run.
    """
    from vllm.model_executor.layers.fused_moe.experts.marlin_moe import fused_marlin_moe

    torch.cuda.set_device(device)
    number, hidden, width, tokens, chosen = 4, 256, 128, 8, 2
    parts = []
    for out_features, in_features in ((2 * width, hidden), (hidden, width)):
        codes = torch.randint(0, 16, (number, out_features, in_features), dtype=torch.uint8, device="cuda")
        scales = torch.full((number, out_features, in_features // 64), 0.01, dtype=torch.bfloat16, device="cuda")
        parts.append(int4_experts.pack(codes, scales, torch.full_like(scales, 8, dtype=torch.uint8)))
    (w13, w13_scales, w13_zeros), (w2, w2_scales, w2_zeros) = parts
    x = torch.randn(tokens, hidden, dtype=torch.bfloat16, device="cuda")
    topk_weights, topk_ids = torch.rand(tokens, number, device="cuda").topk(chosen, dim=-1)
    with set_current_vllm_config(VllmConfig()):
        fused_marlin_moe(
            hidden_states=x,
            w1=w13,
            w2=w2,
            bias1=None,
            bias2=None,
            w1_scale=w13_scales,
            w2_scale=w2_scales,
            topk_weights=topk_weights,
            topk_ids=topk_ids.int(),
            quant_type_id=scalar_types.uint4.id,
            global_num_experts=number,
            activation=MoEActivation.SILU,
            w1_zeros=w13_zeros,
            w2_zeros=w2_zeros,
        )
    torch.cuda.synchronize()


def wna16_blocks(in_features: list[int], group_size: int) -> dict[str, int] | None:
    """The blocks that ``moe_wna16`` has to be told for weights of so many input channels; None where its own choice runs.

    Its CUDA kernel takes blocks of 1, 2, 4 or 8 groups. Of groups of 32, vLLM chooses 16 for long inputs, and 3 for 96.
    """
    if group_size > 32:
        return None
    groups = next(n for n in (8, 4, 2, 1) if all(size % (n * group_size) == 0 for size in in_features))
    return {
        "BLOCK_SIZE_M": 16,
        "BLOCK_SIZE_N": 128,
        "BLOCK_SIZE_K": groups * group_size,
        "GROUP_SIZE_M": 1,
        "SPLIT_K": 1,
    }


class Wna16ExpertsMethod(Int4ExpertsMethod):
    """On vLLM's kernels of ``moe_wna16``: one in CUDA for few tokens, one in Triton for many."""

    runs_on = "vLLM's moe_wna16 kernels"

    def __init__(self, moe, shapes: ExpertShapes, groups: dict[str, int]) -> None:
        # They take one size of groups for both weights.
        super().__init__(moe, shapes, dict.fromkeys(WEIGHTS, min(groups.values())))
        if shapes.dtype not in (torch.bfloat16, torch.float16):
            raise ValueError(f"vLLM's INT4 experts take bfloat16 or float16 activations, not {shapes.dtype}")
        self.blocks = wna16_blocks([shapes.of(name)[1] for name in WEIGHTS], self.groups["w13"])

    def _pack(self, codes, scales, zeros, group):
        pairs = codes[..., 0::2] | codes[..., 1::2] << 4
        return pairs, scales, zeros[:, 0::2] | zeros[:, 1::2] << 4

    def apply(self, layer, x, topk_weights, topk_ids, shared_experts=None, shared_experts_input=None) -> torch.Tensor:
        from vllm.model_executor.layers.fused_moe import override_config
        from vllm.model_executor.layers.fused_moe.fused_moe import fused_experts

        (w13, w13_scales, w13_zeros), (w2, w2_scales, w2_zeros) = (self.parts(layer, name) for name in WEIGHTS)
        config = int4_w4a16_moe_quant_config(
            w1_scale=w13_scales,
            w2_scale=w2_scales,
            w1_zp=w13_zeros,
            w2_zp=w2_zeros,
            block_shape=[0, self.groups["w13"]],
        )
        with override_config(self.blocks):
            return fused_experts(
                hidden_states=x,
                w1=w13,
                w2=w2,
                topk_weights=topk_weights,
                topk_ids=topk_ids,
                activation=layer.activation,
                global_num_experts=self.shapes.number,
                quant_config=config,
            )


class CpuExpertsMethod(Int4ExpertsMethod):
    """On ``kernels/cpu_int4_experts``, which runs on every CPU and takes float32 too."""

    runs_on = "this package's CPU kernel"

    def __init__(self, moe, shapes: ExpertShapes, groups: dict[str, int]) -> None:
        super().__init__(moe, shapes, groups)
        # Here, because on a GPU nothing needs Numba.
        from vllm_quantspec.integration.cpu import llvm_scan
        from vllm_quantspec.kernels import cpu_int4_experts, cpu_int4_linear

        llvm_scan.install()
        for name in WEIGHTS:
            out_features, in_features = shapes.of(name)
            reason = cpu_int4_linear.supported(in_features, out_features, groups[name], shapes.dtype)
            if reason is not None:
                raise ValueError(reason)
            cpu_int4_linear.warm_up(groups[name])
        self.pack = cpu_int4_linear.pack
        assert {a.value for a in _ACTIVATIONS} == cpu_int4_experts.ACTIVATIONS.keys()

    def _pack(self, codes, scales, zeros, group):
        number = len(codes)
        packed = self.pack(*(x.flatten(0, 1) for x in (codes, scales, zeros)), group)
        return tuple(x.unflatten(0, (number, -1)) for x in packed)

    def apply(self, layer, x, topk_weights, topk_ids, shared_experts=None, shared_experts_input=None) -> torch.Tensor:
        w13, w2 = (list(self.parts(layer, name)) for name in WEIGHTS)
        run = torch.ops.vllm_quantspec.cpu_int4_experts
        return run(x, topk_weights, topk_ids, w13, w2, layer.activation.value)


def choose_experts_method(
    layer: MoERunner, dtype: torch.dtype, group_size: int, asked: bool = True
) -> tuple[Int4ExpertsMethod | None, str]:
    """The INT4 method for a loaded layer of the target; ``(None, reason)`` where the draft has to keep its experts.

    Only a user who ``asked`` for it gets one on vLLM's moe_wna16 kernels, which take longer than 16 bits do.
    """
    if (reason := _kept(layer)) is not None:
        return None, reason
    experts = layer.routed_experts
    number, hidden, width = experts.w2_weight.shape
    shapes = ExpertShapes(number, hidden, width, dtype)
    groups = {name: fit_group_size(shapes.of(name)[1], group_size) for name in WEIGHTS}
    if None in groups.values():
        return None, f"{hidden} or {width} input channels are not divisible by a group of {group_size} or less"
    methods = [CpuExpertsMethod] if current_platform.is_cpu() else [MarlinExpertsMethod, Wna16ExpertsMethod][: 1 + asked]
    for method in methods:
        try:
            chosen = method(layer.moe_config, shapes, groups)
        except ValueError as error:
            reason = str(error)
        else:
            return chosen, ""
    return None, reason


def why_no_room(vllm_config: VllmConfig, methods: Collection[Int4ExpertsMethod]) -> str | None:
    """Why a draft whose user did not ask for INT4 experts has none, of so many layers: their copy would leave too little for
    the KV cache. None if it has them; the same on every rank."""
    if current_platform.is_cpu() or not methods:  # there the cache has a memory of its own
        return None
    copy, left = sum(method.copy_bytes for method in methods), left_for_cache(vllm_config)
    reason = None
    if not experts_fit(copy, left):
        reason = (
            f"their INT4 copy of {copy / 2**30:.1f} GiB would take more than half of the {max(left, 0) / 2**30:.1f} GiB "
            "that are left for the KV cache; with draft_experts 'int4' it is made all the same"
        )
    group = get_tp_group()
    return group.broadcast_object(reason, src=0) if group.world_size > 1 else reason


def _kept(layer: MoERunner) -> str | None:
    """Why the draft keeps this layer's experts as the target has them; None if it need not."""
    if type(layer) is not MoERunner or not isinstance(layer.routed_experts, RoutedExperts):
        return f"vLLM runs them with a {type(layer).__name__}, a layer of its own kind"
    experts, parallel = layer.routed_experts, layer.moe_config.moe_parallel_config
    method = experts.quant_method
    if parallel.use_ep or parallel.enable_eplb:
        return "they are spread over ranks by expert parallelism"
    if parallel.dp_size > 1 or parallel.pcp_size > 1 or parallel.is_sequence_parallel:
        return "data, context or sequence parallelism gathers their inputs from other ranks"
    if not isinstance(method, UnquantizedFusedMoEMethod):
        return f"they are not plain 16-bit weights here ({type(method).__name__})"
    if method.unquantized_backend not in _AS_LOADED:
        return f"{method.unquantized_backend.value} keeps their weights in an order of its own (try --moe-backend triton)"
    if layer.moe_config.has_bias:
        return "they have biases"
    if experts.activation not in _ACTIVATIONS or experts.swiglu_limit is not None:
        return f"their activation is {experts.activation.value}" + " with a limit" * (experts.swiglu_limit is not None)
    if experts.apply_router_weight_on_input:
        return "their inputs are scaled by the router"
    if isinstance(layer.router, ZeroExpertRouter):
        return "some of them compute nothing"
    return None


def round_experts(
    method: Int4ExpertsMethod,
    loaded: RoutedExperts,
    layer: nn.Module,
    rounding: str,
) -> None:
    """Round the target's experts, as they are now, into ``layer``; ``rounding``: ``"search"`` or ``"nearest"``."""
    for name in WEIGHTS:
        out_features, in_features = method.shapes.of(name)
        step = max(1, _AT_ONCE // (out_features * in_features))
        for first in range(0, method.shapes.number, step):
            weight = loaded_experts(loaded, name, slice(first, first + step)).flatten(0, 1)
            group = method.groups[name]
            method.write(
                layer, name, first, quantize_weight(weight, group, method=rounding, scale_dtype=method.shapes.dtype)
            )


def loaded_experts(experts: RoutedExperts, name: str, which: slice) -> torch.Tensor:
    """[n, out, in]: the weights ``name`` of some experts of a loaded layer, in the checkpoint's order."""
    weight = getattr(experts, f"{name}_weight")[which].detach()
    return _AS_LOADED[experts.quant_method.unquantized_backend](experts, name, weight)


def experts_bytes(layer: nn.Module) -> int:
    """Bytes of the INT4 experts of a layer."""
    return sum(p.nbytes for name, p in layer.named_parameters(recurse=False) if name.startswith("int4_"))


# --- Orders in which vLLM's kernels keep loaded experts ---------------------------------------------------------------


def _gate_last(experts: RoutedExperts, name: str, weight: torch.Tensor) -> torch.Tensor:
    return weight.unflatten(1, (2, -1)).flip(1).flatten(1, 2) if name == "w13" else weight


def _cpu_order(experts: RoutedExperts, name: str, weight: torch.Tensor) -> torch.Tensor:
    kernel = experts.quant_method.moe_kernel.fused_experts
    if kernel._use_zentorch:
        return weight
    tiles = weight.unflatten(1, (-1, _CPU_TILE)).flatten(2)
    plain = torch.empty_like(tiles)
    plain[..., _packed_order(weight.shape[2], weight.dtype, kernel.isa)] = tiles
    return plain.view(weight.shape)


@cache
def _packed_order(in_features: int, dtype: torch.dtype, isa: str) -> torch.Tensor:
    """int64: where each element of a packed lot of rows comes from. Packing numbers tells, whatever the CPU."""
    from vllm._custom_ops import cpu_prepack_moe_weight

    def packed(values: torch.Tensor) -> torch.Tensor:
        bits = values.to(torch.int16 if dtype.itemsize == 2 else torch.int32).view(1, _CPU_TILE, in_features)
        return cpu_prepack_moe_weight(bits.view(dtype), isa).view(bits.dtype).flatten().long()

    numbers = torch.arange(_CPU_TILE * in_features)
    # In two halves: 16 bits do not hold every number.
    return packed(numbers & 0x7FFF) + (packed(numbers >> 15) << 15)


_AS_LOADED: dict[UnquantizedMoeBackend, Callable[[RoutedExperts, str, torch.Tensor], torch.Tensor]] = {
    UnquantizedMoeBackend.TRITON: lambda experts, name, weight: weight,
    UnquantizedMoeBackend.FLASHINFER_CUTLASS: _gate_last,
    UnquantizedMoeBackend.CPU: _cpu_order,
}
