"""No INT4 copy is made of a linear that a draft step never calls: every one of them runs."""

import pytest
import torch
from engine_tools import draft_of, engine, generate, quantspec
from test_models import ARCHITECTURES, ENGINE, SIZES

SHARED_EXPERTS = {"num_experts": 4, "num_experts_per_tok": 2, "moe_intermediate_size": 128}
MIXTURES = {
    "qwen2_moe": SHARED_EXPERTS | {"shared_expert_intermediate_size": 256, "decoder_sparse_step": 1},
    "qwen3_moe": ARCHITECTURES["qwen3_moe"],
}


@pytest.mark.parametrize("draft_experts", ["target", "int4"])
@pytest.mark.parametrize("architecture", MIXTURES)
def test_every_int4_linear_is_called(architecture, draft_experts, tmp_path):
    from transformers import AutoConfig, AutoModelForCausalLM

    torch.manual_seed(0)
    config = AutoConfig.for_model(architecture, **(SIZES | MIXTURES[architecture]))
    AutoModelForCausalLM.from_config(config, dtype=torch.bfloat16).save_pretrained(tmp_path)
    called = set()
    options = ENGINE | quantspec(2, draft_experts=draft_experts) | {"enforce_eager": True}  # calls are counted
    with engine(str(tmp_path), **options) as llm:
        draft = draft_of(llm)
        for name in draft.quantized:
            method = draft.model.get_submodule(name).quant_method
            apply = method.apply
            method.apply = lambda *args, name=name, apply=apply, **kwargs: called.add(name) or apply(*args, **kwargs)
        generate(llm, [torch.randint(3, 1000, (150,)).tolist()], 8)
    assert set(draft.quantized) == called
    assert any("self_attn" in name for name in called)
    experts = {name: reason for name, reason in draft.shared.items() if "shared_expert." in name and "proj" in name}
    assert len(draft.experts) == (3 if draft_experts == "int4" else 0)
    assert len(experts) == (6 if architecture == "qwen2_moe" and draft_experts == "target" else 0)
    assert all("experts" in reason for reason in experts.values())
