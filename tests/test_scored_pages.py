"""Where the scores of a step's requests go: the kernel against its twin."""

import pytest
import torch
from interpreter import DEVICE, RUNS, run_in_the_interpreter, runs

from vllm_quantspec.format import PageFormat
from vllm_quantspec.kernels import cpu_page_selection as twin
from vllm_quantspec.kernels.scored_pages import scored_pages

pytest.importorskip("triton")


@pytest.mark.skipif(RUNS, reason="the tests run in this process")
def test_in_the_interpreter():
    run_in_the_interpreter(__file__)


@runs
@pytest.mark.parametrize("group", [64, 128])
@pytest.mark.parametrize("requests", [1, 2, 33, 300])
@pytest.mark.parametrize(("min_pages", "some_read_all"), [(0, False), (9, False), (9, True)])
def test_as_the_twin(requests, group, min_pages, some_read_all):
    fmt, generator = PageFormat(1, 64, group), torch.Generator().manual_seed(requests)
    queries = torch.randint(0, 7, (requests,), generator=generator)
    starts = torch.nn.functional.pad(queries.cumsum(0), (1, 0)).int().to(DEVICE)
    seq_lens = (queries + torch.randint(0, 40 * group, (requests,), generator=generator)).int().to(DEVICE)
    reads_all = None
    if some_read_all:  # and further entries, of a step with more requests
        reads_all = (torch.rand(requests + 3, generator=generator) < 0.3).int().to(DEVICE)
    own = None if reads_all is None else reads_all[:requests]
    _, all_pages = twin.scored_pages(fmt, starts, seq_lens, 1 << 30, min_pages, 0, own)
    assert own is None or not (all_pages * own).any()
    assert requests < 3 or (0 < all_pages.count_nonzero() < requests)
    total = int(all_pages.sum())
    for slots, least in ((1 << 30, 0), (int(total * 0.6), total), (0, 0), (1 << 30, total + 1)):
        begin, num_scored = torch.full((2, requests + 2), -5, dtype=torch.int32, device=DEVICE)
        limits = {"num_slots": slots, "min_pages": min_pages, "min_total_pages": least}
        scored_pages(fmt, starts, seq_lens, begin, num_scored, reads_all=reads_all, **limits)
        begins, pages = twin.scored_pages(fmt, starts, seq_lens, slots, min_pages, least, own)
        assert least <= total or not pages.any()
        assert torch.equal(num_scored[:-2], pages) and torch.equal(begin[:-2], begins)
        assert (begin[-2:] == -5).all() and (num_scored[-2:] == -5).all()


def test_refuses():
    fmt, four = PageFormat(1, 64, 64), torch.zeros(4, dtype=torch.int32)
    with pytest.raises(ValueError, match="one start more, got 4 and 4"):
        scored_pages(fmt, four, four, four, four, num_slots=5)
    with pytest.raises(ValueError, match="have 3 and 4 entries, for 4 requests"):
        scored_pages(fmt, torch.zeros(5, dtype=torch.int32), four, four[:3], four, num_slots=5)
    with pytest.raises(ValueError, match="reads_all has 3 entries, for 4 requests"):
        scored_pages(fmt, torch.zeros(5, dtype=torch.int32), four, four, four, num_slots=5, reads_all=four[:3])
