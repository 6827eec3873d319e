"""A region's bytes in files, while it is paused.

Apart because it is the one backup that this package makes itself: the region discards its bytes when it sleeps, and
what comes back from the files is compared with checksums that never left the process.
"""

from __future__ import annotations

import ctypes
import itertools
import os
import secrets
import weakref
import zlib
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any, Self

import torch

from shoal.errors import TransferError
from shoal.torch.tensors import device_of, tensor
from shoal.wake import TIMEOUT_S

if TYPE_CHECKING:
    from shoal._native import RegionUse
    from shoal.memory import Region

__all__ = ["Spill"]


@dataclass
class _Piece:
    """Bytes that move at once."""

    file: int
    at: int
    offset: int
    nbytes: int
    checksum: int = 0


class Spill:
    """The files of one pause of one region: one for each extent that had device memory.

    Made by :meth:`write`. The files are readable by their user alone, and gone when this is, or the process ends.
    """

    def __init__(self) -> None:
        self.paths: list[str] = []
        self._files: list[int] = []
        self._pieces: list[_Piece] = []
        self._chunk = 0
        self._end = weakref.finalize(self, _remove, self._files, self.paths, os.getpid())

    @classmethod
    def write(cls, region: Region, directory: str | os.PathLike[str], chunk_bytes: int) -> Self:
        """Write what a region has on the device.

        Parameters
        ----------
        region
            The region; it is awake.
        directory
            Where the files go.
        chunk_bytes
            How many bytes are on their way at once.

        Returns
        -------
        Spill
            The files.

        Raises
        ------
        TransferError
            If the directory cannot be used or is full. No file is left then.
        """
        made = cls()
        # Two chunks: one is written while the next one comes from the device.
        made._chunk = max(chunk_bytes // 2, 1 << 20)
        try:
            with _Held(region):
                made._open(region._native.resident_ranges(), directory)
                made._write(region)
        except OSError as error:
            path = error.filename or (made.paths[-1] if made.paths else directory)
            made.remove()
            raise TransferError(
                f"region {region.name!r}: its backup cannot be written to {path}: {error.strerror}",
                kind="backup", path=os.fspath(path),
            ) from error  # fmt: skip
        except BaseException:
            made.remove()
            raise
        return made

    @property
    def nbytes(self) -> int:
        """How many bytes of the region the files hold."""
        return sum(piece.nbytes for piece in self._pieces)

    def read_back(self, region: Region) -> None:
        """Bring the bytes back to where they were.

        Parameters
        ----------
        region
            The region; it is awake.

        Raises
        ------
        TransferError
            If a file cannot be read, or does not hold what was written. Part of the region is written then.
        """
        with _Held(region):
            self._read_back(region)

    def remove(self) -> None:
        """Remove the files."""
        self._end()

    def _read_back(self, region: Region) -> None:
        there = region._native.resident_ranges()
        lanes = _Lanes(region, self._chunk)
        # What was freed meanwhile has no memory any more; an extent goes whole.
        pieces = [piece for piece in self._pieces if any(at <= piece.offset < at + nbytes for at, nbytes in there)]
        with lanes.stream():
            for piece, lane in zip(pieces, itertools.cycle(lanes.lanes), strict=False):
                lane.settle()
                view, path = lane.view(piece.nbytes), self.paths[piece.file]
                try:
                    _read(self._files[piece.file], view, piece.at)
                except OSError as error:
                    lanes.settle()
                    raise TransferError(
                        f"region {region.name!r}: its backup {path} cannot be read: {error.strerror}",
                        kind="backup", path=path,
                    ) from error  # fmt: skip
                if zlib.crc32(view) != piece.checksum:
                    lanes.settle()
                    raise TransferError(
                        f"region {region.name!r}: its backup {path} has changed since it was written "
                        f"({piece.nbytes} bytes from {piece.at} on)",
                        kind="backup", path=path,
                    )  # fmt: skip
                lane.up(piece.offset, piece.nbytes)
            lanes.settle()

    def _open(self, ranges: list[tuple[int, int]], directory: str | os.PathLike[str]) -> None:
        # A killed process leaves its files, and in a container the next one often has the same pid.
        name = f"shoal-{os.getpid()}-{secrets.token_hex(8)}"
        for offset, nbytes in ranges:
            path = str(Path(directory) / f"{name}-{offset:x}.backup")
            file = os.open(path, os.O_RDWR | os.O_CREAT | os.O_EXCL | os.O_CLOEXEC, 0o600)
            self._files.append(file)
            self.paths.append(path)
            os.posix_fallocate(file, 0, nbytes)
            for at in range(0, nbytes, self._chunk):
                self._pieces.append(_Piece(len(self._files) - 1, at, offset + at, min(self._chunk, nbytes - at)))

    def _write(self, region: Region) -> None:
        lanes = _Lanes(region, self._chunk)
        before: tuple[_Piece, _Lane] | None = None
        with lanes.stream():
            for now in itertools.chain(zip(self._pieces, itertools.cycle(lanes.lanes), strict=False), [None]):
                if now is not None:
                    now[1].down(now[0].offset, now[0].nbytes)
                if before is not None:
                    piece, lane = before
                    lane.settle()
                    view = lane.view(piece.nbytes)
                    piece.checksum = zlib.crc32(view)
                    _write(self._files[piece.file], view, piece.at)
                before = now
        for file in self._files:
            # They are to save RAM: what was written shall not stay in the page cache.
            os.fdatasync(file)
            os.posix_fadvise(file, 0, 0, os.POSIX_FADV_DONTNEED)


class _Held:
    """What is freed meanwhile keeps its memory: copies go by addresses."""

    def __init__(self, region: Region) -> None:
        self.region = region
        self.held: RegionUse | None = None

    def __enter__(self) -> None:
        self.held = self.region._native.hold_memory(TIMEOUT_S)

    def __exit__(self, *_: object) -> None:
        if self.held is not None:
            self.held.release()


class _Lane:
    """Host memory for one chunk, and the copy that uses it."""

    def __init__(self, region: Region, nbytes: int) -> None:
        self.region = region
        self.is_cuda = device_of(region).type == "cuda"
        self.host = torch.empty(nbytes, dtype=torch.uint8, pin_memory=self.is_cuda)
        self.event: torch.cuda.Event | None = None

    def view(self, nbytes: int) -> memoryview:
        return memoryview((ctypes.c_char * nbytes).from_address(self.host.data_ptr())).cast("B")

    def settle(self) -> None:
        if self.event is not None:
            self.event.synchronize()
            self.event = None

    def down(self, offset: int, nbytes: int) -> None:
        self._copy(self.host[:nbytes], tensor(self.region, offset, (nbytes,), torch.uint8))

    def up(self, offset: int, nbytes: int) -> None:
        self._copy(tensor(self.region, offset, (nbytes,), torch.uint8), self.host[:nbytes])

    def _copy(self, into: torch.Tensor, source: torch.Tensor) -> None:
        into.copy_(source, non_blocking=True)
        if self.is_cuda:
            self.event = torch.cuda.Event()
            self.event.record()


class _Lanes:
    """Two lanes, and the stream that their copies run on."""

    def __init__(self, region: Region, chunk: int) -> None:
        self.device = device_of(region)
        largest = max((nbytes for _, nbytes in region._native.resident_ranges()), default=1)
        self.lanes = [_Lane(region, min(chunk, largest)) for _ in range(2)]

    def stream(self) -> Any:
        if self.device.type != "cuda":
            return _Nothing()
        torch.cuda.synchronize(self.device)
        return torch.cuda.stream(torch.cuda.Stream(self.device))

    def settle(self) -> None:
        for lane in self.lanes:
            lane.settle()


class _Nothing:
    def __enter__(self) -> None:
        return None

    def __exit__(self, *_: object) -> None:
        return None


def _write(file: int, view: memoryview, at: int) -> None:
    while view:
        done = os.pwrite(file, view, at)
        view, at = view[done:], at + done


def _read(file: int, view: memoryview, at: int) -> None:
    while view:
        done = os.preadv(file, [view], at)
        if not done:
            raise OSError(0, f"it ends {len(view)} bytes early")
        view, at = view[done:], at + done


def _remove(files: list[int], paths: list[str], owner: int) -> None:
    """Close and remove files, unless this process is a fork of the one that made them."""
    for file in files:
        os.close(file)
    files.clear()
    if os.getpid() == owner:
        for path in paths:
            Path(path).unlink(missing_ok=True)
