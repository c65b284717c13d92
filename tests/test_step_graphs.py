"""Two kinds of CUDA graphs with ``draft_context: auto``, as far as they can be checked without a GPU."""

from types import SimpleNamespace

import pytest
import torch
from test_speculator import FULL, speculator_with_graphs
from vllm.config.compilation import CUDAGraphMode
from vllm.v1.worker.gpu import cudagraph_utils, model_runner
from vllm.v1.worker.gpu.spec_decode.target_dependent_ar.cudagraph_utils import SpeculatorCudaGraphManager

from vllm_quantspec.config import AUTO_NUMBERS, AUTO_SCHEDULE
from vllm_quantspec.integration.gpu import runner as runner_v2
from vllm_quantspec.integration.gpu import step_graphs
from vllm_quantspec.integration.gpu.speculator import ALL_SIZES, DraftCudaGraphManager, draft_capture_sizes
from vllm_quantspec.integration.gpu.step_graphs import PlainDescriptor, TargetCudaGraphManager


class Graph:
    """What replay() has told."""

    def __init__(self, replayed: list, what) -> None:
        self.replay = lambda: replayed.append(what)


@pytest.fixture
def target(monkeypatch):
    """Returns a function that makes the target's manager, beside layers that know ``sparse``."""
    monkeypatch.setattr(cudagraph_utils, "get_pp_group", lambda: SimpleNamespace(is_first_rank=True, is_last_rank=True))
    platform = SimpleNamespace(get_global_graph_pool=lambda: None)
    monkeypatch.setattr(cudagraph_utils, "current_platform", platform)
    monkeypatch.setattr(cudagraph_utils, "get_offloader", lambda: SimpleNamespace(sync_prev_onload=lambda: None))

    def make(sparse) -> TargetCudaGraphManager:
        layers = {"norm": SimpleNamespace(), "attention": SimpleNamespace(impl=SimpleNamespace(page_scores=sparse))}
        config = SimpleNamespace(
            scheduler_config=SimpleNamespace(max_num_seqs=4),
            compilation_config=SimpleNamespace(
                cudagraph_capture_sizes=[5, 10, 20], max_cudagraph_capture_size=20, static_forward_context=layers
            ),
            parallel_config=SimpleNamespace(tensor_parallel_size=1, data_parallel_size=1, use_ubatching=False),
            speculative_config=None,
            cache_config=SimpleNamespace(use_kda_recoverssm=False),
            lora_config=None,
        )
        return TargetCudaGraphManager(config, torch.device("cpu"), CUDAGraphMode.FULL_AND_PIECEWISE, decode_query_len=5)

    return make


def capture(manager, sparse, monkeypatch) -> list:
    """Capture as vLLM does, with its own loop; returns [(descriptor, mode of its call, plain when metadata are built)]."""
    seen = []

    def create(desc, warmup):
        assert not isinstance(desc, PlainDescriptor)
        plain = sparse is not None and sparse.plain
        return lambda mode: seen.append((desc, mode, plain, warmup))

    def loop(self, create_forward_fn, progress_bar_desc):
        for mode in (CUDAGraphMode.PIECEWISE, FULL):
            for desc in self._capture_descs.get(mode, ()):
                create_forward_fn(desc, warmup=True)(CUDAGraphMode.NONE)
                if mode == FULL:
                    create_forward_fn(desc, warmup=False)(CUDAGraphMode.NONE)
                    assert desc not in self.graphs
                    self.graphs[desc] = Graph(replayed, (seen[-1][0], seen[-1][2]))
        self._graphs_captured = True

    replayed: list = []
    monkeypatch.setattr(cudagraph_utils.CudaGraphManager, "capture", loop)
    step_graphs.PlainGraphs.capture(manager, create)
    return [seen, replayed]


def sparse_drafts(**more):
    return SimpleNamespace(**{"plain": False, "has_plain_steps": True, "scores_out": object(), **more})


def test_verifications_have_a_plain_graph_each(target, monkeypatch):
    sparse = sparse_drafts()
    manager = target(sparse)
    full = list(manager._capture_descs[FULL])
    seen, replayed = capture(manager, sparse, monkeypatch)
    assert not sparse.plain
    # All of them are among what vLLM counts when it estimates their memory, the two of the largest size first.
    assert len(manager._capture_descs[FULL]) == 2 * len(full) == len(manager.graphs)
    assert [d.num_tokens for d in manager._capture_descs[FULL][:2]] == [20, 20]
    for desc in full:
        assert [s[2:] for s in seen if s[0] == desc] == [(False, True), (False, False), (True, True), (True, False)]
    assert all(not s[2] for s in seen if s[0].cg_mode == CUDAGraphMode.PIECEWISE)
    found = manager.dispatch(2, 10, 5, 0)
    assert found in full
    for plain in (False, True, True, False):
        sparse.plain = plain
        step_graphs.PlainGraphs.run_fullgraph(manager, found)
    assert replayed == [(found, False), (found, True), (found, True), (found, False)]
    manager.release_graphs()
    capture(manager, sparse, monkeypatch)
    assert len(manager.graphs) == 2 * len(full)


