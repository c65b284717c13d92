"""What cannot work says so when the engine's configuration is made, before a weight is read: one sentence each."""

import itertools
import json
from pathlib import Path
from types import SimpleNamespace

import pytest
import torch
import vllm.config.vllm
from transformers import PretrainedConfig
from vision_tools import without_processor
from vllm.engine.arg_utils import EngineArgs

from vllm_quantspec import register, supported
from vllm_quantspec.format import PageFormat
from vllm_quantspec.integration.cache.backend import QuantSpecImpl, refuse_layer, refuse_unlike
from vllm_quantspec.integration.startup import checks, version
from vllm_quantspec.integration.startup.speculative_config import QuantSpecConfig

LLAMA = {
    "architectures": ["LlamaForCausalLM"],
    "model_type": "llama",
    "hidden_size": 256,
    "intermediate_size": 512,
    "num_hidden_layers": 2,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "head_dim": 64,
    "vocab_size": 512,
    "max_position_embeddings": 4096,
    "torch_dtype": "bfloat16",
}
AUTO = {"method": "quantspec", "num_speculative_tokens": "auto"}
OWN_SCHEDULER = {"scheduler_cls": "some.Scheduler", "max_model_len": 8192}
MODELS = {
    "latent attention": {
        **LLAMA,
        "architectures": ["DeepseekV2ForCausalLM"],
        "model_type": "deepseek_v2",
        "kv_lora_rank": 64,
        "q_lora_rank": None,
        "qk_nope_head_dim": 32,
        "qk_rope_head_dim": 32,
        "v_head_dim": 32,
        "n_routed_experts": 4,
        "num_experts_per_tok": 2,
        "moe_intermediate_size": 64,
    },
    "an encoder and a decoder": {
        "architectures": ["WhisperForConditionalGeneration"],
        "is_encoder_decoder": True,
        "model_type": "whisper",
        "d_model": 128,
        "encoder_layers": 2,
        "decoder_layers": 2,
        "encoder_attention_heads": 2,
        "decoder_attention_heads": 2,
        "vocab_size": 512,
        "torch_dtype": "bfloat16",
    },
    "Mamba layers and no attention": {
        "architectures": ["MambaForCausalLM"],
        "model_type": "mamba",
        "hidden_size": 256,
        "num_hidden_layers": 2,
        "state_size": 16,
        "vocab_size": 512,
        "torch_dtype": "bfloat16",
    },
    "ALiBi": {
        "architectures": ["BloomForCausalLM"],
        "model_type": "bloom",
        "hidden_size": 256,
        "n_layer": 2,
        "n_head": 4,
        "vocab_size": 512,
        "torch_dtype": "bfloat16",
    },
    "attention sinks": {
        **LLAMA,
        "architectures": ["GptOssForCausalLM"],
        "model_type": "gpt_oss",
        "num_local_experts": 4,
        "layer_types": ["full_attention", "full_attention"],
        "sliding_window": None,
    },
    "soft-cap": {
        **LLAMA,
        "architectures": ["Gemma2ForCausalLM"],
        "model_type": "gemma2",
        "attn_logit_softcapping": 50.0,
        "layer_types": ["full_attention", "full_attention"],
        "sliding_window": None,
    },
    "sliding-window": {
        **LLAMA,
        "architectures": ["MistralForCausalLM"],
        "model_type": "mistral",
        "sliding_window": 1024,
    },
    "heads of size 80": {**LLAMA, "head_dim": 80},
}


@pytest.fixture(scope="module", autouse=True)
def registered():
    register()


def model_folder(tmp_path: Path, config: dict) -> str:
    """A model that has a configuration and no weights: reading them would fail."""
    (tmp_path / "config.json").write_text(json.dumps(config))
    return str(tmp_path)


