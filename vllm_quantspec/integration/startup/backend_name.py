"""The name QUANTSPEC among vLLM's attention backends, in every process."""

import logging

from vllm.v1.attention.backends.registry import AttentionBackendEnum

NAME = "QUANTSPEC"
PATH = "vllm_quantspec.integration.cache.backend.QuantSpecBackend"


def quantspec_backend() -> AttentionBackendEnum:
    """The enum member ``QUANTSPEC``, made on the first call in a process."""
    if NAME not in AttentionBackendEnum.__members__:
        registry_logger = logging.getLogger("vllm.v1.attention.backends.registry")
        level = registry_logger.level
        registry_logger.setLevel(logging.WARNING)  # vLLM says so at INFO, even where nobody asks for the backend
        try:
            member = AttentionBackendEnum.register(NAME, PATH)
        finally:
            registry_logger.setLevel(level)
        # A worker process unpickles its configuration before it loads plugins; an enum pickles as a look-up by value,
        # which would fail there. This makes the look-up register the name first.
        member.__reduce_ex__ = lambda protocol: (quantspec_backend, ())
    return AttentionBackendEnum[NAME]