@pytest.mark.parametrize("sparse", [None, sparse_drafts(has_plain_steps=False), sparse_drafts(scores_out=None)])
def test_other_engines_have_vllms_graphs(target, sparse, monkeypatch):
    """Also one whose verifications leave no scores, as pages are chosen by where they are."""
    manager = target(sparse)
    full = list(manager._capture_descs[FULL])
    _, replayed = capture(manager, sparse, monkeypatch)
    assert manager._capture_descs[FULL] == full and set(manager.graphs) == set(full)
    if sparse is not None:
        sparse.plain = sparse.has_plain_steps  # of the drafts, perhaps
    step_graphs.PlainGraphs.run_fullgraph(manager, full[0])
    assert replayed == [(full[0], False)]


@pytest.mark.parametrize(("drafts", "schedule"), [(4, None), (AUTO_NUMBERS[-1], AUTO_SCHEDULE)])
def test_drafts_have_a_plain_graph_each(drafts, schedule, monkeypatch):
    sparse = sparse_drafts(scores_out=None)
    ours, captured = speculator_with_graphs(drafts, schedule, monkeypatch, sparse)
    manager, numbers = ours.decode_cudagraph_manager, [4] if schedule is None else sorted(set(AUTO_NUMBERS) - {0})
    assert sorted(captured) == sorted(2 * [(n, k) for n in (1, 2, 4, 8) for k in numbers])
    monkeypatch.setattr(cudagraph_utils, "get_offloader", lambda: SimpleNamespace(sync_prev_onload=lambda: None))
    for k in numbers:
        desc = manager.specialize_spec_tokens(manager.dispatch(3, 3, 1, 0), k)
        for plain in (True, False):
            replayed: list = []
            manager.graphs = {d: Graph(replayed, d) for d in manager.graphs}
            sparse.plain = plain
            manager.run_fullgraph(desc)
            assert replayed == [step_graphs.plain_twin(desc) if plain else desc]
            assert getattr(desc, "num_speculative_tokens", k) == k


def test_the_runner_makes_ours():
    runner_v2.install()
    assert model_runner.ModelCudaGraphManager is TargetCudaGraphManager


@pytest.mark.parametrize("max_num_seqs", [1, 7, 64, 100, 144, 192, 256, 320, 1000])
def test_every_batch_that_vllm_has_a_draft_graph_for_has_one(monkeypatch, max_num_seqs):
    """No size that remains is one that no batch may have."""
    monkeypatch.setattr(cudagraph_utils, "get_pp_group", lambda: SimpleNamespace(is_first_rank=True, is_last_rank=True))
    monkeypatch.setattr(cudagraph_utils, "current_platform", SimpleNamespace(get_global_graph_pool=lambda: None))
    sizes = sorted({1, 2, 4, *range(8, 256, 8), *range(256, 513, 16), *range(5, 513, 40)})
    config = SimpleNamespace(
        scheduler_config=SimpleNamespace(max_num_seqs=max_num_seqs),
        compilation_config=SimpleNamespace(cudagraph_capture_sizes=sizes, max_cudagraph_capture_size=512),
        parallel_config=SimpleNamespace(tensor_parallel_size=1, data_parallel_size=1, use_ubatching=False),
        speculative_config=None,
        cache_config=SimpleNamespace(use_kda_recoverssm=False),
        lora_config=None,
    )

    def largest(manager) -> int:
        made = manager(config, torch.device("cpu"), CUDAGraphMode.FULL_DECODE_ONLY, decode_query_len=1)
        assert made.compilation_config.cudagraph_capture_sizes is sizes
        return max(desc.num_tokens for desc in made._capture_descs[FULL])

    possible = max(size for size in sizes if size <= max_num_seqs)
    assert largest(DraftCudaGraphManager) == largest(SpeculatorCudaGraphManager) == possible


def test_drafts_have_graphs_of_fewer_sizes():
    sizes = [1, 2, 4, *range(8, 256, 8), *range(256, 513, 16)]  # vLLM's own
    kept = draft_capture_sizes(sizes)
    assert set(kept) < set(sizes) and len(kept) <= len(sizes) / 2
    for size in sizes:
        padded = next(larger for larger in kept if larger >= size)
        assert padded <= (size if size <= ALL_SIZES else 1.2 * size)
    assert draft_capture_sizes([1, 100, 500, 4]) == [1, 4, 100, 500]  # a user's own
    assert draft_capture_sizes([]) == []