def refusal(model: str, **kwargs) -> str:
    kwargs.setdefault("speculative_config", "quantspec")
    kwargs.setdefault("max_model_len", 1024)
    with pytest.raises((ValueError, RuntimeError), match="quantspec: ") as error:
        EngineArgs(model=model, skip_tokenizer_init=True, **kwargs).create_engine_config()
    sentence = str(error.value)
    assert "\n" not in sentence
    return sentence


@pytest.mark.parametrize("what", MODELS)
@pytest.mark.parametrize("how", [{"speculative_config": "quantspec"}, {"attention_backend": "QUANTSPEC"}])
def test_models(what, how, tmp_path):
    how = {"speculative_config": None, **how}
    if what == "an encoder and a decoder":
        how["max_model_len"] = 128
    sentence = refusal(model_folder(tmp_path, MODELS[what]), **how)
    assert what in sentence and "run it without quantspec" in sentence
    assert supported.unsupported(MODELS[what], str(tmp_path)) == sentence  # the estimate, which asks no vLLM, says the same


TEXT = {key: LLAMA[key] for key in LLAMA.keys() - {"architectures", "model_type", "torch_dtype"}}
VISION = {
    "model_type": "siglip_vision_model",
    "hidden_size": 64,
    "intermediate_size": 128,
    "num_hidden_layers": 2,
    "num_attention_heads": 2,
    "patch_size": 14,
    "image_size": 28,
    "projection_dim": 256,
}
PALIGEMMA = {
    "architectures": ["PaliGemmaForConditionalGeneration"],
    "model_type": "paligemma",
    "text_config": {**TEXT, "model_type": "gemma"},
    "vision_config": VISION,
    "image_token_index": 500,
    "projection_dim": 256,
    "torch_dtype": "bfloat16",
}
GEMMA_3 = {
    "architectures": ["Gemma3ForConditionalGeneration"],
    "model_type": "gemma3",
    "text_config": {**TEXT, "model_type": "gemma3_text", "sliding_window": 512},
    "vision_config": VISION,
    "mm_tokens_per_image": 4,
    "torch_dtype": "bfloat16",
}


@pytest.mark.parametrize("how", [{"speculative_config": "quantspec"}, {"attention_backend": "QUANTSPEC"}])
def test_attention_within_images(how, tmp_path):
    how = {"speculative_config": None, **how}
    model = model_folder(tmp_path, PALIGEMMA)
    sentence = refusal(model, **how)
    assert "attends in both directions within an image" in sentence and "give it text alone" in sentence
    assert supported.unsupported(PALIGEMMA, model) == sentence
    text_alone = {"limit_mm_per_prompt": {"image": 0}, "max_model_len": 1024, "skip_tokenizer_init": True}
    EngineArgs(model=model, **text_alone, **how).create_engine_config()


def test_text_alone_of_a_model_with_sliding_windows_is_not_drafted_for(tmp_path, monkeypatch):
    without_processor("gemma3", monkeypatch)
    config = GEMMA_3 | {"text_config": GEMMA_3["text_config"] | {"num_hidden_layers": 6}}
    model = model_folder(tmp_path, config)
    assert refusal(model) == supported.attends_within_images(model) == supported.unsupported(config, model)
    assert refusal(model, limit_mm_per_prompt={"image": 0}) == supported.not_drafted_for(
        supported.SOME_SLIDING, supported.ALONE
    )


@pytest.mark.parametrize("architecture", sorted(supported.STREAMED))
def test_audio_that_arrives_while_the_model_answers(architecture):
    speculation = object.__new__(QuantSpecConfig)
    speculation.draft_kv, speculation.draft_context, speculation.weight_rounding = "int4", "all", "search"
    speculation.draft_experts = "target"
    config = SimpleNamespace(
        speculative_config=speculation,
        parallel_config=SimpleNamespace(pipeline_parallel_size=1),
        lora_config=None,
        model_config=SimpleNamespace(architectures=[architecture], max_model_len=1024, hf_text_config=PretrainedConfig()),
    )
    with pytest.raises(ValueError, match="quantspec: speculation does not support audio that arrives") as error:
        checks.check_speculation(config)
    assert supported.undrafted({"architectures": [architecture]}) == str(error.value)
    config.model_config.architectures = ["Qwen2_5_VLForConditionalGeneration"]
    checks.check_speculation(config)


