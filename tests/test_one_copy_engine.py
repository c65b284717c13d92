"""Whole engines on a 4-bit checkpoint whose weights exist once.

On a GPU with the option ``one_copy``. A CPU engine has no such kernels: there the operators' references stand in for them,
and vLLM is made to choose Marlin.
"""

import json
from types import SimpleNamespace

import pytest
import torch
from engine_tools import QUANTSPEC_CACHE, assert_same_or_tied, draft_of, engine, generate, quantspec, speculation_counts
from four_bit_tools import Format, name_of
from safetensors.torch import load_file, save_file
from test_models import ENGINE, SIZES
from vllm.model_executor.kernels.linear import MarlinLinearKernel
from vllm.model_executor.layers.quantization import auto_awq, auto_gptq
from vllm.model_executor.layers.quantization.compressed_tensors.schemes import compressed_tensors_wNa16

from vllm_quantspec.config import EngineOptions
from vllm_quantspec.integration.draft import joined_layers
from vllm_quantspec.integration.gpu import marlin_linears
from vllm_quantspec.kernels import draft_layer

CUDA = torch.cuda.is_available()
LAYERS = SIZES["num_hidden_layers"]
TIE = 0.125  # nats, as in test_lossless.py
FORMATS = [Format("gptq", 64), Format("compressed-tensors", 32, True), Format("compressed-tensors", -1)]
# On a CPU vLLM has another name for AWQ.
FORMATS += [Format("awq", 128, True), Format("auto-round", 128)] if CUDA else []


@pytest.fixture
def one_copy(monkeypatch) -> dict:
    """Engine arguments for the option."""
    if CUDA:
        return {"additional_config": {"quantspec": {"one_copy": True}}}
    for module in (auto_awq, auto_gptq, compressed_tensors_wNa16):
        monkeypatch.setattr(module, "choose_mp_linear_kernel", lambda config: MarlinLinearKernel)
    monkeypatch.setattr(marlin_linears, "engine_options", lambda extra: EngineOptions(one_copy=True))
    for name, make in (
        ("process_weights_after_loading", marlin_linears._in_tensor_operations),
        ("apply_weights", marlin_linears._for_few_tokens),
    ):
        monkeypatch.setattr(MarlinLinearKernel, name, make(getattr(MarlinLinearKernel, name)))
    return {}


def save(form: Format, folder, plain_folder) -> None:
    """A small Llama in that format, and the same dequantized."""
    from transformers import AutoConfig, AutoModelForCausalLM

    torch.manual_seed(0)
    config = AutoConfig.for_model("llama", **SIZES, head_dim=64)
    AutoModelForCausalLM.from_config(config, dtype=torch.bfloat16).save_pretrained(plain_folder)
    quantized, plain = {}, {}
    for name, weight in load_file(plain_folder / "model.safetensors").items():
        if not name.endswith("proj.weight"):
            quantized[name] = plain[name] = weight
            continue
        tensors, rounded = form.tensors(*weight.shape, torch.bfloat16)
        plain[name] = rounded.to(torch.bfloat16)
        quantized |= {f"{name.removesuffix('.weight')}.{part}": tensor for part, tensor in tensors.items()}
    save_file(plain, plain_folder / "model.safetensors", metadata={"format": "pt"})
    folder.mkdir()
    save_file(quantized, folder / "model.safetensors", metadata={"format": "pt"})
    settings = json.loads((plain_folder / "config.json").read_text())
    settings["quantization_config"] = form.quantization_config
    (folder / "config.json").write_text(json.dumps(settings))


@pytest.mark.parametrize("form", FORMATS, ids=name_of)
def test_target_and_draft_read_one_copy(form, one_copy, tmp_path):
    save(form, tmp_path / "quantized", tmp_path / "plain")
    prompts = [torch.randint(3, 1000, (length,)).tolist() for length in (5, 40, 300)]
    arguments = {**ENGINE, "dtype": "bfloat16"}
    with engine(str(tmp_path / "plain"), **arguments, **QUANTSPEC_CACHE) as llm:
        plain = generate(llm, prompts, 24)
    with engine(str(tmp_path / "quantized"), **arguments, **QUANTSPEC_CACHE, **one_copy) as llm:
        alone = generate(llm, prompts, 24)
    assert_same_or_tied(plain, alone, 0.3, "its weights are those of the file")
    # All that differs from the target is left out: the output layer, and the KV cache's lower half.
    exact = quantspec(3, quantize_lm_head=False, draft_kv="int8")
    with engine(str(tmp_path / "quantized"), **arguments, **exact, **one_copy) as llm:
        drafted = generate(llm, prompts, 24)
        draft = draft_of(llm)
        drafts, accepted = speculation_counts(llm)
        assert len(draft.one_copy) == 4 * LAYERS and not draft.quantized and draft.int4_bytes == 0
    assert_same_or_tied(alone, drafted, TIE, "with drafts")
    assert drafts > 10 and sum(accepted) > 0.95 * 3 * drafts


JOINED = [Format("gptq", 128), Format("awq" if CUDA else "compressed-tensors", 128, True)]


@pytest.mark.skipif(
    CUDA and torch.cuda.get_device_capability() < draft_layer.MIN_CAPABILITY, reason="needs compute capability 9.0"
)
@pytest.mark.parametrize("form", JOINED, ids=name_of)
def test_few_sequences_have_one_launch_per_layer(form, one_copy, tmp_path, monkeypatch):
    """On the one copy, in Marlin's order: the same answers, and drafts that are believed as often."""
    if not CUDA:
        hopper = SimpleNamespace(get_device_capability=lambda: SimpleNamespace(major=9, minor=0))
        monkeypatch.setattr(joined_layers, "current_platform", hopper)
    save(form, tmp_path / "quantized", tmp_path / "plain")
    prompts = [torch.randint(3, 1000, (length,)).tolist() for length in (40, 300)]
    arguments = {**ENGINE, "dtype": "bfloat16"}
    exact = quantspec(3, quantize_lm_head=False, draft_kv="int8")
    with engine(str(tmp_path / "quantized"), **arguments, **exact, **one_copy) as llm:
        draft = draft_of(llm)
        assert draft.joined.max_rows == 2 and len(draft.one_copy) == 4 * LAYERS
        if not CUDA:  # a graph calls no hook
            rows = []
            draft.joined.model.register_forward_pre_hook(
                lambda *given: rows.append(len(given[2]["input_ids"])), with_kwargs=True
            )
        together = generate(llm, prompts, 24)
        alone = [generate(llm, [prompt], 24)[0] for prompt in prompts]
        drafts, accepted = speculation_counts(llm)
        assert CUDA or set(rows) == {1, 2}
    assert sum(accepted) > 0.95 * 3 * drafts > 0
    assert_same_or_tied(together, alone, TIE, "alone")
    with engine(str(tmp_path / "quantized"), **arguments, **QUANTSPEC_CACHE, **one_copy) as llm:
        assert_same_or_tied(generate(llm, prompts, 24), together, TIE, "without drafts")
