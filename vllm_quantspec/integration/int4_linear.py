"""INT4 linears on vLLM's own mixed-precision kernels (CPUWNA16, Marlin, Machete, ...)."""

from __future__ import annotations

import torch
from vllm.model_executor.kernels.linear import MPLinearKernel, MPLinearLayerConfig, choose_mp_linear_kernel
from vllm.model_executor.layers.linear import LinearMethodBase
from vllm.model_executor.parameter import GroupQuantScaleParameter, PackedvLLMParameter
from vllm.scalar_type import scalar_types

from vllm_quantspec.weights import QuantizedWeight, fit_group_size

WEIGHT, SCALES, ZEROS = "int4_weight", "int4_scales", "int4_zeros"


class Int4LinearMethod(LinearMethodBase):
    """Runs a linear layer whose 4-bit weight (asymmetric, in groups) was computed in memory.

    Args:
        in_features, out_features: shape of the layer's *local* shard.
        dtype: dtype of activations and of the stored scales.
        group_size: input channels per scale.

    Raises:
        ValueError: vLLM has no kernel for this shape on this device; the message says which and why.
    """

    def __init__(self, in_features: int, out_features: int, dtype: torch.dtype, group_size: int) -> None:
        if dtype not in (torch.bfloat16, torch.float16):
            raise ValueError(f"INT4 kernels take bfloat16 or float16 activations, not {dtype}.")
        # The shard was quantized on its own, so it is the whole layer as far as the kernel is concerned.
        config = MPLinearLayerConfig(
            full_weight_shape=(in_features, out_features),
            partition_weight_shape=(in_features, out_features),
            weight_type=scalar_types.uint4,
            act_type=dtype,
            group_size=group_size,
            zero_points=True,
        )
        self.kernel: MPLinearKernel = choose_mp_linear_kernel(config)(config, WEIGHT, SCALES, ZEROS)

    def create_weights(self, layer: torch.nn.Module, *args, **kwargs) -> None:
        raise NotImplementedError("INT4 draft weights are computed from a loaded layer: use install().")

    def install(self, layer: torch.nn.Module, weight: QuantizedWeight) -> None:
        """Give ``layer`` the parameters of ``weight`` ([out, in], the local shard) and make this its linear method."""
        config = self.kernel.config
        if tuple(weight.codes.shape) != config.partition_weight_shape[::-1] or weight.group_size != config.group_size:
            raise ValueError(f"The quantized weight {tuple(weight.codes.shape)} does not fit the kernel's {config}.")
        # The layout of compressed-tensors checkpoints, which every kernel knows how to repack.
        codes, zeros = _pack(weight.codes), _pack(weight.zeros.t().contiguous()).t()
        layout = {"input_dim": 1, "output_dim": 0, "weight_loader": _no_loader}
        layer.register_parameter(WEIGHT, PackedvLLMParameter(data=codes, packed_dim=1, packed_factor=8, **layout))
        layer.register_parameter(SCALES, GroupQuantScaleParameter(data=weight.scales.to(config.act_type), **layout))
        layer.register_parameter(
            ZEROS, PackedvLLMParameter(data=zeros.contiguous(), packed_dim=0, packed_factor=8, **layout)
        )
        self.kernel.process_weights_after_loading(layer)
        layer.quant_method = self

    def apply(self, layer: torch.nn.Module, x: torch.Tensor, bias: torch.Tensor | None = None) -> torch.Tensor:
        return self.kernel.apply_weights(layer, x, bias)


def choose_int4_method(
    in_features: int, out_features: int, dtype: torch.dtype, group_size: int
) -> tuple[Int4LinearMethod | None, str]:
    """The INT4 method for a shard of this shape, with the largest group that divides it and that a kernel takes.

    Returns ``(method, "")``, or ``(None, reason)`` when the layer has to stay as it is.
    """
    reason = f"{in_features} input channels are not divisible by a group of {group_size} or less"
    while (fitting := fit_group_size(in_features, group_size)) is not None:
        try:
            return Int4LinearMethod(in_features, out_features, dtype, fitting), ""
        except ValueError as error:
            reason = " ".join(str(error).split())
        group_size = fitting // 2
    return None, reason


def int4_bytes(layer: torch.nn.Module) -> int:
    """Bytes that ``layer`` spends on its INT4 weight, scales and zero points."""
    tensors = (getattr(layer, name, None) for name in (WEIGHT, SCALES, ZEROS))
    return sum(t.numel() * t.element_size() for t in tensors if t is not None)


def _pack(codes: torch.Tensor) -> torch.Tensor:
    """uint8 codes [rows, n] -> int32 [rows, n / 8], the first code in the lowest bits."""
    # Flat first: a single row may have any stride, and reading it as wider integers asks for a certain one.
    return (codes[:, 0::2] | codes[:, 1::2] << 4).flatten().view(torch.int32).view(codes.shape[0], -1)


def _no_loader(*args, **kwargs) -> None:
    raise NotImplementedError("INT4 draft weights are computed, not loaded.")
