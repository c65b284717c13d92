"""Let torch.compile's kernels overlap with their neighbours: the draft's INT4 linears fetch weights under the end of a norm.

Our kernels are launched so that they may begin under the end of the kernel before them (programmatic dependent launch, from
Hopper on), which gains little while that one does not let them. Inductor's kernels do with ``triton.enable_pdl``.
"""

from vllm.config import VllmConfig
from vllm.platforms import current_platform

from vllm_quantspec.kernels.device import OVERLAP_CAPABILITY

OPTION = "triton.enable_pdl"


def let_compiled_kernels_overlap(config: VllmConfig) -> None:
    """Set Inductor's option where GPU and PyTorch have it and the user has not."""
    if not (current_platform.is_cuda() and current_platform.has_device_capability(OVERLAP_CAPABILITY)):
        return
    import torch._inductor.config as inductor

    if hasattr(inductor.triton, OPTION.removeprefix("triton.")):
        config.compilation_config.inductor_compile_config.setdefault(OPTION, True)
