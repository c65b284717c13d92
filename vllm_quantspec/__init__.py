"""QuantSpec for vLLM."""

from pathlib import Path

__version__ = "0.2.0"

# In a checkout the kernels lie beside this package, not inside it. Python finds the checkout's own package before an
# installed one where the working directory comes first, so this has to work without an installation.
_HERE = Path(__file__).resolve().parent
if not (_HERE / "kernels").is_dir() and (_HERE.parent / "kernels" / "__init__.py").is_file():
    __path__.append(str(_HERE.parent))


def register() -> None:
    """Entry point of group ``vllm.general_plugins``: every vLLM process calls it, some more than once."""
    from vllm_quantspec.integration.startup.register import register as _register

    _register()
