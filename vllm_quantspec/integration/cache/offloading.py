"""vLLM's offloading of the KV cache to host memory, for hierarchical pages.

To vLLM's ``OffloadingConnector`` a page is an opaque block; it moves the groups that take part in prefix caching, so pages
and sliding layers, not exact windows. A reloaded prefix therefore reads like a prefix-cache hit: from pages (design rule 3).
"""

from __future__ import annotations

from typing import TYPE_CHECKING

from vllm.distributed.kv_transfer.kv_connector.v1.offloading_connector import OffloadingConnector
from vllm.v1.kv_cache_interface import SlidingWindowSpec

if TYPE_CHECKING:
    from vllm.v1.request import Request


class PageOffloadingConnector(OffloadingConnector):
    """vLLM's connector, which leaves the last page of a prompt to be computed where it would load all of it.

    After such a load vLLM computes the last token again, over its old slot. Here that token has none: its page is complete
    and there is no window. Prefix-cache hits leave the last token out for the same reason.
    """

    def get_num_new_matched_tokens(self, request: Request, num_computed_tokens: int) -> tuple[int | None, bool]:
        specs = [group.kv_cache_spec for group in self._kv_cache_config.kv_cache_groups]
        page = max(spec.block_size for spec in specs)
        most = (request.num_tokens - 1) // page * page - num_computed_tokens
        if any(isinstance(spec, SlidingWindowSpec) for spec in specs):
            most += 1  # vLLM takes one off where there are such layers: for the last token, which is left out already
        number, is_async = self.scheduler.get_num_new_matched_tokens(request, num_computed_tokens, max_num_new_tokens=most)
        if number and (num_computed_tokens + number) % page:
            raise RuntimeError(f"quantspec: vLLM would load {number} tokens, which end inside a page; drop KV offloading.")
        return number, is_async
