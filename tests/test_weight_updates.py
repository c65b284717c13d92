"""Weights that are exchanged in a running engine: target and draft become those of an engine that started with them."""

import shutil
from pathlib import Path

import pytest
import torch
from engine_tools import engine, generate, quantspec, speculation_counts
from safetensors.torch import load_file, save_file

from vllm_quantspec.integration.draft import weight_updates
from vllm_quantspec.integration.draft.model import DraftModel


@pytest.fixture
def other_model(books_4m, tmp_path) -> str:
    """books-4m with noise in its linears."""
    for file in Path(books_4m).iterdir():
        shutil.copy(file, tmp_path / file.name)
    generator = torch.Generator().manual_seed(0)
    tensors = load_file(Path(books_4m, "model.safetensors"))
    for name, weight in tensors.items():
        if "proj" in name:
            noise = 1 + 0.5 * torch.randn(weight.shape, generator=generator)
            tensors[name] = (weight * noise).to(weight.dtype)
    (tmp_path / "model.safetensors").unlink()
    save_file(tensors, tmp_path / "model.safetensors", metadata={"format": "pt"})
    return str(tmp_path)


def test_reloaded_weights_reach_the_draft(books_4m, other_model, passage):
    from transformers import AutoTokenizer

    tokens = AutoTokenizer.from_pretrained(books_4m).encode(passage)
    prompts = [tokens[:600], tokens[100:900]]

    def run(llm):
        before = speculation_counts(llm)
        answers = generate(llm, prompts, 60)
        after = speculation_counts(llm)
        accepted = [b - a for a, b in zip(before[1], after[1], strict=True)]
        return [a.tokens for a in answers], after[0] - before[0], accepted

    with engine(books_4m, **quantspec(4)) as llm:
        fresh = run(llm)
    with engine(other_model, **quantspec(4)) as llm:
        other = run(llm)
        llm.collective_rpc("reload_weights", kwargs={"weights_path": books_4m})
        llm.reset_prefix_cache()
        reloaded = run(llm)
    assert other[0] != fresh[0]
    assert reloaded == fresh


class Target(torch.nn.Module):
    def load_weights(self, weights):
        return set(weights)


def test_every_load_is_noticed_and_worked_off_once():
    target, draft, rounds = Target(), DraftModel(), []
    draft.updates = [lambda: rounds.append("a"), lambda: rounds.append("b")]
    weight_updates.watch(target, draft)
    weight_updates.refresh(draft)
    assert rounds == []
    assert target.load_weights(["x"]) == {"x"}
    target.load_weights(["y"])
    weight_updates.refresh(draft)
    weight_updates.refresh(draft)
    assert rounds == ["a", "b"]
    target.load_weights(["z"])
    weight_updates.refresh(draft)
    assert rounds == ["a", "b", "a", "b"]


def test_a_draft_with_the_targets_weights_has_nothing_to_do():
    target, draft = Target(), DraftModel()
    weight_updates.watch(target, draft)
    target.load_weights(["x"])
    assert not draft.stale


def test_without_memory_the_engine_goes_on(monkeypatch):
    def no_memory():
        raise torch.OutOfMemoryError("out of memory")

    warnings = []
    monkeypatch.setattr(weight_updates.logger, "warning", lambda message, *args: warnings.append(message % args))
    weight_updates.refresh(DraftModel(stale=True, updates=[no_memory]))
    assert len(warnings) == 1 and "output stays right" in warnings[0]
