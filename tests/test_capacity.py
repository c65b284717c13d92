"""What the engine's KV cache holds: bytes per token, tokens per GiB against BF16, and what is shared with the draft."""

import pytest
from engine_tools import QUANTSPEC_CACHE, engine, quantspec
from vllm import LLM

from vllm_quantspec.integration.draft import build

G = 128
LONG = 32768  # positions of the models: at long context the window is a small part
SIZE = {"max_model_len": LONG, "max_num_seqs": 4, "kv_cache_memory_bytes": 512 << 20}
INT4 = {"kv_cache_dtype": "quantspec_int4"}
CONFIGURATIONS = {"cache": QUANTSPEC_CACHE, "speculation": quantspec(4), "int4": INT4}


def kv_cache_config(llm: LLM):
    return llm.llm_engine.engine_core.engine_core.scheduler.kv_cache_config


def cache_config(llm: LLM):
    return llm.llm_engine.vllm_config.cache_config


def runner(llm: LLM):
    return llm.llm_engine.collective_rpc(lambda worker: worker.model_runner)[0]


def bytes_per_token(num_kv_heads: int, head_size: int, group_size: int, bits: int) -> float:
    """Design section 1, of one layer: codes of 4 or 8 bits, and 16-bit scale and minimum per channel and per token."""
    codes = 2 * head_size * bits // 8
    scales = 4 * head_size / group_size + 4 * max(1, head_size // group_size)
    return num_kv_heads * (codes + scales)


@pytest.fixture(scope="module", params=["books_4m", "books_30m"])
def model(request) -> str:
    return request.getfixturevalue(request.param)


@pytest.fixture(scope="module")
def bf16(model):
    """(blocks, tokens, bytes per token) of vLLM's own cache."""
    with engine(model, **SIZE) as llm:
        (group,) = kv_cache_config(llm).kv_cache_groups
        spec = group.kv_cache_spec
        size = len(group.layer_names) * spec.page_size_bytes / spec.block_size
        return cache_config(llm).num_gpu_blocks, cache_config(llm).kv_cache_size_tokens, size


@pytest.mark.parametrize("group_size", [128, 64])
@pytest.mark.parametrize("configuration", CONFIGURATIONS)
def test_capacity(configuration, group_size, model, bf16):
    arguments = CONFIGURATIONS[configuration]
    if configuration == "speculation":
        arguments = quantspec(4, group_size=group_size)
    elif group_size != G:
        arguments = {**arguments, "block_size": group_size}
    bits = 4 if configuration == "int4" else 8
    with engine(model, **SIZE, **arguments) as llm:
        groups = kv_cache_config(llm).kv_cache_groups
        hf = llm.llm_engine.model_config.hf_config
        layers, heads, head_size = hf.num_hidden_layers, hf.num_key_value_heads, hf.head_dim

        # One group of pages and one of windows: the same layers, the same bytes per block, one pool.
        pages, windows = groups
        assert len(pages.layer_names) == len(windows.layer_names) == layers
        assert {f"{name}.window" for name in pages.layer_names} == set(windows.layer_names)
        assert pages.kv_cache_spec.page_size_bytes == windows.kv_cache_spec.page_size_bytes
        assert pages.kv_cache_spec.block_size == group_size
        assert group_size % windows.kv_cache_spec.block_size == 0

        page_bytes = pages.kv_cache_spec.page_size_bytes
        assert page_bytes == group_size * bytes_per_token(heads, head_size, group_size, bits)

        # The memory that was given is used, up to a block; and vLLM holds no more than that for both groups.
        config = cache_config(llm)
        given, blocks = config.kv_cache_memory_bytes, config.num_gpu_blocks
        assert 0 <= given - blocks * layers * page_bytes < layers * page_bytes
        storages = {
            t.untyped_storage().data_ptr(): t.untyped_storage().nbytes()
            for layer in runner(llm).compilation_config.static_forward_context.values()
            if (t := layer.kv_cache).numel()
        }
        assert given - layers * page_bytes < sum(storages.values()) <= given

        # Tokens per byte against BF16: of the pages by arithmetic, and of all by vLLM's own count, windows included.
        bf16_blocks, bf16_tokens, bf16_size = bf16
        assert bf16_size == layers * heads * head_size * 2 * 2
        by_pages = bf16_size / (layers * bytes_per_token(heads, head_size, group_size, bits))
        by_vllm = config.kv_cache_size_tokens / bf16_tokens
        print(f"head {head_size}, G {group_size}, {configuration}: pages {by_pages:.3f}x, with windows {by_vllm:.3f}x")
        if group_size == G:
            expected = {(64, 8): 1.910, (128, 8): 1.939, (64, 4): 3.657, (128, 4): 3.765}[head_size, bits]
            assert by_pages == pytest.approx(expected, abs=1e-3)
            assert by_pages >= (1.85 if bits == 8 else 3.6)
        window_blocks = windows.kv_cache_spec.max_blocks_per_request
        longest = LONG // group_size
        assert by_vllm == pytest.approx(by_pages * longest / (longest + window_blocks), rel=0.02)
        assert config.kv_cache_max_concurrency == pytest.approx(config.kv_cache_size_tokens / LONG, rel=0.01)


def test_the_start_says_what_the_draft_weighs(books_4m, monkeypatch):
    """The INT4 copy is reported; everything else of the draft is the target's own storage."""
    messages = []
    # Not caplog: the first engine of a process sets up vLLM's loggers anew.
    monkeypatch.setattr(build.logger, "info", lambda message, *args: messages.append(message % args))
    with engine(books_4m, **quantspec(4)) as llm:
        target, draft = runner(llm).get_model(), runner(llm).drafter.model
        layers = runner(llm).compilation_config.static_forward_context
        draft_to_target = runner(llm).drafter.draft.attention_layers

        own = {name: p for name, p in draft.named_parameters() if "int4" in name}
        linears = [m for m in target.modules() if type(m).__name__.endswith("ParallelLinear")]
        loaded = target.lm_head.weight.nbytes + sum(2 * m.input_size * m.output_size for m in linears)
        int4 = sum(p.numel() * p.element_size() for p in own.values())
        assert 0.25 < int4 / loaded < 0.3  # 4 bits, and scale and zero point of every 128, of 16
        (message,) = messages
        assert f"{int4 / 2**30:.2f} GiB ({100 * int4 / loaded:.0f}% of the target's)" in message

        targets = {p.untyped_storage().data_ptr() for p in [*target.parameters(), *target.buffers()]}
        shared = {n: p for n, p in [*draft.named_parameters(), *draft.named_buffers()] if n not in own}
        assert shared and all(p.untyped_storage().data_ptr() in targets for p in shared.values())

        assert len(draft_to_target) == llm.llm_engine.model_config.hf_config.num_hidden_layers
        for name, owner in draft_to_target.items():
            assert layers[name].kv_cache.data_ptr() == layers[owner].kv_cache.data_ptr() != 0
            assert layers[name].kv_cache.shape == layers[owner].kv_cache.shape
