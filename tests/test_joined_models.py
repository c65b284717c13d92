"""Joined layers in models of every kind: what a model gives its layers beside hidden states differs."""

import json
import shutil
from pathlib import Path

import pytest
import torch

pytest.importorskip("vllm")

from engine_tools import assert_same_or_tied, draft_of, generate  # noqa: E402
from test_joined_layers import hidden_states, joined_engine, runner_of  # noqa: E402
from vision_tools import Picture, prompt, without_processor, write_model  # noqa: E402
from vision_tools import generate as generate_seeing  # noqa: E402


@pytest.mark.parametrize("kind", ["Mistral", "Qwen2", "Qwen3"])
def test_random_weights(books_4m, tmp_path, kind, monkeypatch):
    config = json.loads(Path(books_4m, "config.json").read_text())
    config |= {"architectures": [f"{kind}ForCausalLM"], "model_type": kind.lower(), "sliding_window": None}
    shutil.copytree(books_4m, tmp_path, ignore=lambda *_: ["config.json"], dirs_exist_ok=True)
    (tmp_path / "config.json").write_text(json.dumps(config))
    with joined_engine(str(tmp_path), load_format="dummy") as llm:
        draft, token_ids = draft_of(llm), torch.tensor([5, 300], dtype=torch.int32)
        assert type(draft.model).__name__ == f"{kind}ForCausalLM" and draft.joined is not None
        models = draft.model, draft.joined.model
        expected, own = (hidden_states(runner_of(llm), model, token_ids, monkeypatch)[0] for model in models)
        assert (own - expected).norm() < 0.02 * expected.norm()
        assert len(generate(llm, [[5, 300]], 8)[0].tokens) == 8


@pytest.mark.parametrize("architecture", ["qwen2_5_vl", "mistral3"])  # with M-RoPE, and without
def test_models_that_see(architecture, tmp_path, monkeypatch):
    without_processor(architecture, monkeypatch)
    model = write_model(architecture, tmp_path)
    options = {"mm_processor_cache_gb": 0, "skip_mm_profiling": True, "limit_mm_per_prompt": {"image": 1, "video": 0}}
    prompts = [prompt(architecture, [[7, 300, 20], Picture(3, 5, 2), [1000, 5]])]
    with joined_engine(model, max_num_batched_tokens=512, **options) as llm:
        draft, rows = draft_of(llm), []
        hook = draft.joined.model.register_forward_pre_hook(lambda *given: rows.append(1))
        answers = generate_seeing(llm, prompts, 16)
        hook.remove()
        assert rows
        monkeypatch.setattr(draft, "joined", None)
        assert_same_or_tied(generate_seeing(llm, prompts, 16), answers, 0.25, architecture)