@pytest.mark.parametrize(
    ("kwargs", "what", "remedy"),
    [
        ({"block_size": 32}, "--block-size must equal group_size 128", "drop --block-size"),
        ({"block_size": 64}, "--block-size must equal group_size 128", "drop --block-size"),
        (
            {"speculative_config": None, "attention_backend": "QUANTSPEC", "block_size": 16},
            "pages of 64 or 128 tokens, not 16",
            "set --block-size to 64 or 128",
        ),
        ({"decode_context_parallel_size": 2, "tensor_parallel_size": 2}, "decode-context parallelism", "drop --decode"),
        ({"kv_cache_dtype": "fp8"}, "--kv-cache-dtype fp8", "drop --kv-cache-dtype, or set it to quantspec_int8"),
        ({"attention_backend": "CPU_ATTN"}, "CPU_ATTN was selected", "drop --attention-backend"),
        (
            {"attention_backend": "CPU_ATTN", "kv_cache_dtype": "quantspec_int4", "speculative_config": None},
            "--kv-cache-dtype quantspec_int4 reads the hierarchical KV cache",
            "drop --attention-backend",
        ),
        ({"kv_cache_dtype": "quantspec_int3"}, "no --kv-cache-dtype quantspec_int3", "did you mean quantspec_int"),
        ({"kv_cache_dtype": "quantspec_int4", "block_size": 32}, "must equal group_size 128", "drop --block-size"),
        (
            {"kv_cache_dtype": "quantspec_int4", "speculative_config": {"method": "quantspec", "draft_kv": "int8"}},
            "draft_kv 'int8' reads both halves of a page",
            "drop one of them",
        ),
        ({"pipeline_parallel_size": 2}, "pipeline parallelism", "drop --pipeline-parallel-size"),
        (
            {"enable_lora": True, "speculative_config": {"method": "quantspec", "weight_rounding": "gptq"}},
            "LoRA with weight_rounding 'gptq'",
            "set weight_rounding to 'search'",
        ),
        (
            {"enable_lora": True, "speculative_config": {"method": "quantspec", "draft_weights": "mixed"}},
            "LoRA with draft_weights 'mixed'",
            "set draft_weights to 'int4' or 'int8'",
        ),
        (
            {"scheduler_cls": "some.Scheduler", "speculative_config": AUTO},
            "'auto' is chosen by a scheduler of its own",
            "drop one of them",
        ),
        (
            OWN_SCHEDULER | {"speculative_config": {"method": "quantspec", "draft_context": "auto"}},
            "draft_context 'auto' is chosen by a scheduler of its own",
            "drop one of them",
        ),
        (
            OWN_SCHEDULER | {"speculative_config": {"method": "quantspec", "draft_selection": "window"}},
            "draft_context 'auto' is chosen by a scheduler of its own",
            "drop one of them",
        ),
        ({"dtype": "float16", "kv_cache_dtype": "bfloat16"}, "model's own dtype, float16", "drop --kv-cache-dtype"),
        ({"disable_hybrid_kv_cache_manager": True}, "two KV cache groups", "drop --disable-hybrid"),
    ],
)
def test_flags(kwargs, what, remedy, books_4m):
    sentence = refusal(books_4m, **kwargs)
    assert what in sentence and remedy in sentence


def test_data_parallel_ranks_that_share_experts_draft_one_number(books_4m, tmp_path):
    parallel = {"data_parallel_size": 2, "speculative_config": AUTO}
    mixture = {**LLAMA, "architectures": ["MixtralForCausalLM"], "model_type": "mixtral"}
    mixture |= {"num_local_experts": 4, "num_experts_per_tok": 2}
    sentence = refusal(model_folder(tmp_path, mixture), **parallel)
    assert "wait for each other" in sentence and "set num_speculative_tokens to a number" in sentence
    config = EngineArgs(model=books_4m, max_model_len=1024, **parallel).create_engine_config()
    assert config.speculative_config.chooses_number  # engines of a dense model know nothing of each other


