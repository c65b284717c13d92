"""Two GPUs say what one says: as processes and as actors of Ray, in Python and behind `vllm serve`, and as two engines that
share a mixture's experts. CUDA graphs, torch.compile and async scheduling on."""

from importlib.util import find_spec

import pytest
import torch
from engine_tools import assert_same_or_tied, engine, generate, generate_on_ranks, quantspec, speculation_counts
from moe_tools import save_mixture
from server_tools import serve
from test_models import ENGINE, LENGTHS
from test_serve import LOGPROBS, answers
from vllm import AsyncEngineArgs
from vllm.distributed.device_communicators.pynccl_wrapper import NCCLLibrary

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


@pytest.fixture(params=["mp", "ray"])
def executor(request):
    if request.param == "ray" and find_spec("ray") is None:
        pytest.skip("Ray is not installed: pip install 'vllm-quantspec[ray]'")
    return request.param


def test_two_gpus(expected, executor):
    model, prompts, one = expected
    parallel = {"tensor_parallel_size": 2, "distributed_executor_backend": executor}
    with engine(model, **SIZE, **parallel, **quantspec(4)) as llm:
        two = generate(llm, prompts, MAX_TOKENS)
        drafts, accepted = speculation_counts(llm)
    assert_same_or_tied(one, two, TIE, executor)
    assert accepted[0] > 0.6 * drafts  # each GPU quantized its own half of the weights


def test_a_server_of_two_gpus(expected, executor, tmp_path):
    """As a person starts it, with the default options."""
    model, prompts, one = expected
    size = ["--max-model-len", "20000", "--max-num-seqs", "8", "--no-enable-prefix-caching"]
    size += ["--gpu-memory-utilization", "0.2", "--kv-cache-memory-bytes", str(4 << 30)]
    parallel = ["--tensor-parallel-size", "2", "--distributed-executor-backend", executor]
    arguments = [*size, *parallel, "--speculative-config", "quantspec"]
    with serve(model, arguments, tmp_path / "log") as server:
        body = {"max_tokens": MAX_TOKENS, "temperature": 0, "ignore_eos": True, **LOGPROBS}
        two = [answers(server.complete(prompt, **body))[0] for prompt in prompts]
        metrics = server.metrics()
    assert_same_or_tied(one, two, TIE, executor)
    accepted, drafted = (metrics[f"vllm:spec_decode_num_{what}_tokens_total"] for what in ("accepted", "draft"))
    assert accepted > 0.5 * drafted > 0


def test_a_mixture_with_an_idle_rank(tmp_path):
    """Two engines that share the experts: one drafts, the other has no request and must keep step with it."""
    try:
        NCCLLibrary()
    except (OSError, AttributeError) as error:  # none, or one older than vLLM's
        pytest.skip(f"vLLM gathers the inputs of experts by an NCCL that is not here (VLLM_NCCL_SO_PATH): {error}")
    save_mixture("mixtral", tmp_path, torch.bfloat16, every_expert=True)
    prompts = [torch.randint(3, 1000, (length,)).tolist() for length in LENGTHS]
    with engine(str(tmp_path), **ENGINE, **quantspec(3)) as llm:
        one = generate(llm, prompts, 60)
    size = {"gpu_memory_utilization": 0.2, "kv_cache_memory_bytes": 4 << 30}
    arguments = AsyncEngineArgs(str(tmp_path), data_parallel_size=2, **ENGINE, **size, **quantspec(3))
    singly, together = [[(prompt, 0)] for prompt in prompts], [(prompt, i % 2) for i, prompt in enumerate(prompts)]
    *alone, both = generate_on_ranks(arguments, [*singly, together], 60)
    assert_same_or_tied(one, [answer for (answer,) in alone], TIE, "one rank idle")
    assert_same_or_tied(one, both, TIE, "requests on both")
