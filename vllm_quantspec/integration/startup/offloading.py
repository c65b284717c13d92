"""KV connectors: vLLM's own offloading to host memory works with pages, all others are refused."""

from __future__ import annotations

from copy import copy
from typing import TYPE_CHECKING

from vllm import envs

if TYPE_CHECKING:
    from vllm.config import VllmConfig
    from vllm.engine.arg_utils import EngineArgs

NATIVE = "OffloadingConnector"
SPEC = "CPUOffloadingSpec"
OURS = ("PageOffloadingConnector", "vllm_quantspec.integration.cache.offloading")


def check_connector(args: EngineArgs) -> None:
    """Refuse what moves or keeps pages otherwise than as whole blocks of this engine.

    Raises:
        ValueError: one sentence.
    """
    transfer, size = args.kv_transfer_config, args.kv_offloading_size
    if transfer is None and size is None:
        return
    name = transfer.kv_connector if transfer is not None else None
    if size is not None:  # vLLM then names the connector itself
        name = "SimpleCPUOffloadConnector" if envs.VLLM_USE_SIMPLE_KV_OFFLOAD else NATIVE
        name = name if args.kv_offloading_backend == "native" else args.kv_offloading_backend
    if name != NATIVE or transfer is not None and transfer.kv_connector_module_path:
        raise ValueError(
            f"quantspec: of KV connectors the hierarchical KV cache works with vLLM's {NATIVE}, not with {name}, which was "
            "not tried with pages that several tokens share; use --kv-offloading-size, without VLLM_USE_SIMPLE_KV_OFFLOAD, "
            "--kv-offloading-backend and --kv-transfer-config."
        )
    extra = transfer.kv_connector_extra_config if transfer is not None else {}
    if extra.get("spec_name", SPEC) != SPEC:
        raise ValueError(
            f"quantspec: pages can be offloaded to host memory ({SPEC}), not with {extra['spec_name']}, where an engine "
            "with another KV cache may find them by the same name; drop spec_name from kv_connector_extra_config."
        )
    if extra.get("canonical_layout"):
        raise ValueError(
            "quantspec: a page is one string of bytes per KV head, which canonical_layout would cut by tokens; drop it from "
            "kv_connector_extra_config."
        )
    if args.speculative_config is not None and not extra.get("offload_prompt_only", True):
        raise ValueError(
            "quantspec: with speculation a generated token's page is complete one step after vLLM would offload it; drop "
            "offload_prompt_only from kv_connector_extra_config, or speculation."
        )


def offload_pages(config: VllmConfig) -> None:
    """In place: give an engine that offloads the connector for pages."""
    if config.kv_transfer_config is not None:
        transfer = config.kv_transfer_config = copy(config.kv_transfer_config)  # the user's own may serve other engines
        transfer.kv_connector, transfer.kv_connector_module_path = OURS
