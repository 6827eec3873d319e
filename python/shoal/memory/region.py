"""A range of addresses whose bytes come and go, and where clean bytes can be read again."""

from __future__ import annotations

import os
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any, Literal, Protocol, TypeAlias

from shoal.memory.flush import Flush
from shoal.memory.sizes import Size, parse_size
from shoal.wake import TIMEOUT_S, RegionGuard, Report, Transfer

if TYPE_CHECKING:
    from collections.abc import Iterable

    from _typeshed import ReadableBuffer

    from shoal import _native

__all__ = ["Backing", "Kind", "Region", "SourcePiece"]

Kind: TypeAlias = Literal["weights", "kv", "workspace"]
"""What a region is for: which lease pays for it, and in which order it yields."""

Backing: TypeAlias = Literal["keep", "discard"]
"""What happens to the bytes when device memory is taken away: copied first, or dropped."""


@dataclass(frozen=True, slots=True)
class SourcePiece:
    """A place in a file that clean bytes can be read from again.

    Parameters
    ----------
    path
        The file.
    offset
        Where the piece starts in it, in bytes.
    nbytes
        How many bytes of the region it makes.
    conversion
        What is done to the file's bytes to get the region's: nothing, or widening bfloat16 to float32 (so that half as
        many bytes are read).
    """

    path: str | os.PathLike[str]
    offset: int
    nbytes: int
    conversion: Literal["bf16_to_f32"] | None = None


class Filling(Protocol):
    """Who cuts a growing region into pieces for others, as torch's allocator does."""

    def seal(self) -> list[int]:
        """Use what was handed out for nothing new; give the addresses of segments in which nothing lives."""


