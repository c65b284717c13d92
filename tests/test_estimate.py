"""The estimate of memory and speed: what it counts is what the engine counts, what it predicts is what was measured."""

import json
from pathlib import Path

import pytest
import torch

from vllm_quantspec import cli, estimate
from vllm_quantspec.format import PageFormat
from vllm_quantspec.integration.cache.specs import make_specs

LLAMA_8B = {
    "hidden_size": 4096,
    "intermediate_size": 14336,
    "num_hidden_layers": 32,
    "num_attention_heads": 32,
    "num_key_value_heads": 8,
    "vocab_size": 128256,
    "torch_dtype": "bfloat16",
}
LLAMA_2_7B = LLAMA_8B | {"intermediate_size": 11008, "num_key_value_heads": 32, "vocab_size": 32000}
RESULTS = Path(__file__).parent.parent / "benchmarks" / "results"


def test_sizes_of_a_known_model():
    model = estimate.model_from(LLAMA_8B, "8b")
    norms = 65 * 4096
    assert model.linear_weights + model.head_weights + model.embedding_weights == 8_030_261_248 - norms  # Llama-3.1-8B
    assert (model.head_size, model.dtype) == (128, torch.bfloat16)
    tied = estimate.model_from(LLAMA_8B | {"tie_word_embeddings": True}, "8b")
    assert tied.embedding_weights == 0 and tied.head_weights == model.head_weights


@pytest.mark.parametrize(("group_size", "tp"), [(128, 1), (64, 1), (128, 2), (128, 16)])
def test_memory_is_what_the_cache_specs_say(group_size, tp):
    m = estimate.memory(estimate.model_from(LLAMA_8B, "8b"), 140 * estimate.GIB, 0.9, tp, group_size, 0)
    fmt = PageFormat(max(1, 8 // tp), 128, group_size)
    pages, window = make_specs(fmt, 4)
    assert m.quantspec_bytes_per_token * group_size == 32 * pages.page_size_bytes
    assert m.window_bytes_per_request == 32 * window.max_blocks_per_request * window.page_size_bytes
    assert m.free == pytest.approx(140 * estimate.GIB * 0.9 - m.weights)
    assert m.free_with_draft == m.free - m.int4_weights
    assert m.requests(100_000, quantspec=True) > 1.7 * m.requests(100_000, quantspec=False) > 0


@pytest.mark.parametrize(
    ("name", "config", "points"),
    [
        ("8b", LLAMA_8B, 59),
        ("8b-peers", LLAMA_8B, 10),
        ("8b-self", LLAMA_8B, 5),
        ("8b-tp2", LLAMA_8B, 8),
        ("7b", LLAMA_2_7B, 40),
        ("7b-peers", LLAMA_2_7B, 8),
    ],
)
def test_speed_is_what_was_measured(name, config, points):
    results = json.loads((RESULTS / f"end_to_end-{name}.json").read_text())
    model, tp = estimate.model_from(config, name), results.get("tensor_parallel_size", 1)
    checked = 0
    for row in results["rows"]:
        method = row["config"]
        # A point for which the cache was too small has no time; other engines (fp8, draft-5, ngram-5) are not modelled.
        if "ms_per_step" not in row or not (method in ("bf16", "cache") or method.isdigit()):
            continue
        drafts = int(method) if method.isdigit() else 1
        s = estimate.speed(
            model, 4.26e12, row["context"], row["batch"], tp, 128, results["acceptance"], drafts, **results["options"]
        )
        predicted = {"bf16": s.exact, "cache": s.cache}.get(method, s.cycle)
        assert predicted == pytest.approx(row["ms_per_step"], rel=0.04), row
        checked += 1
    assert checked == points


def run(tmp_path, config, *arguments) -> int:
    (tmp_path / "config.json").write_text(json.dumps(config))
    return cli.main(["estimate", str(tmp_path), *arguments])


def test_report(tmp_path, capsys):
    assert run(tmp_path, LLAMA_8B, "--context", "131072", "--batch", "20", "--acceptance", "0.97") == 0
    text = capsys.readouterr().out
    for expected in ("14.96 GiB", "128.0 KiB per token", "66.0 KiB per token", "fewer than --batch 20", "QuantSpec, "):
        assert expected in text
    assert run(tmp_path, LLAMA_8B, "--gpu-memory", "12") == 0
    assert "does not fit" in capsys.readouterr().out
    assert run(tmp_path, LLAMA_8B, "--context", "500", "--acceptance", "0.2", "--num-speculative-tokens", "4") == 0
    assert "Drafting does not pay here" in capsys.readouterr().out


@pytest.mark.parametrize(
    ("config", "arguments", "what"),
    [
        (LLAMA_8B | {"num_local_experts": 8}, [], "a mixture of experts"),
        ({"hidden_size": 64}, [], "no intermediate_size"),
        (LLAMA_8B, ["--tensor-parallel-size", "3"], "do not divide among 3 GPUs"),
    ],
)
def test_what_cannot_be_estimated_is_one_sentence(config, arguments, what, tmp_path, capsys):
    assert run(tmp_path, config, *arguments) == 2
    error = capsys.readouterr().err
    assert what in error and error.count("\n") == 1


def test_no_configuration(tmp_path, capsys):
    assert cli.main(["estimate", str(tmp_path)]) == 2
    assert "no config.json" in capsys.readouterr().err
