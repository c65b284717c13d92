"""KV offloading: pages go to host memory as they are, and a prefix that comes back reads like a prefix-cache hit.

vLLM copies between a GPU and host memory only, so on the CPU engine its connector, scheduler and manager run with a worker
that copies blocks within host memory.
"""

import pytest
import torch
from engine_tools import QUANTSPEC_CACHE, assert_same_or_tied, engine, generate, quantspec
from test_refusals import refusal
from test_sliding_layers import ENGINE as SLIDING_ENGINE
from test_sliding_layers import save_model, spoil_pool
from vllm.config import KVTransferConfig
from vllm.engine.arg_utils import EngineArgs
from vllm.v1.kv_offload.base import OffloadingWorker, TransferResult
from vllm.v1.kv_offload.cpu.spec import CPUOffloadingSpec

from vllm_quantspec import register
from vllm_quantspec.integration.startup import offloading

pytestmark = pytest.mark.skipif(torch.cuda.is_available(), reason="test_gpu_layers.py is for GPUs")

G = 128
TIE = 2e-3  # float32, as in test_lossless.py
INT4 = {"kv_cache_dtype": "quantspec_int4"}
ENGINES = {"int4": INT4, "speculation": quantspec(4, draft_weights="target")}


@pytest.fixture(scope="module", autouse=True)
def registered():
    register()


def native(**extra) -> KVTransferConfig:
    extra.setdefault("cpu_bytes_to_use", 64 << 20)
    return KVTransferConfig(kv_connector="OffloadingConnector", kv_role="kv_both", kv_connector_extra_config=extra)


class HostWorker(OffloadingWorker):
    """Copies blocks as vLLM's worker for GPUs does: of each group, of each of its layers, so many bytes."""

    stored = loaded = 0

    def __init__(self, kv_caches, num_chunks):
        self.caches = kv_caches
        self.chunks = [torch.zeros(num_chunks, t.tensor.shape[1], dtype=torch.int8) for t in kv_caches.tensors]
        self.done = []

    def _copy(self, job_id, blocks, chunks, to_host):
        start, ids = 0, torch.as_tensor(blocks.block_ids, dtype=torch.long)
        chunks = torch.as_tensor(chunks.block_ids, dtype=torch.long)
        assert len(ids) == len(chunks)
        for size, refs in zip(blocks.group_sizes, self.caches.group_data_refs, strict=True):
            part = slice(start, start + size)
            for ref in refs:
                block, chunk = self.caches.tensors[ref.tensor_idx].tensor, self.chunks[ref.tensor_idx]
                if to_host:
                    chunk[chunks[part], : ref.page_size_bytes] = block[ids[part], : ref.page_size_bytes]
                else:
                    block[ids[part], : ref.page_size_bytes] = chunk[chunks[part], : ref.page_size_bytes]
            start += size
        self.done.append(TransferResult(job_id, True))
        return True

    def submit_store(self, job_id, src_spec, dst_spec):
        HostWorker.stored += len(src_spec.block_ids)
        return self._copy(job_id, src_spec, dst_spec, True)

    def submit_load(self, job_id, src_spec, dst_spec):
        HostWorker.loaded += len(dst_spec.block_ids)
        return self._copy(job_id, dst_spec, src_spec, False)

    def get_finished(self):
        done, self.done = self.done, []
        return done

    def wait(self, job_ids):
        pass


@pytest.fixture
def on_the_host(monkeypatch):
    monkeypatch.setattr(CPUOffloadingSpec, "get_worker", lambda self, kv_caches: HostWorker(kv_caches, self.num_chunks))
    monkeypatch.setattr(HostWorker, "stored", 0)
    monkeypatch.setattr(HostWorker, "loaded", 0)


@pytest.fixture(scope="module")
def prompts(books_4m, passage):
    from transformers import AutoTokenizer

    tokens = AutoTokenizer.from_pretrained(books_4m).encode(passage)
    return [tokens[41 * i : 41 * i + n] for i, n in enumerate((90, 3 * G, 5 * G + 1, 8 * G - 1, 1100))]


