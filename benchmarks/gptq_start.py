#!/usr/bin/env python3
"""How long a start takes with weights rounded by GPTQ: the first one, and the next one that finds them on disk.

Random weights in the shapes of model_shapes.py (rounding takes as long for them as for trained ones). An engine per row, in
a cache folder of this run, so that nothing of earlier runs is found.

    python benchmarks/gptq_start.py --shape 8b --json OUT         # a GPU
    python benchmarks/gptq_start.py --shape tiny                  # a CPU
"""

import argparse
import json
import os
import tempfile
import time
from pathlib import Path

os.environ.setdefault("VLLM_ENABLE_V1_MULTIPROCESSING", "0")
os.environ.setdefault("VLLM_CPU_KVCACHE_SPACE", "1")

import torch
from common import engine, write_json
from model_shapes import SHAPES, model_config


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--shape", choices=SHAPES, default="8b")
    parser.add_argument("--layers", type=int, help="fewer layers than the model has")
    parser.add_argument("--json", type=Path)
    args = parser.parse_args()
    shape = model_config(args.shape) | ({"num_hidden_layers": args.layers} if args.layers else {})
    rows = []
    with tempfile.TemporaryDirectory() as folder:
        os.environ["VLLM_CACHE_ROOT"] = str(Path(folder, "cache"))
        Path(folder, "config.json").write_text(json.dumps(shape))
        for name, options in (
            ("search", {}),
            ("gptq", {"weight_rounding": "gptq"}),
            ("gptq, kept", {"weight_rounding": "gptq"}),
        ):
            rows.append({"start": name} | start(folder, options))
            print(rows[-1], flush=True)
        kept = sum(path.stat().st_size for path in Path(folder, "cache", "quantspec").rglob("*.safetensors"))
    print(f"kept on disk: {kept / 2**30:.2f} GiB")
    if args.json:
        write_json(args.json, rows, shape=args.shape, layers=shape["num_hidden_layers"], kept_bytes=kept)


def start(folder: str, options: dict) -> dict:
    """Seconds of building the draft and of the whole start, and the most GPU memory while building it, GiB."""
    from vllm_quantspec.integration.draft import build as draft_build

    build, took = draft_build.build_draft_model, {}

    def timed(*arguments, **keywords):
        if torch.cuda.is_available():
            torch.cuda.synchronize()
            torch.cuda.reset_peak_memory_stats()
            before = torch.cuda.memory_allocated()
        started = time.perf_counter()
        draft = build(*arguments, **keywords)
        if torch.cuda.is_available():
            torch.cuda.synchronize()
            took["peak_gib"] = (torch.cuda.max_memory_allocated() - before) / 2**30
        took["draft_s"] = time.perf_counter() - started
        return draft

    draft_build.build_draft_model = timed
    arguments = {"load_format": "dummy", "skip_tokenizer_init": True, "enforce_eager": True}
    started = time.perf_counter()
    try:
        with engine(folder, 4096, **arguments, speculative_config={"method": "quantspec", **options}):
            took["start_s"] = time.perf_counter() - started
    finally:
        draft_build.build_draft_model = build
    return {name: round(value, 2) for name, value in took.items()}


if __name__ == "__main__":
    main()
