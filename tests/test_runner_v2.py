"""The hooks into model runner V2 that can be checked without a GPU."""

import pickle
from types import SimpleNamespace

import numpy as np
import pytest
import torch
from vllm.v1.attention.backend import CommonAttentionMetadata
from vllm.v1.core.sched.output import SchedulerOutput
from vllm.v1.worker.gpu import model_runner

from vllm_quantspec.format import PageFormat
from vllm_quantspec.integration.cache.backend import QuantSpecMetadataBuilder
from vllm_quantspec.integration.cache.specs import make_specs
from vllm_quantspec.integration.cache.window import WindowMetadataBuilder
from vllm_quantspec.integration.draft.sparse import let_read_all
from vllm_quantspec.integration.gpu import runner as runner_v2
from vllm_quantspec.integration.gpu.speculator import any_request_samples
from vllm_quantspec.integration.startup.replace import replaced
from vllm_quantspec.integration.startup.speculative_config import QuantSpecConfig


@pytest.fixture
def builder():
    pages, _ = make_specs(PageFormat(2, 64), 4)
    speculation = SimpleNamespace(num_speculative_tokens=4, parallel_drafting=False)
    config = SimpleNamespace(
        scheduler_config=SimpleNamespace(max_num_seqs=8),
        parallel_config=SimpleNamespace(decode_context_parallel_size=1),
        speculative_config=speculation,
        num_speculative_tokens=4,
        compilation_config=SimpleNamespace(static_forward_context={}),
    )
    return QuantSpecMetadataBuilder(pages, ["layer"], config, torch.device("cpu"))


def test_draft_counts_go_into_the_tensor_that_graphs_read(builder):
    window = object.__new__(WindowMetadataBuilder)
    groups = [[SimpleNamespace(metadata_builders=[builder])], [SimpleNamespace(metadata_builders=[window])], []]
    runner = SimpleNamespace(attn_groups=groups)
    address = builder.num_unverified.data_ptr()
    runner_v2.set_draft_counts(runner, np.array([4, 0, 2], dtype=np.int32))
    assert builder.num_unverified.tolist() == [4, 0, 2, 0, 0, 0, 0, 0]
    runner_v2.set_draft_counts(runner, np.array([1], dtype=np.int32))
    assert builder.num_unverified.tolist() == [1] + 7 * [0]
    runner_v2.set_draft_counts(runner, None)
    assert builder.num_unverified.tolist() == 8 * [0]
    assert builder.num_unverified.data_ptr() == address


def step(query_lens, seq_lens) -> CommonAttentionMetadata:
    starts = torch.tensor([0, *np.cumsum(query_lens)], dtype=torch.int32)
    return CommonAttentionMetadata(
        query_start_loc=starts,
        query_start_loc_cpu=starts,
        seq_lens=torch.tensor(seq_lens, dtype=torch.int32),
        seq_lens_cpu_upper_bound=torch.tensor(seq_lens, dtype=torch.int32),
        max_seq_len=max(seq_lens),
        num_reqs=len(query_lens),
        num_actual_tokens=sum(query_lens),
        max_query_len=max(query_lens),
        block_table_tensor=torch.zeros(len(query_lens), 8, dtype=torch.int32),
        slot_mapping=torch.zeros(sum(query_lens), dtype=torch.int64),
    )


@pytest.mark.parametrize(
    ("query_lens", "num_decodes", "max_query_len"),
    [([5, 5, 5], 3, 5), ([5, 3, 1], 3, 5), ([5, 1, 40], 2, 5), ([2, 700, 9], 1, 2), ([6, 9], 0, 0)],
)
def test_rows_of_a_step(builder, query_lens, num_decodes, max_query_len):
    """Up to 1 + num_speculative_tokens query tokens are a decode row; their number bounds the captured launch."""
    metadata = builder.build(0, step(query_lens, [1000 + n for n in query_lens]))
    assert (metadata.num_decodes, metadata.max_query_len) == (num_decodes, max_query_len)
    assert metadata.num_decode_tokens == sum(query_lens[:num_decodes])
    assert metadata.num_unverified.data_ptr() == builder.num_unverified.data_ptr()


def test_metadata_carry_the_sparse_drafts_of_their_layers(builder):
    assert builder.build(0, step([5, 40], [1005, 40])).page_scores is None
    layer = SimpleNamespace(impl=SimpleNamespace(page_scores=None))
    builder.vllm_config.compilation_config.static_forward_context["layer"] = layer
    assert builder.build(0, step([5, 40], [1005, 40])).page_scores is None
    layer.impl.page_scores = sparse = SimpleNamespace(plain=False)
    assert builder.build(0, step([5, 40], [1005, 40])).page_scores is sparse
    sparse.plain = True
    assert builder.build(0, step([5, 40], [1005, 40])).page_scores is None


@pytest.mark.parametrize(
    ("computed", "scheduled", "prefill", "samples"),
    [
        ([0], [512], [1000], False),
        ([512], [488], [1000], True),
        ([1000], [5], [1000], True),
        ([0, 512], [512, 400], [1000, 1000], False),
        ([0, 700], [512, 5], [1000, 700], True),
    ],
)
def test_only_prompts_without_their_ends_are_not_drafted_for(computed, scheduled, prefill, samples):
    rows = {
        "num_computed_prefill_tokens_np": np.array(computed),
        "num_scheduled_tokens": np.array(scheduled),
        "prefill_len_np": np.array(prefill),
    }
    assert any_request_samples(SimpleNamespace(**rows)) is samples


def test_sparse_drafts_hear_of_a_step_before_anything_is_built(monkeypatch):
    heard, runner = [], SimpleNamespace(attn_groups=[], speculator=SimpleNamespace(page_scores=None))
    batch = SimpleNamespace(
        num_draft_tokens_per_req=None,
        req_ids=["b", "a"],
        num_reqs=2,
        seq_lens_cpu_upper_bound=torch.tensor([700, 90, 0, 0], dtype=torch.int32),  # padded for a graph
    )
    prepare = runner_v2._with_draft_counts(lambda *args: batch)
    output = SchedulerOutput.make_empty()
    assert prepare(runner, output, "state", "shape", 0) is batch
    runner.speculator.page_scores = SimpleNamespace(begin_step=lambda *args: heard.append(args))
    for told in ((), ("a", "c")):
        let_read_all(output, told)
        prepare(runner, pickle.loads(pickle.dumps(output)), "state", "shape", 0)
    assert [(names, most.tolist(), whole) for names, most, whole in heard] == [
        (["b", "a"], [700, 90], frozenset()),
        (["b", "a"], [700, 90], {"a", "c"}),
    ]


def test_only_quantspec_gets_our_speculator(monkeypatch):
    built = []
    monkeypatch.setattr(runner_v2, "QuantSpecSpeculator", lambda *args: built.append(args) or "ours")
    init_speculator = runner_v2._with_quantspec(lambda *args: "vllm's")
    ours = SimpleNamespace(speculative_config=object.__new__(QuantSpecConfig))
    assert init_speculator(ours, "cuda", "states") == "ours" and built == [(ours, "cuda", "states")]
    assert init_speculator(SimpleNamespace(speculative_config=object()), "cuda", None) == "vllm's"


def test_it_is_installed_once():
    runner_v2.install()
    installed = model_runner.init_speculator
    runner_v2.install()
    assert model_runner.init_speculator is installed
    assert "vllm.v1.worker.gpu.model_runner.init_speculator" in replaced()
