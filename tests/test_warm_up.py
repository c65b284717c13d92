"""What is launched when an engine starts is all that prompts launch later: Triton's own keys are counted, nothing runs."""

import random
from collections import defaultdict

import pytest
import torch

from vllm_quantspec.format import PageFormat

pytest.importorskip("triton")

from triton.backends.compiler import GPUTarget
from triton.runtime import driver
from triton.runtime.jit import JITFunction

from vllm_quantspec.kernels import cache_update, gather_context
from vllm_quantspec.kernels.cache_update import store
from vllm_quantspec.kernels.warm_up import warm_up_prefill

pytestmark = [
    pytest.mark.skipif(not isinstance(cache_update._store, JITFunction), reason="Triton interprets here"),
    pytest.mark.skipif(torch.cuda.is_available(), reason="test_gpu_engine.py counts what is really compiled"),
]


class NoGpu:
    """A driver that has a device to compile for."""

    def get_current_device(self):
        return 0

    def get_current_stream(self, device):
        return 0

    def get_current_target(self):
        return GPUTarget("cuda", 90, 32)


class NoKernel:
    function = packed_metadata = None

    def launch_metadata(self, *args):
        return None

    def run(self, *args):
        pass


@pytest.fixture
def compiled(monkeypatch) -> list[str]:
    """The names of kernels that Triton was asked to compile, one for every variant."""
    names: list[str] = []

    def compile_nothing(self, key, *args):
        names.append(self.__name__)
        self.device_caches[0][0][key] = NoKernel()
        return self.device_caches[0][0][key]

    monkeypatch.setattr(JITFunction, "_do_compile", compile_nothing)
    for kernel in (cache_update._store, gather_context._gather):
        monkeypatch.setattr(kernel, "device_caches", defaultdict(kernel.create_binder))
    for module in (cache_update, gather_context):
        monkeypatch.setattr(module, "check_device", lambda x: None)
    driver.set_active(NoGpu())
    yield names
    driver.set_active(None)  # whatever there is


def random_step(rng, fmt, pages, window, qkv, width):
    """A step of some prompts, with slices of the step's metadata as the backend takes them."""
    requests, decodes = rng.choice([1, 2, 15, 16, 17, 40, 63]), rng.randrange(5)
    metadata = torch.zeros(decodes + requests + 1, dtype=torch.int32)
    tables = [torch.zeros(decodes + requests, n, dtype=torch.int32)[decodes:] for n in (width, 2 * width)]
    heads, dim = fmt.num_kv_heads, fmt.head_size
    _, key, value = qkv[: rng.randrange(1, len(qkv))].split([qkv.shape[1] - 2 * heads * dim, heads * dim, heads * dim], -1)
    key, value = key.view(-1, heads, dim), value.view(-1, heads, dim)
    starts, lengths = metadata[decodes:], metadata[decodes + 1 :]
    most = rng.choice([1, 5, 127, 1000, 8192])
    step = (window, key, value, starts, lengths)
    store(fmt, *step, tables[1], max_query_len=most)
    out = torch.empty(2, rng.randrange(1, 3000), heads, dim, dtype=fmt.dtype)
    pieces = (starts, lengths, lengths, *tables)
    gather_context.gather_context(fmt, pages, window, *out, *pieces, max_len=rng.randrange(1, 3000))


@pytest.mark.parametrize(("heads", "head_size", "group"), [(8, 128, 128), (1, 64, 128), (2, 96, 64), (4, 256, 64)])
def test_prompts_need_nothing_else(heads, head_size, group, compiled):
    fmt = PageFormat(heads, head_size, group)
    pages = torch.zeros(3, heads, fmt.head_bytes, dtype=torch.uint8)
    window = torch.zeros(3, heads, fmt.window_block_size, 2 * head_size, dtype=fmt.dtype)
    qkv = torch.zeros(300, 6 * heads * head_size, dtype=fmt.dtype)
    key, value = (qkv[:, n * heads * head_size :][:, : heads * head_size].view(-1, heads, head_size) for n in (4, 5))
    table = torch.zeros(1, 5, dtype=torch.int32)
    warm_up_prefill(fmt, pages, window, key, value, table, table)
    assert set(compiled) == {"_store", "_gather"}
    warmed_up = len(compiled)
    rng = random.Random(0)
    for width in (1, 2, 7, 16, 160):
        for _ in range(20):
            random_step(rng, fmt, pages, window, qkv, width)
    assert compiled[warmed_up:] == []
