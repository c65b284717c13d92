"""The one way in which this plugin replaces a function of vLLM. docs/design.md lists all of them: name, why, until when."""

from __future__ import annotations

import functools
import inspect
import logging
import types
from collections.abc import Callable
from typing import Any

logger = logging.getLogger("vllm.quantspec.replace")

# {full name of what was replaced: the function that made its replacement}
_replaced: dict[str, Callable[[Any], Any]] = {}


def replace(owner: Any, name: str, make: Callable[[Any], Any]) -> None:
    """Put ``make(original)`` in the place of ``owner.name``; does nothing if the same ``make`` did so before.

    Args:
        owner: a class or a module.
        name: of a function, method, class method or static method in it, or of another object that ``make`` understands.
        make: takes the original function (of a class method: the function below it) and returns what replaces it.

    Raises:
        RuntimeError: another replacement stands there already, or this vLLM has no such function.
    """
    full_name = f"{owner.__name__ if inspect.ismodule(owner) else f'{owner.__module__}.{owner.__qualname__}'}.{name}"
    before = _replaced.get(full_name)
    if before is make:
        return
    if before is not None:
        raise RuntimeError(
            f"quantspec: {full_name} is replaced already, by {before.__module__}.{before.__qualname__}; join the two."
        )
    found = inspect.getattr_static(owner, name, None)
    if found is None:
        raise RuntimeError(f"quantspec: the installed vLLM has no {full_name}, which this vllm-quantspec builds on.")
    kind = type(found) if isinstance(found, classmethod | staticmethod) else None
    original = found.__func__ if kind else found
    replacement = make(original)
    if isinstance(replacement, types.FunctionType):
        functools.update_wrapper(replacement, original)
    setattr(owner, name, kind(replacement) if kind else replacement)
    _replaced[full_name] = make
    logger.debug("replaced %s: %s", full_name, make.__qualname__)


def replaced() -> list[str]:
    """Full names of what is replaced in this process, in the order in which it happened."""
    return list(_replaced)
