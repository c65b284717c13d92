"""Models with sliding-window and full layers: the full ones on this cache, the others on vLLM's own, in blocks of one pool.

Small models with random weights, in float32, beside the same engine with vLLM's exact cache.
"""

import math
from types import SimpleNamespace

import pytest
import torch
from engine_tools import (
    QUANTSPEC_CACHE,
    RULE_3,
    Answer,
    assert_close,
    assert_same_or_tied,
    divergence,
    engine,
    generate,
    quantspec,
)
from test_models import SIZES
from test_refusals import LLAMA, model_folder
from vllm import LLM
from vllm.engine.arg_utils import EngineArgs
from vllm.v1.attention.backend import MultipleOf
from vllm.v1.kv_cache_interface import SlidingWindowSpec

from vllm_quantspec import register, supported
from vllm_quantspec.format import PageFormat
from vllm_quantspec.integration.cache.sliding import in_page_sized_blocks
from vllm_quantspec.integration.cache.specs import make_specs
from vllm_quantspec.integration.startup import layer_backends
from vllm_quantspec.integration.startup.backend_name import quantspec_backend

pytestmark = pytest.mark.skipif(torch.cuda.is_available(), reason="test_gpu_layers.py is for GPUs")

S, F = "sliding_attention", "full_attention"
WINDOW = 200
LENGTHS = (5, 130, 300, 700)
MAX_TOKENS = 20
ARCHITECTURES = {
    "gemma3_text": {"head_dim": 64, "layer_types": [S, S, F, S, S, F]},
    "exaone4": {"layer_types": [S, S, F]},
    "cohere2": {"head_dim": 64, "layer_types": [S, F]},
    "ministral": {"head_dim": 64, "layer_types": [F, S, S, F, S]},  # groups of three layers, one of two
}
LONG = 16384  # positions: at long context the windows are a small part
ENGINE = {"skip_tokenizer_init": True, "max_model_len": LONG, "max_num_seqs": 8, "max_num_batched_tokens": 512}
ENGINE |= {"num_gpu_blocks_override": 400}
INT4_CACHE = {"kv_cache_dtype": "quantspec_int4"}


@pytest.fixture(scope="module", autouse=True)
def registered():
    register()


def save_model(name: str, folder, initializer_range: float = SIZES["initializer_range"]) -> str:
    from transformers import AutoConfig, AutoModelForCausalLM

    torch.manual_seed(0)
    sizes = SIZES | {"sliding_window": WINDOW, "tie_word_embeddings": False, "max_position_embeddings": LONG}
    sizes |= {"initializer_range": initializer_range}
    sizes |= ARCHITECTURES[name] | {"num_hidden_layers": len(ARCHITECTURES[name]["layer_types"])}
    AutoModelForCausalLM.from_config(AutoConfig.for_model(name, **sizes), dtype=torch.float32).save_pretrained(folder)
    return str(folder)


def spoil_pool(llm: LLM) -> None:
    """What other layers leave in a block may be no number: fill the pool with such bytes."""
    (runner,) = llm.llm_engine.collective_rpc(lambda worker: worker.model_runner)
    for layer in runner.compilation_config.static_forward_context.values():
        cache = getattr(layer, "kv_cache", None)
        if isinstance(cache, torch.Tensor):
            torch.tensor([], dtype=torch.uint8, device=cache.device).set_(cache.untyped_storage()).fill_(255)


def groups_of(llm: LLM):
    return llm.llm_engine.engine_core.engine_core.scheduler.kv_cache_config.kv_cache_groups


def largest_difference(expected: list[Answer], actual: list[Answer]) -> float:
    """Of the likeliest tokens' log-probabilities, while both wrote the same."""
    differences = [0.0]
    for e, a in zip(expected, actual, strict=True):
        different = divergence(e, a)
        for step in range(different[0] if different else len(e.tokens)):
            differences += [abs(e.top[step][t] - a.top[step][t]) for t in e.top[step] if t in a.top[step]]
    return max(differences)


