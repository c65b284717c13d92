"""Shared by all tests: settings that keep engines small and in this process, and the models and texts they use."""

import os
from pathlib import Path

# Before vLLM is imported, by this process or by a child.
os.environ.setdefault("VLLM_ENABLE_V1_MULTIPROCESSING", "0")  # errors and objects of the engine are at hand
os.environ.setdefault("VLLM_CPU_KVCACHE_SPACE", "1")  # GiB
os.environ.setdefault("VLLM_NO_USAGE_STATS", "1")
os.environ.setdefault("HF_HUB_OFFLINE", "1")
os.environ.setdefault("OMP_NUM_THREADS", str(max(1, len(os.sched_getaffinity(0)) // 2)))

import pytest
from emulated_gpus import GPUS

from vllm_quantspec.kernels import device

ROOT = Path(__file__).resolve().parent.parent
SHARED = ROOT.parent / "shared"  # larger models and novels, beside the checkout; not everybody has them
ASSETS = ROOT / "vllm_quantspec" / "assets"


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
    for kernel in (cache_update._store, cache_update._quantize, gather_context._gather, rescore_logits._rescore_logits):
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


@pytest.fixture(scope="session", params=["dracula", "emma", "martin-eden"])
def novel(request) -> str:
    """The text of a novel that neither model was trained on; a test with this fixture runs once for each of three."""
    return shared_path(f"data/books/{request.param}.txt").read_text(encoding="utf-8")


@pytest.fixture(scope="session")
def passage() -> str:
    """The passage that ships with the package, about 8,000 tokens of books-4m."""
    return (ASSETS / "passage.txt").read_text(encoding="utf-8")