@pytest.mark.parametrize("name", ENGINES)
def test_a_reloaded_prefix_is_a_prefix_cache_hit(name, books_4m, prompts, on_the_host):
    arguments = {"dtype": "float32", "num_gpu_blocks_override": 300, "max_num_batched_tokens": 512, **ENGINES[name]}
    with engine(books_4m, kv_transfer_config=native(), **arguments) as llm:
        first = generate(llm, prompts, 16)
        hits = generate(llm, prompts, 16)  # from the engine's own prefix cache
        whole = [(len(p) - 1) // G for p in prompts]
        assert [a.num_cached_tokens for a in first] == [0] * len(prompts)
        assert [a.num_cached_tokens // G for a in hits] == whole
        assert HostWorker.loaded == 0 and HostWorker.stored == sum(len(p) // G for p in prompts)
        llm.reset_prefix_cache()
        spoil_pool(llm)  # nothing can be read but what is loaded or computed from here on
        loads = generate(llm, prompts, 16)
    assert [a.num_cached_tokens for a in loads] == [a.num_cached_tokens for a in hits]
    assert HostWorker.loaded == sum(whole)
    assert_same_or_tied(hits, loads, TIE)
    for hit, load in zip(hits, loads, strict=True):  # the first token, and its probability, are of the same bytes
        token = hit.tokens[0]
        assert load.top[0][token] == pytest.approx(hit.top[0][token], abs=1e-4)


def test_sliding_layers_come_back_too(tmp_path, on_the_host):
    model = save_model("gemma3_text", tmp_path)
    prompts = [torch.randint(3, 1000, (length,)).tolist() for length in (3 * G, 700)]
    sizes = SLIDING_ENGINE | {"dtype": "float32", "max_model_len": 2048}
    with engine(model, kv_transfer_config=native(), **QUANTSPEC_CACHE, **sizes) as llm:
        generate(llm, prompts, 1)
        hits = generate(llm, prompts, 12)
        llm.reset_prefix_cache()
        spoil_pool(llm)  # nothing can be read but what is loaded or computed from here on
        loads = generate(llm, prompts, 12)
    assert [a.num_cached_tokens for a in loads] == [a.num_cached_tokens for a in hits] == [2 * G, 5 * G]
    assert HostWorker.loaded > 7  # pages, and blocks of the sliding window before them
    assert_same_or_tied(hits, loads, TIE)


@pytest.mark.parametrize("how", [{"kv_offloading_size": 1.0}, {"kv_transfer_config": native()}])
def test_the_connector_is_ours(how, books_4m):
    args = EngineArgs(model=books_4m, max_model_len=1024, attention_backend="QUANTSPEC", **how)
    args.create_engine_config()
    config = args.create_engine_config()  # as where arguments are used twice
    transfer = config.kv_transfer_config
    assert (transfer.kv_connector, transfer.kv_connector_module_path) == offloading.OURS
    assert not config.scheduler_config.disable_hybrid_kv_cache_manager
    config = EngineArgs(model=books_4m, max_model_len=1024, **how).create_engine_config()
    assert config.kv_transfer_config.kv_connector == "OffloadingConnector"


@pytest.mark.parametrize(
    ("connector", "what", "remedy"),
    [
        (
            KVTransferConfig(kv_connector="ExampleConnector", kv_role="kv_both"),
            "OffloadingConnector, not with ExampleConnector",
            "use --kv-offloading-size, without",
        ),
        (
            native(spec_name="TieringOffloadingSpec"),
            r"host memory (CPUOffloadingSpec), not with TieringOffloadingSpec",
            "drop spec_name",
        ),
        (native(canonical_layout=True), "canonical_layout would cut", "drop it from"),
        (native(offload_prompt_only=False), "one step after vLLM would offload it", "drop offload_prompt_only"),
    ],
)
def test_what_is_refused(connector, what, remedy, books_4m):
    sentence = refusal(books_4m, kv_transfer_config=connector)
    assert what in sentence and remedy in sentence


@pytest.mark.parametrize("how", [{"kv_offloading_backend": "lmcache"}, "VLLM_USE_SIMPLE_KV_OFFLOAD"])
def test_other_ways_to_offload(how, books_4m, monkeypatch):
    if isinstance(how, str):
        monkeypatch.setenv(how, "1")
        how = {}
    assert "use --kv-offloading-size, without" in refusal(books_4m, kv_offloading_size=1.0, **how)