@pytest.mark.parametrize("architecture", ARCHITECTURES)
def test_output_and_prefix_caching(architecture, tmp_path):
    """Of one in bfloat16 and 4 bits; a page in 4 bits holds too few tokens in float32."""
    if architecture == "cohere2" and torch.backends.cpu.get_cpu_capability() == "AVX2":
        pytest.skip("vLLM's own cache gives no numbers (NaN) for it in float32 on a CPU without AVX-512")
    model = save_model(architecture, tmp_path)
    dtype, cache = ("bfloat16", INT4_CACHE) if architecture == "exaone4" else ("float32", QUANTSPEC_CACHE)
    prompts = [torch.randint(3, 1000, (length,)).tolist() for length in LENGTHS]
    with engine(model, **ENGINE, dtype=dtype) as llm:
        exact, exact_again = (generate(llm, prompts, MAX_TOKENS) for _ in range(2))
    assert len({token for answer in exact for token in answer.tokens}) > MAX_TOKENS  # no loop of a few tokens
    with engine(model, **ENGINE, **cache, dtype=dtype) as llm:
        spoil_pool(llm)
        answers, again = (generate(llm, prompts, MAX_TOKENS) for _ in range(2))
        check_groups(llm, ARCHITECTURES[architecture]["layer_types"], getattr(torch, dtype))
    for got in (answers, again):
        assert_close(exact, got)
    if dtype == "float32":
        assert_same_or_tied(exact[:2], answers[:2], 2e-3)  # shorter than a window of the cache: all is exact
        assert largest_difference(exact[:2], answers[:2]) < 1e-4
        assert 1e-4 < largest_difference(exact[2:], answers[2:]) < RULE_3  # the full layers read pages
    assert [a.num_cached_tokens for a in again] == [a.num_cached_tokens for a in exact_again] == [0, 128, 256, 640]


def check_groups(llm: LLM, layer_types: list[str], dtype: torch.dtype) -> None:
    """Full layers have pages and windows, sliding ones vLLM's spec; and vLLM counts what each holds."""
    groups, layers = groups_of(llm), {S: set(), "HierarchicalKVSpec": set(), "RecentWindowSpec": set()}
    blocks = 0
    for group in groups:
        spec = group.kv_cache_spec
        assert spec.page_size_bytes == groups[0].kv_cache_spec.page_size_bytes
        kind = S if isinstance(spec, SlidingWindowSpec) else type(spec).__name__
        layers[kind].update(int(name.split(".")[2]) for name in group.layer_names)
        if kind == S:
            assert (spec.block_size, spec.dtype) == (32, dtype)
            blocks += math.ceil((spec.sliding_window - 1 + ENGINE["max_num_batched_tokens"]) / 32) + 1
        else:
            blocks += spec.max_blocks_per_request if kind == "RecentWindowSpec" else LONG // spec.block_size
    wanted = {i for i, kind in enumerate(layer_types) if kind == F}
    assert layers["HierarchicalKVSpec"] == layers["RecentWindowSpec"] == wanted
    assert layers[S] == set(range(len(layer_types))) - wanted
    config = llm.llm_engine.vllm_config.cache_config
    assert config.kv_cache_max_concurrency == pytest.approx(400 / blocks)


def backend_reading(*sizes):
    return SimpleNamespace(get_supported_kernel_block_sizes=lambda spec=None: list(sizes), get_name=lambda: "TEST")


@pytest.mark.parametrize("head_size", [64, 128, 256])
@pytest.mark.parametrize("bits", [4, 8])
@pytest.mark.parametrize("sizes", [(MultipleOf(16),), (16, 32, 64)])
def test_blocks_of_a_page(sizes, bits, head_size):
    """As FlashAttention and FlashInfer read them: nearly all of a page's bytes are used."""
    pages, recent = make_specs(PageFormat(8, head_size, 128, torch.bfloat16, bits), 0)
    spec = SlidingWindowSpec(block_size=16, num_kv_heads=8, head_size=head_size, dtype=torch.bfloat16, sliding_window=1024)
    fitted = in_page_sized_blocks(spec, backend_reading(*sizes), pages)
    assert fitted.page_size_bytes == pages.page_size_bytes
    assert fitted.block_size == recent.block_size == (64 if bits == 8 else 32)
    assert 0.9 < fitted.unpadded_page_size_bytes / fitted.page_size_bytes <= 1
    assert (fitted.sliding_window, fitted.dtype) == (1024, torch.bfloat16)


def test_a_sliding_layer_with_fewer_heads_has_no_longer_blocks_than_a_page():
    pages, _ = make_specs(PageFormat(8, 128, 128, torch.bfloat16), 0)
    spec = SlidingWindowSpec(block_size=16, num_kv_heads=1, head_size=128, dtype=torch.bfloat16, sliding_window=1024)
    assert in_page_sized_blocks(spec, backend_reading(MultipleOf(16)), pages).block_size == 128


def test_too_small_a_page():
    pages, _ = make_specs(PageFormat(2, 64, 64, torch.bfloat16, 4), 0)
    spec = SlidingWindowSpec(block_size=32, num_kv_heads=2, head_size=64, dtype=torch.bfloat16, sliding_window=1024)
    with pytest.raises(ValueError, match=r"^quantspec: .* hold 18 tokens .* TEST reads at a time; set --kv-cache-dtype"):
        in_page_sized_blocks(spec, backend_reading(MultipleOf(32)), pages)


