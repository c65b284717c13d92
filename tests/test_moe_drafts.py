"""Drafts of mixtures of experts: INT4 experts compute what their dequantized weights do, and the output stays as it is."""

import copy
from dataclasses import dataclass
from types import SimpleNamespace

import pytest
import torch
from engine_tools import (
    QUANTSPEC_CACHE,
    Answer,
    assert_same_or_tied,
    draft_of,
    engine,
    generate,
    quantspec,
    speculation_counts,
)
from moe_tools import (
    MIXTURES,
    layer_of,
    plain_experts,
    random_experts,
    random_tokens,
    round_as_drafts_are,
    save_mixture,
)
from test_draft_model import run
from test_models import ENGINE, LENGTHS
from vllm.model_executor.layers.fused_moe.activation import MoEActivation
from vllm.model_executor.layers.fused_moe.fused_moe import get_moe_wna16_block_config
from vllm.model_executor.layers.fused_moe.runner.moe_runner import MoERunner
from vllm.model_executor.layers.linear import LinearBase
from vllm.model_executor.layers.quantization.utils import marlin_utils, marlin_utils_test

from vllm_quantspec.config import QuantSpecOptions
from vllm_quantspec.integration.draft import experts
from vllm_quantspec.integration.draft import model as draft_model
from vllm_quantspec.integration.draft.build import build_draft_model
from vllm_quantspec.integration.draft.experts import (
    CpuExpertsMethod,
    ExpertShapes,
    MarlinExpertsMethod,
    Wna16ExpertsMethod,
)
from vllm_quantspec.integration.draft.model import DRAFT_PREFIX
from vllm_quantspec.kernels import int4_experts

TIE = 0.125  # nats, as in test_lossless.py


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16])
@pytest.mark.parametrize(("number", "hidden", "width", "chosen"), [(8, 128, 64, 2), (5, 96, 160, 3), (3, 64, 32, 1)])
@pytest.mark.parametrize("tokens", [1, 5, 40])
def test_the_cpu_operator_is_its_dequantized_weights(number, hidden, width, chosen, tokens, dtype):
    shapes = ExpertShapes(number, hidden, width, dtype)
    groups = {name: experts.fit_group_size(shapes.of(name)[1]) for name in experts.WEIGHTS}
    method, weights = CpuExpertsMethod(None, shapes, groups), random_experts(shapes, groups, "cpu")
    layer = layer_of(method, weights, at_once=2)
    x, topk_weights, topk_ids = random_tokens(shapes, tokens, chosen, "cpu")
    expected = plain_experts(x, topk_weights, topk_ids, weights)
    out = method.apply(layer, x, topk_weights, topk_ids)
    assert out.dtype == dtype
    error = (out.float() - expected).norm() / expected.norm()
    assert error < (1e-5 if dtype == torch.float32 else 4e-3)
    packed = experts.experts_bytes(layer)
    assert packed < 0.26 * sum(4 * w.codes.numel() for name in weights for w in weights[name])


def test_the_cpu_operator_is_one_to_compilers():
    shapes, groups = ExpertShapes(4, 64, 32, torch.float32), {"w13": 64, "w2": 32}
    layer = layer_of(CpuExpertsMethod(None, shapes, groups), random_experts(shapes, groups, "cpu"), 4)
    w13, w2 = (list(CpuExpertsMethod(None, shapes, groups).parts(layer, name)) for name in experts.WEIGHTS)
    arguments = (*random_tokens(shapes, 3, 2, "cpu"), w13, w2, "gelu_tanh")
    torch.library.opcheck(torch.ops.vllm_quantspec.cpu_int4_experts, arguments)


