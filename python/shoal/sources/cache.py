"""Where prepared models lie, and how a directory comes into being in one step.

A model is either wholly in the cache or not there: it is put together beside its final place and renamed. What an
interrupted run left is kept, so that the next run goes on from it; a lock keeps two processes from doing the same work.
"""

from __future__ import annotations

import fcntl
import os
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path

from shoal.sources.errors import SourceError

Progress = Callable[[str, int, int], None]
"""Called with a phase, bytes done and bytes in all (0 where that is unknown)."""

_LOCK_WAIT_S_MAX = 3600.0
_LOCK_POLL_S = 0.25


def no_progress(_phase: str, _done: int, _total: int) -> None:
    """Progress that nobody looks at."""


def cache_dir() -> Path:
    """Return the directory for prepared models: ``$XDG_CACHE_HOME/shoal/models``."""
    base = Path(os.environ.get("XDG_CACHE_HOME", ""))
    # The XDG rules say that a relative path is to be ignored.
    root = base if base.is_absolute() else Path.home() / ".cache"
    return root / "shoal" / "models"


@contextmanager
def locked(target: Path, source: str, progress: Progress = no_progress) -> Iterator[None]:
    """Hold the only right to make ``target``; waits while another process does (an hour at most).

    The lock is a file beside ``target`` that the kernel lets go of when its holder dies.
    """
    path = target.with_name(target.name + ".lock")
    make_directory(path.parent, source)
    deadline = time.monotonic() + _LOCK_WAIT_S_MAX
    with path.open("a") as handle:
        while True:
            try:
                fcntl.flock(handle, fcntl.LOCK_EX | fcntl.LOCK_NB)
                break
            except BlockingIOError:
                if time.monotonic() > deadline:
                    raise SourceError(
                        source, f"another process has been preparing {target} for over an hour; is it stuck?"
                    ) from None
                progress("waiting for another process", 0, 0)
                time.sleep(_LOCK_POLL_S)
        yield


def make_directory(path: Path, source: str) -> None:
    """Create ``path`` with its parents; say plainly where that is not allowed."""
    try:
        path.mkdir(parents=True, exist_ok=True)
    except OSError as error:
        raise SourceError(
            source,
            f"cannot create {path}: {error.strerror}; set XDG_CACHE_HOME to a directory you may write to",
        ) from error


def publish(partial: Path, target: Path) -> None:
    """Rename a finished directory into place, once its files have reached the disk."""
    for path in sorted(partial.rglob("*")):
        if path.is_file():
            with path.open("rb") as handle:
                os.fsync(handle.fileno())
    partial.rename(target)
    descriptor = os.open(target.parent, os.O_RDONLY)
    try:
        os.fsync(descriptor)
    finally:
        os.close(descriptor)
