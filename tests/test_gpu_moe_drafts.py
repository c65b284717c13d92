"""INT4 experts on a GPU: vLLM's kernels compute what the dequantized weights do, also out of a CUDA graph, and drafts of
mixtures change nothing of the output there."""

import pytest
import torch
from engine_tools import QUANTSPEC_CACHE, assert_same_or_tied, draft_of, engine, generate, quantspec, speculation_counts
from linear_tools import one_rank
from moe_tools import MIXTURES, layer_of, plain_experts, random_experts, random_tokens, save_mixture
from test_models import ENGINE, LENGTHS
from vllm.model_executor.layers.fused_moe.runner.moe_runner import MoERunner

from vllm_quantspec.integration.draft import experts
from vllm_quantspec.integration.draft.experts import (
    ExpertShapes,
    MarlinExpertsMethod,
    Wna16ExpertsMethod,
    marlin_problem,
)
from vllm_quantspec.kernels import int4_experts
from vllm_quantspec.weights import fit_group_size, quantize_weight

pytestmark = pytest.mark.skipif(not torch.cuda.is_available(), reason="needs an NVIDIA GPU")

TIE = 0.125  # nats, as in test_lossless.py
METHODS = [MarlinExpertsMethod, Wna16ExpertsMethod]
# Experts, hidden size, width, experts per token, weight_group_size; the last but one is a shard of Qwen3-30B-A3B's layer.
SHAPES = [
    (8, 256, 128, 2, 128),
    (4, 512, 448, 2, 32),
    (8, 256, 192, 8, 128),
    (60, 2048, 1408, 4, 128),
    (128, 2048, 768, 8, 128),
    (8, 4096, 1792, 2, 64),
    (8, 256, 96, 4, 128),  # groups of 32, of which moe_wna16 takes 1, 2, 4 or 8 as a block
]


@pytest.fixture(scope="module")
def rank():
    with one_rank():
        yield


def on_vllms_kernel(method_class, monkeypatch) -> None:
    """Nothing is computed by this package's kernel; skips the test where vLLM's does not run."""
    if method_class is MarlinExpertsMethod and (reason := marlin_problem()) is not None:
        pytest.skip(reason)
    monkeypatch.setattr(int4_experts, "MAX_TOKENS", 0)


@pytest.mark.parametrize("method_class", METHODS)
@pytest.mark.parametrize("own_kernel", [True, False])
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
@pytest.mark.parametrize("shape", SHAPES)
def test_experts_are_their_dequantized_weights(rank, method_class, own_kernel, dtype, shape, monkeypatch):
    if not own_kernel:
        if method_class is Wna16ExpertsMethod:
            pytest.skip("has none")
        on_vllms_kernel(method_class, monkeypatch)
    number, hidden, width, chosen, group_size = shape
    shapes = ExpertShapes(number, hidden, width, dtype)
    groups = {name: fit_group_size(shapes.of(name)[1], group_size) for name in experts.WEIGHTS}
    if method_class is MarlinExpertsMethod and width % 64:
        pytest.skip("not Marlin's")
    method = method_class(None, shapes, groups)
    weights = random_experts(shapes, method.groups, "cuda")
    layer = layer_of(method, weights, at_once=3)
    bits = 8 * experts.experts_bytes(layer) / sum(w.codes.numel() for name in weights for w in weights[name])
    assert 4 < bits < 4.8
    for tokens in (1, 2, 3, 5, 8, 9, 16, 32, 33, 130):
        x, topk_weights, topk_ids = random_tokens(shapes, tokens, chosen, "cuda")
        expected = plain_experts(x, topk_weights, topk_ids, weights)
        out = method.apply(layer, x, topk_weights, topk_ids)
        assert out.dtype == dtype
        error = ((out.float() - expected).norm() / expected.norm()).item()
        print(f"{method_class.__name__} {shape} {dtype} {tokens} tokens: {error:.2g}")
        assert error < (0.012 if dtype == torch.bfloat16 else 0.01)  # vLLM's kernel rounds weights to its dtype


