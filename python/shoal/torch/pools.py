"""torch's allocations in a region: pools of its caching allocator whose memory is the region's.

torch's allocator keeps blocks of what it got and hands them out again without asking, pool by pool. So what goes into a
region goes into pools of its own (``torch.cuda.MemPool``), and freezing a region means never handing out from its pools
again. torch refuses one pool for two threads at a time, so there are as many as are used at once.
"""

from __future__ import annotations

import collections
import contextlib
import ctypes
import os
import threading
import weakref
from typing import TYPE_CHECKING, Any, Self

import torch

from shoal import _native
from shoal.errors import RegionError
from shoal.torch.tensors import device_of
from shoal.wake import TIMEOUT_S

if TYPE_CHECKING:
    from collections.abc import Iterator
    from types import TracebackType

    from shoal.memory import Region

__all__ = ["disable", "live_spans", "stats", "use_region"]

UNCACHED = "PYTORCH_NO_CUDA_MEMORY_CACHING"
"""With it, whatever its value, torch's allocator takes every tensor from the driver."""

_lock = threading.Lock()
_allocators: dict[int, Any] = {}
"""torch's allocator objects by slot. They are never dropped: torch's pools point to them without keeping them."""
_captures = [0]
"""How many graphs are being captured by our calls, in all threads."""
_captures_lock = threading.Lock()
"""Held where all work on the device is marked, which would end a capture, and where a capture begins."""
_abandoned: collections.deque[_Filling] = collections.deque()
"""What regions that are gone have left: tensors may still lie in it. Regions go wherever Python collects garbage, also
in a thread that holds one of our locks: so it has none."""


class _GraphPool:
    """A pool of graphs, which goes when none of them is left."""

    def __init__(self, pool: Any) -> None:
        self.pool = pool
        # Captures into it that are under way.
        self.captures = 0
        # torch captures into it no more: its graphs are gone, and tensors that they made live on.
        self.is_released = False

    def is_unused(self) -> bool:
        # The pool itself counts as one use, and each graph as another.
        return not self.captures and self.pool.use_count() <= 1


class _Filling:
    """What torch has of one region."""

    def __init__(self, region: Region) -> None:
        self.native = region._native
        self.name = region.name
        self.device = device_of(region)
        self.slot = self.native.torch_bind()
        self.lock = threading.Lock()
        self.users = 0
        self.idle: list[Any] = []
        self.sealed: list[Any] = []
        # A graph uses blocks at every replay that torch counts as free: what these have is not given up for dead while
        # one of their graphs lives, and what was made by name never, since nobody can know who still has the name.
        self.graphs: list[_GraphPool] = []
        self.kept: list[Any] = []

    def make(self) -> Any:
        """Make a pool that fills the region."""
        from torch.cuda.memory import CUDAPluggableAllocator

        with _lock:
            allocator = _allocators.get(self.slot)
            if allocator is None:
                name = f"shoal_torch_alloc_{self.slot}"
                allocator = _allocators[self.slot] = CUDAPluggableAllocator(_native.__file__, name, "shoal_torch_free")
        with torch.cuda.device(self.device):
            made = torch.cuda.MemPool(allocator.allocator())
        # A MemPool that is destroyed while any thread of the process is inside torch.cuda.use_mem_pool, or captures a
        # graph, ends the process: its destructor empties the pool, which asserts that nobody is. So none of ours is
        # ever destroyed; `end` takes from a pool what its destructor would have given back.
        ctypes.pythonapi.Py_IncRef(ctypes.py_object(made))
        return made

    def end(self, used: Any) -> None:
        """Take the memory of a pool in which nothing lives, for good: torch keeps the books of it, and no memory."""
        self.native.torch_discard([segment["address"] for segment in _segments(used)])
        torch._C._cuda_releasePool(self.device.index, used.id)

    def end_graphs(self) -> None:
        """Take the memory that graphs had which are gone, but for what tensors of theirs lie in.

        While a graph is being captured nothing is taken: the fence would end the capture.
        """
        with _captures_lock, self.lock:
            if not _captures[0]:
                self._end_graphs()

    def _end_graphs(self) -> None:
        for one in [one for one in self.graphs if one.is_unused()]:
            segments = _segments(one.pool)
            if not any(segment["active_size"] for segment in segments) and not one.is_released:
                self.graphs.remove(one)
                self.end(one.pool)
                continue
            if not one.is_released:
                # From here on torch hands out nothing of it: its free blocks lose their memory.
                one.is_released = True
                torch._C._cuda_releasePool(self.device.index, one.pool.id)
            self.native.torch_discard([segment["address"] for segment in segments if not segment["active_size"]])
            if not any(segment["active_size"] for segment in segments):
                self.graphs.remove(one)

    def take(self) -> Any:
        """Take a pool for one thread."""
        with self.lock:
            self.users += 1
            if self.idle:
                return self.idle.pop()
        try:
            return self.make()
        except BaseException:
            with self.lock:
                self.users -= 1
            raise

    def put(self, used: Any) -> None:
        """Give a thread's pool back."""
        with self.lock:
            self.users -= 1
            self.idle.append(used)

    def seal(self) -> list[int]:
        """Use these pools for nothing new; give the addresses of segments in which nothing lives."""
        self.end_graphs()
        with self.lock:
            if self.users:
                raise RegionError(f"region {self.name!r}: cannot freeze it while it is being filled", kind="state")
            self.sealed += self.idle
            self.idle = []
            return [
                segment["address"] for one in self.sealed for segment in _segments(one) if not segment["active_size"]
            ]

    def live(self) -> tuple[int, int]:
        """Give bytes in tensors, and bytes of free blocks that torch keeps."""
        with self.lock:
            pools = [*self.idle, *self.sealed, *self.kept, *(one.pool for one in self.graphs)]
        segments = [segment for one in pools for segment in _segments(one)]
        active = sum(segment["active_size"] for segment in segments)
        return active, sum(segment["total_size"] for segment in segments) - active

    def blocks(self) -> list[tuple[int, int]]:
        """Give the addresses of blocks that live: the first byte, and the byte after the last that was asked for."""
        with self.lock:
            pools = [*self.idle, *self.sealed, *self.kept, *(one.pool for one in self.graphs)]
        found = []
        for segment in (segment for one in pools for segment in _segments(one)):
            at = segment["address"]
            for block in segment["blocks"]:
                if block["state"] != "inactive":
                    found.append((at, at + (block.get("requested_size") or block["size"])))
                at += block["size"]
        return found

    def drop(self) -> bool:
        """Let go of pools in which nothing lives and that no graph has; whether none is left."""
        with _captures_lock, self.lock:
            if _captures[0]:
                return False
            self._end_graphs()
            for pools in (self.idle, self.sealed, self.kept):
                for one in list(pools):
                    if one.use_count() <= 1 and not any(segment["active_size"] for segment in _segments(one)):
                        pools.remove(one)
                        self.end(one)
            empty = not (self.users or self.idle or self.sealed or self.kept or self.graphs)
        if empty:
            self.native.torch_unbind()
        return empty


