"""Checkpoints with 4-bit linears and random weights: what a file of each format has, and the weight that it stands for."""

from __future__ import annotations

from dataclasses import dataclass

import torch
from vllm.model_executor.layers.quantization.utils.quant_utils import awq_pack, pack_cols, pack_rows


@dataclass(frozen=True)
class Format:
    """method: "awq", "gptq", "compressed-tensors" or "auto-round"; group_size: -1 for a scale per output."""

    method: str
    group_size: int
    has_zeros: bool = False

    @property
    def quantization_config(self) -> dict:
        if self.method == "awq":
            return {"quant_method": "awq", "bits": 4, "group_size": self.group_size, "zero_point": self.has_zeros}
        if self.method == "gptq":
            return {
                "quant_method": "gptq",
                "bits": 4,
                "group_size": self.group_size,
                "desc_act": False,
                "sym": True,
                "lm_head": False,
            }
        if self.method == "auto-round":
            return {
                "quant_method": "auto-round",
                "bits": 4,
                "group_size": self.group_size,
                "sym": True,
                "data_type": "int",
                "packing_format": "auto_round:auto_gptq",
            }
        weights = {
            "num_bits": 4,
            "type": "int",
            "symmetric": not self.has_zeros,
            "strategy": "channel" if self.group_size == -1 else "group",
            "group_size": None if self.group_size == -1 else self.group_size,
        }
        groups = {"all": {"targets": ["Linear"], "weights": weights, "input_activations": None}}
        return {
            "quant_method": "compressed-tensors",
            "format": "pack-quantized",
            "ignore": ["lm_head"],
            "config_groups": groups,
        }

    def tensors(
        self, out_features: int, in_features: int, dtype: torch.dtype, generator: torch.Generator | None = None
    ) -> tuple[dict[str, torch.Tensor], torch.Tensor]:
        """A linear's tensors by their names in the file, and its weight: float32 [out, in]."""
        groups = 1 if self.group_size == -1 else in_features // self.group_size
        codes = torch.randint(0, 16, (out_features, in_features), generator=generator, dtype=torch.int32, device="cpu")
        scales = (
            (torch.rand(out_features, groups, generator=generator, device="cpu") + 0.3)
            .mul(0.2 * in_features**-0.5)
            .to(dtype)
        )
        zeros = torch.full((out_features, groups), 8, dtype=torch.int32)
        if self.has_zeros:
            zeros = torch.randint(0, 16, (out_features, groups), generator=generator, dtype=torch.int32, device="cpu")
        levels = codes.unflatten(1, (groups, -1)) - zeros.unsqueeze(-1)
        weight = (levels.float() * scales.float().unsqueeze(-1)).flatten(1)
        if self.method == "awq":
            stored = {
                "qweight": awq_pack(codes.t().contiguous(), 4, in_features, out_features),
                "qzeros": awq_pack(zeros.t().contiguous(), 4, groups, out_features),
                "scales": scales.t().contiguous(),
            }
        elif self.method == "compressed-tensors":
            stored = {
                "weight_packed": pack_cols(codes, 4, out_features, in_features),
                "weight_scale": scales,
                "weight_shape": torch.tensor([out_features, in_features]),
            }
            if self.has_zeros:
                stored["weight_zero_point"] = pack_rows(zeros, 4, out_features, groups)
        else:
            stored = {
                "qweight": pack_rows(codes.t().contiguous(), 4, in_features, out_features),
                "qzeros": pack_cols(zeros.t().contiguous() - 1, 4, groups, out_features),
                "scales": scales.t().contiguous(),
            }
        return stored, weight


FORMATS = [
    *(Format("gptq", group) for group in (32, 64, 128, -1)),
    *(Format("awq", group, True) for group in (32, 64, 128)),
    *(Format("compressed-tensors", group, zeros) for group in (32, 64, 128, -1) for zeros in (False, True)),
    *(Format("auto-round", group) for group in (64, 128)),
]


def name_of(form: Format) -> str:
    return f"{form.method}-{form.group_size}{'-zeros' * form.has_zeros}"
