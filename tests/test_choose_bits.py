"""What ``draft_weights: auto`` decides for models of several sizes, by the cost model: 4 bits, 8, or some linears in 8."""

import math
from types import SimpleNamespace

import pytest
import torch
from test_estimate import LLAMA_8B, LLAMA_70B

from vllm_quantspec import estimate, precision
from vllm_quantspec.integration.draft import choose_bits
from vllm_quantspec.integration.draft.choose_bits import Load, fastest_bits
from vllm_quantspec.precision import WIDE_LOSS, Linear, within

SMOLLM2 = {
    "hidden_size": 576,
    "intermediate_size": 1536,
    "num_hidden_layers": 30,
    "num_attention_heads": 9,
    "num_key_value_heads": 3,
    "vocab_size": 49152,
    "tie_word_embeddings": True,
    "torch_dtype": "bfloat16",
}
LLAMA_1B = LLAMA_8B | {
    "hidden_size": 2048,
    "intermediate_size": 8192,
    "num_hidden_layers": 16,
    "head_dim": 64,
    "tie_word_embeddings": True,
}


def engine(config: dict, max_model_len: int, tp: int = 1, number: int | str = 4, draft_context="auto") -> SimpleNamespace:
    """What is read of a VllmConfig."""
    text = SimpleNamespace(to_dict=lambda: config)
    return SimpleNamespace(
        model_config=SimpleNamespace(hf_text_config=text, architectures=["LlamaForCausalLM"], max_model_len=max_model_len),
        parallel_config=SimpleNamespace(tensor_parallel_size=tp),
        additional_config={},
        speculative_config=SimpleNamespace(
            join_layers=True,
            chooses_number=number == "auto",
            num_speculative_tokens=8 if number == "auto" else number,
            group_size=128,
            quantize_lm_head=True,
            draft_context=draft_context,
            draft_experts="target",
        ),
    )


