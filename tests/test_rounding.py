"""``weight_rounding: auto``: by GPTQ on a GPU, where it can run and does not keep an engine waiting."""

from types import SimpleNamespace

import pytest
import torch
from linear_tools import one_rank
from torch import nn
from vllm.model_executor.layers.attention import Attention
from vllm.model_executor.layers.linear import LinearBase

from vllm_quantspec.integration.draft import rounding


@pytest.fixture(scope="module", autouse=True)
def rank():
    with one_rank():
        yield


def settle(monkeypatch, shapes=((256, 512),), free=1 << 34, cpu=False, **changes) -> tuple[str, list[str]]:
    """What is chosen for a model of these linears, and what the log says of it."""
    attention = object.__new__(Attention)
    nn.Module.__init__(attention)
    attention.layer_name, attention.kv_sharing_target_layer_name = "attn", None
    attention.num_heads = attention.num_kv_heads = 4
    attention.head_size = 64
    config = {
        "load_config": {"load_format": "auto"},
        "lora_config": None,
        "parallel_config": {"data_parallel_size": 1},
        "model_config": {"is_multimodal_model": False, "quantization": None, "dtype": torch.bfloat16},
        "scheduler_config": {"max_num_batched_tokens": 2048},
        "speculative_config": {"draft_weights": "int4", "draft_experts": "int4"},
        "compilation_config": {"static_forward_context": {"attn": attention, "other": nn.Module()}},
    }
    for name, change in changes.items():
        config[name] = config[name] | change if isinstance(change, dict) else change
    config = SimpleNamespace(**{k: SimpleNamespace(**v) if isinstance(v, dict) else v for k, v in config.items()})
    model = nn.ModuleList()
    for _ in shapes:
        linear = object.__new__(LinearBase)
        nn.Module.__init__(linear)
        model.append(linear)
    of = dict(zip(model, shapes, strict=True))
    said = []
    monkeypatch.setattr(rounding, "local_shape", of.__getitem__)
    monkeypatch.setattr(rounding, "current_platform", SimpleNamespace(is_cpu=lambda: cpu))
    monkeypatch.setattr(torch.cuda, "mem_get_info", lambda: (free, 1 << 36))
    monkeypatch.setattr(rounding.logger, "info", lambda text, *values: said.append(text % values))
    return rounding.settle_rounding(config, model), said


def test_gptq_on_a_gpu(monkeypatch):
    assert settle(monkeypatch) == ("gptq", [])


def test_search_on_a_cpu_without_a_word(monkeypatch):
    assert settle(monkeypatch, cpu=True) == ("search", [])


@pytest.mark.parametrize(
    "change, reason",
    [
        ({"load_config": {"load_format": "dummy"}}, "random weights"),
        ({"lora_config": object()}, "LoRA"),
        ({"parallel_config": {"data_parallel_size": 2}}, "data-parallel ranks"),
        ({"model_config": {"is_multimodal_model": True}}, "sees more"),
        ({"model_config": {"quantization": "fp8"}}, "quantized itself"),
        ({"shapes": [(1 << 17, 1 << 18)]}, "34 billion weights per GPU take minutes; weight_rounding 'gptq' asks for it"),
        ({"free": 1 << 20}, "0.0 GiB of the GPU are free"),
    ],
)
def test_search_where_gptq_is_not_for(monkeypatch, change, reason):
    chosen, said = settle(monkeypatch, **change)
    assert chosen == "search" and len(said) == 1 and reason in said[0]
