"""The compiler of the CPU's kernels: Numba, with the compiled code kept on disk where that can be."""

from __future__ import annotations

import logging
import os
import stat
from collections.abc import Callable
from functools import cache
from pathlib import Path

import numba as nb

logger = logging.getLogger("vllm.quantspec.numba_jit")

_OPTIONS = {"fastmath": {"contract", "reassoc", "nsz"}, "boundscheck": False, "nogil": True}


def jit(function: Callable) -> Callable:
    """Compile ``function`` at its first call, or load what was compiled before.

    Numba keeps it in NUMBA_CACHE_DIR, beside the source, or in the user's cache; where none of these can be written (site
    packages of another user, and no home), in VLLM_CACHE_ROOT or the folder for temporary files; else nowhere.
    """
    try:
        return nb.njit(function, cache=True, **_OPTIONS)
    except RuntimeError as error:
        if "no locator available" not in str(error):
            raise
    folder = _own_folder()
    if folder is None:
        return nb.njit(function, **_OPTIONS)
    before, nb.config.CACHE_DIR = nb.config.CACHE_DIR, str(folder)
    try:
        return nb.njit(function, cache=True, **_OPTIONS)
    finally:
        nb.config.CACHE_DIR = before


@cache
def _own_folder() -> Path | None:
    """A folder that this user alone can write, because what is in it will be run; None if there is no such folder."""
    user = os.getuid()
    for root in (os.environ.get("VLLM_CACHE_ROOT"), os.environ.get("TMPDIR", "/tmp")):
        if not root:
            continue
        folder = Path(root, f"quantspec-numba-{user}")
        try:
            folder.mkdir(mode=0o700, parents=True, exist_ok=True)
            state = folder.lstat()
        except OSError:
            continue
        if stat.S_ISDIR(state.st_mode) and state.st_uid == user and not state.st_mode & 0o022 and os.access(folder, os.W_OK):
            logger.info("Compiled CPU kernels are kept in %s", folder)
            return folder
    logger.warning("quantspec: there is no folder to keep compiled CPU kernels in; they are compiled anew in each process.")
    return None
