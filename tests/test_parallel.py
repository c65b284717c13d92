"""Engines of two workers say what one of one says: as processes, and as actors of Ray on two nodes."""

import multiprocessing
import os
import secrets
import sys
from importlib.util import find_spec
from itertools import count
from multiprocessing.forkserver import _forkserver
from pathlib import Path
from types import SimpleNamespace

import pytest
import torch
from engine_tools import (
    QUANTSPEC_CACHE,
    assert_same_or_tied,
    engine,
    generate,
    generate_on_ranks,
    quantspec,
    speculation_counts,
)
from moe_tools import save_mixture
from test_models import ENGINE
from vllm.engine.arg_utils import AsyncEngineArgs, EngineArgs
from vllm.platforms import current_platform

from vllm_quantspec.sparse_choice import SparseChoice

pytestmark = pytest.mark.skipif(not current_platform.is_cpu(), reason="two workers of the CPU engine; GPUs are not shared")

TIE = 0.125  # nats; two workers add up bfloat16 products in another order
MAX_TOKENS = 40


@pytest.fixture(scope="module", autouse=True)
def cores():
    """Two workers that both want the same core wait for each other most of the time: bind neither."""
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("VLLM_CPU_OMP_THREADS_BIND", "nobind")
        patch.setenv("OMP_NUM_THREADS", "1")
        yield


@pytest.fixture(scope="module")
def expected(books_4m, passage):
    """Prompts below one page, of some pages and of many, and what an engine of one worker answers."""
    with engine(books_4m, **quantspec()) as llm:
        encode = llm.get_tokenizer().encode
        prompts = [encode(passage[700 * i : 700 * i + size]) for i, size in enumerate((300, 1500, 6000))]
        return prompts, generate(llm, prompts, MAX_TOKENS)


def check(model, expected, what, **kwargs):
    prompts, answers = expected
    with engine(model, tensor_parallel_size=2, **kwargs) as llm:
        actual = generate(llm, prompts, MAX_TOKENS)
        drafts, accepted = speculation_counts(llm)
        assert_same_or_tied(answers, actual, TIE, what)
        assert accepted[0] > drafts / 2  # each worker quantized its own half of the weights
        yield llm


def test_processes_with_sparse_drafts(books_4m, expected):
    """Each worker chooses pages for its own KV head. (Drafts that read everything: the tests below.)"""
    for llm in check(books_4m, expected, "mp", **quantspec(draft_context=256)):
        shares = llm.collective_rpc(lambda worker: worker.model_runner.drafter.page_scores.share.mean)
        assert shares[0] == shares[1] < 0.7


def place_workers_by_cpu(setattr=setattr):
    """vLLM's Ray executor asks for an accelerator per worker and its CPU platform names none: let it ask for a CPU."""
    import ray
    from vllm.platforms.cpu import CpuPlatform
    from vllm.v1.executor.ray_executor_v2 import RayExecutorV2, RayWorkerProc

    setattr(CpuPlatform, "ray_device_key", "CPU")
    setattr(RayExecutorV2, "_get_actor_resource_kwargs", staticmethod(lambda: {"num_gpus": 0}))
    setattr(RayWorkerProc, "get_node_and_physical_gpu_ids", lambda self: (ray.get_runtime_context().get_node_id(), []))


@pytest.fixture
def ray_cluster(monkeypatch):
    """A Ray cluster of two nodes on this machine, one CPU each: one worker shares the engine's memory, one does not."""
    if find_spec("ray") is None:
        pytest.skip("Ray is not installed: pip install 'vllm-quantspec[ray]'")
    import ray
    from ray._raylet import AuthenticationTokenLoader, Config
    from ray.cluster_utils import Cluster

    def read_environment():  # Ray did, when vLLM imported it
        Config.initialize("")
        AuthenticationTokenLoader.instance().reset_cache()

    # Its ports are open to the network; and a token from here leaves the home directory's alone.
    monkeypatch.setenv("RAY_AUTH_MODE", "token")
    monkeypatch.setenv("RAY_AUTH_TOKEN", secrets.token_hex(32))
    read_environment()

    place_workers_by_cpu(monkeypatch.setattr)
    ray.cloudpickle.register_pickle_by_value(sys.modules[__name__])  # Ray's workers do not find the tests
    node = {"num_cpus": 1, "object_store_memory": 80 << 20, "include_dashboard": False}
    cluster = Cluster(initialize_head=True, head_node_args=node)
    try:
        cluster.add_node(**node)
        ray.init(address=cluster.address, runtime_env={"worker_process_setup_hook": place_workers_by_cpu})
        yield ray
    finally:
        ray.shutdown()
        cluster.shutdown()
        ray.cloudpickle.unregister_pickle_by_value(sys.modules[__name__])
        monkeypatch.undo()
        read_environment()


def test_ray(books_4m, expected, ray_cluster):
    assert [node["Resources"]["CPU"] for node in ray_cluster.nodes()] == [1, 1]
    for _ in check(books_4m, expected, "Ray", distributed_executor_backend="ray", **quantspec()):
        pass


