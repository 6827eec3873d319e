"""Blocks by name on a tier, from and to memory of the caller's: what engines with a block table of their own ask for.

A :class:`BlockStore` has a few threads of its own. What is asked for is a job: its number comes back at once, and how
it ended is told by :meth:`BlockStore.finished`, or by a descriptor that an event loop can wait for. Reads go before
writes. What a tier fails at is a block that is not there.
"""

from __future__ import annotations

import collections
import contextlib
import os
import threading
import time
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any, NamedTuple

from shoal import _native
from shoal.memory.sizes import Size, parse_size

if TYPE_CHECKING:
    from collections.abc import Callable, Mapping, Sequence

    from shoal.tiers import DiskTier, HostTier, TierStack

__all__ = ["BlockStore", "Finished"]

_CLOSE_S = 5.0


class Finished(NamedTuple):
    """How a job ended.

    Attributes
    ----------
    job : int
        Its number.
    ok : list of bool
        For each block, in the order asked for: read and verified; or kept (it is there now, was there, or the tier does
        not find it worth a write); or there.
    nbytes : int
        Bytes that were moved.
    seconds : float
        From the request to its end.
    """

    job: int
    ok: list[bool]
    nbytes: int
    seconds: float


@dataclass
class _Job:
    number: int
    begun: float
    ok: list[bool]
    parts: int = 0
    nbytes: int = 0


@dataclass
class _Part:
    """Blocks of a job that one thread moves."""

    job: _Job
    place: slice
    nbytes: int
    work: Callable[[slice], tuple[list[bool], int]] | None