@pytest.fixture
def lines(monkeypatch):
    said: list[str] = []
    monkeypatch.setattr(checks.logger, "info", lambda text, *values: said.append(text % values))
    return said


@pytest.mark.parametrize("options", [{}, {"draft_kv": "int8"}, {"weight_rounding": "gptq"}])
def test_a_scheduler_of_the_users_own_is_not_refused_for_a_default(options, lines, books_4m):
    speculation = {"method": "quantspec", **options}
    arguments = OWN_SCHEDULER | {"skip_tokenizer_init": True, "speculative_config": speculation}
    config = EngineArgs(model=books_4m, **arguments).create_engine_config()
    assert config.scheduler_config.scheduler_cls == "some.Scheduler"
    assert config.speculative_config.draft_context == "all" and "draft_context='all'" in repr(config.speculative_config)
    assert lines == [
        "Drafts read the whole cache: draft_context 'auto', the default, is chosen by a scheduler of its own, so it cannot "
        "be combined with --scheduler-cls some.Scheduler"
    ]
    del lines[:]
    for given in ({"draft_context": "all"}, {"draft_context": 1024}):
        arguments["speculative_config"] = speculation | given
        config = EngineArgs(model=books_4m, **arguments).create_engine_config()
        assert config.speculative_config.draft_context == given["draft_context"] and not lines


def test_more_pages_than_are_chosen_among_on_a_gpu(lines, books_4m, monkeypatch):
    """By default drafts read everything there; a CPU has no such limit."""
    config, asked = (
        EngineArgs(model=books_4m, max_model_len=8192, speculative_config=given).create_engine_config()
        for given in ("quantspec", {"method": "quantspec", "draft_context": 0.125})
    )
    for one in (config, asked):
        monkeypatch.setattr(one.model_config, "max_model_len", 128 * checks.MAX_PAGES)
        monkeypatch.setattr(one.scheduler_config, "scheduler_cls", None)
    checks.settle_draft_context(config)
    monkeypatch.setattr(checks, "current_platform", SimpleNamespace(is_cpu=lambda: False))
    checks.settle_draft_context(config)
    assert config.speculative_config.draft_context == "auto"
    for one in (config, asked):
        monkeypatch.setattr(one.model_config, "max_model_len", 128 * checks.MAX_PAGES + 1)
    checks.settle_draft_context(config)
    assert config.speculative_config.draft_context == "all"
    assert len(lines) == 1 and "among at most 16384 pages of 128 tokens, but --max-model-len is 2097153" in lines[0]
    with pytest.raises(ValueError, match="quantspec: draft_context 0.125 chooses among .*; set draft_context to 'all'"):
        checks.settle_draft_context(asked)


MIXTURE = LLAMA | {"architectures": ["MixtralForCausalLM"], "model_type": "mixtral", "num_local_experts": 4}


@pytest.mark.parametrize(
    ("arguments", "reason"),
    [
        ({"enable_lora": True}, "they may run with LoRA adapters"),
        ({"enable_expert_parallel": True, "tensor_parallel_size": 2}, "they are spread over ranks by expert parallelism"),
        ({"data_parallel_size": 2}, "data parallelism gathers their inputs from other ranks"),
        ({}, None),
    ],
)
def test_experts_that_cannot_be_int4_by_the_flags(arguments, reason, lines, tmp_path, books_4m):
    """By default the draft reads the target's; who asks for INT4 ones hears of it when the layers are loaded."""
    size = {"max_model_len": 1024, "skip_tokenizer_init": True}
    dense = [] if "enable_expert_parallel" in arguments else [books_4m]  # vLLM refuses it there
    for model, options in itertools.product([model_folder(tmp_path, MIXTURE), *dense], ({}, {"draft_experts": "int4"})):
        del lines[:]
        speculation = {"method": "quantspec", **options}
        config = EngineArgs(model=model, speculative_config=speculation, **size, **arguments).create_engine_config()
        gives_way = reason is not None and not options and model != books_4m
        assert config.speculative_config.draft_experts == ("target" if gives_way else "int4")
        assert lines == ([f"The draft reads the target's experts: {reason}"] if gives_way else [])


