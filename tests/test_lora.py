"""LoRA under speculation: the target has the adapters, the draft has none, and the output is the target's."""

import json
from pathlib import Path

import pytest
import torch
from engine_tools import QUANTSPEC_CACHE, Answer, assert_same_or_tied, draft_of, engine, quantspec, speculation_counts
from safetensors.torch import save_file
from vllm import LLM, SamplingParams
from vllm.lora.layers import BaseLayerWithLoRA
from vllm.lora.request import LoRARequest

TIE = 0.125  # see test_lossless.py
RANK = 8
LORA = {"enable_lora": True, "max_loras": 2, "max_lora_rank": RANK, "max_model_len": 2048}


def write_adapter(folder: Path, model: str, seed: int) -> str:
    """An adapter of every linear of a Llama, in the PEFT format, that changes what the model says."""
    config = json.loads((Path(model) / "config.json").read_text())
    hidden, inner, size = config["hidden_size"], config["intermediate_size"], config["head_dim"]
    query, kv = config["num_attention_heads"] * size, config["num_key_value_heads"] * size
    shapes = {"self_attn.q_proj": (hidden, query), "self_attn.k_proj": (hidden, kv), "self_attn.v_proj": (hidden, kv)}
    shapes |= {"self_attn.o_proj": (query, hidden), "mlp.down_proj": (inner, hidden)}
    shapes |= {"mlp.gate_proj": (hidden, inner), "mlp.up_proj": (hidden, inner)}
    generator, tensors = torch.Generator().manual_seed(seed), {}
    for layer in range(config["num_hidden_layers"]):
        for name, (in_features, out_features) in shapes.items():
            path = f"base_model.model.model.layers.{layer}.{name}"
            tensors[f"{path}.lora_A.weight"] = torch.randn(RANK, in_features, generator=generator) / in_features**0.5
            tensors[f"{path}.lora_B.weight"] = torch.randn(out_features, RANK, generator=generator) * 0.02
    folder.mkdir()
    save_file(tensors, folder / "adapter_model.safetensors")
    modules = [name.split(".")[1] for name in shapes]
    settings = {"peft_type": "LORA", "r": RANK, "lora_alpha": 2 * RANK, "target_modules": modules, "bias": "none"}
    (folder / "adapter_config.json").write_text(json.dumps(settings))
    return str(folder)


@pytest.fixture(scope="module")
def adapters(books_4m, tmp_path_factory):
    folder = tmp_path_factory.mktemp("adapters")
    return [LoRARequest(name, i + 1, write_adapter(folder / name, books_4m, seed=i)) for i, name in enumerate("ab")]


@pytest.fixture(scope="module")
def prompts(books_4m, passage):
    from transformers import AutoTokenizer

    tokens = AutoTokenizer.from_pretrained(books_4m).encode(passage)
    return [tokens[37 * i : 37 * i + n] for i, n in enumerate((20, 127, 300, 1000))]


def answers(llm: LLM, prompts: list[list[int]], adapters: list[LoRARequest | None]) -> list[Answer]:
    params = SamplingParams(temperature=0.0, max_tokens=40, ignore_eos=True, logprobs=5)
    outputs = llm.generate([{"prompt_token_ids": p} for p in prompts], params, lora_request=adapters, use_tqdm=False)
    completions = [output.outputs[0] for output in outputs]
    tops = [[{t: lp.logprob for t, lp in step.items()} for step in c.logprobs] for c in completions]
    return [Answer(list(c.token_ids), c.finish_reason, top) for c, top in zip(completions, tops, strict=True)]


@pytest.fixture(scope="module")
def expected(books_4m, prompts, adapters):
    """{batch: answers with speculation off}"""
    a, b = adapters
    batches = {"none": [None] * 4, "one": [a] * 4, "mixed": [a, b, None, a]}
    with engine(books_4m, **LORA, **QUANTSPEC_CACHE) as llm:
        return batches, {name: answers(llm, prompts, batch) for name, batch in batches.items()}


@pytest.fixture(scope="module")
def llm(books_4m, expected):  # one engine at a time in a process
    with engine(books_4m, **LORA, **quantspec(4)) as llm:
        yield llm


@pytest.mark.parametrize("name", ["none", "one", "mixed"])
def test_lossless(name, llm, prompts, expected):
    batches, want = expected
    before = speculation_counts(llm)
    got = answers(llm, prompts, batches[name])
    after = speculation_counts(llm)
    assert assert_same_or_tied(want[name], got, TIE, name) <= 1
    drafts, first = after[0] - before[0], after[1][0] - before[1][0]
    assert first > 0.4 * drafts  # without the adapter that the target has
    if name != "none":
        assert [x.tokens for x in want[name]] != [x.tokens for x in want["none"]]


def test_the_draft_has_no_adapters(llm):
    draft = draft_of(llm)
    assert draft.quantized and not any(isinstance(m, BaseLayerWithLoRA) for m in draft.model.modules())
