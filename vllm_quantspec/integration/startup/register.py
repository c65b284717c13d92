"""What the plugin does to a vLLM process. Cheap and idempotent: vLLM loads plugins in every process, often twice."""

import logging

from vllm_quantspec.integration.startup.version import SUPPORTED, fitting_vllm, installed_vllm

logger = logging.getLogger("vllm.quantspec")


def register() -> None:
    """Teach this process the name ``quantspec``; nothing else changes until an engine asks for it."""
    if installed_vllm() not in SUPPORTED:
        # Other engines must go on; one that asks for QuantSpec is refused by vLLM, which does not know the name.
        logger.warning(
            "vllm-quantspec works with vLLM %s, not %s: it stays off. For this machine, install %s.",
            " and ".join(SUPPORTED),
            installed_vllm(),
            fitting_vllm(),
        )
        return
    from vllm_quantspec.integration.draft.scheduler_name import silence_warning
    from vllm_quantspec.integration.startup import engine_args, sampling_params
    from vllm_quantspec.integration.startup.backend_name import quantspec_backend

    quantspec_backend()
    engine_args.install()
    sampling_params.install()
    silence_warning()
    logger.debug("vllm-quantspec is registered.")