def test_experts_of_a_quantized_checkpoint(lines, tmp_path):
    model = model_folder(
        tmp_path, MIXTURE | {"quantization_config": {**CHECKPOINTS["compressed-tensors"], "kv_cache_scheme": None}}
    )
    size = {"max_model_len": 1024, "skip_tokenizer_init": True}
    config = EngineArgs(model=model, speculative_config="quantspec", **size).create_engine_config()
    assert config.speculative_config.draft_experts == "target"
    assert lines == ["The draft reads the target's experts: they are quantized already"]


FP8_CACHE = {"num_bits": 8, "type": "float", "strategy": "tensor", "dynamic": False, "symmetric": True}
CHECKPOINTS = {
    "compressed-tensors": {
        "quant_method": "compressed-tensors",
        "format": "float-quantized",
        "ignore": [],
        "config_groups": {},
        "kv_cache_scheme": FP8_CACHE,
    },
    "modelopt": {"quant_method": "modelopt", "quant_algo": "FP8", "kv_cache_scheme": FP8_CACHE, "ignore": []},
}


@pytest.mark.parametrize("method", CHECKPOINTS)
def test_checkpoints_with_an_fp8_cache(method, tmp_path, monkeypatch):
    from vllm.platforms import current_platform

    monkeypatch.setattr(type(current_platform), "supported_quantization", [])  # the CPU engine has no ModelOpt
    model = model_folder(tmp_path, {**LLAMA, "quantization_config": CHECKPOINTS[method]})
    for how in ({"speculative_config": "quantspec"}, {"speculative_config": None, "attention_backend": "QUANTSPEC"}):
        sentence = refusal(model, **how)
        assert "asks for a KV cache in fp8" in sentence and "set --kv-cache-dtype bfloat16" in sentence
    config = EngineArgs(
        model=model, skip_tokenizer_init=True, max_model_len=1024, speculative_config="quantspec", kv_cache_dtype="bfloat16"
    ).create_engine_config()
    assert config.cache_config.cache_dtype == "bfloat16"


def test_a_float32_model_with_a_cache_in_bfloat16(books_4m):
    options = {"method": "quantspec", "draft_weights": "target"}
    sentence = refusal(books_4m, dtype="float32", kv_cache_dtype="bfloat16", speculative_config=options)
    assert "the model's own dtype, float32" in sentence and "set --dtype bfloat16" in sentence


def test_local_argmax(books_4m):
    """It never worked: no model that can be a target has it, and vLLM blamed the way of sampling, which nobody had set."""
    for others in ({}, {"draft_sample_method": "greedy"}):
        options = {"method": "quantspec", "use_local_argmax_reduction": True, **others}
        sentence = refusal(books_4m, speculative_config=options)
        assert "drop use_local_argmax_reduction" in sentence and "draft_sample_method" not in sentence
    options["use_local_argmax_reduction"] = False
    EngineArgs(model=books_4m, max_model_len=1024, speculative_config=options).create_engine_config()


def test_a_draft_model_of_its_own(books_4m):
    speculation = {"method": "draft_model", "model": books_4m, "num_speculative_tokens": 2}
    sentence = refusal(books_4m, speculative_config=speculation, attention_backend="QUANTSPEC")
    assert "quantspec and ngram, not of draft_model" in sentence and "drop --attention-backend" in sentence


