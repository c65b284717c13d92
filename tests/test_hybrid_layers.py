"""Models with Mamba or linear-attention layers: their full layers on this cache, in blocks large enough for a state.

Small models with random weights beside the same engine with vLLM's exact cache.
"""

import math

import pytest
import torch
from engine_tools import QUANTSPEC_CACHE, assert_close, engine, generate, quantspec
from test_models import SIZES
from test_offloading import native
from test_refusals import LLAMA, model_folder
from test_sliding_layers import groups_of, spoil_pool
from vllm.engine.arg_utils import EngineArgs
from vllm.v1.kv_cache_interface import FullAttentionSpec, MambaSpec

from vllm_quantspec import register, supported
from vllm_quantspec.format import PageFormat
from vllm_quantspec.integration.cache.backend import QuantSpecBackend
from vllm_quantspec.integration.cache.specs import make_specs
from vllm_quantspec.integration.cache.window import RecentWindow

pytestmark = pytest.mark.skipif(torch.cuda.is_available(), reason="test_gpu_layers.py is for GPUs")

L, F = "linear_attention", "full_attention"
G = 128
LENGTHS = (5, 300, 700, 1100)
MAX_TOKENS = 16
# {architecture: its sizes, the dtype in which vLLM's CPU engine runs it, pages per block, whether it shares prefixes there}
MODELS = {
    # Heads of 256 channels, experts.
    "qwen3_next": (
        {
            "layer_types": [L, F],
            "head_dim": 256,
            "linear_num_value_heads": 8,
            "linear_num_key_heads": 2,
            "linear_key_head_dim": 128,
            "linear_value_head_dim": 128,
            "num_experts": 4,
            "num_experts_per_tok": 2,
            "moe_intermediate_size": 128,
            "shared_expert_intermediate_size": 128,
        },
        "bfloat16",
        4,
        True,
    ),
    "nemotron_h": (
        {
            "hybrid_override_pattern": "M*",
            "head_dim": 64,
            "mamba_num_heads": 8,
            "mamba_head_dim": 64,
            "ssm_state_size": 64,
            "n_groups": 2,
            "expand": 2,
        },
        "float32",
        5,
        False,  # vLLM 0.32's CPU engine fails at it, whatever the KV cache
    ),
}


@pytest.fixture(scope="module", autouse=True)
def registered():
    register()


def save_model(name: str, folder) -> str:
    from transformers import AutoConfig, AutoModelForCausalLM

    torch.manual_seed(0)
    sizes = SIZES | {"tie_word_embeddings": False, "num_hidden_layers": 2} | MODELS[name][0]
    AutoModelForCausalLM.from_config(AutoConfig.for_model(name, **sizes), dtype=torch.float32).save_pretrained(folder)
    return str(folder)


