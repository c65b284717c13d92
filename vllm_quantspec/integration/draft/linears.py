"""Quantized linears of the draft: on our decode-size kernel on a GPU, else in 4 bits on vLLM's mixed-precision kernels.

vLLM's kernels (Marlin, Machete, ...; CPUWNA16 on a CPU) serve the shapes that ours does not take. Not every CPU has vLLM's:
its library for AVX2 leaves the operator out, and none takes float32. A kernel of ours serves there. Weights in 8 bits run
on our kernels alone: their levels (`vllm_quantspec.levels`) are not those of vLLM's.
"""

from __future__ import annotations

import functools

import torch
from vllm.logger import init_logger
from vllm.model_executor.kernels.linear import MPLinearKernel, MPLinearLayerConfig, choose_mp_linear_kernel
from vllm.model_executor.layers.linear import LinearMethodBase
from vllm.model_executor.parameter import GroupQuantScaleParameter, PackedvLLMParameter
from vllm.platforms import current_platform
from vllm.scalar_type import scalar_types
from vllm.utils.torch_utils import direct_register_custom_op

from vllm_quantspec.kernels import int4_linear
from vllm_quantspec.kernels.int4_linear_fp8 import split
from vllm_quantspec.rotation import rotate_inputs
from vllm_quantspec.weights import QuantizedWeight, fit_group_size

logger = init_logger("vllm.quantspec.linears")

WEIGHT, SCALES, ZEROS, ORIGINAL = "int4_weight", "int4_scales", "int4_zeros", "target_weight"


class Int4LinearMethod(LinearMethodBase):
    """Runs a linear layer whose weight in 4 or 8 bits (asymmetric, in groups) was computed in memory.

    Args:
        in_features, out_features: shape of the layer's *local* shard.
        dtype: dtype of activations and of the stored scales.
        group_size: input channels per scale.
        rotated: whether weights are those of rotated inputs (`vllm_quantspec.rotation`); inputs are then rotated here.
        fp8_inputs: whether inputs may be rounded to e4m3 numbers (``draft_activations: fp8``).
    """

    bits = 4

    def __init__(
        self,
        in_features: int,
        out_features: int,
        dtype: torch.dtype,
        group_size: int,
        rotated: bool = False,
        fp8_inputs: bool = False,
    ) -> None:
        self.in_features, self.out_features, self.dtype, self.group_size = in_features, out_features, dtype, group_size
        self.rotated, self.fp8_inputs = rotated, fp8_inputs
        self._prepare()

    def _prepare(self) -> None:
        """Find out whether the kernel takes this shape on this device: a ValueError says why not."""

    @property
    def bits_per_weight(self) -> float:
        """With a 16-bit scale and zero point per group."""
        return self.bits + 32 / self.group_size

    @property
    def runs_on(self) -> str:
        """The kernel, as the log calls it."""
        raise NotImplementedError

    def create_weights(self, layer: torch.nn.Module, *args, **kwargs) -> None:
        raise NotImplementedError("INT4 draft weights are computed from a loaded layer: use install().")

    def install(self, layer: torch.nn.Module, weight: QuantizedWeight, original: torch.Tensor | None = None) -> None:
        """Give ``layer`` the parameters of ``weight`` ([out, in], the local shard) and make this its linear method.

        ``original``, the target's own tensor, may serve where it is the faster one.
        """
        if tuple(weight.codes.shape) != (self.out_features, self.in_features) or weight.group_size != self.group_size:
            raise ValueError(
                f"The quantized weight {tuple(weight.codes.shape)} in groups of {weight.group_size} does not fit a linear "
                f"of {self.out_features} x {self.in_features} in groups of {self.group_size}."
            )
        if weight.bits != self.bits:
            raise ValueError(f"The quantized weight has {weight.bits} bits, the linear {self.bits}.")
        if weight.rotated != self.rotated:
            raise ValueError(f"The quantized weight has rotated={weight.rotated}, the linear rotated={self.rotated}.")
        self._install(layer, weight, original)
        layer.quant_method = self

    def _install(self, layer: torch.nn.Module, weight: QuantizedWeight, original: torch.Tensor | None) -> None:
        raise NotImplementedError

    def _inputs(self, x: torch.Tensor) -> torch.Tensor:
        """x rotated, and then rounded to e4m3 numbers, where this linear's are: for kernels that do neither."""
        x = torch.ops.vllm_quantspec.rotate(x) if self.rotated else x
        return torch.ops.vllm_quantspec.round_inputs(x) if self.fp8_inputs else x

    def apply_own(self, layer: torch.nn.Module, x: torch.Tensor, bias: torch.Tensor | None = None) -> torch.Tensor:
        """`apply` with the quantized weight, however many rows x has."""
        return self.apply(layer, x, bias)


