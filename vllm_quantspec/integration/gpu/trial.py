"""Whether a kernel of vLLM's runs on this process's GPU: a build may lack its machine code for it."""

from __future__ import annotations

import subprocess
import sys
from collections.abc import Callable

import torch


def problem_of(trial: Callable[..., None], what: str, *arguments: str | bool) -> str | None:
    """Why ``trial(device, *arguments)``, a function of a module, fails on the current GPU; None if it does not.

    In a process of its own, as an error of CUDA may leave the process that met it without a GPU. ``what`` begins the answer.
    """
    call = f"{trial.__name__}({', '.join(map(repr, (torch.cuda.current_device(), *arguments)))})"
    script = f"from {trial.__module__} import {trial.__name__}; {call}"
    try:
        done = subprocess.run([sys.executable, "-c", script], capture_output=True, text=True, timeout=300)
    except subprocess.TimeoutExpired:
        return f"{what} did not end here"
    if done.returncode == 0:
        return None
    said = [line.strip() for line in done.stderr.splitlines() if "Error" in line or "error" in line]
    return f"{what} does not run here: {said[0] if said else f'exit code {done.returncode}'}"
