"""What a linear of the loaded target holds: its shard's shape and bytes, and the weight that it applies."""

from __future__ import annotations

import torch
from torch import nn
from vllm.model_executor.layers.linear import UnquantizedLinearMethod
from vllm.model_executor.layers.vocab_parallel_embedding import UnquantizedEmbeddingMethod, VocabParallelEmbedding

_IDENTITY_ROWS = 1024


def local_shape(layer: nn.Module) -> tuple[int, int]:
    """(in, out) of this rank's shard of a linear or an output projection."""
    if isinstance(layer, VocabParallelEmbedding):
        return layer.embedding_dim, layer.num_embeddings_per_partition
    return (
        getattr(layer, "input_size_per_partition", layer.input_size),
        getattr(layer, "output_size_per_partition", layer.output_size),
    )


def is_plain(layer: nn.Module) -> bool:
    return isinstance(layer.quant_method, UnquantizedLinearMethod | UnquantizedEmbeddingMethod)


def loaded_bytes(layer: nn.Module) -> int:
    """Of this rank's shard of a linear or an output projection; a CPU may have packed its weight elsewhere since."""
    if is_plain(layer):
        in_features, out_features = local_shape(layer)
        return in_features * out_features * layer.params_dtype.itemsize
    return sum(p.numel() * p.element_size() for p in layer.parameters(recurse=False))


def data_ptr_of(layer: nn.Module) -> int | None:
    weight = getattr(layer, "weight", None)
    return weight.data_ptr() if isinstance(weight, torch.Tensor) else None


def effective_weight(layer: nn.Module, dtype: torch.dtype) -> tuple[torch.Tensor, nn.Parameter | None]:
    """The [out, in] weight that ``layer`` applies, and its bias as a new parameter of ``dtype`` (or None)."""
    in_features, out_features = local_shape(layer)
    weight, bias = getattr(layer, "weight", None), getattr(layer, "bias", None)
    if not (is_plain(layer) and weight is not None and weight.shape == (out_features, in_features)):
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
