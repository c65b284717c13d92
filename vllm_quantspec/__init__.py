"""QuantSpec for vLLM."""

import importlib.util
import sys
from pathlib import Path

__version__ = "0.2.0"


def _load_kernels_of_a_checkout() -> None:
    """Make ``vllm_quantspec.kernels`` the folder beside this package, where a checkout has it; installed, it lies inside.

    Python finds the checkout's own package before an installed one where the working directory comes first, as it does for
    `python -c` and `python -m`: this has to work without an installation, and beside one.
    """
    package = Path(__file__).resolve().parent
    beside = package.parent / "kernels"
    if (package / "kernels" / "__init__.py").is_file() or not (beside / "__init__.py").is_file():
        return
    name = f"{__name__}.kernels"
    spec = importlib.util.spec_from_file_location(name, beside / "__init__.py", submodule_search_locations=[str(beside)])
    sys.modules[name] = module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    sys.modules[__name__].kernels = module  # as an import would


_load_kernels_of_a_checkout()


def register() -> None:
    """Entry point of group ``vllm.general_plugins``: every vLLM process calls it, some more than once."""
    from vllm_quantspec.integration.startup.register import register as _register

    _register()
