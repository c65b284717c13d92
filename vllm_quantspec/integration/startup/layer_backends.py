"""Which attention backend each layer has: full layers QUANTSPEC, sliding-window layers beside them vLLM's own choice.

vLLM selects backends per kind of KV cache (``attention_config.backend_per_kind``), by name or by itself where no name is
given, so QUANTSPEC moves from "all layers" to "full layers" where a model has both.
"""

from __future__ import annotations

from typing import TYPE_CHECKING

from vllm.v1.kv_cache_interface import KVCacheSpecKind

from vllm_quantspec.integration.startup.backend_name import NAME, quantspec_backend
from vllm_quantspec.supported import sliding_layers

if TYPE_CHECKING:
    from vllm.config import VllmConfig
    from vllm.engine.arg_utils import EngineArgs

FULL = KVCacheSpecKind.FULL_ATTENTION.value


def _name(backend) -> str:
    return getattr(backend, "name", str(backend)).upper()


def wants_quantspec_cache(args: EngineArgs) -> bool:
    """Whether the flags select QUANTSPEC, for all layers or for full ones.

    Raises:
        ValueError: QUANTSPEC for layers that are not full, or for all layers and yet not for full ones.
    """
    backend = args.attention_backend if args.attention_backend is not None else args.attention_config.backend
    kinds = {kind: _name(other) for kind, other in args.attention_config.backend_per_kind.items()}
    wrong = [kind for kind, name in kinds.items() if name == NAME and kind != FULL]
    if wrong:
        raise ValueError(
            f"quantspec: the hierarchical KV cache is for full attention, not for {wrong[0]} layers; drop {wrong[0]} from "
            "backend_per_kind."
        )
    everywhere = backend is not None and _name(backend) == NAME
    if everywhere and kinds.get(FULL, NAME) != NAME:
        raise ValueError(
            f"quantspec: the attention backend is QUANTSPEC, but backend_per_kind gives full layers {kinds[FULL]}, and "
            f"other layers have no use for this cache; drop {FULL} from backend_per_kind."
        )
    return everywhere or kinds.get(FULL) == NAME


def leave_sliding_layers(config: VllmConfig) -> None:
    """In place: of a model with sliding-window and full layers, only the full ones get the backend QUANTSPEC."""
    attention = config.attention_config
    if attention.backend is not quantspec_backend():
        return
    if sliding_layers(config.model_config.hf_text_config.to_dict()) == "some":
        attention.backend_per_kind = {**attention.backend_per_kind, FULL: attention.backend}
        attention.backend = None
