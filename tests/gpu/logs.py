"""The ends of programs' logs, kept beside the results while they run: a part that is killed leaves them too."""

from __future__ import annotations

import contextlib
import os
import threading
from pathlib import Path
from typing import TYPE_CHECKING, Self

if TYPE_CHECKING:
    from collections.abc import Callable, Iterable

__all__ = ["KeptLogs"]

EVERY_S = 2.0
KEPT_BYTES = 400_000


class KeptLogs:
    """While it lasts, the ends of some files are copied to the folder of `$SHOAL_RESULT` every two seconds.

    Parameters
    ----------
    find
        Gives the files; they may come later.
    prefix
        Of the copies' names.
    """

    def __init__(self, find: Callable[[], Iterable[Path]], prefix: str) -> None:
        result = os.environ.get("SHOAL_RESULT")
        self._out = Path(result).parent if result else None
        self._find, self._prefix = find, prefix
        self._end = threading.Event()
        self._thread = threading.Thread(target=self._run, daemon=True)

    def __enter__(self) -> Self:
        if self._out is not None:
            self._thread.start()
        return self

    def __exit__(self, *_: object) -> None:
        self._end.set()
        if self._out is not None:
            self._thread.join(30)
            self._copy()

    def tails(self, length: int = 3000) -> str:
        """Give the end of each file, for people."""
        return "\n".join(f"=== {log}\n{_end_of(log, length)}" for log in self._find())

    def _run(self) -> None:
        while not self._end.wait(EVERY_S):
            self._copy()

    def _copy(self) -> None:
        for log in self._find():
            with contextlib.suppress(OSError):
                (self._out or log.parent).joinpath(f"{self._prefix}_{log.name}").write_text(_end_of(log, KEPT_BYTES))


def _end_of(log: Path, length: int) -> str:
    with contextlib.suppress(OSError), log.open("rb") as file:
        file.seek(max(file.seek(0, os.SEEK_END) - length, 0))
        return file.read().decode(errors="replace")
    return ""
