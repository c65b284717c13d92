"""Triton kernels are tested on a GPU, or else in Triton's interpreter."""

import os
import subprocess
import sys
from pathlib import Path

import pytest
import torch

DEVICE = "cuda" if torch.cuda.is_available() else "cpu"
INTERPRETED = os.environ.get("TRITON_INTERPRET") == "1"
RUNS = DEVICE == "cuda" or INTERPRETED

runs = pytest.mark.skipif(not RUNS, reason="test_in_the_interpreter runs it")


def run_in_the_interpreter(file: str) -> None:
    """Triton decides when it is imported whether it interprets, so the tests of ``file`` get a process of their own."""
    env = os.environ | {"TRITON_INTERPRET": "1", "OMP_NUM_THREADS": "1", "PYTHONWARNINGS": "ignore"}
    command = [sys.executable, "-m", "pytest", "-q", "-p", "no:cacheprovider", str(Path(file).resolve())]
    done = subprocess.run(command, env=env, capture_output=True, text=True, timeout=600)
    assert done.returncode == 0, done.stdout[-6000:] + done.stderr[-2000:]
    assert " passed" in done.stdout
