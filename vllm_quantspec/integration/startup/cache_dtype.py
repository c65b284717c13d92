"""The names of this cache among those of ``--kv-cache-dtype``: quantspec_int8 and quantspec_int4.

vLLM's list of cache dtypes is closed (``CacheDType``), so the name is taken out of the arguments before vLLM reads them:
it selects the attention backend QUANTSPEC, and the bits of a page travel in ``additional_config``, which every worker gets.
"""

from __future__ import annotations

import difflib
from typing import TYPE_CHECKING, Any

from vllm.logger import init_logger

from vllm_quantspec.config import CACHE_DTYPES, DEFAULT_CACHE_DTYPE

if TYPE_CHECKING:
    from vllm.config import VllmConfig
    from vllm.engine.arg_utils import EngineArgs

logger = init_logger("vllm.quantspec.cache_dtype")

_KEY = "quantspec_page_bits"


def take_cache_dtype(args: EngineArgs) -> bool:
    """Record in place what ``args.kv_cache_dtype`` says of QuantSpec's pages; whether it named QuantSpec's cache.

    Raises:
        ValueError: a name that begins like ours and is none, or an ``additional_config`` that cannot be added to.
    """
    name = args.kv_cache_dtype
    if not str(name).startswith("quantspec"):
        return False
    if name not in CACHE_DTYPES:
        near = difflib.get_close_matches(name, CACHE_DTYPES, n=1, cutoff=0)[0]
        raise ValueError(f"quantspec: there is no --kv-cache-dtype {name}; did you mean {near}?")
    if not isinstance(args.additional_config, dict):
        raise ValueError(
            f"quantspec: --kv-cache-dtype {name} is kept in additional_config, which is a "
            f"{type(args.additional_config).__name__} here and no dictionary; pass a dictionary."
        )
    if CACHE_DTYPES[name] == 4:
        logger.info("KV cache %s: all but the newest tokens in 4 bits; output is near that of 16 bits, not equal", name)
    args.kv_cache_dtype = "auto"  # of the exact window: the model's
    args.additional_config = {**args.additional_config, _KEY: CACHE_DTYPES[name]}
    return True


def page_bits(config: VllmConfig) -> int:
    """Bits that a page of this engine's cache stores of each code: 8 or 4."""
    extra: Any = config.additional_config
    default = CACHE_DTYPES[DEFAULT_CACHE_DTYPE]
    return extra.get(_KEY, default) if isinstance(extra, dict) else default