@pytest.mark.parametrize("method", ["eagle", "eagle3", "mtp", "medusa", "suffix", "ngram_gpu", "dflash", "custom_class"])
def test_other_draft_methods(method):
    parallel = SimpleNamespace(pipeline_parallel_size=1)
    config = SimpleNamespace(speculative_config=SimpleNamespace(method=method), parallel_config=parallel)
    with pytest.raises(ValueError, match=f"quantspec: .* quantspec and ngram, not of {method}, .*; use one"):
        checks.check_speculation(config)


@pytest.mark.parametrize("dtype", ["bfloat16", "float32"])
def test_ngram_is_not_refused(books_4m, dtype):
    ngram = {"method": "ngram", "num_speculative_tokens": 3, "prompt_lookup_max": 3}
    arguments = {"speculative_config": ngram, "attention_backend": "QUANTSPEC", "max_model_len": 1024, "dtype": dtype}
    config = EngineArgs(model=books_4m, skip_tokenizer_init=True, **arguments).create_engine_config()
    assert config.speculative_config.method == "ngram"


@pytest.mark.parametrize("method", ["fly", "typical"])
def test_lossy_verification(method, books_4m):
    """Also on a vLLM that has such a method (0.33 has "fly"), and one that nobody has read yet."""
    options = {"method": "quantspec", "rejection_sample_method": method}
    sentence = refusal(books_4m, speculative_config=options)
    assert f"rejection_sample_method '{method}' is not known to keep" in sentence and "drop it" in sentence


@pytest.mark.parametrize("how", [{"speculative_config": "quantspec"}, {"attention_backend": "QUANTSPEC"}])
@pytest.mark.parametrize("chosen", ["by the user", "by default"])
def test_model_runner_v2_on_a_cpu(chosen, how, books_4m, monkeypatch):
    if chosen == "by the user":
        monkeypatch.setenv("VLLM_USE_V2_MODEL_RUNNER", "1")
    else:
        monkeypatch.setattr(vllm.config.vllm, "HAS_TRITON", True)  # as with Triton for CPU
    sentence = refusal(books_4m, **{"speculative_config": None, **how})
    assert "model runner V1" in sentence and "set VLLM_USE_V2_MODEL_RUNNER=0" in sentence


class Gpu:
    """A platform as `check_gpu` sees it."""

    device_name = "test device"

    def __init__(self, cuda=True, capability=(9, 0)):
        self.cuda, self.capability = cuda, capability

    def is_cuda(self):
        return self.cuda

    def has_device_capability(self, capability):
        return self.capability >= capability


@pytest.fixture(scope="module")
def config(books_4m):
    return EngineArgs(model=books_4m, max_model_len=1024, attention_backend="QUANTSPEC").create_engine_config()


@pytest.mark.parametrize(
    ("gpu", "change", "what"),
    [
        (Gpu(cuda=False), {}, "not on this platform (test device)"),
        (Gpu(capability=(7, 5)), {}, "compute capability 8.0"),
        (Gpu(), {"VLLM_USE_V2_MODEL_RUNNER": "0"}, "model runner V2"),
        (Gpu(), {"max_num_seqs": 2048}, "at most 1024 sequences"),
        (Gpu(), {"dtype": torch.float32}, "a 16-bit model"),
    ],
)
def test_what_a_gpu_must_have(gpu, change, what, config, monkeypatch):
    monkeypatch.setattr(checks, "find_spec", lambda name: object())  # this machine may have no CUDA packages
    monkeypatch.setenv("VLLM_USE_V2_MODEL_RUNNER", change.get("VLLM_USE_V2_MODEL_RUNNER", "1"))
    monkeypatch.setattr(config.scheduler_config, "max_num_seqs", change.get("max_num_seqs", 16))
    monkeypatch.setattr(config.model_config, "dtype", change.get("dtype", torch.bfloat16))
    with pytest.raises(ValueError, match="quantspec: ") as error:
        checks.check_gpu(config, gpu)
    assert what in str(error.value) and "; " in str(error.value)


