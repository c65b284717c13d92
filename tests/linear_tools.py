"""vLLM's own quantized linears with random weights, as a checkpoint of each kind would make them."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from types import SimpleNamespace

import torch
from vllm.config import VllmConfig, get_current_vllm_config, set_current_vllm_config
from vllm.distributed import cleanup_dist_env_and_memory, ensure_model_parallel_initialized, init_distributed_environment
from vllm.model_executor.layers.linear import ReplicatedLinear
from vllm.model_executor.layers.quantization import get_quantization_config
from vllm.utils.torch_utils import set_default_torch_dtype

E4M3 = torch.float8_e4m3fn


def _compressed(num_bits: int, kind: str, weights: dict, activations: dict | None) -> tuple[str, dict]:
    numbers = {"num_bits": num_bits, "type": kind}
    group = {"targets": ["Linear"], "weights": numbers | {"symmetric": True} | weights}
    group["input_activations"] = None if activations is None else numbers | {"symmetric": True} | activations
    style = "float-quantized" if kind == "float" else "int-quantized"
    return "compressed-tensors", {"format": style, "ignore": [], "config_groups": {"all": group}}


_FP8 = {"quant_method": "fp8", "activation_scheme": "dynamic"}
_STATIC, _TOKEN = {"strategy": "tensor", "dynamic": False}, {"strategy": "token", "dynamic": True}
# What a checkpoint's `quantization_config` says.
KINDS = {
    "fp8 static": ("fp8", _FP8 | {"activation_scheme": "static"}),
    "fp8 dynamic": ("fp8", _FP8),
    "fp8 blocks": ("fp8", _FP8 | {"weight_block_size": [128, 128]}),
    "compressed fp8 static": _compressed(8, "float", {"strategy": "tensor"}, _STATIC),
    "compressed fp8 static rows": _compressed(8, "float", {"strategy": "channel"}, _STATIC),
    "compressed fp8 rows": _compressed(8, "float", {"strategy": "channel"}, _TOKEN),
    "compressed int8 static": _compressed(8, "int", {"strategy": "channel"}, _STATIC),
    "compressed int8 static asymmetric": _compressed(8, "int", {"strategy": "channel"}, _STATIC | {"symmetric": False}),
    "compressed int8 rows": _compressed(8, "int", {"strategy": "channel"}, _TOKEN),
    "modelopt fp8 static": ("modelopt", {"quant_method": "modelopt", "quantization": {"quant_algo": "FP8"}}),
}


@contextmanager
def one_rank() -> Iterator[None]:
    """What vLLM's layers ask for: a configuration, and a group of one process."""
    with set_current_vllm_config(VllmConfig()):
        init_distributed_environment(1, 0, "tcp://127.0.0.1:0", 0, "nccl" if torch.cuda.is_available() else "gloo")
        ensure_model_parallel_initialized(1, 1)
        try:
            yield
        finally:
            cleanup_dist_env_and_memory()


def build(
    kind: str, weight: torch.Tensor, input_scale: float, dtype: torch.dtype = torch.bfloat16, zero_point: int = 0
) -> tuple[torch.nn.Module, torch.Tensor]:
    """A linear of that kind, loaded and processed, and the weight that it applies: float32 [out, in].

    Args:
        kind: a key of ``KINDS``.
        weight: float32 [out, in], rounded to the kind's format here.
        input_scale: of the inputs, where their scale is static; ``zero_point``: likewise, where they have one.
    """
    method, settings = KINDS[kind]
    config_class = get_quantization_config(method)
    config = config_class.from_config(settings)
    config.packed_modules_mapping = {}
    out_features, in_features = weight.shape
    device = weight.device
    get_current_vllm_config().model_config = SimpleNamespace(dtype=dtype)
    with torch.device(device), set_default_torch_dtype(dtype):  # as vLLM's loader does
        layer = ReplicatedLinear(
            in_features, out_features, bias=False, params_dtype=dtype, quant_config=config, prefix="model.layers.0.up_proj"
        )
    if "int8" in kind:
        scale = weight.abs().amax(1, keepdim=True) / 127
        stored = (weight / scale).round().clamp(-128, 127).to(torch.int8)
    elif "blocks" in kind:
        blocks = weight.view(out_features // 128, 128, in_features // 128, 128)
        scale = blocks.abs().amax((1, 3)) / 448
        stored = (blocks / scale[:, None, :, None]).view_as(weight).to(E4M3)
    else:
        largest = weight.abs().amax(1, keepdim=True) if "rows" in kind else weight.abs().amax().view(1)
        scale = largest / 448
        stored = (weight / scale).to(E4M3)
    spread = scale.repeat_interleave(128, 0).repeat_interleave(128, 1) if "blocks" in kind else scale
    expected = stored.float() * spread
    for name, parameter in layer.named_parameters():
        value = {"weight": stored, "weight_scale": scale, "weight_scale_inv": scale}.get(name)
        if name == "input_scale":
            value = torch.tensor(input_scale, device=device)
        elif name == "input_zero_point":
            value = torch.tensor(zero_point, device=device)
        assert value is not None, f"{kind}: {name}"
        parameter.data.copy_(value.view(parameter.shape) if value.numel() > 1 else value.expand(parameter.shape))
    with set_default_torch_dtype(dtype):
        layer.quant_method.process_weights_after_loading(layer)
    return layer, expected