class Region:
    """A range of addresses with a name. Made by :meth:`MemoryManager.region`.

    Its address is fixed for its life. Its bytes are on the device, on the host or in the file they came from, extent by
    extent.
    """

    __slots__ = ("__weakref__", "_filling", "_manager", "_native")

    def __init__(self, native: _native.Region, manager: _native.MemoryManager) -> None:
        self._native = native
        self._manager = manager
        self._filling: Filling | None = None

    @property
    def name(self) -> str:
        """The name it was made with."""
        return self._native.name

    @property
    def device(self) -> str:
        """The device it lies on: ``"sim:N"`` or ``"cuda:N"``."""
        return self._native.device

    @property
    def address(self) -> int:
        """The address of its first byte. It never changes."""
        return self._native.address

    @property
    def bytes(self) -> int:
        """Its length in bytes, rounded up to whole pages."""
        return self._native.bytes

    def __len__(self) -> int:
        return self.bytes

    def usage(self) -> dict[str, Any]:
        """Give where its bytes are.

        Returns
        -------
        dict
            Bytes by place: ``device`` (committed), ``host`` (copies), ``source_only`` (nowhere but in their file) and
            ``total``; and ``left``, those that have left the device since the region was made, each time counted.

        Raises
        ------
        ForkError
            In a process other than the one that made it.
        """
        return self._native.usage()

    def stage(self, offset: int, data: ReadableBuffer, source: SourcePiece | None = None) -> None:
        """Give bytes their place, without any device memory.

        They are copied to host memory. With a ``source``, they may be left where they are if the host budget is short:
        then they are compared with the file first.

        Parameters
        ----------
        offset
            Where in the region, in bytes.
        data
            Any object with a contiguous buffer. It must not be written to meanwhile.
        source
            Where the same bytes can be read again.

        Raises
        ------
        RegionError
            If it does not fit, or the region is sealed.
        OutOfMemoryError
            If the host budget is short and there is no source.
        TransferError
            If the source does not hold these bytes.
        """
        piece = None if source is None else (os.fspath(source.path), source.offset, source.nbytes, source.conversion)
        # A memoryview has strides even where its object has none to show, as ctypes arrays have not.
        self._native.stage(offset, memoryview(data), piece)

    def seal(self) -> None:
        """Declare that all bytes are in place: each extent's checksum is recorded, and it is clean from here on.

        Raises
        ------
        RegionError
            If it is sealed already.
        """
        self._native.seal()

    def freeze(self, wait: bool = False, *, timeout_s: float = TIMEOUT_S) -> Flush:
        """Declare that all bytes are in place, and copy them to the host in the background.

        Each extent's checksum is recorded at once, so that later writes are found. What lies only on the device is then
        copied to the host, as far as the host budget has room; once that has ended, sleeping copies nothing. It may be
        used and written meanwhile: what is not clean yet is copied by a sleep.

        Where torch fills the region, later allocations into it lie apart from these, and segments in which nothing
        lives lose their memory. Freezing again takes in what came since. From the first time on such a region yields
        under pressure, so use what lies in it under a guard.

        Parameters
        ----------
        wait
            Whether to return only when all is copied. Otherwise :meth:`Flush.wait` does.
        timeout_s
            How long it may wait for kernels and other operations, in seconds; with ``wait``, and then for the copying.

        Returns
        -------
        Flush
            Its progress, and its outcome.

        Raises
        ------
        RegionError
            If it is being filled, or if torch fills it and it is asleep.
        DeadlineError
            If kernels did not end in time.
        """
        dead = [] if self._filling is None else self._filling.seal()
        flush = Flush(self._native.freeze(dead, timeout_s))
        if wait:
            flush.wait(timeout_s)
        return flush

    @property
    def grows(self) -> bool:
        """Whether it was made without a length, for torch to fill."""
        return self._native.is_growing

    @property
    def reads_stored(self) -> bool:
        """Whether what no host copy holds is read from a store of weights; not any more once that failed."""
        return self._native.reads_stored

    def commit(self, offset: int, nbytes: int) -> None:
        """Give a range zeroed device memory now. Pages that have it keep it.

        Parameters
        ----------
        offset, nbytes
            The range, in bytes.

        Raises
        ------
        RegionError
            If it lies outside.
        LeaseError, OutOfMemoryError
            If there is no room for it. Nothing has changed then.
        DeadlineError
            If memory that was taken away there before could not be unmapped in time. Nothing has changed then.
        """
        self._native.commit(offset, nbytes)

    def decommit(self, offset: int, nbytes: int) -> None:
        """Take the device memory of a range away, and its bytes with it.

        The process keeps some of the memory for a second, leased as before, for whatever grows next; a reclaim, a sleep
        or a denied lease frees it at once.

        Parameters
        ----------
        offset, nbytes
            The range, in bytes. Only extents that lie in it wholly are taken.

        Raises
        ------
        RegionError
            If it lies outside, or its bytes are to be kept.
        """
        self._native.decommit(offset, nbytes)

    def sleep(self, keep: float = 0.0, *, trust_clean: bool = False, timeout_s: float = TIMEOUT_S) -> Report:
        """Give up device memory; the address stays.

        Clean extents are unmapped without a copy. Waits for guards that are held.

        Parameters
        ----------
        keep
            The share that may stay resident, 0 to 1, from the front of the region; whole extents, so rather less.
        trust_clean
            Do not check by hash that sealed extents were not written to: what was written since is then lost.
        timeout_s
            How long it may wait for guards and copies, in seconds.

        Returns
        -------
        Report
            What was freed and copied.

        Raises
        ------
        ValueError
            If ``keep`` is not in 0..1.
        OutOfMemoryError
            If what must be copied does not fit into the host budget. It stays resident then.
        DeadlineError
            If guards were held, or copies ran, for longer than ``timeout_s``. What was freed stays freed.
        """
        return Report._of(self._native.sleep(keep, trust_clean, timeout_s), whole=True)

    def evict(self, nbytes: Size, *, timeout_s: float = TIMEOUT_S) -> Report:
        """Give up at least so many bytes of device memory, from the last extent backwards.

        Parameters
        ----------
        nbytes
            How many; all there are, if there are fewer.
        timeout_s
            How long it may wait for guards and copies, in seconds.

        Returns
        -------
        Report
            What was freed and copied.

        Raises
        ------
        OutOfMemoryError
            If what must be copied does not fit into the host budget. It stays resident then.
        DeadlineError
            If guards were held, or copies ran, for longer than ``timeout_s``. What was freed stays freed.
        """
        return Report._of(self._native.evict(parse_size(nbytes), timeout_s), whole=True)

    def wake(self, wait: bool = True, timeout_s: float | None = None) -> Transfer:
        """Bring back what is missing, at the same address.

        Parameters
        ----------
        wait
            Whether to return only when it is done. Otherwise :meth:`Transfer.wait` does.
        timeout_s
            How long it may take in all, in seconds; 60 without it.

        Returns
        -------
        Transfer
            Its progress, and its outcome.

        Raises
        ------
        OutOfMemoryError, LeaseError
            If there is no room for it. The region stays as it was.
        TransferError
            If a copy failed. The copy it was made from is still valid.
        DeadlineError
            If it took longer than ``timeout_s``.
        """
        transfer = Transfer(self._native.wake(TIMEOUT_S if timeout_s is None else timeout_s))
        if wait:
            transfer.wait(timeout_s)
        return transfer

    async def wake_async(self, timeout_s: float | None = None) -> Transfer:
        """Bring back what is missing, without holding up the event loop.

        A task that is cancelled meanwhile cancels the wake; what came back so far stays.

        Parameters
        ----------
        timeout_s
            How long it may take in all, in seconds; 60 without it.

        Returns
        -------
        Transfer
            It has ended.

        Raises
        ------
        OutOfMemoryError, LeaseError, TransferError, DeadlineError
            As :meth:`wake`.
        """
        import asyncio

        transfer = self.wake(wait=False, timeout_s=timeout_s)
        try:
            await asyncio.to_thread(transfer.wait, timeout_s)
        except asyncio.CancelledError:
            transfer.cancel()
            raise
        return transfer

    @property
    def waking(self) -> Transfer | None:
        """The wake that is under way, if one was started by :meth:`wake` or by a guard in order."""
        native = self._native.waking
        return None if native is None else Transfer(native)

    def set_order(self, ranges: Iterable[tuple[int, int]]) -> None:
        """Set the order in which its bytes are used: wakes bring what is used first, evictions take what is used last.

        Parameters
        ----------
        ranges
            Offset and length in bytes, in order of use. What is in none of them comes last, by address; without any,
            all comes by address.

        Raises
        ------
        RegionError
            If one lies outside. Nothing has changed then.
        """
        self._native.set_order(list(ranges))

    def record_use(self, stream: Any) -> None:
        """Vouch that what uses the region runs on streams that it was told of.

        An eviction waits for the kernels of the steps before it. Which streams these are on nobody says, so by default
        it waits for all work on the device, and is refused while a graph is captured. Once this was called, putting
        the region to sleep, evicting and swapping it wait only for what is queued on the streams that were given here,
        or that torch asked for memory on, and so go on beside another stream's capture. Work on a stream that it was
        not told of may then find its memory gone. What is reclaimed from several regions still waits for all work.

        Parameters
        ----------
        stream
            A ``torch.cuda.Stream``, or a stream's handle; 0 is the default stream. It must live as long as the process,
            as torch's streams do.

        Raises
        ------
        ForkError
            In a process other than the one that made it.
        """
        self._native.record_use(int(getattr(stream, "cuda_stream", stream)))

    def guard(self, *, in_order: bool = False, timeout_s: float = TIMEOUT_S) -> RegionGuard:
        """Give a context in which this region is resident and stays so.

        Entering it brings back what is missing. Graphs are captured under :meth:`MemoryManager.guard`: beside
        this one other regions are evicted.

        Parameters
        ----------
        in_order
            Enter as soon as a wake has all of its memory, while its bytes still come: the body uses a range only after
            ``guard.wake.wait_stream(offset, nbytes, stream)``, if there is a :attr:`RegionGuard.wake`. Starts the wake
            if none is under way. Until the guard is left, nothing that came is taken away, also if the wake fails.
        timeout_s
            How long entering may take, in seconds.

        Returns
        -------
        RegionGuard
            For one ``with`` statement. It raises, on entering: :class:`OutOfMemoryError` or :class:`LeaseError` if
            there is no room, :class:`TransferError` if a copy failed, :class:`DeadlineError` if it took too long.

        Raises
        ------
        ForkError
            In a process other than the one that made it.
        """
        return RegionGuard(self._native, in_order, timeout_s)

    def buffer(self, offset: int = 0, nbytes: int | None = None) -> _native.RegionBuffer:
        """Give a range of addresses as an object that speaks DLPack and, on a simulated device, has a writable buffer.

        Nothing is touched by this, so the range need not be resident. The object, and whatever is made of it, keeps the
        address reserved. A GPU's memory has no buffer of the CPU's: ``memoryview`` of it raises :class:`BufferError`.

        Parameters
        ----------
        offset
            Where it starts, in bytes.
        nbytes
            How long it is; up to the end, without it.

        Returns
        -------
        RegionBuffer
            Read it and write it only under a guard: it faults where nothing is mapped.

        Raises
        ------
        RegionError
            If it lies outside.
        """
        return self._native.buffer(offset, self.bytes - offset if nbytes is None else nbytes)

    def __repr__(self) -> str:
        return f"<Region {self.name!r} of {self.bytes} bytes at {self.address:#x}>"
