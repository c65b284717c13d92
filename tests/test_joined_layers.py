"""All between two attentions in one launch, and norms and activations with the linears behind them: the views of the draft
that have it, in an engine on the operators' CPU twins."""

from contextlib import contextmanager
from types import SimpleNamespace

import pytest
import torch

vllm = pytest.importorskip("vllm")

from engine_tools import RULE_3, assert_same_or_tied, draft_of, engine, generate, quantspec, speculation_counts  # noqa: E402
from test_draft_model import causal_attention  # noqa: E402
from vllm.forward_context import set_forward_context  # noqa: E402

from vllm_quantspec.integration.draft import fused_layers, joined_layers, linears  # noqa: E402
from vllm_quantspec.integration.draft.fused_layers import fuse_layers  # noqa: E402
from vllm_quantspec.integration.draft.joined_layers import MAX_ROWS, join_layers  # noqa: E402


@contextmanager
def joined_engine(model: str, **options):
    """An engine whose draft has the GPU's linears, joined and fused layers, on the CPU twins of their operators."""
    gpu = SimpleNamespace(
        is_cuda=lambda: True, is_cpu=lambda: False, get_device_capability=lambda: SimpleNamespace(major=9, minor=0)
    )
    with pytest.MonkeyPatch.context() as patch:
        for module in (linears, joined_layers, fused_layers):
            patch.setattr(module, "current_platform", gpu)
        with engine(model, max_model_len=1024, max_num_seqs=8, **quantspec(3, fuse_layers=True), **options) as llm:
            yield llm


@pytest.fixture(scope="module")
def llm(books_4m):
    with joined_engine(books_4m) as llm:
        yield llm


@pytest.fixture
def runner(llm):
    return runner_of(llm)


def runner_of(llm):
    return llm.llm_engine.collective_rpc(lambda worker: worker.model_runner)[0]


def hidden_states(runner, model, token_ids: torch.Tensor, monkeypatch) -> tuple[torch.Tensor, list[str]]:
    """What ``model`` computes of these tokens, and the names of the attention layers it called."""
    calls: list[str] = []
    with monkeypatch.context() as patch:
        for layer in runner.vllm_config.compilation_config.static_forward_context.values():
            if hasattr(layer, "impl"):
                patch.setattr(layer.impl, "forward", causal_attention(layer, calls))
        with torch.inference_mode(), set_forward_context(None, runner.vllm_config, num_tokens=len(token_ids)):
            positions = torch.arange(len(token_ids))
            return model(input_ids=token_ids, positions=positions, inputs_embeds=None).float(), calls


@pytest.mark.parametrize("rows", range(1, MAX_ROWS + 1))
def test_the_view_computes_what_the_draft_does(llm, runner, rows, monkeypatch):
    draft = draft_of(llm)
    assert draft.joined.max_rows == MAX_ROWS
    token_ids = torch.randint(0, 4096, (rows,), generator=torch.Generator().manual_seed(rows), dtype=torch.int32)
    expected, calls = hidden_states(runner, draft.model, token_ids, monkeypatch)
    own, own_calls = hidden_states(runner, draft.joined.model, token_ids, monkeypatch)
    assert own_calls == calls == list(draft.attention_layers)
    assert 0 < (own - expected).norm() < 0.02 * expected.norm()  # it rounds elsewhere


@pytest.mark.parametrize("rows", [MAX_ROWS + 1, 7])
def test_more_sequences_have_fused_linears(llm, runner, rows, monkeypatch):
    draft = draft_of(llm)
    assert draft.forward_of(rows) is draft.fused and draft.forward_of(MAX_ROWS) is draft.joined.model
    token_ids = torch.randint(0, 4096, (rows,), generator=torch.Generator().manual_seed(rows), dtype=torch.int32)
    expected, calls = hidden_states(runner, draft.model, token_ids, monkeypatch)
    own, own_calls = hidden_states(runner, draft.fused, token_ids, monkeypatch)
    assert own_calls == calls == list(draft.attention_layers)
    assert 0 < (own - expected).norm() < 0.02 * expected.norm()


def test_the_views_have_the_drafts_own_weights(llm):
    draft = draft_of(llm)
    own = {id(p) for p in draft.model.parameters()}
    assert own >= {id(p) for p in draft.joined.model.parameters()} | {id(p) for p in draft.fused.parameters()}
    for before, after in zip(draft.model.model.layers, draft.joined.model.model.layers, strict=True):
        assert before.self_attn.attn is after.attention.attn
        assert hasattr(before.self_attn.qkv_proj, linears.WEIGHT)  # the draft's own attention has its linears still


def put(monkeypatch, layer, path: str, value) -> None:
    """In the place of what ``layer`` has at ``path``."""
    module, _, name = path.rpartition(".")
    owner = layer
    for part in module.split("."):
        owner = getattr(owner, part)
    if isinstance(owner, torch.nn.Module) and name in owner._modules:
        monkeypatch.setitem(owner._modules, name, value)
    elif isinstance(owner, torch.nn.Module) and name in owner._parameters:
        monkeypatch.setitem(owner._parameters, name, torch.nn.Parameter(value, requires_grad=False))
    else:
        monkeypatch.setattr(owner, name, value)