class BlockStore:
    """Blocks by name on a tier.

    Parameters
    ----------
    tier
        Where they lie.
    facts
        What their bytes depend on beside their names: model, revision, dtype, layout. Other facts, other blocks.
    salt
        The tenant.
    put_to
        Of several tiers the one that blocks are put to; what is read from it goes into the faster ones. All, if it is
        not given: then a job that puts ends as soon as one of them has its blocks.
    threads
        How many threads move blocks. They are started by the first job.
    part_bytes
        The most bytes of a job that one thread moves by itself.
    waiting_bytes_max
        The most bytes of blocks that wait; jobs beyond end at once, with no block read or kept.
    deadline_s
        How long one part of a job may take, in seconds.

    Raises
    ------
    ValueError
        If a size cannot be read, or there are no threads.
    """

    def __init__(
        self,
        tier: HostTier | DiskTier | TierStack,
        facts: Mapping[str, str],
        *,
        salt: str | bytes = "",
        put_to: HostTier | DiskTier | None = None,
        threads: int = 4,
        part_bytes: Size = "8MiB",
        waiting_bytes_max: Size = "64GiB",
        deadline_s: float = 30.0,
    ) -> None:
        if threads < 1:
            raise ValueError(f"threads must be at least 1, not {threads}")
        self._store = tier._native.store()
        self._below = self._store if put_to is None else put_to._native.store()
        # Each text has bytes of its own, also where it is no valid Unicode (I12).
        whose = salt.encode("utf-8", "surrogatepass") if isinstance(salt, str) else salt
        self._names = _native.StoreNames([(str(name), str(value)) for name, value in facts.items()], whose)
        self._threads_max, self._deadline_s = threads, deadline_s
        self._part_bytes, self._waiting_bytes_max = parse_size(part_bytes), parse_size(waiting_bytes_max)
        self._changed = threading.Condition()
        self._reads: collections.deque[_Part] = collections.deque()
        self._writes: collections.deque[_Part] = collections.deque()
        self._jobs: dict[int, _Job] = {}
        self._finished: list[Finished] = []
        self._threads: list[threading.Thread] = []
        self._event: int | None = None
        self._number = 0
        self._waiting_bytes = 0
        self._is_closed = False
        self._counts = dict.fromkeys(("read", "missed", "written", "already", "declined", "failed", "refused"), 0)

    def __repr__(self) -> str:
        return f"BlockStore({self._store.name})"

    def contains(self, names: Sequence[bytes]) -> list[bool]:
        """Say which blocks are there, as far as the tier knows without reading.

        Parameters
        ----------
        names
            What the caller calls them.

        Returns
        -------
        list of bool
            One for each. A block that is there may still be missed when it is read.

        Raises
        ------
        ForkError
            In a process other than the one that made the tier.
        """
        return self._store.contains(self._keys(names))

    def get(self, names: Sequence[bytes], buffers: Sequence[Any]) -> int:
        """Read blocks into memory. Comes back at once.

        Parameters
        ----------
        names
            What the caller calls them.
        buffers
            For each a contiguous buffer to be written, of the block's length. Nobody may look at them before the job
            has ended; one whose block was not read holds what it held, or the block.

        Returns
        -------
        int
            The job's number.

        Raises
        ------
        ValueError
            If there are not as many buffers as names, or the store is closed.
        """
        keys, views = self._keys(names), [memoryview(one) for one in buffers]
        _check(keys, views)

        def work(part: slice) -> tuple[list[bool], int]:
            ok = self._store.get(keys[part], views[part], self._deadline_s)
            read = sum(ok)
            self._count(read=read, missed=len(ok) - read)
            return ok, sum(view.nbytes for view, is_there in zip(views[part], ok, strict=True) if is_there)

        return self._submit(self._reads, [view.nbytes for view in views], work, "missed")

    def put(self, names: Sequence[bytes], buffers: Sequence[Any]) -> int:
        """Keep blocks. Comes back at once.

        Parameters
        ----------
        names
            What the caller calls them. Bytes never change under a name.
        buffers
            For each a contiguous buffer with the block. Nobody may write to them before the job has ended.

        Returns
        -------
        int
            The job's number.

        Raises
        ------
        ValueError
            If there are not as many buffers as names, or the store is closed.
        """
        keys, views = self._keys(names), [memoryview(one) for one in buffers]
        _check(keys, views)

        def work(part: slice) -> tuple[list[bool], int]:
            said = self._below.put(keys[part], views[part], self._deadline_s)
            counts = collections.Counter(one or "failed" for one in said)
            self._count(**counts)
            written = sum(view.nbytes for view, one in zip(views[part], said, strict=True) if one == "written")
            return [one is not None for one in said], written

        return self._submit(self._writes, [view.nbytes for view in views], work, "failed")

    def look(self, names: Sequence[bytes]) -> int:
        """Ask which blocks are there, as a job: :meth:`contains` for those who wait for a descriptor.

        Parameters
        ----------
        names
            What the caller calls them.

        Returns
        -------
        int
            The job's number.

        Raises
        ------
        ValueError
            If the store is closed.
        """
        return self._answer(self.contains(names))

    def remove(self, names: Sequence[bytes]) -> int:
        """Forget blocks. Comes back at once.

        Parameters
        ----------
        names
            What the caller calls them.

        Returns
        -------
        int
            The job's number; it tells for each whether there was one.

        Raises
        ------
        ValueError
            If the store is closed.
        """
        keys = self._keys(names)
        return self._submit(
            self._writes, [0] * len(keys), lambda part: (self._store.remove(keys[part], self._deadline_s), 0), "failed"
        )

    def finished(self) -> list[Finished]:
        """Take what has ended since the last call. Comes back at once.

        Returns
        -------
        list of Finished
            Each job once, in the order of their ends.

        Raises
        ------
        ForkError
            In a process other than the one that made the tier.
        """
        self._refuse_other_process()
        with self._changed:
            found, self._finished = self._finished, []
            if found and self._event is not None:
                with contextlib.suppress(BlockingIOError):
                    os.eventfd_read(self._event)
        return found

    def fileno(self) -> int:
        """Give a descriptor that is readable while there is something for :meth:`finished` to take.

        Returns
        -------
        int
            An ``eventfd``, the same each time. It is the store's, until it is closed.

        Raises
        ------
        ValueError
            If the store is closed.
        OSError
            If there are no more descriptors.
        """
        with self._changed:
            self._refuse_closed()
            if self._event is None:
                self._event = os.eventfd(1 if self._finished else 0, os.EFD_NONBLOCK | os.EFD_CLOEXEC)
            return self._event

    def drain(self, timeout_s: float = 60.0) -> bool:
        """Wait until every job has ended.

        Parameters
        ----------
        timeout_s
            How long at most, in seconds.

        Returns
        -------
        bool
            Whether they have. Then nothing touches a buffer any more.

        Raises
        ------
        ForkError
            In a process other than the one that made the tier.
        """
        self._refuse_other_process()
        with self._changed:
            return self._changed.wait_for(lambda: not self._jobs, timeout_s)

    def flush(self, timeout_s: float = 5.0) -> bool:
        """Wait until the tier has written out what was put before, past every cache of the system.

        Parameters
        ----------
        timeout_s
            How long at most, in seconds. The GIL is let go meanwhile.

        Returns
        -------
        bool
            Whether it was in time, and could be.

        Raises
        ------
        ForkError
            In a process other than the one that made the tier.
        """
        return self._store.flush(timeout_s)

    def usage(self) -> dict[str, int]:
        """Give what was done.

        Returns
        -------
        dict
            In blocks: ``read``, ``missed`` (asked for, and not there, damaged or late), ``written``, ``already``,
            ``declined`` (not worth a write), ``failed`` and ``refused`` (too much waited). ``jobs`` that have not
            ended, and their ``waiting_bytes``.

        Raises
        ------
        ForkError
            In a process other than the one that made the tier.
        """
        self._refuse_other_process()
        with self._changed:
            return {**self._counts, "jobs": len(self._jobs), "waiting_bytes": self._waiting_bytes}

    def close(self, timeout_s: float = _CLOSE_S) -> bool:
        """Take no more jobs, drop what nobody has begun and end the threads. The tier stays open.

        Parameters
        ----------
        timeout_s
            How long to wait for what is under way, in seconds.

        Returns
        -------
        bool
            Whether all of it ended. What did not still touches its buffers, until its deadline at most.

        Raises
        ------
        ForkError
            In a process other than the one that made the tier.
        """
        self._refuse_other_process()
        with self._changed:
            self._is_closed = True
            for part in [*self._reads, *self._writes]:
                self._end(part, [], 0)
            self._reads.clear()
            self._writes.clear()
            self._changed.notify_all()
        until = time.monotonic() + timeout_s
        for thread in self._threads:
            thread.join(max(until - time.monotonic(), 0))
        with self._changed:
            has_ended = not any(thread.is_alive() for thread in self._threads)
            if has_ended and self._event is not None:
                os.close(self._event)
                self._event = None
        return has_ended

    # Helpers.

    def _keys(self, names: Sequence[bytes]) -> list[_native.StoreKey]:
        return [self._names.key(name) for name in names]

    def _count(self, **blocks: int) -> None:
        with self._changed:
            for name, count in blocks.items():
                self._counts[name] += count

    def _refuse_other_process(self) -> None:
        """Raise in a process that has neither the threads nor the tier."""
        _ = self._store.name

    def _refuse_closed(self) -> None:
        if self._is_closed:
            raise ValueError("the block store is closed")

    def _answer(self, ok: list[bool]) -> int:
        """Make a job that has ended."""
        with self._changed:
            self._refuse_closed()
            self._number += 1
            self._tell(Finished(self._number, ok, 0, 0.0))
            return self._number

    def _submit(
        self,
        queue: collections.deque[_Part],
        sizes: list[int],
        work: Callable[[slice], tuple[list[bool], int]],
        otherwise: str,
    ) -> int:
        if not sizes:
            return self._answer([])
        with self._changed:
            self._refuse_closed()
            whole = sum(sizes)
            if self._waiting_bytes and self._waiting_bytes + whole > self._waiting_bytes_max:
                self._counts["refused"] += len(sizes)
                self._counts[otherwise] += len(sizes)
                self._number += 1
                self._tell(Finished(self._number, [False] * len(sizes), 0, 0.0))
                return self._number
            self._number += 1
            job = _Job(self._number, time.monotonic(), [False] * len(sizes))
            self._jobs[job.number] = job
            self._waiting_bytes += whole
            for part in _parts(sizes, self._part_bytes):
                job.parts += 1
                queue.append(_Part(job, part, sum(sizes[part]), work))
            while len(self._threads) < min(self._threads_max, len(self._reads) + len(self._writes)):
                thread = threading.Thread(target=self._run, name="shoal-blocks", daemon=True)
                thread.start()
                self._threads.append(thread)
            self._changed.notify_all()
            return job.number

    def _run(self) -> None:
        """Do parts until the store is closed."""
        while True:
            with self._changed:
                self._changed.wait_for(lambda: self._is_closed or self._reads or self._writes)
                queue = self._reads or self._writes
                if not queue:
                    return
                part = queue.popleft()
            try:
                assert part.work is not None
                ok, moved = part.work(part.place)
            except Exception:  # noqa: BLE001 - a buffer that cannot be used: blocks that are not there
                ok, moved = [], 0
            with self._changed:
                self._end(part, ok, moved)

    def _end(self, part: _Part, ok: list[bool], moved: int) -> None:
        job = part.job
        # Blocks of a part that was not done are false already.
        if ok:
            job.ok[part.place] = ok
        job.nbytes += moved
        job.parts -= 1
        self._waiting_bytes -= part.nbytes
        # It holds buffers.
        part.work = None
        if job.parts == 0:
            del self._jobs[job.number]
            self._tell(Finished(job.number, job.ok, job.nbytes, time.monotonic() - job.begun))

    def _tell(self, end: Finished) -> None:
        if not self._finished and self._event is not None:
            os.eventfd_write(self._event, 1)
        self._finished.append(end)
        self._changed.notify_all()


def _check(keys: Sequence[object], views: Sequence[memoryview]) -> None:
    if len(keys) != len(views):
        raise ValueError(f"there are {len(keys)} names and {len(views)} buffers")


def _parts(sizes: list[int], nbytes: int) -> list[slice]:
    """Cut a job into runs of blocks, each of at most so many bytes or one block."""
    parts, first, length = [], 0, 0
    for at, size in enumerate(sizes):
        if at > first and length + size > nbytes:
            parts.append(slice(first, at))
            first, length = at, 0
        length += size
    parts.append(slice(first, len(sizes)))
    return parts