def test_a_gpu_that_has_it_all(config, monkeypatch):
    monkeypatch.setattr(checks, "find_spec", lambda name: object())
    monkeypatch.setenv("VLLM_USE_V2_MODEL_RUNNER", "1")
    checks.check_gpu(config, Gpu())


def test_fp8_inputs_on_another_gpu():
    checks.check_fp8((9, 0))
    for capability in ((8, 0), (8, 9), (10, 0), (12, 0)):
        with pytest.raises(ValueError, match="^quantspec: draft_activations 'fp8' needs a Hopper GPU.*; drop it.$") as error:
            checks.check_fp8(capability)
        assert "has {}.{};".format(*capability) in str(error.value)


def test_mps_is_warned_of(tmp_path, monkeypatch):
    """Launches of two processes then share the multiprocessors, where each counts on all of them."""
    said = []
    monkeypatch.setattr(checks.logger, "warning_once", lambda message, *values: said.append(message % values))
    monkeypatch.setenv("CUDA_MPS_PIPE_DIRECTORY", str(tmp_path))
    checks.warn_of_mps()
    assert not said
    (tmp_path / "control").touch()
    checks.warn_of_mps()
    assert len(said) == 1 and "MPS" in said[0] and str(tmp_path) in said[0]


def test_a_gpu_without_the_kernel_compiler(config, monkeypatch):
    monkeypatch.setattr(checks, "find_spec", lambda name: None)
    with pytest.raises(ValueError, match="cuda-bindings"):
        checks.check_gpu(config, Gpu())


def test_another_vllm_version(books_4m, monkeypatch):
    monkeypatch.setattr(version, "installed_vllm", lambda: "0.99.0")
    sentence = refusal(books_4m)
    assert "works with vLLM 0.32.0 and 0.33.0" in sentence and "vLLM 0.99.0 is installed" in sentence


def test_layers_whose_pages_are_not_alike():
    """Before a weight is read; the specs' own merge would end in a bare assert."""
    layers, formats = {}, [PageFormat(2, 64, 128, torch.bfloat16), PageFormat(4, 64, 128, torch.bfloat16)]
    for i, page_format in enumerate(formats):
        impl = object.__new__(QuantSpecImpl)
        impl.settings = SimpleNamespace(format=page_format)
        layers[f"model.layers.{i}"] = SimpleNamespace(impl=impl)
    engine = SimpleNamespace(compilation_config=SimpleNamespace(static_forward_context=layers))
    with pytest.raises(ValueError, match=r"^quantspec: .* 4 KV heads of size 64 and others with 2 of size 64.*; run it"):
        refuse_unlike(formats[0], engine)
    del layers["model.layers.1"]
    refuse_unlike(formats[0], engine)


@pytest.mark.parametrize(
    ("layer", "what"),
    [
        ({"alibi_slopes": [0.5]}, "ALiBi"),
        ({"sliding_window": 512}, "sliding-window"),
        ({"logits_soft_cap": 30.0}, "logit soft-cap"),
        ({"sinks": object()}, "attention sinks"),
        ({"attn_type": "encoder_only"}, "encoder_only attention"),
        ({"kv_sharing_target_layer_name": "model.layers.18"}, "keys and values of another"),
        ({"head_size": 72}, "head size 72"),
        ({"unsupported": {"chunk_lookback": 4}}, "chunk_lookback"),
    ],
)
def test_layers_that_the_configuration_does_not_show(layer, what):
    known = {"head_size": 64, "alibi_slopes": None, "sliding_window": None, "logits_soft_cap": None}
    known |= {"attn_type": "decoder", "kv_sharing_target_layer_name": None, "sinks": None, "unsupported": {}}
    refuse_layer(**known)
    with pytest.raises(ValueError, match=what):
        refuse_layer(**{**known, **layer})
