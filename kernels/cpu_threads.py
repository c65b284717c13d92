"""Threads of the CPU kernels: a compiled function that releases the interpreter lock, split over several cores."""

from __future__ import annotations

import os
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from functools import cache

import torch

# vLLM binds the thread that runs the model to one core; the others of this process are for the helpers below.
CPUS = os.sched_getaffinity(0) if hasattr(os, "sched_getaffinity") else None


@cache
def _pool(threads: int) -> ThreadPoolExecutor:
    def free_of_the_models_core() -> None:
        if CPUS:
            os.sched_setaffinity(0, CPUS)

    return ThreadPoolExecutor(threads, "quantspec-cpu", initializer=free_of_the_models_core)


def split(function: Callable, number: int, arguments: tuple, most: int | None = None) -> None:
    """Call ``function(begin, end, *arguments)`` for parts of [0, number), on PyTorch's number of threads or ``most``."""
    threads = min(torch.get_num_threads(), len(CPUS) if CPUS else 1, number, number if most is None else most)
    if threads <= 1:
        function(0, number, *arguments)
        return
    cuts = [number * i // threads for i in range(threads + 1)]
    jobs = [_pool(threads).submit(function, a, b, *arguments) for a, b in zip(cuts, cuts[1:], strict=False)]
    for job in jobs:
        job.result()