def test_few_sequences_take_it(llm, monkeypatch):
    """The same answers, by either; and more sequences than it is made for do not reach it."""
    draft, rows = draft_of(llm), []
    joined = draft.joined
    hook = joined.model.register_forward_pre_hook(lambda *given: rows.append(len(given[2]["input_ids"])), with_kwargs=True)
    prompts = [[7 + i, 300, 20 + i, 1000, 5] for i in range(MAX_ROWS + 1)]
    try:
        answers = [generate(llm, [prompt], 24)[0] for prompt in prompts]
        assert set(rows) == {1}
        rows.clear()
        together = generate(llm, prompts, 24)
        assert max(rows, default=0) <= MAX_ROWS
    finally:
        hook.remove()
    drafted, _ = speculation_counts(llm)
    monkeypatch.setattr(draft, "joined", None)
    of_fused = [generate(llm, [prompt], 24)[0] for prompt in prompts]
    monkeypatch.setattr(draft, "fused", None)
    without = [generate(llm, [prompt], 24)[0] for prompt in prompts]
    assert speculation_counts(llm)[0] > drafted
    assert_same_or_tied(without, of_fused, RULE_3)
    assert_same_or_tied(without, answers, RULE_3)
    assert_same_or_tied(without, together, RULE_3)


@pytest.mark.parametrize(
    "path, value, words",
    [
        ("self_attn.o_proj.quant_method", SimpleNamespace(), "not all linears are in 4 bits"),
        ("self_attn.o_proj.bias", torch.zeros(256), "biases"),
        ("self_attn.qkv_proj.skip_bias_add", True, "biases"),
        ("mlp.act_fn", torch.nn.SiLU(), "MLP"),
        ("input_layernorm.variance_size_override", 64, "norms"),
        ("self_attn.qkv_proj.quant_method.rotated", True, "without rotation"),
        ("mlp.down_proj.quant_method.group_size", 64, "groups of 128, not 4 bits in groups of 64"),
    ],
)
def test_other_layers_are_not_joined(llm, runner, monkeypatch, path, value, words):
    put(monkeypatch, draft_of(llm).model.model.layers[1], path, value)
    reason = join_layers(draft_of(llm).model, runner.vllm_config, lambda module: pytest.fail("nothing is to be cloned"))
    assert isinstance(reason, str) and words in reason


def test_other_engines_have_no_joined_layers(llm, runner, monkeypatch):
    def reason(model=None, config=runner.vllm_config):
        return join_layers(model or draft_of(llm).model, config, lambda module: pytest.fail("nothing is to be cloned"))

    parallel = SimpleNamespace(tensor_parallel_size=2, pipeline_parallel_size=1)
    assert "GPUs" in reason(config=SimpleNamespace(parallel_config=parallel))
    assert "not known here" in reason(torch.nn.Sequential(torch.nn.ModuleList([torch.nn.Linear(2, 2)])))
    cpu = SimpleNamespace(get_device_capability=lambda: None)
    monkeypatch.setattr(joined_layers, "current_platform", cpu)
    assert "needs a GPU" in reason()
    old = SimpleNamespace(get_device_capability=lambda: SimpleNamespace(major=8, minor=9))
    monkeypatch.setattr(joined_layers, "current_platform", old)
    assert "compute capability 9.0" in reason()
    monkeypatch.setattr("vllm.envs.VLLM_BATCH_INVARIANT", True, raising=False)
    assert "VLLM_BATCH_INVARIANT" in reason()


@pytest.mark.parametrize(
    "path, value, words",
    [
        ("mlp.gate_up_proj.quant_method", SimpleNamespace(), "this package's GPU kernel"),
        ("mlp.down_proj.skip_bias_add", True, "biases"),
        ("self_attn.qkv_proj.quant_method.in_features", 192, "not divisible by 128"),
        ("mlp.act_fn", torch.nn.SiLU(), "MLP"),
    ],
)
def test_other_layers_are_not_fused(llm, runner, monkeypatch, path, value, words):
    put(monkeypatch, draft_of(llm).model.model.layers[0], path, value)
    reason = fuse_layers(draft_of(llm).model, runner.vllm_config, lambda module: pytest.fail("nothing is to be cloned"))
    assert isinstance(reason, str) and words in reason


def test_other_engines_have_no_fused_layers(llm, runner, monkeypatch):
    def reason(model=None, config=runner.vllm_config):
        return fuse_layers(model or draft_of(llm).model, config, lambda module: pytest.fail("nothing is to be cloned"))

    assert "GPUs" in reason(config=SimpleNamespace(parallel_config=SimpleNamespace(tensor_parallel_size=2)))
    assert "not known here" in reason(torch.nn.Sequential(torch.nn.ModuleList([torch.nn.Linear(2, 2)])))
    old = SimpleNamespace(get_device_capability=lambda: SimpleNamespace(major=8, minor=9))
    monkeypatch.setattr(fused_layers, "current_platform", old)
    assert "begin under one another" in reason()
