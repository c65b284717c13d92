"""Two GPUs say what one says: as processes, and as actors of Ray. CUDA graphs, torch.compile and async scheduling on."""

from importlib.util import find_spec

import pytest
import torch
from engine_tools import assert_same_or_tied, engine, generate, quantspec, speculation_counts

pytestmark = pytest.mark.skipif(torch.cuda.device_count() < 2, reason="needs two NVIDIA GPUs")

TIE = 0.125  # nats; two GPUs add up bfloat16 products in another order
MAX_TOKENS = 100
SIZE = {"max_model_len": 20000, "max_num_seqs": 8, "enable_prefix_caching": False}


@pytest.fixture(scope="module", params=["books_4m", "books_30m"])  # one KV head of size 64 and 128 on each GPU
def expected(request, passage):
    """A model, prompts below one page, of some pages and of many, and what an engine of one GPU answers."""
    model = request.getfixturevalue(request.param)
    with engine(model, **SIZE, **quantspec(4)) as llm:
        tokens = llm.get_tokenizer().encode(passage)
        prompts = [tokens[37 * i : 37 * i + n] for i, n in enumerate((5, 127, 128, 1000, 3000))] + [2 * tokens[:6000]]
        return model, prompts, generate(llm, prompts, MAX_TOKENS)


@pytest.mark.parametrize("executor", ["mp", "ray"])
def test_two_gpus(expected, executor):
    if executor == "ray" and find_spec("ray") is None:
        pytest.skip("Ray is not installed: pip install 'vllm-quantspec[ray]'")
    model, prompts, answers = expected
    parallel = {"tensor_parallel_size": 2, "distributed_executor_backend": executor}
    with engine(model, **SIZE, **parallel, **quantspec(4)) as llm:
        actual = generate(llm, prompts, MAX_TOKENS)
        drafts, accepted = speculation_counts(llm)
    assert_same_or_tied(answers, actual, TIE, executor)
    assert accepted[0] > 0.6 * drafts  # each GPU quantized its own half of the weights
