"""A 4-bit checkpoint's linears on weights that exist once, in the order of vLLM's Marlin kernel.

With the option ``one_copy`` vLLM chooses `MarlinLinearKernel` for these linears (`startup/one_copy.py`), whatever the
checkpoint's format, and two of its methods are replaced: weights are brought into Marlin's order by tensor operations, as
vLLM's kernel for it does not run everywhere, and up to `MAX_TOKENS` tokens of a step run on our kernel. More run on vLLM's,
which reads the same tensors, up to `MAX_TOKENS_MARLIN`; a prompt's many tokens are worth dequantizing one linear at a time
for a product in 16 bits. Where Marlin does not run on this GPU, ours goes on to `MAX_TOKENS_ALONE`.

The draft shares these linears with the target (`draft/one_copy.py`): its weights are the same 4 bits.
"""

from __future__ import annotations

from functools import cache

import torch
import torch.nn.functional as F
from vllm.config import get_current_vllm_config_or_none
from vllm.logger import init_logger
from vllm.model_executor.kernels.linear import MarlinLinearKernel, MPLinearLayerConfig
from vllm.model_executor.layers.quantization.utils.marlin_utils import (
    apply_gptq_marlin_linear,
    marlin_make_empty,
    marlin_permute_bias,
    marlin_permute_scales,
    marlin_zero_points,
    unpack_cols,
)
from vllm.model_executor.parameter import permute_param_layout_
from vllm.platforms import current_platform
from vllm.scalar_type import scalar_types
from vllm.utils.torch_utils import direct_register_custom_op

from vllm_quantspec.config import engine_options
from vllm_quantspec.integration.draft.one_copy import mark
from vllm_quantspec.integration.gpu.trial import problem_of
from vllm_quantspec.integration.startup.replace import replace
from vllm_quantspec.kernels import marlin_linear
from vllm_quantspec.kernels.marlin_dequantize import marlin_dequantize
from vllm_quantspec.kernels.marlin_linear import MarlinWeight

logger = init_logger("vllm.quantspec.linears")

# As fast as Marlin with 16 tokens; with 32 it takes half as long again (results/marlin_linear.json).
MAX_TOKENS = 16
# With Marlin a prompt of 32k takes an engine 1.4 times as long as with Machete; dequantized, one of 16k 0.91 times. To write
# and read a weight in 16 bits costs as much as some 200 tokens' products differ, by arithmetic (benchmarks/NOTES.md).
MAX_TOKENS_MARLIN = 512
# Where Marlin does not run: reading 4 bits once per 32 tokens is less than writing and reading 16. Not measured yet.
MAX_TOKENS_ALONE = 160
_OURS = "quantspec_has_marlin"  # an attribute of vLLM's kernel object: whether Marlin takes many tokens


def one_copy_linear(
    x: torch.Tensor,
    codes: torch.Tensor,
    scales: torch.Tensor,
    zeros: torch.Tensor | None,
    bias: torch.Tensor | None,
    has_marlin: bool,
) -> torch.Tensor:
    """`marlin_linear`, for more tokens vLLM's Marlin kernel (if ``has_marlin``), for many a product with 16-bit weights.

    Arguments and result as `marlin_linear`'s.

    One operator, because torch.compile must not see a choice that depends on the number of tokens.
    """
    if x.shape[0] <= (MAX_TOKENS if has_marlin else MAX_TOKENS_ALONE):
        return marlin_linear.marlin_linear(x, codes, scales, zeros, bias)
    if not has_marlin or x.shape[0] > MAX_TOKENS_MARLIN:
        weight = marlin_dequantize(MarlinWeight(codes, scales, zeros))
        return F.linear(x, weight, None if bias is None else marlin_linear.single_order_undone(bias))
    return vllms_marlin(x, codes, scales, zeros, bias)


def vllms_marlin(
    x: torch.Tensor, codes: torch.Tensor, scales: torch.Tensor, zeros: torch.Tensor | None, bias: torch.Tensor | None
) -> torch.Tensor:
    """vLLM's Marlin kernel on the tensors of a `MarlinWeight`; arguments and result as `marlin_linear`'s."""
    return apply_gptq_marlin_linear(
        input=x,
        weight=codes,
        weight_scale=scales,
        weight_zp=marlin_make_empty(x.device) if zeros is None else zeros,
        workspace=None,
        wtype=scalar_types.uint4b8 if zeros is None else scalar_types.uint4,
        output_size_per_partition=scales.shape[1],
        input_size_per_partition=x.shape[1],
        bias=bias,
    )


def _one_copy_linear_fake(x, codes, scales, zeros, bias, has_marlin):
    return x.new_empty(x.shape[0], scales.shape[1])


library = torch.library.Library("vllm_quantspec", "FRAGMENT")
direct_register_custom_op("one_copy_linear", one_copy_linear, fake_impl=_one_copy_linear_fake, target_lib=library)


def kept_by_vllm(config: MPLinearLayerConfig) -> str | None:
    """Why a linear stays with vLLM's Marlin alone, and the draft with a copy of its own; None if our kernel reads it."""
    if config.weight_type not in (scalar_types.uint4, scalar_types.uint4b8):
        return f"its weights are {config.weight_type}, not in 4 bits"
    if config.zero_points != (config.weight_type == scalar_types.uint4):
        return "its zero points are not those of vLLM's Marlin kernel"
    if config.act_type not in (torch.bfloat16, torch.float16):
        return f"its activations are {config.act_type}, not in 16 bits"
    in_features, out_features = config.partition_weight_shape
    capability = current_platform.get_device_capability() if current_platform.is_cuda() else None
    capability = capability and (capability.major, capability.minor)
    return marlin_linear.supported(in_features, out_features, config.group_size, config.act_type, capability)


