"""One copy of a 4-bit checkpoint's weights for target and draft: what is asked for, refused, and told vLLM.

The copy is in the order of vLLM's Marlin kernel (`gpu/marlin_linears.py` has what reads it), so vLLM must choose Marlin for
these linears: ``linear_backend_per_quant`` of its kernel configuration says so. On Hopper it would choose Machete by itself.
"""

from __future__ import annotations

from importlib import import_module
from typing import TYPE_CHECKING, Any

from vllm import envs
from vllm.logger import init_logger
from vllm.platforms import current_platform

from vllm_quantspec.checkpoint import four_bits
from vllm_quantspec.config import EngineOptions, engine_options

if TYPE_CHECKING:
    from vllm.config import VllmConfig

logger = init_logger("vllm.quantspec.one_copy")

# vLLM's names for linears with 16-bit activations and fewer bits of weights, and for the kernel.
_SCHEME, _KERNEL = "mixed_precision", "marlin"


def check_unused(additional_config: Any) -> None:
    """For an engine without QuantSpec.

    Raises:
        ValueError: it has options of QuantSpec.
    """
    if engine_options(additional_config) != EngineOptions():
        raise ValueError(
            "quantspec: --additional-config has options of quantspec, but this engine does not use it; add "
            "--attention-backend QUANTSPEC or --speculative-config quantspec, or drop them."
        )


def read_one_copy(config: VllmConfig) -> None:
    """Let vLLM choose Marlin where ``one_copy`` asks for it, in place; does nothing otherwise.

    Raises:
        ValueError: one sentence, where there cannot be one copy.
    """
    if not engine_options(config.additional_config).one_copy:
        return
    model, kernels = config.model_config, config.kernel_config
    quantization = getattr(model.hf_config, "quantization_config", None)
    found = four_bits(quantization if isinstance(quantization, dict) else None)
    asked = (kernels.linear_backend_per_quant or {}).get(_SCHEME, kernels.linear_backend)
    for problem, what, remedy in (
        (
            not current_platform.is_cuda(),
            "one_copy is about kernels of a GPU; a CPU engine's draft reads a 4-bit checkpoint's own weights anyway",
            "drop one_copy",
        ),
        (isinstance(found, str), f"one_copy is for 4-bit checkpoints, but {model.model} {found}", "drop one_copy"),
        (
            asked not in ("auto", _KERNEL),
            f"one_copy needs weights in the order of vLLM's Marlin kernel, but the linear backend is {asked}",
            "drop --linear-backend, or one_copy",
        ),
        (
            "MarlinLinearKernel" in envs.VLLM_DISABLED_KERNELS,
            "one_copy needs vLLM's MarlinLinearKernel, which VLLM_DISABLED_KERNELS names",
            "take it out, or drop one_copy",
        ),
        (
            envs.VLLM_MARLIN_INPUT_DTYPE is not None,
            f"one_copy multiplies 16-bit activations, but VLLM_MARLIN_INPUT_DTYPE is {envs.VLLM_MARLIN_INPUT_DTYPE}",
            "unset it, or drop one_copy",
        ),
        (
            envs.VLLM_BATCH_INVARIANT,
            "one_copy runs many tokens on other kernels than few, which VLLM_BATCH_INVARIANT excludes",
            "unset it, or drop one_copy",
        ),
    ):
        if problem:
            raise ValueError(f"quantspec: {what}; {remedy}.")
    try:
        import_module("vllm_quantspec.integration.gpu.marlin_linears")
    except ImportError as error:
        raise ValueError(
            f"quantspec: one_copy builds on vLLM's Marlin linears, which this vLLM does not have as expected ({error}); "
            "drop one_copy."
        ) from error
    kernels.linear_backend_per_quant = {**(kernels.linear_backend_per_quant or {}), _SCHEME: _KERNEL}
    logger.info("4-bit linears keep one copy of their weights, in the order of vLLM's Marlin kernel, for target and draft")
