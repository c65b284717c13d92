"""The speculator of model runner V2, as far as it can be checked without a GPU: which loops get a CUDA graph, what an idle
rank of data parallelism drafts for, and which rotary positions drafts have."""

from contextlib import nullcontext
from types import SimpleNamespace

import pytest
import torch
from vllm.config.compilation import CUDAGraphMode
from vllm.v1.worker.gpu import cudagraph_utils
from vllm.v1.worker.gpu.cudagraph_utils import BatchExecutionDescriptor
from vllm.v1.worker.gpu.dp_utils import DPSyncState
from vllm.v1.worker.gpu.spec_decode.target_dependent_ar import cudagraph_utils as speculator_graphs
from vllm.v1.worker.gpu.spec_decode.target_dependent_ar import speculator as vllm_speculator

from vllm_quantspec.config import AUTO_NUMBERS, AUTO_SCHEDULE, NGRAM_NUMBERS, NGRAM_SCHEDULE
from vllm_quantspec.integration.draft.joined_layers import Joined
from vllm_quantspec.integration.draft.model import DraftModel
from vllm_quantspec.integration.draft.rotary import RotaryPositions
from vllm_quantspec.integration.gpu import speculator
from vllm_quantspec.integration.gpu.draft_numbers import with_every_number
from vllm_quantspec.integration.gpu.speculator import QuantSpecSpeculator

FULL = CUDAGraphMode.FULL


def speculator_with_graphs(
    drafts: int, schedule, monkeypatch, page_scores=None
) -> tuple[QuantSpecSpeculator, list[tuple[int, int]]]:
    """A speculator that has captured its graphs, and what it captured: [(requests, drafts)]. Nothing is recorded."""
    group = SimpleNamespace(is_first_rank=True, is_last_rank=True)
    monkeypatch.setattr(cudagraph_utils, "get_pp_group", lambda: group)
    monkeypatch.setattr(cudagraph_utils, "current_platform", SimpleNamespace(get_global_graph_pool=lambda: None))
    monkeypatch.setattr(speculator_graphs, "prepare_inputs_to_capture", lambda *args, **kwargs: (None, None))

    def capture(self, create_forward_fn, *args, **kwargs):
        for mode, descriptors in self._capture_descs.items():
            for descriptor in descriptors:
                create_forward_fn(descriptor, False)(mode)
                self.graphs[descriptor] = object()
        self._graphs_captured = True

    monkeypatch.setattr(cudagraph_utils.CudaGraphManager, "capture", capture)
    speculative_config = SimpleNamespace(
        uses_dynamic_speculative_decoding=lambda: schedule is not None,
        num_speculative_tokens_per_batch_size=schedule,
        num_speculative_tokens=drafts,
    )
    sizes = SimpleNamespace(cudagraph_capture_sizes=[1, 2, 4, 8], max_cudagraph_capture_size=8)
    config = SimpleNamespace(
        scheduler_config=SimpleNamespace(max_num_seqs=8),
        compilation_config=sizes,
        parallel_config=SimpleNamespace(tensor_parallel_size=1, data_parallel_size=1, use_ubatching=False),
        speculative_config=speculative_config,
        num_speculative_tokens=drafts,
    )
    captured: list[tuple[int, int]] = []
    ours = object.__new__(QuantSpecSpeculator)
    ours.vllm_config, ours.device, ours.speculative_config = config, torch.device("cpu"), speculative_config
    ours.idx_mapping, ours.page_scores = torch.ones(8), page_scores
    for name in ("model_state", "input_buffers", "block_tables", "attn_groups", "kv_cache_config"):
        setattr(ours, name, None)
    ours._generate_fused_drafts = lambda num_reqs, *args, num_speculative_steps: captured.append(
        (num_reqs, num_speculative_steps)
    )
    ours.init_cudagraph_manager(FULL)
    ours.capture()
    return ours, captured


