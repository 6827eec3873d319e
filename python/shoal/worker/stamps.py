"""Whether a file is still the one that a model was loaded from.

Apart, because the name of a model's KV is made of its files after they were loaded: a file that was replaced or written
to in between would give one model's KV the name of another.
"""

from __future__ import annotations

import contextlib
import os
from dataclasses import dataclass
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from collections.abc import Iterator, Mapping
    from io import BufferedReader
    from pathlib import Path


@dataclass(frozen=True)
class Stamp:
    """What tells a file from another one of its name, and from itself after it was written to."""

    device: int
    inode: int
    bytes: int
    mtime_ns: int

    @classmethod
    def of(cls, stat: os.stat_result) -> Stamp:
        """Take it from what the system says of a path or of an open file."""
        return cls(stat.st_dev, stat.st_ino, stat.st_size, stat.st_mtime_ns)


class FilesChangedError(RuntimeError):
    """A model's files are not those that it was loaded from.

    Attributes
    ----------
    path
        The file that is another one, or was written to.
    """

    def __init__(self, path: Path) -> None:
        super().__init__(f"{path} was replaced or written to since the model was loaded from it; restart the model")
        self.path = path


@contextlib.contextmanager
def unchanged(path: Path, stamps: Mapping[Path, Stamp]) -> Iterator[BufferedReader]:
    """Open a file, and see before and after it is read that it is the one of its stamp, by itself and by its path.

    It is not tried again: the model that runs was loaded from what the stamp is of.

    Raises
    ------
    FilesChangedError
        It is not, or there is no stamp of it.
    OSError
        It cannot be read.
    """
    with path.open("rb") as file:
        _check(path, file, stamps)
        yield file
        _check(path, file, stamps)


def _check(path: Path, file: BufferedReader, stamps: Mapping[Path, Stamp]) -> None:
    if {Stamp.of(os.fstat(file.fileno())), Stamp.of(path.stat())} != {stamps.get(path)}:
        raise FilesChangedError(path)