def _in_tensor_operations(process_weights_after_loading):
    def process_one_copy(self, layer: torch.nn.Module) -> None:
        vllm_config = get_current_vllm_config_or_none()
        if vllm_config is None or not engine_options(vllm_config.additional_config).one_copy:
            return process_weights_after_loading(self, layer)
        if (reason := kept_by_vllm(self.config)) is not None:
            logger.warning_once("quantspec: a 4-bit linear stays with vLLM's kernel, and drafts with a copy: %s", reason)
            return process_weights_after_loading(self, layer)
        bring_into_order(self, layer)
        problem = marlin_problem(self.config.act_type, self.config.zero_points)
        setattr(self, _OURS, problem is None)
        names = self.w_q_name, self.w_s_name, self.w_zp_name
        mark(layer, names if self.config.zero_points else names[:2])
        most = MAX_TOKENS_ALONE if problem else MAX_TOKENS
        marlin = f" ({problem})" if problem else f", up to {MAX_TOKENS_MARLIN} on vLLM's Marlin kernel"
        logger.info_once(
            "4-bit linears run on this package's GPU kernel up to %d tokens%s, beyond on their dequantized weights.",
            *(most, marlin),
        )

    return process_one_copy


def _for_few_tokens(apply_weights):
    def apply_one_copy(self, layer: torch.nn.Module, x: torch.Tensor, bias: torch.Tensor | None = None) -> torch.Tensor:
        has_marlin = getattr(self, _OURS, None)
        if has_marlin is None:
            return apply_weights(self, layer, x, bias)
        codes, scales, zeros = self._get_weight_params(layer)
        zeros = zeros if self.config.zero_points else None
        rows = x.reshape(-1, x.shape[-1])
        out = torch.ops.vllm_quantspec.one_copy_linear(rows, codes, scales, zeros, bias, has_marlin)
        return out.view(*x.shape[:-1], out.shape[-1])

    return apply_one_copy


def bring_into_order(kernel: MarlinLinearKernel, layer: torch.nn.Module) -> None:
    """What `MarlinLinearKernel.process_weights_after_loading` does without padding, in tensor operations alone."""
    config = kernel.config
    in_features, out_features = config.partition_weight_shape
    groups = 1 if config.group_size == -1 else in_features // config.group_size
    if kernel.w_zp_name is None:
        kernel.w_zp_name = "w_zp"

    def codes(parameter):
        permute_param_layout_(parameter, input_dim=0, output_dim=1, packed_dim=0)
        parameter.data = marlin_linear.repack(parameter.data.contiguous())
        return parameter

    def scales(parameter):
        permute_param_layout_(parameter, input_dim=0, output_dim=1)
        values = parameter.data.contiguous()
        parameter.data = marlin_permute_scales(values, in_features, out_features, config.group_size)
        return parameter

    def zeros(parameter):
        return marlin_zero_points(unpack_cols(parameter.t(), 4, groups, out_features), groups, out_features, 4)

    if config.zero_points:
        kernel._transform_param(layer, kernel.w_zp_name, zeros)
    else:
        setattr(layer, kernel.w_zp_name, marlin_make_empty(getattr(layer, kernel.w_q_name).device))
    kernel._transform_param(layer, kernel.w_q_name, codes)
    kernel._transform_param(layer, kernel.w_s_name, scales)
    layer.input_global_scale = None
    if getattr(layer, "bias", None) is not None:
        layer.bias.data = marlin_permute_bias(layer.bias)


@cache
def marlin_problem(dtype: torch.dtype = torch.bfloat16, zero_points: bool = False) -> str | None:
    """Why vLLM's Marlin kernel for linears does not run on this process's GPU; None if it does.

    Each dtype of activations and each kind of weights has machine code of its own.
    """
    if not hasattr(torch.ops._C, "marlin_gemm"):
        return "this vLLM has no Marlin kernel for linears"
    name = f"vLLM's Marlin kernel for {str(dtype).removeprefix('torch.')} linears{' with zero points' * zero_points}"
    return problem_of(try_marlin, name, str(dtype).removeprefix("torch."), zero_points)


def try_marlin(device: int, dtype: str = "bfloat16", zero_points: bool = False) -> None:
    """Run vLLM's Marlin kernel once on a small linear. ``dtype``: the name of torch's.

    Raises:
        RuntimeError: it does not run, or computes something else. A launch that fails may say so to the next one only.
    """
    torch.cuda.set_device(device)
    out_features, in_features = 128, 256
    codes = torch.randint(0, 16, (out_features, in_features), dtype=torch.uint8, device="cuda")
    scales = torch.full((out_features, in_features // 64), 0.01, dtype=getattr(torch, dtype), device="cuda")
    zeros = torch.full_like(scales, 7, dtype=torch.uint8) if zero_points else None
    x = torch.randn(MAX_TOKENS + 1, in_features, dtype=scales.dtype, device="cuda")
    weight = marlin_linear.pack(codes, scales, zeros)
    out, expected = one_copy_linear(x, *weight, None, True), F.linear(x, marlin_dequantize(weight))
    if not (out - expected).float().norm() < 0.01 * expected.float().norm():
        raise RuntimeError("Error: its result is not that of the dequantized weight")


def install() -> None:
    """Replace both methods; they do nothing for engines without ``one_copy``."""
    replace(MarlinLinearKernel, "process_weights_after_loading", _in_tensor_operations)
    replace(MarlinLinearKernel, "apply_weights", _for_few_tokens)