@pytest.mark.parametrize(
    ("drafts", "schedule", "lengths"),
    [
        (4, None, {4}),
        (1, None, {1}),
        (4, [[1, 2, 4], [3, 4, 1], [5, 8, 0]], {1, 4}),
        (1, [[1, 4, 1], [5, 8, 0]], {1}),
        (3, [[1, 4, 3], [5, 8, 2]], {2, 3}),
        (AUTO_NUMBERS[-1], AUTO_SCHEDULE, set(AUTO_NUMBERS) - {0}),
        (NGRAM_NUMBERS[-1], NGRAM_SCHEDULE, set(AUTO_NUMBERS) - {0}),  # n-grams need none
    ],
)
def test_every_number_of_drafts_has_its_graphs(drafts, schedule, lengths, monkeypatch):
    ours, captured = speculator_with_graphs(drafts, schedule, monkeypatch)
    manager = ours.decode_cudagraph_manager
    assert sorted(captured) == [(n, k) for n in (1, 2, 4, 8) for k in sorted(lengths)]
    for k in lengths:
        for descriptor in (manager.dispatch(n, n, 1, 0) for n in (1, 3, 8)):
            assert manager.specialize_spec_tokens(descriptor, k) in manager.graphs


@pytest.mark.parametrize("schedule", [AUTO_SCHEDULE, NGRAM_SCHEDULE])
@pytest.mark.parametrize("max_num_seqs", [1, 2, 8, 40])
def test_verifications_of_every_number_that_may_be_chosen_have_graphs(max_num_seqs, schedule, monkeypatch):
    """Also where fewer requests run at a time than there are numbers."""
    build = cudagraph_utils.build_dynamic_sd_schedule_lookup
    monkeypatch.setattr(cudagraph_utils, "build_dynamic_sd_schedule_lookup", with_every_number(build))
    numbers = [number for _, _, number in schedule]
    most = numbers[-1]
    sizes = sorted({1, 2, 4, *range(8, 2 * max_num_seqs * (most + 1), 8)})
    config = SimpleNamespace(
        scheduler_config=SimpleNamespace(max_num_seqs=max_num_seqs),
        compilation_config=SimpleNamespace(cudagraph_capture_sizes=sizes, max_cudagraph_capture_size=sizes[-1]),
        parallel_config=SimpleNamespace(tensor_parallel_size=1, data_parallel_size=1, use_ubatching=False),
        speculative_config=SimpleNamespace(
            uses_dynamic_speculative_decoding=lambda: True,
            num_speculative_tokens_per_batch_size=[tuple(entry) for entry in schedule],
        ),
        num_speculative_tokens=most,
        lora_config=None,
        cache_config=SimpleNamespace(use_kda_recoverssm=False),
    )
    monkeypatch.setattr(cudagraph_utils, "get_pp_group", lambda: SimpleNamespace(is_first_rank=True, is_last_rank=True))
    platform = SimpleNamespace(get_global_graph_pool=lambda: None)
    monkeypatch.setattr(cudagraph_utils, "current_platform", platform)
    manager = cudagraph_utils.CudaGraphManager(
        config, torch.device("cpu"), CUDAGraphMode.FULL_DECODE_ONLY, decode_query_len=most + 1
    )
    captured = manager._capture_descs[FULL]
    assert {d.uniform_token_count for d in captured} == {number + 1 for number in numbers}
    manager._graphs_captured = True
    for number in numbers:
        found = manager.dispatch(1, number + 1, number + 1, 0)
        assert found.cg_mode == FULL and found.uniform_token_count == number + 1, number