@pytest.mark.parametrize("own_kernel", [True, False])
@pytest.mark.parametrize("method_class", METHODS)
def test_a_graph_reads_new_inputs_and_new_weights(rank, method_class, own_kernel, monkeypatch):
    if not own_kernel:
        on_vllms_kernel(method_class, monkeypatch)
    shapes, groups = ExpertShapes(8, 256, 128, torch.bfloat16), {"w13": 128, "w2": 64}
    method = method_class(None, shapes, groups)
    weights = random_experts(shapes, method.groups, "cuda")
    layer = layer_of(method, weights, at_once=8)
    arguments = random_tokens(shapes, 4, 2, "cuda")
    for _ in range(2):
        method.apply(layer, *arguments)
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        out = method.apply(layer, *arguments)
    for seed in range(3):
        fresh = random_tokens(shapes, 4, 2, "cuda")
        generator = torch.Generator(device="cuda").manual_seed(seed)
        arguments[0].copy_(torch.randn(fresh[0].shape, generator=generator, device="cuda"))
        arguments[2].copy_(fresh[2].roll(seed, 0))
        for name in experts.WEIGHTS:
            weight = torch.randn(8 * shapes.of(name)[0], shapes.of(name)[1], generator=generator, device="cuda") * 0.1
            rounded = quantize_weight(weight.bfloat16(), method.groups[name])
            method.write(layer, name, 0, rounded)
            rows = shapes.of(name)[0]
            weights[name] = [
                experts.QuantizedWeight(
                    *(field[i * rows : (i + 1) * rows] for field in (rounded.codes, rounded.scales, rounded.zeros)),
                    method.groups[name],
                )
                for i in range(8)
            ]
        graph.replay()
        expected = plain_experts(*arguments, weights)
        assert (out.float() - expected).norm() < 0.01 * expected.norm()


def test_a_kernel_says_what_it_does_not_take(rank):
    groups = {"w13": 64, "w2": 32}
    with pytest.raises(ValueError, match="multiples of 128"):
        MarlinExpertsMethod(None, ExpertShapes(4, 192, 96, torch.bfloat16), groups)
    for method_class in METHODS:
        with pytest.raises(ValueError, match="float32"):
            method_class(None, ExpertShapes(4, 256, 128, torch.float32), groups)


@pytest.mark.parametrize("weight_rounding", ["search", "gptq"])
@pytest.mark.parametrize("name", MIXTURES)
def test_mixtures(name, weight_rounding, tmp_path):
    """Experts of 96 channels are not Marlin's; the shared expert runs beside the others, on a stream of its own."""
    save_mixture(name, tmp_path, torch.bfloat16, every_expert=True)
    prompts = [torch.randint(3, 1000, (length,)).tolist() for length in LENGTHS]
    with engine(str(tmp_path), **ENGINE, **QUANTSPEC_CACHE) as llm:
        expected = generate(llm, prompts, 60)
    options = {"draft_experts": "int4", "weight_rounding": weight_rounding}
    with engine(str(tmp_path), **ENGINE, **quantspec(3, **options)) as llm:
        draft = draft_of(llm)
        assert len(draft.experts) == 3
        runners = [m for m in draft.model.modules() if isinstance(m, MoERunner)]
        kinds = {type(m.routed_experts.quant_method) for m in runners}
        assert kinds == {Wna16ExpertsMethod if name == "qwen3_moe" else MarlinExpertsMethod}
        actual = generate(llm, prompts, 60)
        drafts, accepted = speculation_counts(llm)
        assert_same_or_tied(expected, actual, TIE, name)
        assert accepted[0] > 0.1 * drafts
        alone = [generate(llm, [prompt], 60)[0] for prompt in prompts]
        assert_same_or_tied(expected, alone, TIE, name)


def test_new_weights_reach_the_graphs(tmp_path):
    """The drafts of an engine whose weights were loaded again are accepted as often as before."""
    save_mixture("mixtral", tmp_path, torch.bfloat16, every_expert=True)
    prompts = [torch.randint(3, 1000, (length,)).tolist() for length in LENGTHS]
    with engine(str(tmp_path), **ENGINE, **quantspec(3, draft_experts="int4")) as llm:
        expected, counts = generate(llm, prompts, 60), speculation_counts(llm)
        for layer in draft_of(llm).model.modules():
            if isinstance(layer, MoERunner):
                for parameter in layer.routed_experts.parameters():
                    parameter.data.zero_()
        llm.collective_rpc("reload_weights")
        answers, after = generate(llm, prompts, 60), speculation_counts(llm)
    assert_same_or_tied(expected, answers, TIE)
    assert after[1][0] - counts[1][0] == pytest.approx(counts[1][0], rel=0.1)
