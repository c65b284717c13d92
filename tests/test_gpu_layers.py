"""On a GPU, with CUDA graphs: models whose layers differ, and pages that come back from host memory."""

import pytest
import test_hybrid_layers as hybrid
import test_sliding_layers as sliding
import torch
from engine_tools import QUANTSPEC_CACHE, assert_close, assert_same_or_tied, engine, generate, quantspec
from test_offloading import native

from vllm_quantspec import register

pytestmark = pytest.mark.skipif(not torch.cuda.is_available(), reason="needs an NVIDIA GPU")

G = 128
LENGTHS = (5, 130, 300, 700, 1100)
MAX_TOKENS = 24
INT4_CACHE = {"kv_cache_dtype": "quantspec_int4"}
SIZE = {"skip_tokenizer_init": True, "max_model_len": 2048, "max_num_seqs": 8, "max_num_batched_tokens": 512}
SIZE |= {"num_gpu_blocks_override": 400, "dtype": "bfloat16"}


@pytest.fixture(scope="module", autouse=True)
def registered():
    register()


def prompts_of(lengths=LENGTHS) -> list[list[int]]:
    generator = torch.Generator().manual_seed(0)
    return [torch.randint(3, 1000, (length,), generator=generator).tolist() for length in lengths]


@pytest.mark.parametrize("cache", [QUANTSPEC_CACHE, INT4_CACHE], ids=["int8", "int4"])
@pytest.mark.parametrize("architecture", sliding.ARCHITECTURES)
def test_sliding_layers(architecture, cache, tmp_path):
    # With weights as large as the others', 4 bits make up to 0.7 nats where queries and keys have no norm.
    small = architecture == "ministral" and cache is INT4_CACHE
    model = sliding.save_model(architecture, tmp_path, 0.03 if small else sliding.SIZES["initializer_range"])
    with engine(model, **SIZE) as llm:
        exact, exact_again = (generate(llm, prompts_of(), MAX_TOKENS) for _ in range(2))
    with engine(model, **SIZE, **cache) as llm:
        sliding.spoil_pool(llm)
        answers, again = (generate(llm, prompts_of(), MAX_TOKENS) for _ in range(2))
    for got in (answers, again):
        assert_close(exact, got)
    hits = [a.num_cached_tokens // G for a in exact_again]
    assert [a.num_cached_tokens // G for a in again] == hits and max(hits) >= 4


@pytest.mark.parametrize("name", hybrid.MODELS)
def test_hybrids(name, tmp_path):
    model = hybrid.save_model(name, tmp_path)
    linear = {"additional_config": {"gdn_prefill_backend": "triton"}}  # a Hopper GPU's choice, FlashInfer, need not be there
    with engine(model, **SIZE, **linear) as llm:
        exact = generate(llm, prompts_of(), MAX_TOKENS)
    with engine(model, **SIZE, **linear, **QUANTSPEC_CACHE) as llm:
        sliding.spoil_pool(llm)
        answers, again = (generate(llm, prompts_of(), MAX_TOKENS) for _ in range(2))
    for got in (answers, again):
        assert_close(exact, got)


@pytest.mark.parametrize(
    "arguments", [QUANTSPEC_CACHE, INT4_CACHE, quantspec(4, draft_weights="target")], ids=["int8", "int4", "drafts"]
)
def test_a_reloaded_prefix_is_a_prefix_cache_hit(arguments, books_4m):
    prompts = prompts_of((90, 3 * G, 5 * G + 1, 8 * G - 1, 1100))
    with engine(books_4m, kv_transfer_config=native(), **SIZE, **arguments) as llm:
        first = generate(llm, prompts, 16)
        hits = generate(llm, prompts, 16)
        assert [a.num_cached_tokens for a in first] == [0] * len(prompts)
        llm.reset_prefix_cache()
        sliding.spoil_pool(llm)  # nothing can be read but what is loaded or computed from here on
        loads = generate(llm, prompts, 16)
    assert [a.num_cached_tokens for a in loads] == [a.num_cached_tokens for a in hits]
    assert_same_or_tied(hits, loads, 0.125)
    for hit, load in zip(hits, loads, strict=True):
        token = hit.tokens[0]
        assert load.top[0][token] == pytest.approx(hit.top[0][token], abs=0.05)