def test_marlins_layout_is_that_of_vllm():
    number, out, channels, group = 3, 192, 256, 64
    generator = torch.Generator().manual_seed(0)

    def levels(*shape: int) -> torch.Tensor:
        return torch.randint(0, 16, shape, dtype=torch.uint8, generator=generator)

    codes, zeros = levels(number, out, channels), levels(number, out, channels // group)
    scales = torch.randn(number, out, channels // group, generator=generator)
    order = marlin_utils_test.get_weight_perm(4)
    packed = int4_experts.pack(codes, scales, zeros)
    for i in range(number):
        one, groups = codes[i].t().int(), channels // group
        assert torch.equal(packed[0][i], marlin_utils_test.marlin_weights(one, channels, out, 4, order))
        assert torch.equal(packed[1][i], marlin_utils.marlin_permute_scales(scales[i].t().clone(), channels, out, group))
        assert torch.equal(packed[2][i], marlin_utils.marlin_zero_points(zeros[i].t().int().clone(), groups, out, 4))


def test_where_marlin_does_not_run_our_kernel_takes_all_tokens(monkeypatch):
    """Their sizes are those of its layout, and the log says what it runs on."""
    shapes, groups = ExpertShapes(3, 128, 64, torch.bfloat16), {"w13": 64, "w2": 32}
    monkeypatch.setattr(experts, "marlin_problem", lambda: "no Marlin kernel here")
    method, weights = MarlinExpertsMethod(None, shapes, groups), random_experts(shapes, groups, "cpu")
    assert method.runs_on == "this package's GPU kernel (no Marlin kernel here)"
    layer = layer_of(method, weights, at_once=2)
    monkeypatch.setattr(int4_experts, "int4_experts", int4_experts.reference)
    for tokens in (2, int4_experts.MAX_TOKENS + 8):
        x, topk_weights, topk_ids = random_tokens(shapes, tokens, 2, "cpu")
        expected = plain_experts(x, topk_weights, topk_ids, weights)
        out = method.apply(layer, x, topk_weights, topk_ids)
        assert out.dtype == torch.bfloat16 and (out.float() - expected).norm() < 4e-3 * expected.norm()
    monkeypatch.setattr(experts, "marlin_problem", lambda: None)
    assert f"beyond {int4_experts.MAX_TOKENS} tokens vLLM's" in MarlinExpertsMethod(None, shapes, groups).runs_on


def test_why_marlin_does_not_run_is_said():
    if not hasattr(torch.ops._moe_C, "moe_wna16_marlin_gemm"):
        assert experts.marlin_problem() == "this vLLM has no Marlin kernel for experts"


def test_wna16_layout_reads_back():
    """As vLLM's Triton kernel indexes it: the code of an even channel, and the zero of an even row, in the low half."""
    shapes, groups = ExpertShapes(2, 64, 96, torch.bfloat16), {"w13": 64, "w2": 32}
    method, weights = Wna16ExpertsMethod(None, shapes, groups), random_experts(shapes, {"w13": 32, "w2": 32}, "cpu")
    assert method.groups == {"w13": 32, "w2": 32}
    layer = layer_of(method, weights, at_once=1)
    for name in experts.WEIGHTS:
        codes, scales, zeros = method.parts(layer, name)
        out, channels = torch.arange(shapes.of(name)[0])[:, None], torch.arange(shapes.of(name)[1])
        for i, weight in enumerate(weights[name]):
            code = (codes[i, out, channels // 2] >> (channels % 2 * 4)) & 15
            zero = (zeros[i, out // 2, channels // 32] >> (out % 2 * 4)) & 15
            assert torch.equal((code.float() - zero.float()) * scales[i, out, channels // 32].float(), weight.dequantize())


def test_blocks_that_moe_wna16_takes():
    """Its kernel takes 1, 2, 4 or 8 groups; where vLLM chooses others, it is told."""
    for group_size in (32, 64, 128):
        refused = 0
        for size in range(group_size, 4097, group_size):
            blocks = experts.wna16_blocks([size, 4096], group_size)
            arguments = True, 64, size, 2 * size, 8, group_size, 2, 16
            chosen = {get_moe_wna16_block_config(blocks or {}, *arguments).get("BLOCK_SIZE_K")}
            if blocks is not None:
                assert chosen == {None}  # it keeps to what it is told
                chosen = {blocks["BLOCK_SIZE_K"]}
                plain = get_moe_wna16_block_config({}, *arguments)["BLOCK_SIZE_K"]
                refused += plain // group_size not in (1, 2, 4, 8)
            assert all(block // group_size in (1, 2, 4, 8) and size % block == 0 for block in chosen), (size, group_size)
        assert (refused > 0) == (group_size == 32)


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float32])
@pytest.mark.parametrize("isa", ["vec", "amx"])
def test_weights_come_back_out_of_the_order_of_a_cpu_kernel(isa, dtype):
    from vllm._custom_ops import cpu_prepack_moe_weight

    weight = torch.randn(3, 96, 2080).to(dtype)
    tiles = cpu_prepack_moe_weight(weight, isa).unflatten(1, (-1, 32)).flatten(2)
    plain = torch.empty_like(tiles)
    plain[..., experts._packed_order(2080, dtype, isa)] = tiles
    assert torch.equal(plain.view(weight.shape), weight)


@dataclass
class Mixture:
    """A model in float32, in which INT4 weights are exact, and what its engines did."""

    model: torch.nn.Module
    expected: list[Answer]  # of the cache alone
    actual: list[Answer]  # with speculation
    drafts: int
    accepted: list[int]
    layers_of_experts: int  # in INT4
    by_targets: list[Answer]  # with speculation and the target's experts
    runner: object  # of the engine of the cache alone, which runs


@pytest.fixture(scope="module", params=MIXTURES)
def mixture(request, tmp_path_factory):
    folder = tmp_path_factory.mktemp(request.param)
    model = save_mixture(request.param, folder, torch.float32)
    prompts = [torch.randint(3, 1000, (length,)).tolist() for length in LENGTHS]
    with engine(str(folder), dtype="float32", **ENGINE, **quantspec(3)) as llm:
        actual, (drafts, accepted) = generate(llm, prompts, 40), speculation_counts(llm)
        layers = len(draft_of(llm).experts)
        assert llm.llm_engine.vllm_config.speculative_config.draft_experts == "int4"  # the default
    with engine(str(folder), dtype="float32", **ENGINE, **quantspec(3, draft_experts="target")) as llm:
        by_targets = generate(llm, prompts, 40)
        assert not draft_of(llm).experts
    with engine(str(folder), dtype="float32", **ENGINE, **QUANTSPEC_CACHE) as llm:
        expected = generate(llm, prompts, 40)
        runner = llm.llm_engine.collective_rpc(lambda worker: worker.model_runner)[0]
        yield Mixture(model, expected, actual, drafts, accepted, layers, by_targets, runner)


@pytest.fixture
def build(mixture):
    """build_draft_model on the engine's model, with INT4 experts; what it registers is taken out again."""
    runner = mixture.runner
    layers = runner.vllm_config.compilation_config.static_forward_context
    before = dict(layers)

    def forget():
        for name in layers.keys() - before.keys():
            del layers[name]

    def build(**options):
        forget()
        return build_draft_model(runner.vllm_config, runner.get_model(), **options)

    yield build
    forget()


@pytest.fixture
def tokens():
    return torch.randint(3, 1000, (60,), generator=torch.Generator().manual_seed(5), dtype=torch.int32)


def test_speculation_changes_nothing(mixture):
    assert mixture.layers_of_experts == 3
    assert_same_or_tied(mixture.expected, mixture.actual, TIE)
    assert mixture.accepted[0] > 0.1 * mixture.drafts  # random weights lose far more by INT4 than trained ones


def test_a_draft_is_the_model_with_dequantized_weights(mixture, build, tokens, monkeypatch):
    model, runner = mixture.model, mixture.runner
    draft = build(quantize_lm_head=False)
    layers = runner.vllm_config.compilation_config.static_forward_context
    assert len(draft.experts) == 3
    for name in draft.experts:
        own, target = draft.model.get_submodule(name), runner.get_model().get_submodule(name)
        assert own.layer_name == DRAFT_PREFIX + target.layer_name and layers[own.layer_name] is own
        assert layers[target.layer_name] is target
        assert target.routed_experts.quant_method is not own.routed_experts.quant_method
        assert not any("int4" in n for n, _ in target.named_parameters())
    assert all(reason == "a router" or "lm_head" in name for name, reason in draft.shared.items())
    own = {n: p for n, p in draft.model.named_parameters() if "int4" in n}
    assert draft.int4_bytes == sum(p.nbytes for p in own.values()) < 0.16 * draft.target_bytes  # of float32
    rounded = type(model)(model.config)
    rounded.load_state_dict(model.state_dict())
    round_as_drafts_are(rounded.eval(), experts=True)
    with torch.no_grad():
        expected = rounded(tokens[None].long()).logits[0]
        exact = model(tokens[None].long()).logits[0]
    logits, _ = run(runner, draft.model, tokens, monkeypatch)
    assert (logits - expected).norm() < 1e-3 * expected.norm()
    assert (logits - exact).norm() > 0.05 * exact.norm()
    assert torch.equal(logits.argmax(-1), expected.argmax(-1))


def why_shared(model: torch.nn.Module, draft: draft_model.DraftModel, part: str) -> set[str | None]:
    """Why those linears of the draft whose names have ``part`` are the target's; None for one that is not."""
    names = [name for name, module in model.named_modules() if isinstance(module, LinearBase) and part in name]
    return {draft.shared.get(name) if name not in draft.quantized else None for name in names}


def test_the_targets_experts_where_asked(mixture, tokens, build, monkeypatch):
    """Nothing of them is copied, registered or warned about; attention has INT4 weights all the same."""
    runner, warnings = mixture.runner, []
    monkeypatch.setattr(draft_model.logger, "warning", lambda *line: warnings.append(line))
    target = runner.get_model()
    layers = runner.vllm_config.compilation_config.static_forward_context
    assert QuantSpecOptions.draft_experts == build_draft_model.__kwdefaults__["draft_experts"] == "int4"
    draft = build(draft_experts="target", quantize_lm_head=False)
    assert not draft.experts and not warnings
    for name in (name for name, module in target.named_modules() if isinstance(module, MoERunner)):
        assert draft.model.get_submodule(name) is target.get_submodule(name)
        assert draft.shared[name] == "draft_experts='target'"
    assert {name for name in layers if name.startswith(DRAFT_PREFIX)} == draft.attention_layers.keys()
    assert why_shared(target, draft, "self_attn") == {None}
    # Shared experts run inside the target's layer: a copy would never be called.
    assert why_shared(target, draft, "shared_expert.") <= {"a mixture of experts calls it, and vLLM calls that by name"}
    rounded = copy.deepcopy(mixture.model)
    round_as_drafts_are(rounded, experts=False)
    with torch.no_grad():
        expected = rounded(tokens[None].long()).logits[0]
    logits, _ = run(runner, draft.model, tokens, monkeypatch)
    assert (logits - expected).norm() < 1e-3 * expected.norm()
    assert_same_or_tied(mixture.expected, mixture.by_targets, TIE)


def test_the_targets_weights_where_asked(mixture, build, tokens, monkeypatch):
    runner = mixture.runner
    draft = build(draft_weights="target", draft_experts="target")
    assert not draft.experts and not draft.updates and draft.int4_bytes == 0
    assert not any(isinstance(m, MoERunner) and m.layer_name.startswith(DRAFT_PREFIX) for m in draft.model.modules())
    exact, _ = run(runner, runner.get_model(), tokens, monkeypatch)
    assert torch.equal(run(runner, draft.model, tokens, monkeypatch)[0], exact)


def test_new_weights_reach_the_experts(mixture, build, tokens, monkeypatch):
    runner = mixture.runner
    loaded = [m.routed_experts for m in runner.get_model().modules() if isinstance(m, MoERunner)]
    draft = build()
    before, _ = run(runner, draft.model, tokens, monkeypatch)
    places = {name: p.data_ptr() for name, p in draft.model.named_parameters() if "int4" in name}
    olds = [(p, p.detach().clone()) for layer in loaded for p in (layer.w13_weight, layer.w2_weight)]
    for parameter, old in olds:
        parameter.data.copy_(old.flip(0) * 0.75)
    try:
        for update in draft.updates:
            update()
        after, _ = run(runner, draft.model, tokens, monkeypatch)
        assert places == {name: p.data_ptr() for name, p in draft.model.named_parameters() if "int4" in name}
        fresh, _ = run(runner, build().model, tokens, monkeypatch)
    finally:
        for parameter, old in olds:
            parameter.data.copy_(old)
    assert torch.equal(after, fresh) and not torch.allclose(after, before, rtol=0.1)


@pytest.mark.parametrize("rounding", ["nearest", "gptq"])
def test_other_roundings(mixture, build, rounding):
    """GPTQ rounds the linears, shared experts among them; experts are rounded by search then."""
    runner = mixture.runner
    draft = build(weight_rounding=rounding)
    layer = draft.experts[0]
    own, target = draft.model.get_submodule(layer).routed_experts, runner.get_model().get_submodule(layer).routed_experts
    for name in experts.WEIGHTS:
        weight = experts.loaded_experts(target, name, slice(1, 2))[0]
        method = {"gptq": "search"}.get(rounding, rounding)
        quantized = experts.quantize_weight(weight, own.quant_method.groups[name], method=method, scale_dtype=torch.float32)
        scales, zeros = own.quant_method.parts(own, name)[1:]
        assert torch.equal(scales[1], quantized.scales) and torch.equal(zeros[1], quantized.zeros)


@pytest.mark.parametrize("asked", [True, False])
def test_experts_that_have_no_int4_kernel_stay_the_targets(mixture, build, tokens, asked, monkeypatch):
    runner = mixture.runner
    lines, quiet = [], []
    monkeypatch.setattr(draft_model.logger, "warning", lambda message, *values: lines.append(message % values))
    monkeypatch.setattr(draft_model.logger, "info", lambda message, *values: quiet.append(message % values))
    layers = [m for m in runner.get_model().modules() if isinstance(m, MoERunner)]
    for layer in layers:
        monkeypatch.setattr(layer.moe_config, "has_bias", True)
    draft = build(experts_asked=asked)
    said = "The draft reads the target's experts: they have biases"
    assert lines == (["quantspec: the draft reads the target's experts as they are: they have biases"] if asked else [])
    assert (said in quiet) == (not asked)
    assert not draft.experts and draft.quantized
    names = [name for name, module in runner.get_model().named_modules() if isinstance(module, MoERunner)]
    for name in names:
        assert draft.shared[name] == "they have biases"
        assert draft.model.get_submodule(name) is runner.get_model().get_submodule(name)
    assert not any("shared_expert." in name for name in draft.quantized)
    run(runner, draft.model, tokens, monkeypatch)


GIB = 1 << 30


@pytest.mark.parametrize(
    ("free", "cache", "has_room"),
    [(0.3, {}, True), (0.2, {}, False), (0.3, {"kv_cache_memory_bytes": GIB // 5}, False), (0.4, {"used": 0.2}, False)],
)
def test_by_default_a_copy_of_experts_leaves_half_of_the_cache(free, cache, has_room, mixture, monkeypatch):
    """On a GPU of 1 GiB, of which 0.9 are vLLM's; the copy takes 0.1. Where a cache has a size, it comes first."""
    config = SimpleNamespace(gpu_memory_utilization=0.9, kv_cache_memory_bytes=None)
    vars(config).update((k, v) for k, v in cache.items() if k != "used")
    monkeypatch.setattr(experts, "current_platform", SimpleNamespace(is_cpu=lambda: False))
    monkeypatch.setattr(torch.cuda, "mem_get_info", lambda: (int((free - cache.get("used", 0)) * GIB), GIB))
    monkeypatch.setattr(torch.cuda, "memory_reserved", lambda: 0)
    monkeypatch.setattr(torch.cuda, "memory_allocated", lambda: 0)
    methods = [SimpleNamespace(copy_bytes=GIB // 20)] * 2
    reason = experts.why_no_room(SimpleNamespace(cache_config=config), methods)
    assert (reason is None) == has_room and (has_room or "would take more than half of the 0.1 GiB" in reason)
    assert experts.why_no_room(SimpleNamespace(cache_config=config), []) is None


def test_a_copy_without_room_is_not_made_by_default(mixture, build, monkeypatch):
    monkeypatch.setattr(draft_model, "why_no_room", lambda config, methods: f"no room for {len(methods)}")
    assert len(build(experts_asked=True).experts) == 3
    draft = build(experts_asked=False)
    assert not draft.experts and "no room for 3" in draft.shared.values()


def test_by_default_experts_are_not_int4_where_that_is_slower(mixture, monkeypatch):
    """On a GPU, for sizes that this package's kernel does not take: those of the smallest of the three."""
    layer = next(m for m in mixture.runner.get_model().modules() if isinstance(m, MoERunner))
    monkeypatch.setattr(experts, "current_platform", SimpleNamespace(is_cpu=lambda: False))
    width = layer.routed_experts.w2_weight.shape[2]
    (asked, _), (default, reason) = (experts.choose_experts_method(layer, torch.bfloat16, 128, a) for a in (True, False))
    assert type(asked) is (Wna16ExpertsMethod if width == 96 else MarlinExpertsMethod)
    assert (default is None) == (width == 96) and ("multiples of 64 channels" in reason) == (width == 96)


def test_the_size_of_a_copy_is_known_before_it_is_made(mixture, build):
    draft = build()
    for name in draft.experts:
        routed = draft.model.get_submodule(name).routed_experts
        made = experts.experts_bytes(routed)
        assert 0.9 * made < routed.quant_method.copy_bytes < 1.02 * made


def a_parallel(name: str, value: object):
    return lambda layer: setattr(layer.moe_config.moe_parallel_config, name, value)


@pytest.mark.parametrize(
    ("change", "reason"),
    [
        (a_parallel("use_ep", True), "expert parallelism"),
        (a_parallel("enable_eplb", True), "expert parallelism"),
        (a_parallel("dp_size", 2), "data, context or sequence parallelism"),
        (lambda layer: setattr(layer.routed_experts, "swiglu_limit", 7.0), "their activation is silu with a limit"),
        (lambda layer: setattr(layer.routed_experts, "activation", MoEActivation.RELU2), "their activation is relu2"),
        (lambda layer: setattr(layer.routed_experts, "apply_router_weight_on_input", True), "scaled by the router"),
        (lambda layer: setattr(layer.routed_experts, "quant_method", torch.nn.Identity()), "not plain 16-bit weights"),
        (lambda layer: setattr(layer, "__class__", type("Latent", (MoERunner,), {})), "a Latent, a layer of its own kind"),
    ],
)
def test_why_experts_stay_as_they_are(mixture, change, reason):
    layer = next(m for m in mixture.runner.get_model().modules() if isinstance(m, MoERunner))
    assert experts.choose_experts_method(layer, torch.float32, 128)[1] == ""
    clone = draft_model._shallow_clone(layer)
    clone.moe_config = copy.deepcopy(layer.moe_config)
    clone._modules["routed_experts"] = draft_model._shallow_clone(layer.routed_experts)
    change(clone)
    method, why = experts.choose_experts_method(clone, torch.float32, 128)
    assert method is None and reason in why
