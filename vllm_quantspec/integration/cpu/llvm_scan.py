"""Keep vLLM's scan for Triton kernels from tripping over Numba, which the CPU kernel uses.

For each new engine vLLM's CPU platform looks through every loaded module for Triton kernels. LLVM's bindings, which Numba
loads, answer to any attribute name, ``__dict__`` too, with a foreign function, and the scan fails.
"""

import functools

from llvmlite.binding import ffi


def install() -> None:
    """Make LLVM's library object say that it has no double-underscore functions; idempotent."""
    library = type(ffi.lib)
    original = library.__getattr__
    if getattr(original, "_quantspec", False):
        return

    @functools.wraps(original)
    def without_dunders(self, name):
        if name.startswith("__"):
            raise AttributeError(name)
        return original(self, name)

    without_dunders._quantspec = True
    library.__getattr__ = without_dunders