def _segments(one: Any) -> list[dict[str, Any]]:
    """Give what a pool has, without the trace of every allocation where that can be left out."""
    try:
        return list(one.snapshot(include_traces=False))
    except TypeError:
        return list(one.snapshot())


def _sweep() -> None:
    """Let go of what regions have left in which nothing lives any more."""
    left: list[_Filling] = []
    try:
        while True:
            try:
                left.append(_abandoned.popleft())
            except IndexError:
                break
            if left[-1].drop():
                left.pop()
    finally:
        _abandoned.extend(left)


def _filling(region: Region) -> _Filling:
    """Give what torch has of a region; the first call makes it."""
    filling = region._filling
    if isinstance(filling, _Filling):
        return filling
    if not region.grows:
        raise RegionError(
            f"region {region.name!r} was made with a length; make it without one (`mem.region({region.name!r})`) for "
            "torch to fill it",
            kind="state",
        )
    if device_of(region).type != "cuda":
        raise RegionError(
            f"region {region.name!r} lies on a simulated device, and torch's CPU allocator has no pools: put a "
            "module's weights there with shoal.torch.place, or a tensor with shoal.torch.tensor",
            kind="state",
        )
    if UNCACHED in os.environ:
        raise RegionError(
            f"region {region.name!r}: {UNCACHED} is set, so torch asks no pool for memory and nothing would lie in the "
            "region; start the process without it",
            kind="state",
        )
    _sweep()
    made = _Filling(region)
    with _lock:
        filling = region._filling
        if isinstance(filling, _Filling):
            return filling
        region._filling = made
    # Keeps what the region leaves in torch until nothing lives in it.
    weakref.finalize(region, _abandoned.append, made)
    return made


class _Stack(threading.local):
    """What this thread's allocations go to: the innermost entry. None: torch's own memory."""

    def __init__(self) -> None:
        self.entries: list[_Entry] = []


