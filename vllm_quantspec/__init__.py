"""QuantSpec for vLLM."""

__version__ = "0.1.0"


def register() -> None:
    """Entry point of group ``vllm.general_plugins``: every vLLM process calls it, some more than once."""
    from vllm_quantspec.integration.register import register as _register

    _register()