@pytest.mark.parametrize(("own", "agreed", "dummy_run"), [(6, 2, True), (2, 6, True), (3, 3, True), (2, 6, False)])
def test_an_idle_rank_drafts_for_as_many_as_the_others(own, agreed, dummy_run, monkeypatch):
    """A dummy batch is padded to a captured size; since vLLM 0.33 the ranks agree on the requests that there really are."""
    ours = object.__new__(QuantSpecSpeculator)
    ours.draft, ours.num_speculative_steps, ours.max_model_len = DraftModel(), 4, 1000
    ours.dp_size, ours.dp_rank, ours.max_num_reqs = 2, 0, 8
    ours.decode_cudagraph_manager = None
    ours.draft_tokens = torch.zeros(8, 4, dtype=torch.int64)
    ours.temperature, ours.seeds, ours.idx_mapping = torch.zeros(8), torch.zeros(8), torch.zeros(8, dtype=torch.int32)
    ours.sample_src_positions, ours.current_draft_step = torch.zeros(8, dtype=torch.int64), torch.zeros(())
    ours.input_buffers = SimpleNamespace(positions=torch.zeros(8, dtype=torch.int64))
    rows, drafted = [], []
    monkeypatch.setattr(speculator, "prepare_decode_inputs", lambda tokens, *args: rows.append(len(tokens)))
    monkeypatch.setattr(speculator.weight_updates, "refresh", lambda draft: None)

    def dispatch(manager, num_reqs, num_tokens, dp_sync_state, **kwargs):
        assert dp_sync_state.num_tokens_across_dp.tolist() == [num_tokens] * 2
        return BatchExecutionDescriptor(CUDAGraphMode.NONE, num_tokens, num_reqs), dp_sync_state

    monkeypatch.setattr(speculator, "dispatch_cg_and_sync_dp", dispatch)
    ours._fused_multi_step_decode = lambda num_reqs, _, batch, *args: drafted.append((num_reqs, batch.num_tokens))
    batch = SimpleNamespace(
        num_reqs=own,
        idx_mapping=torch.arange(own, dtype=torch.int32),
        seq_lens=torch.full((8,), 20, dtype=torch.int32),
        seq_lens_cpu_upper_bound=torch.full((own,), 20, dtype=torch.int32),
        num_computed_prefill_tokens_np=torch.full((own,), 20).numpy(),
        num_scheduled_tokens=torch.ones(own).numpy(),
        prefill_len_np=torch.full((own,), 20).numpy(),
    )
    sync = DPSyncState(torch.full((2,), 32, dtype=torch.int32), uniform_token_count=5, eager=False, num_reqs=agreed)
    counts = torch.ones(own, dtype=torch.int32)
    result = ours.propose(
        batch, {}, {}, torch.zeros(1), None, counts, counts, torch.zeros(8, 1, dtype=torch.int64),
        torch.zeros(1, 8, dtype=torch.int64), torch.zeros(8), torch.zeros(8), dp_sync_state=sync, dummy_run=dummy_run,
    )  # fmt: skip
    expected = min(own, agreed)
    assert rows == [expected] and drafted == [(expected, agreed)]
    assert len(result) == expected


