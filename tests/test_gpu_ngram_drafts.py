"""N-gram drafts of model runner V2, as far as they can be checked without a GPU: who drafts by them, and where they go."""

from types import SimpleNamespace

import pytest
import torch
from vllm.config.compilation import CUDAGraphMode
from vllm.v1.worker.gpu.cudagraph_utils import BatchExecutionDescriptor

from vllm_quantspec.draft_length import Drafts, Plan
from vllm_quantspec.integration.draft.model import DraftModel
from vllm_quantspec.integration.draft.ngram_plan import plan_of, set_plan
from vllm_quantspec.integration.gpu import ngram_drafts, speculator
from vllm_quantspec.integration.gpu import runner as runner_v2
from vllm_quantspec.integration.gpu.speculator import QuantSpecSpeculator
from vllm_quantspec.kernels.ngram_drafts import LOW, reference

SLOTS, MOST, VOCABULARY = 8, 12, 50


class Search:
    """vLLM's, of texts that are the slots' numbers; slot 5 repeats nothing, and who has no new token is not searched."""

    def __init__(self):
        self.scratch = torch.zeros(SLOTS, 3, dtype=torch.int64)
        self.searched = []

    def propose(self, batch, num_sampled, last_sampled, **unused):
        assert all(value is None for value in unused.values()) and len(num_sampled) == batch.num_reqs
        slots = batch.idx_mapping.tolist()
        self.searched.append(slots)
        self.scratch.zero_()
        drafts = last_sampled.view(-1)[batch.idx_mapping][:, None].expand(-1, MOST).clone()
        for i, slot in enumerate(slots):
            if slot != 5 and num_sampled[i] > 0:
                self.scratch[i, slot % 3] = 7
                drafts[i] = slot
        return drafts


@pytest.fixture
def ngrams(monkeypatch):
    monkeypatch.setattr(ngram_drafts, "write_ngram_drafts", reference)
    ours = object.__new__(ngram_drafts.NgramDrafts)
    ours.device, ours.search = torch.device("cpu"), Search()
    return ours


def batch_of(slots: list[int]) -> SimpleNamespace:
    rows = len(slots)
    return SimpleNamespace(
        num_reqs=rows,
        req_ids=[f"r{slot}" for slot in slots],
        idx_mapping=torch.tensor(slots, dtype=torch.int32),
        seq_lens=torch.full((SLOTS,), 20, dtype=torch.int32),
        seq_lens_cpu_upper_bound=torch.full((rows,), 20, dtype=torch.int32),
        num_computed_prefill_tokens_np=torch.full((rows,), 20).numpy(),
        num_scheduled_tokens=torch.ones(rows).numpy(),
        prefill_len_np=torch.full((rows,), 20).numpy(),
    )


LAST = torch.arange(40, 40 + SLOTS)[:, None]


def test_some_requests_beside_the_model_s(ngrams):
    """r2 has an n-gram; r5 was to have one and has none; r7 drafts by the model."""
    tokens, logits = torch.full((SLOTS, MOST), 9), torch.randn(SLOTS, MOST, VOCABULARY)
    before = logits.clone()
    plan = Plan(Drafts(4), frozenset({"r2", "r5", "gone"}))
    ngrams.write(plan, batch_of([7, 5, 2]), torch.ones(3, dtype=torch.int32), LAST, tokens, logits)
    assert ngrams.search.searched == [[5, 2]]
    assert tokens[:3].tolist() == [[9] * MOST, [9] * MOST, [2] * 4 + [9] * 8]
    assert logits[[0, 1, 3, 4, 5, 6, 7]].equal(before[[0, 1, 3, 4, 5, 6, 7]]) and logits[2, 4:].equal(before[2, 4:])
    assert logits[2, :4].argmax(-1).tolist() == [2] * 4 and (logits[2, :4] == LOW).sum() == 4 * (VOCABULARY - 1)


def test_all_requests(ngrams):
    """Where nothing is found the last token is the draft, and its distribution is its own as well."""
    tokens, logits = torch.full((SLOTS, MOST), 9), torch.randn(SLOTS, MOST, VOCABULARY)
    plan = Plan(Drafts(8, by_ngrams=True))
    ngrams.write(plan, batch_of([3, 5, 6]), torch.tensor([1, 1, 0], dtype=torch.int32), LAST, tokens, logits)
    assert tokens[:3, :8].tolist() == [[3] * 8, [45] * 8, [46] * 8] and (tokens[:, 8:] == 9).all()
    assert logits[[3, 5, 6], :8].argmax(-1).equal(tokens[:3, :8])


def test_nobody(ngrams):
    ngrams.write(Plan(Drafts(4), frozenset({"gone"})), batch_of([1]), torch.ones(1), LAST, torch.zeros(1, MOST), None)
    assert not ngrams.search.searched