@pytest.mark.parametrize("name", MODELS)
def test_output_and_prefix_caching(name, tmp_path):
    _, dtype, pages_per_block, shares = MODELS[name]
    if dtype == "bfloat16" and not torch.cpu._is_avx512_bf16_supported():
        pytest.skip("vLLM's CPU engine runs linear attention on CPUs with AVX-512 BF16 alone")
    model = save_model(name, tmp_path)
    prompts = [torch.randint(3, 1000, (length,)).tolist() for length in LENGTHS]
    arguments = {"skip_tokenizer_init": True, "max_model_len": 2048, "max_num_seqs": 8, "dtype": dtype}
    arguments |= {"enable_prefix_caching": shares, "num_gpu_blocks_override": 200}
    with engine(model, **arguments) as llm:
        exact = generate(llm, prompts, MAX_TOKENS)
    with engine(model, **arguments, **QUANTSPEC_CACHE) as llm:
        spoil_pool(llm)
        answers, again = (generate(llm, prompts, MAX_TOKENS) for _ in range(2))
        specs = {type(group.kv_cache_spec).__name__: group.kv_cache_spec for group in groups_of(llm)}
        concurrency = llm.llm_engine.vllm_config.cache_config.kv_cache_max_concurrency
    for got in (answers, again):
        assert_close(exact, got)
    block = pages_per_block * G
    assert [a.num_cached_tokens for a in again] == [(n - 1) // block * block if shares else 0 for n in LENGTHS]
    pages, window, state = specs["HierarchicalKVSpec"], specs["RecentWindowSpec"], specs["MambaSpec"]
    assert pages.block_size == block
    assert pages.page_size_bytes == window.page_size_bytes == state.page_size_bytes
    unpadded = MambaSpec(block_size=state.block_size, shapes=state.shapes, dtypes=state.dtypes).page_size_bytes
    page_bytes = pages.page_size_bytes // pages_per_block
    assert pages.page_size_bytes - page_bytes < unpadded <= pages.page_size_bytes  # the least that holds a state
    states = 2 if shares else 1  # as vLLM counts them
    assert concurrency == pytest.approx(200 / (math.ceil(2048 / block) + window.max_blocks_per_request + states))


@pytest.mark.parametrize("head_size", [64, 96, 128, 256])
@pytest.mark.parametrize("group_size", [64, 128])
@pytest.mark.parametrize("bits", [4, 8])
def test_blocks_of_several_pages(head_size, group_size, bits, monkeypatch):
    """vLLM asks for a token's bytes; its blocks split into pages, and into window blocks, without a gap."""
    fmt = PageFormat(3, head_size, group_size, torch.bfloat16, bits)
    monkeypatch.setattr(QuantSpecBackend, "page_format", fmt)
    token = FullAttentionSpec(block_size=1, num_kv_heads=3, head_size=head_size, dtype=torch.bfloat16)
    assert QuantSpecBackend.customize_spec(token).page_size_bytes * group_size == fmt.page_bytes
    pages, window = make_specs(fmt, 0, 5)
    assert pages.page_size_bytes == window.page_size_bytes == 5 * fmt.page_bytes
    assert (pages.block_size, window.block_size) == (5 * group_size, 5 * fmt.window_block_size)
    assert QuantSpecBackend.get_supported_kernel_block_sizes(pages) == [group_size]
    layer = RecentWindow(window)
    assert layer.get_attn_backend().get_supported_kernel_block_sizes(window) == [fmt.window_block_size]
    for spec, tokens in ((pages, group_size), (window, fmt.window_block_size)):
        kernel = spec.copy_with_new_block_size(tokens)
        assert kernel.page_size_bytes == fmt.page_bytes and kernel.num_states == 1


def test_the_window_of_several_blocks_is_read_as_that_of_one():
    fmt = PageFormat(2, 64, 128, torch.bfloat16)
    raw = torch.randint(0, 256, (6, fmt.page_bytes), dtype=torch.uint8)
    one, several = (RecentWindow(make_specs(fmt, 0, n)[1]) for n in (1, 3))
    size, row = fmt.window_block_size, 2 * fmt.head_size * 2
    one.kv_cache = raw.as_strided((6, 2, size, row), (fmt.page_bytes, size * row, row, 1))
    several.kv_cache = raw.view(6, 2, 1, fmt.head_bytes)
    assert torch.equal(one.exact(fmt).view(torch.int16), several.exact(fmt).view(torch.int16))
    assert one.exact(fmt).shape == (6, 2, size, 2 * fmt.head_size)


JAMBA = {**LLAMA, "architectures": ["JambaForCausalLM"], "model_type": "jamba"}
JAMBA |= {"attn_layer_period": 2, "attn_layer_offset": 1}


@pytest.mark.parametrize(
    "speculation", [quantspec(4), {"speculative_config": {"method": "ngram", "num_speculative_tokens": 2}} | QUANTSPEC_CACHE]
)
def test_speculation_is_refused(speculation, tmp_path):
    model = model_folder(tmp_path, JAMBA)
    with pytest.raises(ValueError, match="^quantspec: speculation does not support .* Mamba .*QUANTSPEC alone") as error:
        EngineArgs(model=model, skip_tokenizer_init=True, max_model_len=1024, **speculation).create_engine_config()
    assert supported.unsupported(JAMBA, model) is None and supported.undrafted(JAMBA) == str(error.value)


def test_offloading_is_refused(tmp_path):
    args = EngineArgs(
        model_folder(tmp_path, JAMBA), skip_tokenizer_init=True, kv_transfer_config=native(), **QUANTSPEC_CACHE
    )
    with pytest.raises(ValueError, match="^quantspec: KV offloading was not tried with .*Mamba.*; drop --kv-offloading"):
        args.create_engine_config()