def test_drafts_of_a_model_with_mrope(monkeypatch):
    """Three positions per token, all the plain one plus the request's delta; all else goes by plain positions."""
    slots, drafts, padded = 8, 3, 4
    requests, deltas = torch.tensor([5, 2, 7]), torch.randint(-300, 300, (slots,), dtype=torch.int32)
    seq_lens, num_rejected = torch.tensor([1000, 1400, 1700], dtype=torch.int32), torch.tensor([0, 3, 1], dtype=torch.int32)
    ours = object.__new__(QuantSpecSpeculator)
    ours.vllm_config, ours.draft, ours.num_speculative_steps, ours.max_model_len = None, DraftModel(), drafts, 2000
    ours.dp_size, ours.dp_rank, ours.max_num_reqs, ours.decode_cudagraph_manager = 1, 0, slots, None
    ours.draft_tokens = torch.zeros(slots, drafts, dtype=torch.int64)
    ours.temperature, ours.seeds = torch.zeros(slots), torch.zeros(slots)
    ours.idx_mapping = torch.zeros(slots, dtype=torch.int32)
    ours.sample_src_positions, ours.current_draft_step = torch.zeros(slots, dtype=torch.int64), torch.zeros(())
    ours.hidden_states = ours.draft_logits = ours.eplb_state = None
    # What an earlier batch left in rows that only pad this one.
    buffers = {name: torch.full((slots,), 7, dtype=torch.int64) for name in ("positions", "input_ids", "seq_lens")}
    ours.input_buffers = SimpleNamespace(**buffers)
    ours.rotary = RotaryPositions(3, 16, torch.device("cpu"))
    ours.rotary.set_deltas(torch.full((slots,), 99))
    ours.model_state = SimpleNamespace(rope_state=SimpleNamespace(prefill_delta=SimpleNamespace(gpu=deltas)))

    def advance(rows):
        ours.input_buffers.positions[:rows] += 1
        ours.sample_src_positions[:rows] += 1

    seen, plain, addresses = [], [], set()

    def model(input_ids, positions, inputs_embeds):
        assert inputs_embeds is None and len(input_ids) == padded
        seen.append(positions.clone())
        plain.append(ours.input_buffers.positions[:padded].clone())
        addresses.add(positions.data_ptr())
        return torch.zeros(padded, 8)

    ours.model, ours.draft = model, DraftModel(model)
    ours.sample_draft = lambda hidden_states, *args: torch.zeros(len(hidden_states), dtype=torch.int64)
    monkeypatch.setattr(speculator, "prepare_decode_inputs", lambda tokens, *args: advance(len(tokens)))
    monkeypatch.setattr(vllm_speculator, "update_draft_inputs", lambda *args, **kwargs: advance(padded))
    monkeypatch.setattr(speculator, "set_forward_context", lambda *args, **kwargs: nullcontext())
    monkeypatch.setattr(speculator.weight_updates, "refresh", lambda draft: None)
    graph = BatchExecutionDescriptor(CUDAGraphMode.NONE, padded, padded)
    monkeypatch.setattr(speculator, "dispatch_cg_and_sync_dp", lambda *args, **kwargs: (graph, None))
    ours._fused_multi_step_decode = lambda num_reqs, *args: ours._generate_fused_drafts(
        num_reqs, padded, None, None, None, CUDAGraphMode.NONE, drafts
    )

    def propose(dummy_run, **more):
        batch = SimpleNamespace(
            num_reqs=3,
            idx_mapping=requests,
            seq_lens=seq_lens,
            seq_lens_cpu_upper_bound=seq_lens,
            num_computed_prefill_tokens_np=seq_lens.numpy(),
            num_scheduled_tokens=torch.ones(3).numpy(),
            prefill_len_np=seq_lens.numpy(),
        )
        ours.propose(
            batch, {}, {}, torch.zeros(1), None, torch.ones(3), num_rejected, torch.zeros(slots, 1, dtype=torch.int64),
            torch.zeros(1, slots, dtype=torch.int64), torch.zeros(slots), torch.zeros(slots), dummy_run=dummy_run, **more,
        )  # fmt: skip

    propose(dummy_run=False)
    first = seq_lens - num_rejected
    for step, (rotary, positions) in enumerate(zip(seen, plain, strict=True)):
        assert positions[:3].equal((first + step).long())
        assert rotary.equal((positions + torch.cat([deltas[requests], torch.zeros(1)])).long().expand(3, padded))
    assert len(seen) == drafts and len(addresses) == 1  # a graph reads and writes one buffer
    assert ours.sample_src_positions[:3].equal((first + drafts).long())
    seen.clear(), plain.clear()
    del ours.model_state  # vLLM profiles before there is one
    propose(dummy_run=True)
    assert all(rotary.equal(positions.expand(3, padded)) for rotary, positions in zip(seen, plain, strict=True))
    seen.clear()
    rows = []
    joined = lambda input_ids, **given: rows.append(len(input_ids)) or torch.zeros(len(input_ids), 8)  # noqa: E731
    for max_rows in (padded, padded - 1):
        ours.draft.joined = Joined(joined, max_rows)
        propose(dummy_run=True, is_profile=True)
    # Few enough: every step is joined's. Profiling runs each number of rows that it may have, several before one.
    assert rows == [padded] * drafts + [4, 3, 2, 1] + [3, 2, 1] and len(seen) == drafts
