"""What sparse drafts launch on a GPU, from the runner's tensors to lists of pages: all kernels, against the twin."""

from types import SimpleNamespace

import numpy as np
import pytest
import torch
from interpreter import DEVICE, INTERPRETED, RUNS, run_in_the_interpreter, runs

from vllm_quantspec.format import PageFormat
from vllm_quantspec.integration.cache.metadata import LayerSettings, QuantSpecMetadata
from vllm_quantspec.integration.gpu import sparse_drafts
from vllm_quantspec.kernels import cpu_page_selection as twin

pytest.importorskip("triton")

G, LAYERS, WIDTH = 64, 3, 64
FMT = PageFormat(2, 64, G)
SETTINGS = LayerSettings(FMT, 4, 0.125, draft_bits=4, max_unverified=4, fa_version=None)
STARTS, LENGTHS, REJECTED = [0, 5, 6, 11, 11, 11], [G * 14 + 5, G * 3, G * 30, 0, 0], [2, 0, 4, 0, 0]
LIMITS = {"pages": 2, "fraction": 0.0, "min_pages": 1, "min_total_pages": 0}


@pytest.mark.skipif(RUNS, reason="the tests run in this process")
def test_in_the_interpreter():
    run_in_the_interpreter(__file__)


@pytest.fixture
def make(monkeypatch):
    monkeypatch.setattr(sparse_drafts, "pages_of_pool", lambda *args: 300)

    def make_buffers(policy: str, draft_context: str | int = 2 * G, least: int = 0) -> sparse_drafts.SparseDrafts:
        options = {"draft_selection": policy, "draft_context": draft_context, "num_speculative_tokens": 4}
        config = SimpleNamespace(
            speculative_config=SimpleNamespace(**options),
            scheduler_config=SimpleNamespace(max_num_seqs=8),
            model_config=SimpleNamespace(max_model_len=WIDTH * G * (4 if draft_context == "auto" else 1)),
        )
        return sparse_drafts.SparseDrafts(config, SETTINGS, LAYERS, least, torch.device(DEVICE))

    return make_buffers


def ints(values):
    return torch.tensor(values, dtype=torch.int32, device=DEVICE)


def cycle(sparse: sparse_drafts.SparseDrafts, table: torch.Tensor, idx_mapping: list[int]) -> None:
    """A verification of three requests, with random scores, and what the head of the drafts makes of them; the last two rows
    are the padding of a CUDA graph."""
    starts, lengths, rejected = map(ints, (STARTS, LENGTHS, REJECTED))
    metadata = QuantSpecMetadata(11, starts, lengths, torch.zeros_like(lengths), table, 5, 11, 5)
    if sparse.scores is not None:
        sparse.prepare(metadata)
        sparse.scores.copy_(torch.rand(sparse.scores.shape))
    sparse.set_verified_rows(starts, rejected)
    rows = torch.tensor(idx_mapping, device=DEVICE)  # int64, as the runner's
    sparse.choose(5, lengths - rejected + 1, table, rows)


def lists(sparse: sparse_drafts.SparseDrafts) -> torch.Tensor:
    """[L, H, 2, 2]: what the first and the third request read."""
    return torch.stack([sparse.page_list[:, :, b : b + 2] for b in sparse.begin[[0, 2]].tolist()], dim=2).cpu()


@runs
@pytest.mark.parametrize("policy", ["attention", "window", "snapkv"])
def test_pages_are_chosen_by_what_verified_rows_attended_to(make, policy):
    sparse, table = make(policy), torch.randperm(5 * WIDTH).int().view(5, WIDTH).to(DEVICE)
    cycle(sparse, table, [3, 0, 5, -1, -1])
    assert sparse.count.tolist() == [2, 0, 2] + [0] * 5
    assert sparse.dense_from.tolist() == [13, 0, 28] + [0] * 5
    assert not sparse.num_scored.any()  # used up: drafts that follow no scores read everything
    expected = torch.full_like(sparse.page_list, -7).cpu()
    count, dense_from = twin.plan_selection(torch.tensor([13, 0, 28]), **LIMITS)
    scores = None if sparse.scores is None else sparse.scores.cpu()
    begin = sparse.begin[:3].cpu()
    twin.select_pages(scores, begin, torch.tensor([3, 1, 1]), count, dense_from, table.cpu(), expected)
    assert torch.equal(lists(sparse), lists(SimpleNamespace(page_list=expected, begin=begin)))
    first = lists(sparse)
    cycle(sparse, table, [3, 0, 5, -1, -1])
    assert torch.equal(first, lists(sparse)) == (policy != "attention")
    if policy == "snapkv":
        cycle(sparse, table, [4, 0, 5, -1, -1])  # another request has come
        again = lists(sparse)
        assert torch.equal(first[:, :, 1], again[:, :, 1]) and not torch.equal(first[:, :, 0], again[:, :, 0])


