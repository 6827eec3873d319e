"""Small things that users of torch_memory_saver import from it."""

from __future__ import annotations

import contextlib
import os
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from collections.abc import Iterator

__all__ = ["change_env", "is_xpu"]


def is_xpu() -> bool:
    """Say whether the GPU is Intel's: never, here."""
    return False


@contextlib.contextmanager
def change_env(key: str, value: str) -> Iterator[None]:
    """Set a variable of the environment for the body of a ``with`` statement.

    Parameters
    ----------
    key
        Its name.
    value
        What it is inside.
    """
    before = os.environ.get(key)
    os.environ[key] = value
    try:
        yield
    finally:
        if before is None:
            os.environ.pop(key, None)
        else:
            os.environ[key] = before