def linears(config: dict, kl: float, tp: int = 1) -> list[Linear]:
    """All of a model's, which lose ``kl`` nats together: a few much more than others, as was measured."""
    hidden, inner, heads = (config[k] for k in ("hidden_size", "intermediate_size", "num_attention_heads"))
    head = config.get("head_dim") or hidden // heads
    q, kv = head * heads, head * config["num_key_value_heads"]
    sizes = {"qkv": hidden * (q + 2 * kv), "o": q * hidden, "gate_up": 2 * hidden * inner, "down": hidden * inner}
    generator = torch.Generator().manual_seed(0)
    names = [(f"{i}.{kind}", size) for i in range(config["num_hidden_layers"]) for kind, size in sizes.items()]
    losses = [math.exp(1.2 * torch.randn((), generator=generator)) * size**0.5 for _, size in names]
    losses = [loss * kl / sum(losses) for loss in losses]
    scales = 0.5 if hidden % 128 else 0.25
    return [
        Linear(name, size // tp, 4 + scales, 8 + scales, loss, WIDE_LOSS["gptq"] * loss)
        for (name, size), loss in zip(names, losses, strict=True)
    ]


def share(config: dict, kl: float, max_model_len: int, tp: int = 1, **options) -> float:
    """Of the weights, those that get 8 bits."""
    return fastest_bits(engine(config, max_model_len, tp, **options), linears(config, kl, tp), some=False)[0].share


def test_a_small_model_waits_for_launches_and_has_8_bits():
    assert share(SMOLLM2, 0.13, 8192) == 1
    assert share(SMOLLM2, 0.02, 8192) > 0.9
    assert share(SMOLLM2, 0.05, 2048, number="auto") > 0.9


def test_a_large_model_has_8_bits_where_they_win_most():
    """A KL of 0.008 is accepted with 0.955, of 0.05 with 0.89."""
    assert share(LLAMA_8B, 0.008, 131072) == share(LLAMA_8B, 0.015, 131072) == share(LLAMA_70B, 0.005, 32768, tp=2) == 0
    assert share(LLAMA_8B, 0.008, 8192) < 0.05
    assert 0.1 < share(LLAMA_8B, 0.05, 8192) < 0.5
    assert 0.3 < share(LLAMA_1B, 0.05, 16384) < 0.9


def test_one_launch_per_layer_is_worth_more_than_8_bits():
    """It reads 4 bits alone, and saves more than a better draft would; on two GPUs there is none."""
    joined = LLAMA_8B | {"model_type": "llama"}
    assert share(joined, 0.05, 8192) == 0 < share(joined, 0.05, 8192, tp=2)


def test_sparse_drafts_have_fewer_bits():
    """Weights are less of what they lose."""
    assert share(LLAMA_8B, 0.05, 131072) < share(LLAMA_8B, 0.05, 131072, draft_context="all")


@pytest.mark.parametrize(
    ("config", "kl", "max_model_len"),
    [
        (SMOLLM2, 0.13, 8192),
        (SMOLLM2, 0.02, 8192),
        (LLAMA_1B, 0.05, 16384),
        (LLAMA_1B, 0.02, 16384),
        (LLAMA_8B, 0.05, 8192),
        (LLAMA_8B, 0.05, 131072),
        (LLAMA_8B, 0.03, 32768),
        (LLAMA_8B, 0.015, 131072),
        (LLAMA_70B, 0.015, 32768),
    ],
)
def test_the_choice_is_near_the_best_of_other_loads_too(config, kl, max_model_len):
    """Within 2 % of the best of 4 bits, 8 bits and mixtures; for up to 32 requests, of half the context too, within 3 %."""
    candidates, model = linears(config, kl), estimate.model_from(config, "a model")
    chosen = fastest_bits(engine(config, max_model_len), candidates, some=False)[0]
    for length in (max_model_len, max_model_len // 2):
        for batch in (1, 4, 16, 32):
            load = Load(engine(config, length), model, batch)
            best = min(load.ms_per_token(within(candidates, 4.5 + 0.25 * i)) for i in range(18))
            most = 1.02 if (length, batch) == (max_model_len, 1) else 1.03
            assert load.ms_per_token(chosen) < most * best, (length, batch)


@pytest.mark.parametrize("kl", [0.01, 0.03, 0.1, 0.3])
@pytest.mark.parametrize("config", [SMOLLM2, LLAMA_1B, LLAMA_8B])
def test_estimate_and_engine_agree_on_where_8_bits_begin_to_pay(config, kl):
    from vllm_quantspec.estimate.cost_model import needed_acceptance

    load = Load(engine(config, 8192, draft_context="all"), estimate.model_from(config, "a model"))
    narrow, wide = (within(linears(config, kl), bits) for bits in (0, 8.5))
    speeds = [
        estimate.speed(load.model, 4.26e12, 4096, 1, 1, 128, c.acceptance, 4, draft_context="all", wide_share=c.share)
        for c in (narrow, wide)
    ]
    assert [s.quantspec for s in speeds] == [load.ms_per_token(c) for c in (narrow, wide)]
    needed = needed_acceptance(speeds[1].cycle, 4, speeds[0].quantspec)
    assert (needed is not None and wide.acceptance > needed) == (speeds[1].quantspec < speeds[0].quantspec)


def test_8_bits_take_a_part_of_the_room_for_the_cache(monkeypatch):
    candidates = linears(LLAMA_8B, 0.05)
    monkeypatch.setattr(choose_bits, "_most_bytes", lambda config: 0.2e9)
    few = fastest_bits(engine(LLAMA_8B, 8192), candidates, some=False)[0]
    assert 0 < sum(x.weights for x in candidates if x.name in few.wide) / 2 <= 0.2e9
    monkeypatch.setattr(choose_bits, "_most_bytes", lambda config: -1.0)
    assert not fastest_bits(engine(LLAMA_8B, 8192), candidates, some=False)[0].wide


def test_why_is_said():
    choice, why = fastest_bits(engine(SMOLLM2, 8192), linears(SMOLLM2, 0.13), some=False)
    assert "a request of 4096 tokens" in why and "all in 4 bits" in why and choice.share == 1
    unknown = {"hidden_size": 64}
    choice, why = fastest_bits(engine(unknown, 8192), linears(SMOLLM2, 0.13), some=False)
    assert choice.share == 0 and "no estimate of speed" in why
    assert precision.acceptance(0) == 1
