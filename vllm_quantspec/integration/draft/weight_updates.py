"""Weights that are exchanged in a running engine reach the draft's INT4 copy.

vLLM loads them in place through the target's ``load_weights``: ``reload_weights``, waking up from sleep level 2, weight
transfer, and trainers that call it themselves. One update may be many calls, with more to do behind the last, so a call
only marks the draft as stale, and the next draft begins with rounding the new weights into the tensors of CUDA graphs.
"""

from __future__ import annotations

import functools
import time

import torch
from torch import nn
from vllm.logger import init_logger

from vllm_quantspec.integration.draft.model import DraftModel

logger = init_logger("vllm.quantspec.weight_updates")


def watch(target_model: nn.Module, draft: DraftModel) -> None:
    """From now on, loading weights into ``target_model`` makes ``draft`` stale, if it has weights of its own."""
    if not draft.updates:
        return
    load_weights = target_model.load_weights

    @functools.wraps(load_weights)
    def load_and_mark(*args, **kwargs):
        draft.stale = True
        return load_weights(*args, **kwargs)

    target_model.load_weights = load_and_mark


@torch.inference_mode()
def refresh(draft: DraftModel) -> None:
    """Round the INT4 weights again if the target's have changed; does nothing otherwise."""
    if not draft.stale:
        return
    draft.stale = False
    started = time.perf_counter()
    try:
        for round_again in draft.updates:
            round_again()
    except torch.OutOfMemoryError:  # the engine's memory is the cache's by now
        logger.warning(
            "quantspec: the draft's INT4 weights could not be made again from the new weights, as GPU memory ran out: the "
            "output stays right, but few drafts will be accepted; lower --gpu-memory-utilization, or restart the engine."
        )
        return
    logger.info("INT4 draft weights made again from new weights, took %.1f s", time.perf_counter() - started)
