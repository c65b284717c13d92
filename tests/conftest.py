"""Shared by all tests: settings that keep engines small and in this process, the order of modules, the models and texts."""

import os
from pathlib import Path

# Before vLLM is imported, by this process or by a child.
os.environ.setdefault("VLLM_ENABLE_V1_MULTIPROCESSING", "0")  # errors and objects of the engine are at hand
os.environ.setdefault("VLLM_CPU_KVCACHE_SPACE", "1")  # GiB
os.environ.setdefault("VLLM_NO_USAGE_STATS", "1")
os.environ.setdefault("HF_HUB_OFFLINE", "1")
# Workers of pytest-xdist share the cores; a process alone leaves half of them to vLLM's other threads.
os.environ.setdefault(
    "OMP_NUM_THREADS",
    str(max(1, len(os.sched_getaffinity(0)) // max(2, int(os.environ.get("PYTEST_XDIST_WORKER_COUNT", 1))))),
)
# Of vLLM's n-grams; with more of them PyTorch has more, too, and threads wait for each other in a loop.
os.environ.setdefault("NUMBA_NUM_THREADS", os.environ["OMP_NUM_THREADS"])

import pytest
from emulated_gpus import GPUS

from vllm_quantspec.kernels import device

ROOT = Path(__file__).resolve().parent.parent
SHARED = ROOT.parent / "shared"  # larger models and novels, beside the checkout; not everybody has them
ASSETS = ROOT / "vllm_quantspec" / "assets"


# Modules that take a quarter of a minute and more, the longest first: two processes are then done at about the same time.
# Before them come those that start no engine.
LONG = (
    "test_parallel",
    "test_serve",
    "test_lossless",
    "test_sampling",
    "test_sparse_drafts",
    "test_scheduling",
    "test_exactness",
    "test_acceptance",
    "test_ray",
    "test_mixed_drafts",
    "test_plugin",
    "test_sliding_layers",
    "test_one_copy_engine",
    "test_offloading",
    "test_avx2",
    "test_int4_cache",
    "test_benchmarks",
    "test_weight_updates",
    "test_sparse_choice_engine",
    "test_page_selection",
    "test_draft_model",
    "test_ngram_drafts_engine",
    "test_prefix_caching",
    "test_moe_drafts",
    "test_models",
    "test_vision",
)
FAST = (
    "test_format",
    "test_reference",
    "test_step",
    "test_cpu_decode",
    "test_cpu_prefill",
    "test_cache_kernels",
    "test_weights",
    "test_options",
    "test_specs",
    "test_replace",
    "test_packaging",
    "test_docs",
)
WORKER_BYTES = 6 << 30  # of memory, with an engine of books-30m and the processes that some tests start


def pytest_xdist_auto_num_workers(config) -> int:
    """Processes of ``pytest -n auto`` (`make test`): engines on a CPU take a core each; on a GPU they would share it."""
    import torch

    memory = os.sysconf("SC_PAGE_SIZE") * os.sysconf("SC_PHYS_PAGES")
    return 0 if torch.cuda.is_available() else max(1, min(len(os.sched_getaffinity(0)), 4, memory // WORKER_BYTES))


def pytest_collection_modifyitems(items) -> None:
    order = {name: place for place, name in enumerate((*FAST, *LONG))}
    items.sort(key=lambda item: order.get(item.module.__name__, len(order)))


def pytest_addoption(parser):
    parser.addoption("--emulate-gpu", choices=sorted(GPUS), help="launch kernels as this GPU would, on a newer one")


def pytest_configure(config):
    if config.getoption("--emulate-gpu"):
        device.emulate(GPUS[config.getoption("--emulate-gpu")])


@pytest.fixture(scope="session", autouse=True)
def triton_kernels_fit(request):
    """Triton's kernels are compiled for the GPU that is there, so they must only fit an emulated one."""
    yield
    if not request.config.getoption("--emulate-gpu"):
        return
    from vllm_quantspec.kernels import cache_update, gather_context, rescore_logits

    limit = device.device_properties(0).shared_memory_per_block
    kernels = [cache_update._store, cache_update._quantize, gather_context._gather, rescore_logits._rescore_logits]
    for kernel in kernels:
        for cached in kernel.device_caches.values():
            for compiled in cached[0].values():
                assert compiled.metadata.shared <= limit, f"{kernel.__name__}: {compiled.metadata.shared} bytes"


def shared_path(relative: str) -> Path:
    """A file or folder of ../shared; skips the test that asks for it where it is absent."""
    path = SHARED / relative
    if not path.exists():
        pytest.skip(f"../shared/{relative} is not on this machine")
    return path


@pytest.fixture(scope="session")
def books_4m() -> str:
    """The model that ships with the package: head size 64, 4 query and 2 KV heads, 5 layers, 32k positions."""
    return str(ASSETS / "books-4m")


@pytest.fixture(scope="session")
def books_30m() -> str:
    """A larger model of the same kind: head size 128, 4 query and 2 KV heads, 64k positions."""
    return str(shared_path("models/books-30m"))


@pytest.fixture(scope="session")
def passage() -> str:
    """The passage that ships with the package, about 8,000 tokens of books-4m."""
    return (ASSETS / "passage.txt").read_text(encoding="utf-8")