class _Entry:
    """One ``with`` of a thread; it is begun while it is the innermost one."""

    def __init__(self, device: torch.device | None, pool: Any) -> None:
        self.device = device
        self.pool = pool
        self.begun: contextlib.AbstractContextManager[None] | None = None

    def begin(self) -> None:
        if self.pool is not None:
            self.begun = torch.cuda.use_mem_pool(self.pool, self.device)
            self.begun.__enter__()

    def end(self) -> None:
        begun, self.begun = self.begun, None
        if begun is not None:
            begun.__exit__(None, None, None)


_stack = _Stack()


class _Held(threading.local):
    """What this thread entered of one :class:`use_region`."""

    def __init__(self) -> None:
        self.entries: list[tuple[_Filling, _native.RegionUse, _Entry]] = []


def _push(entry: _Entry) -> None:
    """Make an entry the one that allocations go to. Only one is begun at a time, so that none can mask another."""
    entries = _stack.entries
    if entries:
        entries[-1].end()
    try:
        entry.begin()
    except BaseException:
        if entries:
            entries[-1].begin()
        raise
    entries.append(entry)


def _pop(entry: _Entry) -> None:
    entries = _stack.entries
    if not entries or entries[-1] is not entry:
        raise RuntimeError("use_region and disable must be left in the reverse order, on the thread that entered them")
    entries.pop()
    entry.end()
    if entries:
        entries[-1].begin()


class use_region:  # noqa: N801  (it is called, as torch.no_grad is)
    """Let every CUDA tensor that this thread makes lie in a region. Made by calling it: ``with use_region(region):``.

    May be nested: the innermost counts. Other threads enter it themselves, also for the same region; threads that torch
    starts (a backward pass) make their tensors in torch's own memory. The region does not sleep or yield meanwhile. A
    shortage first takes from the manager's regions that may yield, and is then ``torch.OutOfMemoryError``.

    Parameters
    ----------
    region
        A region made without a length, on a GPU.
    timeout_s
        How long entering may wait for another operation, in seconds.

    Raises
    ------
    RegionError
        On entering: if the region is asleep, was made with a length, or lies on a simulated device.
    DeadlineError
        On entering: if it waited too long.
    """

    def __init__(self, region: Region, *, timeout_s: float = TIMEOUT_S) -> None:
        self._region = region
        self._timeout_s = timeout_s
        # One object may be entered by several threads at once, each with a pool of its own.
        self._held = _Held()

    def __enter__(self) -> Self:
        filling = _filling(self._region)
        use = filling.native.begin_use(self._timeout_s)
        taken = None
        try:
            taken = filling.take()
            entry = _Entry(filling.device, taken)
            _push(entry)
        except BaseException:
            if taken is not None:
                filling.put(taken)
            use.release()
            raise
        self._held.entries.append((filling, use, entry))
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        if not self._held.entries:
            raise RuntimeError("use_region was not entered on this thread: leave it where it was entered")
        filling, use, entry = self._held.entries.pop()
        try:
            _pop(entry)
        finally:
            filling.put(entry.pool)
            use.release()
        if isinstance(error, torch.OutOfMemoryError):
            why = filling.native.last_error()
            if why is not None:
                error.add_note(f"Shoal had no memory for region {filling.name!r}: {why}")


@contextlib.contextmanager
def disable() -> Iterator[None]:
    """Let tensors lie in torch's own memory again, inside :class:`use_region`."""
    entry = _Entry(None, None)
    _push(entry)
    try:
        yield
    finally:
        _pop(entry)


def live_spans(region: Region) -> list[tuple[int, int]]:
    """Give what torch counts as used of a region, as offsets of the first byte and the byte after the last."""
    filling = region._filling
    if not isinstance(filling, _Filling):
        return []
    return [(first - region.address, end - region.address) for first, end in filling.blocks()]


def stats(region: Region) -> dict[str, int]:
    """Give what torch has of a region, after giving up what belonged to graphs that are gone.

    Parameters
    ----------
    region
        The region.

    Returns
    -------
    dict
        ``segments`` and ``segment_bytes`` that torch got, ``dropped`` bytes of these that lost their memory by
        freezing, ``committed`` bytes of memory, ``retired`` bytes that are freed once their last work ends,
        ``allocations``, ``frees`` and ``refusals`` so far; ``active`` bytes in tensors, ``cached`` bytes of segments
        that no tensor has, and ``users`` that fill it at this moment.

    Raises
    ------
    RegionError
        If the region was made with a length.
    """
    filling = region._filling
    if isinstance(filling, _Filling):
        filling.end_graphs()
    figures = dict(region._native.segments_usage())
    figures.update(active=0, cached=0, users=0)
    if isinstance(filling, _Filling):
        figures["active"], figures["cached"] = filling.live()
        figures["users"] = filling.users
    return figures