@pytest.fixture(scope="module")
def forked(cores, tmp_path_factory):
    """From here on vLLM's processes are copies of one that imported it (forked_workers.py), with the environment it has."""
    context = multiprocessing.get_context("forkserver")
    context.set_forkserver_preload(["forked_workers"])
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("PYTHONPATH", str(Path(__file__).parent), prepend=os.pathsep)
        patch.setenv("VLLM_CACHE_ROOT", str(tmp_path_factory.mktemp("cache")))
        patch.setattr("vllm.utils.system_utils.multiprocessing", SimpleNamespace(get_context=lambda method: context))
        yield
    _forkserver._stop()


def test_processes_are_told_who_reads_everything(books_4m, passage, monkeypatch, forked):
    """``draft_context: auto``, every second cycle by the scheduler's choice: both workers hear of it in the same step."""
    steps = count()
    monkeypatch.setattr(SparseChoice, "choose", lambda self, names, *more: (set(names) if next(steps) % 2 else set(), set()))
    size = {"max_model_len": 8192, "dtype": "float32"}
    with engine(books_4m, tensor_parallel_size=2, **size, **quantspec(draft_context="auto")) as llm:
        prompt = llm.get_tokenizer().encode(passage)[:5000]
        assert len(prompt) == 5000
        answer = generate(llm, [prompt], MAX_TOKENS)
        shares = llm.collective_rpc(lambda worker: worker.model_runner.drafter.page_scores.share.mean)
    assert 0.4 < shares[0] == shares[1] < 0.9 and next(steps) > 4
    assert len(answer[0].tokens) == MAX_TOKENS


def test_a_mixture_of_experts(tmp_path, forked):
    """Each worker rounds its own half of every expert, and of the shared one."""
    save_mixture("qwen2_moe", tmp_path, torch.float32)
    prompts = [torch.randint(3, 1000, (length,)).tolist() for length in (5, 300)]
    with engine(str(tmp_path), dtype="float32", **ENGINE, **QUANTSPEC_CACHE) as llm:
        expected = generate(llm, prompts, MAX_TOKENS)
    with engine(
        str(tmp_path), dtype="float32", tensor_parallel_size=2, **ENGINE, **quantspec(3, draft_experts="int4")
    ) as llm:
        actual = generate(llm, prompts, MAX_TOKENS)
        drafts, accepted = speculation_counts(llm)
    assert_same_or_tied(expected, actual, TIE, "two workers")
    assert accepted[0] > 0.1 * drafts


def test_data_parallel_engines_choose_their_own_numbers_of_drafts(books_4m, expected, forked):
    """Of a dense model: one drafts while the other has nothing to do, then both."""
    prompts, answers = expected
    size = {"max_model_len": 4096, "max_num_seqs": 8, "enforce_eager": True}
    arguments = AsyncEngineArgs(books_4m, data_parallel_size=2, **size, **quantspec(num_speculative_tokens="auto"))

    (alone,), both = generate_on_ranks(arguments, [[(prompts[0], 0)], [(prompts[0], 0), (prompts[1], 1)]], MAX_TOKENS)
    assert_same_or_tied([answers[0], *answers[:2]], [alone, *both], TIE, "data parallel")


def test_workers_agree_on_rounded_weights_and_on_their_bits(books_4m, expected, forked):
    """Each keeps its own half. One whose file is gone cannot write texts alone: both round again."""
    folder = Path(os.environ["VLLM_CACHE_ROOT"])
    options = {"weight_rounding": "gptq", "draft_weights": "mixed", "weight_bits": 6.0}

    def start() -> tuple[dict[str, int], dict[str, int]]:
        """(when each worker's file was written, bits of each linear)"""
        prompts, answers = expected
        # Texts are no longer than a request may be.
        with engine(books_4m, tensor_parallel_size=2, max_model_len=160, **quantspec(**options)) as llm:
            actual = generate(llm, prompts[:1], MAX_TOKENS)
            drafts, accepted = speculation_counts(llm)
            choices = llm.collective_rpc(widths_of_draft)
        assert_same_or_tied(answers[:1], actual, TIE)
        assert accepted[0] > drafts / 2
        assert choices[0] == choices[1] and set(choices[0].values()) == {4, 8}
        assert len(list(folder.rglob("losses.json"))) == 1
        return {path.name: path.stat().st_mtime_ns for path in folder.rglob("rank_*.safetensors")}, choices[0]

    first, bits = start()
    assert sorted(first) == ["rank_0.safetensors", "rank_1.safetensors"]
    assert start() == (first, bits)
    next(folder.rglob("rank_1.safetensors")).unlink()
    again, bits_again = start()
    assert sorted(again) == sorted(first) and again["rank_0.safetensors"] > first["rank_0.safetensors"]
    assert bits_again == bits


def widths_of_draft(worker) -> dict[str, int]:
    """Bits of each linear of the draft."""
    linears = {name: getattr(m, "quant_method", None) for name, m in worker.model_runner.drafter.model.named_modules()}
    return {name: method.bits for name, method in linears.items() if hasattr(method, "bits")}


def test_pipeline_stages_are_refused(books_4m):
    """vLLM 0.32's CPU engine dies at the first request of any pipeline, whatever the cache."""
    with pytest.raises(ValueError, match="^quantspec: [^\n]*pipeline parallelism[^\n]*; drop --pipeline-parallel-size"):
        EngineArgs(model=books_4m, attention_backend="QUANTSPEC", pipeline_parallel_size=2).create_engine_config()
