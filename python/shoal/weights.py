"""Weights at rest: what a model's region holds, on a disk in the order of its use, for the next start.

A :class:`WeightStore` is a directory that any number of processes share. A tensor that several models have lies there
once. What is read is verified before it is used; whatever the disk fails at, the model's own files are read.
:func:`shoal.torch.place` reads from it, :func:`shoal.torch.store_weights` fills it.
"""

from __future__ import annotations

import os
from typing import TYPE_CHECKING, Any

from shoal import _native
from shoal.memory.sizes import Size, parse_size

if TYPE_CHECKING:
    from collections.abc import Iterable
    from typing import TypeAlias

    from shoal.memory import Region, SourcePiece

    Tensors: TypeAlias = Iterable[tuple[int, int, SourcePiece | None]]

__all__ = ["StoredWeights", "WeightStore"]


class WeightStore:
    """A directory of weights, made with mode 0700 if it is not there.

    Files in it are written once, whole, and named when they are on the disk, so a process that is killed leaves nothing
    that counts. When room is short, the model that was used least lately goes, unless somebody reads it.

    Parameters
    ----------
    path
        The directory, of this store alone.
    max_bytes
        Most bytes that it takes on the disk.
    write_bytes_per_s
        Most bytes that one fill writes in a second; 512 MiB by default.
    write_bytes_per_hour
        Most bytes that all fills together write in an hour, saved up for at most an hour, so that the disk lasts; a
        model that is longer is written when all is made good. None for no limit.
    keep_s
        How long a model stays from its last use, whatever else needs room; a day by default.

    Raises
    ------
    TierError
        If the directory has to be left alone: its ``kind`` is ``"other_version"``, ``"foreign"`` (it holds something
        else) or ``"damaged"``; or it cannot be made: ``"io"``.
    ValueError
        If a size or a time cannot be read.
    """

    __slots__ = ("_native",)

    def __init__(
        self,
        path: str | os.PathLike[str],
        max_bytes: Size,
        *,
        write_bytes_per_s: Size | None = None,
        write_bytes_per_hour: Size | None = None,
        keep_s: float = 86400.0,
    ) -> None:
        pace = None if write_bytes_per_s is None else parse_size(write_bytes_per_s)
        hourly = None if write_bytes_per_hour is None else parse_size(write_bytes_per_hour)
        self._native = _native.WeightStore(path, parse_size(max_bytes), pace, hourly, keep_s)

    def find(self, name: str) -> StoredWeights | None:
        """Open a model that is stored; it counts as used from now on.

        Parameters
        ----------
        name
            What it was stored under.

        Returns
        -------
        StoredWeights or None
            None where it is not there, or not whole.

        Raises
        ------
        ForkError
            In a process other than the one that made it.
        """
        found = self._native.find(name)
        return None if found is None else StoredWeights(found)

    def fill(self, region: Region, name: str, note: str, tensors: Tensors) -> dict[str, Any]:
        """Store a sealed region. Steps, wakes and sleeps go on meanwhile.

        Parameters
        ----------
        region
            The region.
        name
            What it is found by: 8 to 64 hexadecimal digits that stand for all that its bytes depend on.
        note
            What whoever finds it needs to use it.
        tensors
            Offset and length of each tensor in the region, and where it can be read again: so that tensors of 1 MiB or
            more that another model has too are not written again. They have to begin at multiples of 4 KiB for that.

        Returns
        -------
        dict
            ``bytes`` of the region, how many of them were ``written`` and ``shared``, whether it ``was_there``, and the
            names that were ``evicted``.

        Raises
        ------
        TierError
            Nothing was stored: its ``kind`` is ``"in_use"`` while another process fills, ``"no_room"``, ``"too_soon"``
            (the disk may not be written to so much before ``wait_s``), ``"changed"`` (the bytes are not those that were
            sealed), ``"stopped"``, ``"bad_name"``, ``"failed"`` or ``"io"``.
        RegionError
            The region is not sealed as a whole, or bytes of it are on the device alone.
        """
        filled: dict[str, Any] = self._native.fill(region._native, name, note, _given(tensors))
        return filled

    def stop(self) -> None:
        """End fills that are under way, and let none begin.

        Raises
        ------
        ForkError
            In a process other than the one that made it.
        """
        self._native.stop()

    def usage(self) -> dict[str, int]:
        """Give what is there.

        Returns
        -------
        dict
            How many ``models``, all ``bytes``, and the bytes that they would take ``unshared``.

        Raises
        ------
        TierError
            If the directory cannot be read.
        ForkError
            In a process other than the one that made it.
        """
        return self._native.usage()


class StoredWeights:
    """One model in a :class:`WeightStore`. It stays there for as long as this lives."""

    __slots__ = ("_native",)

    def __init__(self, native: _native.StoredWeights) -> None:
        self._native = native

    @property
    def note(self) -> str:
        """What was noted when it was stored."""
        return self._native.note

    @property
    def bytes(self) -> int:
        """The region's length."""
        return self._native.bytes

    def load(self, region: Region, tensors: Tensors) -> None:
        """Fill a region of which nothing was staged, and seal it.

        Bytes go straight to host memory, in order of use; what the host budget has no room for stays on disk if
        `tensors` say where it can be read from a file as well.

        Parameters
        ----------
        region
            The region, of the same layout.
        tensors
            As in :meth:`WeightStore.fill`.

        Raises
        ------
        TierError
            What is stored is of another layout, damaged (then it is dropped), or cannot be read. The region is as it
            was.
        OutOfMemoryError
            If the host budget is short.
        """
        self._native.load(region._native, _given(tensors))

    def attach(self, region: Region) -> None:
        """Let a sealed region read from here, from now on, what it would read from its files.

        Raises
        ------
        TierError
            Other bytes are stored.
        """
        self._native.attach(region._native)


def _given(tensors: Tensors) -> list[tuple[int, int, tuple[str, int, int, str | None] | None]]:
    return [
        (
            offset,
            nbytes,
            None if source is None else (os.fspath(source.path), source.offset, source.nbytes, source.conversion),
        )
        for offset, nbytes, source in tensors
    ]
