"""The CPU's kernels where Numba has no folder of its own for compiled code: read-only packages, a home that is not there."""

import os
import subprocess
import sys

import pytest
from conftest import ROOT

CODE = """
import logging, os, sys
import numpy as np
from numba.core import caching

ensure = caching._CacheLocator.ensure_cache_path
def ensure_where_one_may_write(self):
    # Root may write everywhere, so permissions would show nothing here.
    if not os.path.abspath(self.get_cache_path()).startswith(sys.argv[1]):
        raise PermissionError(self.get_cache_path())
    ensure(self)
caching._CacheLocator.ensure_cache_path = ensure_where_one_may_write

logging.basicConfig(level=logging.INFO)
from vllm_quantspec.kernels import cpu_decode, cpu_int4_linear
out = np.zeros(3, np.float32)
cpu_decode._half_to_float(np.array([0x3C00, 0xC000, 0x3555], np.uint16), 0, 3, np.zeros(3, np.uint32), out)
print(out.tolist(), sum(cpu_decode._half_to_float.stats.cache_hits.values()))
"""


def run(folder, **environment) -> tuple[str, str]:
    """What a process printed, and what it logged, that may write in ``folder`` only."""
    inherited = {k: v for k, v in os.environ.items() if k not in ("NUMBA_CACHE_DIR", "VLLM_CACHE_ROOT", "XDG_CACHE_HOME")}
    environment = inherited | {"HOME": "/nonexistent", "PYTHONPATH": str(ROOT), "TMPDIR": "/nonexistent"} | environment
    done = subprocess.run(
        [sys.executable, "-c", CODE, str(folder)], env=environment, cwd="/", capture_output=True, text=True, timeout=300
    )
    assert done.returncode == 0, done.stderr
    return done.stdout.strip(), done.stderr


@pytest.mark.parametrize("variable", ["VLLM_CACHE_ROOT", "TMPDIR"])
def test_code_is_kept_where_one_may_write(variable, tmp_path):
    """One process compiles, the next one loads what it left."""
    first, log = run(tmp_path, **{variable: str(tmp_path)})
    assert first == "[1.0, -2.0, 0.333251953125] 0"
    assert log.count(f"Compiled CPU kernels are kept in {tmp_path}") == 1
    again, _ = run(tmp_path, **{variable: str(tmp_path)})
    assert again == "[1.0, -2.0, 0.333251953125] 1"
    (folder,) = tmp_path.iterdir()
    assert folder.stat().st_mode & 0o777 == 0o700


def test_a_folder_that_others_may_write_is_left_alone(tmp_path):
    """Code from it would be run."""
    folder = tmp_path / f"quantspec-numba-{os.getuid()}"
    folder.mkdir()
    folder.chmod(0o777)
    printed, log = run(tmp_path, VLLM_CACHE_ROOT=str(tmp_path), TMPDIR=str(tmp_path))
    assert printed == "[1.0, -2.0, 0.333251953125] 0"
    assert log.count("compiled anew in each process") == 1
    assert not any(folder.iterdir())