@runs
def test_what_is_read_is_counted_from_lengths_and_scores_can_be_dropped(make):
    sparse = make("attention")
    sparse.count_reading(np.array([900, 190, 1900]), np.array([False, False, True]), 4)
    assert (sparse.share.read, sparse.share.old) == (4 * (2 + 1 + 28), 4 * (13 + 1 + 28))
    cycle(sparse, torch.zeros(5, WIDTH, dtype=torch.int32, device=DEVICE), [0, 1, 2, -1, -1])
    sparse.num_scored.fill_(7)
    sparse.forget()
    assert not sparse.num_scored.any()


@runs
@pytest.mark.parametrize("policy", ["attention", "window"])
def test_a_request_that_shall_read_everything_is_not_scored(make, policy):
    sparse, table = make(policy), torch.randperm(5 * WIDTH).int().view(5, WIDTH).to(DEVICE)
    sparse.begin_step(["a", "b", "c"], np.array(LENGTHS[:3]), {"c", "elsewhere"})
    cycle(sparse, table, [3, 0, 5, -1, -1])
    assert sparse.count.tolist() == [2] + [0] * 7 and not sparse.plain
    sparse.count_reading(np.array([900, 190, 1900]), np.array([False] * 3), 1)
    assert (sparse.share.read, sparse.share.old) == (2 + 1 + 28, 13 + 1 + 28)
    sparse.begin_step(["c", "a", "b"], np.array(LENGTHS[:3]), ())
    cycle(sparse, table, [3, 0, 5, -1, -1])
    assert sparse.count.tolist() == [2, 0, 2] + [0] * 5


@runs
@pytest.mark.parametrize("policy", ["attention", "window", "snapkv"])
def test_a_step_is_plain_where_the_device_would_choose_nothing(make, policy):
    """Whatever the lengths, a few tokens less than the host knows: a plain step never hides a choice, and is no rarity."""
    sparse, generator = make(policy, "auto", least=100), np.random.default_rng(3)
    plain, steps = 0, 15 if INTERPRETED else 30
    for _ in range(steps):
        most = generator.integers(1, generator.choice([60, 80, 140]) * G, 3)
        whole = {name for name in "abc" if generator.random() < 0.2}
        sparse.begin_step(list("abc"), most, whole)
        lengths = np.maximum(most - generator.integers(0, 5, 3), 1)
        queries = np.minimum(generator.integers(1, 6, 3), lengths)
        table = torch.zeros(3, 4 * WIDTH, dtype=torch.int32, device=DEVICE)
        starts = ints([0, *queries.cumsum()])
        metadata = QuantSpecMetadata(0, starts, ints(lengths), ints([0] * 3), table, 3, int(queries.sum()), 5)
        if sparse.scores is not None:
            sparse.prepare(metadata)
            sparse.scores.fill_(0.5)
        sparse.set_verified_rows(starts, ints([0] * 3))
        sparse.choose(3, ints(lengths + 1), table, torch.arange(3, device=DEVICE))
        assert not (sparse.plain and sparse.count.any())
        plain += sparse.plain
    assert (0.25 * steps < plain < 0.9 * steps) if policy != "snapkv" else plain == 0


@runs
@pytest.mark.parametrize("policy", ["attention", "window", "snapkv"])
def test_what_a_step_leaves_for_the_next_is_kept_while_an_engine_sleeps(make, policy):
    """vLLM saves the buffers of the draft's modules, whose memory is then given away, and copies into them."""
    sparse, model = make(policy), torch.nn.Linear(2, 2)
    sparse.keep_with(model)
    kept = dict(model.named_buffers())
    assert kept["quantspec_num_scored"] is sparse.num_scored and kept["quantspec_reads_all"] is sparse.reads_all
    assert ("quantspec_snap_pages" in kept) == (policy == "snapkv") and not model.state_dict().keys() & kept.keys()
    large = max(x.numel() for x in kept.values())
    assert large == len(sparse.count)  # a number for each request: nothing that takes long to save


@runs
def test_only_auto_has_plain_steps(make):
    sparse = make("attention")
    sparse.begin_step(["a"], np.array([3]), ())
    assert not sparse.plain and not sparse.has_plain_steps
