"""A linear of the draft with weights of its own: rounded from the target's, in 4 or 8 bits, and again when those change."""

from __future__ import annotations

import torch
from torch import nn
from vllm.logger import init_logger
from vllm.model_executor.layers.vocab_parallel_embedding import VocabParallelEmbedding

from vllm_quantspec.integration.draft.head import RescoringHeadMethod
from vllm_quantspec.integration.draft.linears import Int4LinearMethod, int4_bytes
from vllm_quantspec.integration.draft.loaded import data_ptr_of, effective_weight, local_shape
from vllm_quantspec.weights import QuantizedWeight, quantize_weight

logger = init_logger("vllm.quantspec.own_linear")


class OwnLinear:
    """The draft's ``clone`` of the target's ``layer``.

    Args:
        methods: by number of bits, those that there are for its shape. bits: the one to use, until it is set to another.
        rounding: as of `vllm_quantspec.weights.quantize_weight`; without moments, ``"gptq"`` is ``"search"``.
        dtype: of activations and scales.
    """

    def __init__(
        self,
        name: str,
        layer: nn.Module,
        clone: nn.Module,
        methods: dict[int, Int4LinearMethod],
        bits: int,
        rounding: str,
        dtype: torch.dtype,
    ) -> None:
        self.name, self.layer, self.clone, self.methods, self.bits = name, layer, clone, methods, bits
        self.rounding, self.dtype = rounding, dtype

    @property
    def method(self) -> Int4LinearMethod:
        return self.methods[self.bits]

    @property
    def is_head(self) -> bool:
        return isinstance(self.layer, VocabParallelEmbedding)

    @property
    def num_weights(self) -> int:
        """Of this rank."""
        in_features, out_features = local_shape(self.layer)
        return in_features * out_features

    @property
    def num_bytes(self) -> int:
        return int4_bytes(self.clone)

    @property
    def layout(self) -> tuple[int, int, int, int, torch.dtype]:
        """Out, in, group size, bits, and the dtype of scales."""
        in_features, out_features = local_shape(self.layer)
        return out_features, in_features, self.method.group_size, self.bits, self.dtype

    def rounded(self, second_moments: torch.Tensor | None = None) -> QuantizedWeight:
        """The target's weight as it is now, rounded for the method in use; by moments if there are any."""
        weight = effective_weight(self.layer, self.dtype)[0]
        method = self.method
        options = {"scale_dtype": self.dtype, "rotated": method.rotated, "bits": method.bits}
        if second_moments is not None and len(second_moments) == weight.shape[1]:
            try:
                return quantize_weight(weight, method.group_size, method="gptq", second_moments=second_moments, **options)
            except (torch.linalg.LinAlgError, torch.OutOfMemoryError) as error:
                logger.warning("%s is rounded by search, as GPTQ cannot: %s", self.name, " ".join(str(error).split()))
        rounding = "search" if self.rounding == "gptq" else self.rounding
        return quantize_weight(weight, method.group_size, method=rounding, **options)

    def put(self, quantized: QuantizedWeight) -> None:
        """Give the clone this weight, and the method for it."""
        weight, bias = effective_weight(self.layer, self.dtype)
        self.clone._parameters = {"bias": bias}
        original = weight if weight.data_ptr() == data_ptr_of(self.layer) else None
        self.method.install(self.clone, quantized, original)
        if self.is_head:
            self.clone.quant_method = RescoringHeadMethod(self.method, weight)

    def round_again(self) -> None:
        """Round the target's weight into the clone's own tensors, which CUDA graphs have seen."""
        _, bias = effective_weight(self.layer, self.dtype)
        fresh = nn.Module()
        fresh.register_parameter("bias", bias)
        self.method.install(fresh, self.rounded())
        for name, parameter in fresh.named_parameters():
            getattr(self.clone, name).copy_(parameter)