def draft_linear(
    x: torch.Tensor,
    codes: torch.Tensor,
    scales_zeros: torch.Tensor,
    bias: torch.Tensor | None,
    original: torch.Tensor | None,
    rotated: bool,
    fp8_inputs: bool = False,
) -> torch.Tensor:
    """`int4_linear.faster_linear`, where the weight in 16 bits is the target's own.

    One operator, because torch.compile must not see a choice that depends on the number of tokens.
    """
    return int4_linear.faster_linear(x, codes, scales_zeros, bias, original, rotated, fp8_inputs)


def _draft_linear_fake(x, codes, scales_zeros, bias, original, rotated, fp8_inputs=False):
    return x.new_empty(x.shape[0], codes.shape[0] * int4_linear.ROWS)


library = torch.library.Library("vllm_quantspec", "FRAGMENT")
direct_register_custom_op("draft_linear", draft_linear, fake_impl=_draft_linear_fake, target_lib=library)


def rotate(x: torch.Tensor) -> torch.Tensor:
    """Rotated inputs in x's dtype, for kernels that do not rotate: one operator, so that no graph holds its matrix."""
    return rotate_inputs(x).to(x.dtype)


direct_register_custom_op("rotate", rotate, fake_impl=torch.empty_like, target_lib=library)


def round_inputs(x: torch.Tensor) -> torch.Tensor:
    """Each number as the nearest of e4m3, with a power of two per token and 128 channels as their scale; in x's dtype."""
    return split(x.flatten(0, -2), 1).view(x.shape).to(x.dtype)


direct_register_custom_op("round_inputs", round_inputs, fake_impl=torch.empty_like, target_lib=library)


class FastInt4LinearMethod(Int4LinearMethod):
    """On ``kernels/int4_linear``, which is near the memory's bandwidth at the few tokens of a draft step.

    Raises:
        ValueError: the kernel does not take this shape on this GPU; the message says why.
    """

    def _prepare(self) -> None:
        capability = current_platform.get_device_capability()
        shape = self.in_features, self.out_features, self.group_size, self.dtype
        reason = int4_linear.supported(*shape, (capability.major, capability.minor))
        if reason is not None:
            raise ValueError(reason)

    @property
    def runs_on(self) -> str:
        return "this package's GPU kernel"

    def _install(self, layer: torch.nn.Module, weight: QuantizedWeight, original: torch.Tensor | None) -> None:
        scales = weight.scales.to(self.dtype)
        packed = int4_linear.pack(weight.codes, scales, weight.zeros, weight.group_size, weight.bits)
        for name, tensor in ((WEIGHT, packed.codes), (SCALES, packed.scales_zeros), (ORIGINAL, original)):
            layer.register_parameter(name, None if tensor is None else torch.nn.Parameter(tensor, requires_grad=False))

    def apply(self, layer: torch.nn.Module, x: torch.Tensor, bias: torch.Tensor | None = None) -> torch.Tensor:
        return self._run(layer, x, bias, getattr(layer, ORIGINAL))

    def apply_own(self, layer: torch.nn.Module, x: torch.Tensor, bias: torch.Tensor | None = None) -> torch.Tensor:
        return self._run(layer, x, bias, None)

    def _run(self, layer, x: torch.Tensor, bias: torch.Tensor | None, original: torch.Tensor | None) -> torch.Tensor:
        rows = x.reshape(-1, self.in_features)
        codes, scales = getattr(layer, WEIGHT), getattr(layer, SCALES)
        out = torch.ops.vllm_quantspec.draft_linear(rows, codes, scales, bias, original, self.rotated, self.fp8_inputs)
        return out.view(*x.shape[:-1], self.out_features)


