"""Machine code of kernels kept on disk: an engine has dozens of them, which take up to seconds each to compile.

A file per kernel, named by a hash of all that decides its code. It begins with a hash of what follows, and takes its name
when it is complete: one that is damaged is as good as none. All may be deleted at any time.
"""

from __future__ import annotations

import contextlib
import hashlib
import os
import secrets
from collections.abc import Iterable
from pathlib import Path

_SUM_BYTES = hashlib.sha256().digest_size


def temporary_beside(path: Path) -> Path:
    """A name in the folder of ``path`` that no other process has, of no other machine either."""
    return path.with_name(f".{path.name}.{secrets.token_hex(8)}")


class KeptCode:
    """Code in ``folder``, which is made when the first is kept there."""

    def __init__(self, folder: Path) -> None:
        self.folder = folder

    def path(self, decides: Iterable[bytes]) -> Path:
        """Where the code is that depends on all of ``decides`` and nothing else."""
        digest = hashlib.sha256()
        for part in decides:
            digest.update(len(part).to_bytes(8, "little") + part)
        return self.folder / digest.hexdigest()

    def load(self, path: Path) -> bytes | None:
        """The code, or None where there is none that is whole."""
        try:
            kept = path.read_bytes()
        except OSError:
            return None
        sum_of_code, code = kept[:_SUM_BYTES], kept[_SUM_BYTES:]
        return code if hashlib.sha256(code).digest() == sum_of_code else None

    def save(self, path: Path, code: bytes) -> None:
        """Keep ``code``, where that is possible: a start does not fail for a full or read-only disk."""
        temporary = temporary_beside(path)
        with contextlib.suppress(OSError):
            try:
                self.folder.mkdir(parents=True, exist_ok=True)
                temporary.write_bytes(hashlib.sha256(code).digest() + code)
                os.replace(temporary, path)
            finally:
                temporary.unlink(missing_ok=True)