MIXED = {**LLAMA, "architectures": ["Cohere2ForCausalLM"], "model_type": "cohere2", "sliding_window": 256}
MIXED |= {"layer_types": [S, F], "rope_parameters": {"rope_type": "default", "rope_theta": 1e4}}


def test_backends_of_the_layers(tmp_path):
    """QUANTSPEC for full layers, vLLM's choice or the user's for the others; nothing changes for models that have none."""
    model = model_folder(tmp_path, MIXED)
    for arguments, others in (
        (QUANTSPEC_CACHE, {}),
        ({"kv_cache_dtype": "quantspec_int8"}, {}),
        ({"attention_config": {"backend_per_kind": {"full_attention": "QUANTSPEC"}}}, {}),
        (
            {**QUANTSPEC_CACHE, "attention_config": {"backend_per_kind": {"sliding_window": "TRITON_ATTN"}}},
            {"sliding_window": "TRITON_ATTN"},
        ),
    ):
        args = EngineArgs(model=model, skip_tokenizer_init=True, max_model_len=1024, **arguments)
        for _ in range(2):  # as where arguments are used twice
            config = args.create_engine_config()
            chosen = config.attention_config
            assert chosen.backend is None and chosen.backend_per_kind.pop(layer_backends.FULL) is quantspec_backend()
            assert {kind: backend.name for kind, backend in chosen.backend_per_kind.items()} == others
            assert config.cache_config.block_size == 128


@pytest.mark.parametrize(
    ("arguments", "what", "remedy"),
    [
        ({"backend_per_kind": {"sliding_window": "QUANTSPEC"}}, "not for sliding_window layers", "drop sliding_window"),
        (
            {"backend_per_kind": {"full_attention": "CPU_ATTN"}, "backend": "QUANTSPEC"},
            "gives full layers CPU_ATTN",
            "drop full_attention",
        ),
    ],
)
def test_backends_that_contradict(arguments, what, remedy, tmp_path):
    model = model_folder(tmp_path, MIXED)
    with pytest.raises(ValueError, match=f"^quantspec: .*{what}.*; {remedy} from backend_per_kind"):
        EngineArgs(model=model, skip_tokenizer_init=True, attention_config=arguments).create_engine_config()


def test_speculation_is_refused(tmp_path):
    model = model_folder(tmp_path, MIXED)
    with pytest.raises(
        ValueError, match="^quantspec: speculation does not support .* sliding-window .*QUANTSPEC alone"
    ) as e:
        EngineArgs(model=model, skip_tokenizer_init=True, max_model_len=1024, **quantspec(4)).create_engine_config()
    assert supported.unsupported(MIXED, model) is None and supported.undrafted(MIXED) == str(e.value)


def test_images_that_are_read_both_ways(tmp_path, monkeypatch):
    model = model_folder(tmp_path, MIXED)
    from vllm.config import ModelConfig

    monkeypatch.setattr(ModelConfig, "is_mm_prefix_lm", True)
    with pytest.raises(ValueError, match="^quantspec: .* in both directions within an image, .*text alone"):
        EngineArgs(model=model, skip_tokenizer_init=True, max_model_len=1024, **QUANTSPEC_CACHE).create_engine_config()


@pytest.mark.parametrize(
    ("config", "which", "number"),
    [
        ({}, "none", 0),
        ({"sliding_window": 512}, "all", 0),
        ({"sliding_window": 512, "use_sliding_window": False}, "none", 0),
        ({"sliding_window": 512, "layer_types": [S, S]}, "all", 0),
        ({"sliding_window": 512, "layer_types": [F, F]}, "none", 0),
        ({"sliding_window": 512, "layer_types": [S, S, F], "num_hidden_layers": 3}, "some", 2),
        ({"sliding_window": None, "layer_types": [S, S, F]}, "none", 0),  # --disable-sliding-window
        # Configurations from before "layer_types".
        ({"sliding_window": 512, "model_type": "gemma3_text", "num_hidden_layers": 26}, "some", 22),
        ({"sliding_window": 512, "model_type": "cohere2", "sliding_window_pattern": 2, "num_hidden_layers": 8}, "some", 4),
        (
            {"sliding_window": 512, "model_type": "exaone4", "sliding_window_pattern": "LLLG", "num_hidden_layers": 64},
            "some",
            48,
        ),
    ],
)
def test_which_layers_slide(config, which, number):
    assert supported.sliding_layers(config) == which and supported.num_sliding_layers(config) == number
