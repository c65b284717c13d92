"""Other architectures than the test models': the draft is built out of whatever layers a model has, and changes nothing.

Small models with random weights, spread wide enough that the likeliest token seldom ties; and the test model with weights
that are quantized already.
"""

import json
from pathlib import Path

import pytest
import torch
from engine_tools import QUANTSPEC_CACHE, assert_same_or_tied, engine, generate, quantspec, speculation_counts
from safetensors.torch import load_file, save_file

TIE = 0.125  # nats, as in test_lossless.py
MAX_TOKENS = 40
LENGTHS = (5, 130, 300, 700)
SIZES = {
    "hidden_size": 256,
    "intermediate_size": 512,
    "num_hidden_layers": 3,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "vocab_size": 1024,
    "max_position_embeddings": 2048,
    "initializer_range": 0.1,
    "pad_token_id": 0,
    "bos_token_id": 1,
    "eos_token_id": 2,
}
ARCHITECTURES = {
    "qwen2": {},  # biases
    "gemma": {"num_key_value_heads": 1, "head_dim": 256},  # one KV head, tied embeddings
    "opt": {"num_key_value_heads": 4, "ffn_dim": 512, "word_embed_proj_dim": 256},  # learned positions, no KV groups
    # Experts; norms of queries and keys.
    "qwen3_moe": {"num_experts": 4, "num_experts_per_tok": 2, "moe_intermediate_size": 128, "head_dim": 64},
}
ENGINE = {"skip_tokenizer_init": True, "max_model_len": 2048, "max_num_seqs": 8, "enable_prefix_caching": False}


def check(model: Path, prompts: list[list[int]], accepted_at_first: float) -> None:
    """Speculation says what the cache alone does, and that share of the first drafts is accepted at least."""
    with engine(str(model), **ENGINE, **QUANTSPEC_CACHE) as llm:
        expected = generate(llm, prompts, MAX_TOKENS)
    assert len({token for answer in expected for token in answer.tokens}) > MAX_TOKENS / 4  # no loop of a few tokens
    with engine(str(model), **ENGINE, **quantspec(3)) as llm:
        actual = generate(llm, prompts, MAX_TOKENS)
        drafts, accepted = speculation_counts(llm)
    assert_same_or_tied(expected, actual, TIE, model.name)
    assert accepted[0] > accepted_at_first * drafts


@pytest.mark.parametrize("architecture", ARCHITECTURES)
def test_architectures(architecture, tmp_path):
    from transformers import AutoConfig, AutoModelForCausalLM

    torch.manual_seed(0)
    config = AutoConfig.for_model(architecture, **(SIZES | ARCHITECTURES[architecture]))
    AutoModelForCausalLM.from_config(config, dtype=torch.bfloat16).save_pretrained(tmp_path)
    prompts = [torch.randint(3, 1000, (length,)).tolist() for length in LENGTHS]
    check(tmp_path, prompts, 0.2)  # random weights lose more by INT4 than trained ones


def quantize_checkpoint(model: str, folder: Path, bits: int) -> None:
    """Write ``model`` with symmetric integer weights in compressed-tensors' format: 8 bits per row, or 4 per 128 inputs."""
    tensors = {}
    for name, weight in load_file(Path(model, "model.safetensors")).items():
        if not name.endswith("proj.weight"):
            tensors[name] = weight
            continue
        rows, channels = weight.shape
        groups = weight.float().view(rows, -1, 128 if bits == 4 else channels)
        scale = groups.abs().amax(-1, keepdim=True) / (2 ** (bits - 1) - 1)
        codes = (groups / scale).round().view(rows, channels)
        if bits == 8:
            tensors |= {name: codes.to(torch.int8), name + "_scale": scale[..., 0]}
            continue
        nibbles = (codes + 8).to(torch.int64).view(rows, -1, 8)
        packed = (nibbles << (4 * torch.arange(8))).sum(-1)
        tensors[name + "_packed"] = torch.where(packed >= 1 << 31, packed - (1 << 32), packed).to(torch.int32)
        tensors[name + "_scale"] = scale[..., 0].to(torch.bfloat16)
        tensors[name + "_shape"] = torch.tensor(weight.shape)
    save_file(tensors, folder / "model.safetensors", metadata={"format": "pt"})
    integers = {"num_bits": bits, "type": "int", "symmetric": True}
    weights = integers | ({"strategy": "group", "group_size": 128} if bits == 4 else {"strategy": "channel"})
    activations = integers | {"strategy": "token", "dynamic": True} if bits == 8 else None
    config = json.loads(Path(model, "config.json").read_text())
    config["quantization_config"] = {
        "quant_method": "compressed-tensors",
        "format": "pack-quantized" if bits == 4 else "int-quantized",
        "ignore": ["lm_head"],
        "config_groups": {"all": {"targets": ["Linear"], "weights": weights, "input_activations": activations}},
    }
    (folder / "config.json").write_text(json.dumps(config))


@pytest.mark.parametrize("bits", [8, 4])
def test_weights_that_are_quantized_already(books_4m, passage, bits, tmp_path):
    import vllm._custom_ops  # noqa: F401  (loads vLLM's library for this CPU)
    from transformers import AutoTokenizer

    if bits == 4 and not hasattr(torch.ops._C, "cpu_gemm_wna16"):
        pytest.skip("vLLM's library for CPUs without AVX-512 cannot run a 4-bit checkpoint, with or without QuantSpec")
    quantize_checkpoint(books_4m, tmp_path, bits)
    tokens = AutoTokenizer.from_pretrained(books_4m).encode(passage)
    check(tmp_path, [tokens[37 * i : 37 * i + length] for i, length in enumerate(LENGTHS)], 0.6)