def test_warm_up_runs_both_kinds(ngrams):
    ngrams.search.req_states = SimpleNamespace(last_sampled_tokens=LAST)
    tokens, logits = torch.full((SLOTS, MOST), 9), torch.randn(SLOTS, MOST, VOCABULARY)
    ngrams.warm_up(tokens, logits)
    assert ngrams.search.searched == [[0], [0]]


def drafting(ngrams, monkeypatch) -> tuple[QuantSpecSpeculator, list]:
    """A speculator whose loop drafts 30s, and a list of the numbers that it was asked for."""
    ours = object.__new__(QuantSpecSpeculator)
    ours.draft, ours.num_speculative_steps, ours.max_model_len = DraftModel(), MOST, 1000
    ours.dp_size, ours.dp_rank, ours.max_num_reqs, ours.decode_cudagraph_manager = 1, 0, SLOTS, None
    ours.draft_tokens, ours.draft_logits = torch.zeros(SLOTS, MOST, dtype=torch.int64), None
    ours.temperature, ours.seeds, ours.idx_mapping = torch.zeros(SLOTS), torch.zeros(SLOTS), torch.zeros(SLOTS).int()
    ours.sample_src_positions, ours.current_draft_step = torch.zeros(SLOTS, dtype=torch.int64), torch.zeros(())
    ours.input_buffers = SimpleNamespace(positions=torch.zeros(SLOTS, dtype=torch.int64))
    ours.ngrams = ngrams
    asked = []
    graph = BatchExecutionDescriptor(CUDAGraphMode.NONE, 3, 3)
    monkeypatch.setattr(speculator, "prepare_decode_inputs", lambda *args: None)
    monkeypatch.setattr(speculator.weight_updates, "refresh", lambda draft: None)
    monkeypatch.setattr(speculator, "dispatch_cg_and_sync_dp", lambda *args, **kwargs: (graph, None))

    def loop(num_reqs, *args):
        asked.append(args[-1])
        ours.draft_tokens[:num_reqs, : args[-1]] = 30

    ours._fused_multi_step_decode = loop
    return ours, asked


def propose(ours, number, dummy_run=False):
    batch = batch_of([1, 5, 4])
    counts = torch.ones(3, dtype=torch.int32)
    return ours.propose(
        batch, {}, {}, torch.zeros(1), None, counts, torch.zeros(3, dtype=torch.int32), LAST,
        torch.zeros(1, SLOTS, dtype=torch.int64), torch.zeros(SLOTS), torch.zeros(SLOTS), dummy_run=dummy_run,
        num_speculative_tokens=number,
    )  # fmt: skip


def test_the_plan_says_who_drafts(ngrams, monkeypatch):
    ours, asked = drafting(ngrams, monkeypatch)
    assert (propose(ours, 3)[:, :3] == 30).all() and asked == [3]  # no plan: an engine without n-grams
    ours.plan = Plan(Drafts(3))
    assert (propose(ours, 3)[:, :3] == 30).all() and asked == [3, 3] and not ngrams.search.searched
    ours.plan = Plan(Drafts(3), frozenset({"r4", "r5"}))
    assert propose(ours, 3)[:, :3].tolist() == [[30] * 3, [30] * 3, [4] * 3] and asked == [3] * 3
    ours.plan = Plan(Drafts(MOST, by_ngrams=True))
    assert propose(ours, MOST).tolist() == [[1] * MOST, [45] * MOST, [4] * MOST] and asked == [3] * 3
    assert (propose(ours, 2, dummy_run=True)[:, :2] == 30).all() and asked == [3] * 3 + [2]
    ours.plan = Plan(Drafts(0))
    assert (propose(ours, 0) == -1).all()


def test_sparse_drafts_forget_a_step_that_has_none(ngrams, monkeypatch):
    ours, _ = drafting(ngrams, monkeypatch)
    forgotten = []
    ours.page_scores = SimpleNamespace(forget=lambda: forgotten.append(True))
    ours.plan = Plan(Drafts(4, by_ngrams=True))
    propose(ours, 4)
    assert forgotten == [True]


def test_the_plan_reaches_the_speculator():
    ours = object.__new__(QuantSpecSpeculator)
    runner = SimpleNamespace(attn_groups=[], speculator=ours)
    prepare = runner_v2._with_draft_counts(lambda self, output, *args: SimpleNamespace(num_draft_tokens_per_req=None))
    step, plan = SimpleNamespace(), Plan(Drafts(4), frozenset({"a"}))
    set_plan(step, plan)
    assert plan_of(step) == plan
    prepare(runner, step, None)
    assert ours.plan == plan
    prepare(runner, SimpleNamespace())
    assert ours.plan is None
    prepare(SimpleNamespace(attn_groups=[], speculator=None), step)