class FastInt8LinearMethod(FastInt4LinearMethod):
    """The same kernel in 8 bits."""

    bits = 8


class CpuInt4LinearMethod(Int4LinearMethod):
    """On ``kernels/cpu_int4_linear``, which runs on every CPU and takes float32 too.

    Raises:
        ValueError: the kernel does not take this shape; the message says why.
    """

    def _prepare(self) -> None:
        # Here, because on a GPU nothing needs Numba.
        from vllm_quantspec.integration.cpu import llvm_scan
        from vllm_quantspec.kernels import cpu_int4_linear

        llvm_scan.install()
        reason = cpu_int4_linear.supported(self.in_features, self.out_features, self.group_size, self.dtype)
        if reason is not None:
            raise ValueError(reason)
        self._choose_kernel()

    def _choose_kernel(self) -> None:
        from vllm_quantspec.kernels import cpu_int4_linear

        self.pack = functools.partial(cpu_int4_linear.pack, group_size=self.group_size)
        self.operator = torch.ops.vllm_quantspec.cpu_int4_linear
        cpu_int4_linear.warm_up(self.group_size)

    @property
    def runs_on(self) -> str:
        return "this package's CPU kernel"

    def _install(self, layer: torch.nn.Module, weight: QuantizedWeight, original: torch.Tensor | None) -> None:
        packed = self.pack(weight.codes, weight.scales.to(self.dtype), weight.zeros)
        for name, tensor in zip((WEIGHT, SCALES, ZEROS), packed, strict=True):
            layer.register_parameter(name, torch.nn.Parameter(tensor, requires_grad=False))

    def apply(self, layer: torch.nn.Module, x: torch.Tensor, bias: torch.Tensor | None = None) -> torch.Tensor:
        rows = x.reshape(-1, self.in_features)
        weight = (getattr(layer, name) for name in (WEIGHT, SCALES, ZEROS))
        if self.fp8_inputs:
            rows = self._inputs(rows)
        out = self.operator(rows, *weight, bias, self.rotated and not self.fp8_inputs)
        return out.view(*x.shape[:-1], self.out_features)


class CpuInt8LinearMethod(CpuInt4LinearMethod):
    """On ``kernels/cpu_int8_linear``, for the same shapes."""

    bits = 8

    def _choose_kernel(self) -> None:
        from vllm_quantspec.kernels import cpu_int8_linear

        self.pack, self.operator = cpu_int8_linear.pack, torch.ops.vllm_quantspec.cpu_int8_linear
        cpu_int8_linear.warm_up(self.group_size)


