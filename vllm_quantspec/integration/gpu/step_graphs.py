"""CUDA graphs of every kind of step, with ``draft_context: auto``: those in which drafts may be sparse, and plain ones.

What sparse drafts need costs a step something even where no request is long enough for them: launches that find nothing to
do, attention that could leave scores. The host knows no request's exact length, but a bound of it, and `SparseDrafts` says
before each step whether any could have sparse drafts by that. Where none can, `SparseDrafts.plain` is set: metadata then
carry no page scores, so that layers launch what an engine without sparse drafts launches, and graphs are those that were
captured from such metadata. vLLM's dispatch does not know of it: for each of its descriptors there are two graphs here.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, fields

from vllm.config import VllmConfig
from vllm.config.compilation import CUDAGraphMode
from vllm.v1.worker.gpu.cudagraph_utils import BatchExecutionDescriptor, CudaGraphManager, ModelCudaGraphManager

from vllm_quantspec.integration.gpu import sparse_drafts
from vllm_quantspec.integration.gpu.sparse_drafts import SparseDrafts


@dataclass(frozen=True)
class PlainDescriptor(BatchExecutionDescriptor):
    """Names the plain graph beside the one that ``of`` names."""

    of: BatchExecutionDescriptor | None = None


def plain_twin(desc: BatchExecutionDescriptor) -> PlainDescriptor:
    return PlainDescriptor(**{f.name: getattr(desc, f.name) for f in fields(BatchExecutionDescriptor)}, of=desc)


class PlainGraphs(CudaGraphManager):
    """Captures a plain graph beside each full one, and replays the one for the step; to stand before `CudaGraphManager`.

    Descriptors of plain graphs are among those to capture, so vLLM's estimate of the graphs' memory counts them.
    """

    sparse: SparseDrafts | None = None  # of an engine whose steps are of two kinds

    def capture(self, create_forward_fn: Callable, progress_bar_desc: str = "Capturing CUDA graphs") -> None:
        if self.sparse is None:
            return super().capture(create_forward_fn, progress_bar_desc)
        full = self._capture_descs.get(CUDAGraphMode.FULL, [])
        if not any(isinstance(desc, PlainDescriptor) for desc in full):  # graphs may be captured again
            self._capture_descs[CUDAGraphMode.FULL] = [one for desc in full for one in (desc, plain_twin(desc))]

        def create(desc: BatchExecutionDescriptor, warmup: bool):
            # Metadata are built in here; what launches by them is called after that, and asks nothing but them.
            self.sparse.plain = isinstance(desc, PlainDescriptor)
            return create_forward_fn(desc.of if self.sparse.plain else desc, warmup)

        try:
            super().capture(create, progress_bar_desc)
        finally:
            self.sparse.plain = False

    def run_fullgraph(self, desc: BatchExecutionDescriptor):
        plain = self.sparse is not None and self.sparse.plain
        return super().run_fullgraph(plain_twin(desc) if plain else desc)


class TargetCudaGraphManager(ModelCudaGraphManager, PlainGraphs):
    """Graphs of verifications: of two kinds where these may leave scores, else vLLM's."""

    def __init__(self, vllm_config: VllmConfig, *args, **kwargs) -> None:
        super().__init__(vllm_config, *args, **kwargs)
        sparse = sparse_drafts.of_engine(vllm_config)
        if sparse is not None and sparse.has_plain_steps and sparse.scores_out is not None:
            self.sparse = sparse


def with_plain_graphs(_manager: type[ModelCudaGraphManager]) -> type[ModelCudaGraphManager]:
    """What the runner makes in the place of vLLM's ``ModelCudaGraphManager``."""
    return TargetCudaGraphManager
