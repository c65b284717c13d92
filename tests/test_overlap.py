"""Inductor's kernels overlap with their neighbours where GPU and PyTorch can, unless the user says otherwise."""

from types import SimpleNamespace

import pytest
import torch._inductor.config as inductor

from vllm_quantspec.integration.startup import overlap


@pytest.mark.parametrize(
    ("capability", "given", "expected"),
    [
        ((9, 0), {}, True),
        ((12, 0), {}, True),
        ((9, 0), {overlap.OPTION: False}, False),
        ((8, 9), {}, None),
        (None, {}, None),
    ],
)
def test_the_option_is_set_where_it_helps(capability, given, expected, monkeypatch):
    platform = SimpleNamespace(
        is_cuda=lambda: capability is not None, has_device_capability=lambda needed: capability >= needed
    )
    monkeypatch.setattr(overlap, "current_platform", platform)
    config = SimpleNamespace(compilation_config=SimpleNamespace(inductor_compile_config=dict(given)))
    overlap.let_compiled_kernels_overlap(config)
    assert config.compilation_config.inductor_compile_config.get(overlap.OPTION) is expected


def test_inductor_has_the_option():
    assert overlap.OPTION in inductor.get_config_copy()


def test_a_pytorch_without_it_is_left_alone(monkeypatch):
    monkeypatch.setattr(
        overlap, "current_platform", SimpleNamespace(is_cuda=lambda: True, has_device_capability=lambda c: True)
    )
    monkeypatch.delattr(inductor.triton, "enable_pdl")
    config = SimpleNamespace(compilation_config=SimpleNamespace(inductor_compile_config={}))
    overlap.let_compiled_kernels_overlap(config)
    assert config.compilation_config.inductor_compile_config == {}