class LibraryInt4LinearMethod(Int4LinearMethod):
    """On the kernel that vLLM chooses for the shape.

    Raises:
        ValueError: vLLM has no kernel for this shape on this device; the message says which and why.
    """

    def _prepare(self) -> None:
        self.fp8_inputs &= current_platform.is_cpu()  # on a GPU rounding them would cost time and save none
        if self.dtype not in (torch.bfloat16, torch.float16):
            raise ValueError(f"vLLM's INT4 kernels take bfloat16 or float16 activations, not {self.dtype}.")
        if current_platform.is_cpu() and not hasattr(torch.ops._C, "cpu_gemm_wna16"):
            raise ValueError("vLLM's library for this CPU has no INT4 operator.")  # its can_implement does not look
        # The shard was quantized on its own, so it is the whole layer as far as the kernel is concerned.
        config = MPLinearLayerConfig(
            full_weight_shape=(self.in_features, self.out_features),
            partition_weight_shape=(self.in_features, self.out_features),
            weight_type=scalar_types.uint4,
            act_type=self.dtype,
            group_size=self.group_size,
            zero_points=True,
        )
        self.kernel: MPLinearKernel = choose_mp_linear_kernel(config)(config, WEIGHT, SCALES, ZEROS)

    @property
    def runs_on(self) -> str:
        return f"vLLM's {type(self.kernel).__name__}"

    def _install(self, layer: torch.nn.Module, weight: QuantizedWeight, original: torch.Tensor | None) -> None:
        if self.rotated:
            rotate(weight.scales.new_empty(0, self.in_features))  # its matrix must be there before a graph is captured
        config = self.kernel.config
        # The layout of compressed-tensors checkpoints, which every kernel knows how to repack.
        codes, zeros = _pack(weight.codes), _pack(weight.zeros.t().contiguous()).t()
        layout = {"input_dim": 1, "output_dim": 0, "weight_loader": _no_loader}
        layer.register_parameter(WEIGHT, PackedvLLMParameter(data=codes, packed_dim=1, packed_factor=8, **layout))
        layer.register_parameter(SCALES, GroupQuantScaleParameter(data=weight.scales.to(config.act_type), **layout))
        layer.register_parameter(
            ZEROS, PackedvLLMParameter(data=zeros.contiguous(), packed_dim=0, packed_factor=8, **layout)
        )
        self.kernel.process_weights_after_loading(layer)

    def apply(self, layer: torch.nn.Module, x: torch.Tensor, bias: torch.Tensor | None = None) -> torch.Tensor:
        return self.kernel.apply_weights(layer, self._inputs(x), bias)


def choose_int4_method(
    in_features: int,
    out_features: int,
    dtype: torch.dtype,
    group_size: int,
    rotated: bool = False,
    bits: int = 4,
    fp8_inputs: bool = False,
) -> tuple[Int4LinearMethod | None, str]:
    """The method for a shard of this shape in 4 or 8 bits, with the largest group that divides it and that a kernel takes.

    ``rotated``, ``fp8_inputs``: as of `Int4LinearMethod`; the latter for 4 bits.

    Returns ``(method, "")``, or ``(None, reason)`` when the layer has to stay as it is.
    """
    methods = [LibraryInt4LinearMethod] if bits == 4 else []
    if current_platform.is_cuda():
        methods.insert(0, FastInt4LinearMethod if bits == 4 else FastInt8LinearMethod)
    elif current_platform.is_cpu():
        methods.append(CpuInt4LinearMethod if bits == 4 else CpuInt8LinearMethod)
    reason = f"{in_features} input channels are not divisible by a group of {group_size} or less"
    while (fitting := fit_group_size(in_features, group_size)) is not None:
        for method in methods:
            try:
                chosen = method(in_features, out_features, dtype, fitting, rotated, fp8_inputs)
            except ValueError as error:
                reason = " ".join(str(error).split())
            else:
                logger.info_once("INT%d draft linears run on %s.", bits, chosen.runs_on)
                return chosen, ""
        group_size = fitting // 2
    return None, reason


def int4_bytes(layer: torch.nn.Module) -> int:
    """Bytes that ``layer`` spends on its quantized weight, scales and zero points."""
    tensors = (getattr(layer, name, None) for name in (WEIGHT, SCALES, ZEROS))
    return sum(t.numel() * t.element_size() for t in tensors if t is not None)


def _pack(codes: torch.Tensor) -> torch.Tensor:
    """uint8 codes [rows, n] -> int32 [rows, n / 8], the first code in the lowest bits."""
    # Flat first: a single row may have any stride, and reading it as wider integers asks for a certain one.
    return (codes[:, 0::2] | codes[:, 1::2] << 4).flatten().view(torch.int32).view(codes.shape[0], -1)


def _no_loader(*args, **kwargs) -> None:
    raise NotImplementedError("INT4 draft weights are computed, not loaded.")
