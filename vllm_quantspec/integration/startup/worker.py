"""Importing this module in a worker process installs the hooks that QuantSpec needs there.

vLLM imports it by itself, because the engine's configuration names it as ``worker_extension_cls``: workers of engines
without QuantSpec never do. A user's own extension keeps working: its path travels in the name, see ``extension_path``.
"""

from pathlib import Path

from vllm import envs
from vllm.platforms import current_platform
from vllm.utils.import_utils import resolve_obj_by_qualname

if current_platform.is_cpu():
    from vllm_quantspec.integration.cpu import generators, logits_processors, platform, rejection_sampler, runner

    for hook in (platform, rejection_sampler, logits_processors, generators, runner):
        hook.install()
else:
    from vllm_quantspec.integration.gpu import runner
    from vllm_quantspec.kernels import nvrtc

    runner.install()
    if not envs.VLLM_DISABLE_COMPILE_CACHE:
        nvrtc.keep_code_in(Path(envs.VLLM_CACHE_ROOT, "quantspec", "kernels"))


class WorkerExtension:
    """Adds nothing to the worker."""


def __getattr__(name: str):
    prefix, _, encoded = name.partition("_of_")
    if prefix != WorkerExtension.__name__ or not encoded:
        raise AttributeError(name)
    return resolve_obj_by_qualname(bytes.fromhex(encoded).decode())
