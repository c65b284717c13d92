"""Importing this module in a worker process installs the hooks that QuantSpec needs there.

vLLM imports it by itself, because the engine's configuration names it as ``worker_extension_cls``: workers of engines
without QuantSpec never do. A user's own extension keeps working: its path travels in the name, see ``extension_path``.
"""

from vllm.utils.import_utils import resolve_obj_by_qualname

from vllm_quantspec.integration import cpu_generators, cpu_rejection_sampler, platform_cpu, runner_v1

platform_cpu.install()
cpu_rejection_sampler.install()
cpu_generators.install()
runner_v1.install()


class WorkerExtension:
    """Adds nothing to the worker."""


def __getattr__(name: str):
    prefix, _, encoded = name.partition("_of_")
    if prefix != WorkerExtension.__name__ or not encoded:
        raise AttributeError(name)
    return resolve_obj_by_qualname(bytes.fromhex(encoded).decode())
