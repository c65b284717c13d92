"""Keep vLLM's scan for Triton kernels from failing on Numba, which the CPU kernel uses.

For each new engine vLLM's CPU platform looks through every loaded module for Triton kernels. LLVM's bindings, which Numba
loads, answer to any attribute name, ``__dict__`` too, with a foreign function, and the scan fails.
"""

from llvmlite.binding import ffi

from vllm_quantspec.integration.startup.replace import replace


def _without_dunders(getattr_of_library):
    def __getattr__(self, name):
        if name.startswith("__"):
            raise AttributeError(name)
        return getattr_of_library(self, name)

    return __getattr__


def install() -> None:
    """Make LLVM's library object say that it has no double-underscore functions."""
    replace(type(ffi.lib), "__getattr__", _without_dunders)
