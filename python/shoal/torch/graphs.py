"""CUDA graphs whose own memory lies in a region.

A graph's memory sleeps with its region and has its addresses again at the replay. What torch counts as free in the pool
of a graph is used at every replay, so it is given up only with the last graph of the pool: the next :func:`graph`,
``region.freeze()`` or :func:`shoal.torch.stats` of the region does that, once torch's count says that none is left.
"""

from __future__ import annotations

import contextlib
from typing import TYPE_CHECKING, Any

import torch

from shoal.errors import RegionError
from shoal.torch import pools
from shoal.wake import TIMEOUT_S, Guard

if TYPE_CHECKING:
    from collections.abc import Iterator

    from shoal.memory import Region
    from shoal.torch.pools import _Filling

__all__ = ["graph", "pool"]


def pool(region: Region) -> Any:
    """Make a pool whose memory is the region's, for what takes one: ``torch.cuda.graph(g, pool=pool(region).id)``.

    Unlike what :func:`graph` makes by itself, it stays until the region goes, with all its memory: whoever has its id
    may capture into it again. Graphs that are replayed in the order of their capture may share one.

    Parameters
    ----------
    region
        A region made without a length, on a GPU.

    Returns
    -------
    torch.cuda.MemPool
        The region keeps it too.

    Raises
    ------
    RegionError
        If the region was made with a length, or lies on a simulated device.
    """
    filling = pools._filling(region)
    made = filling.make()
    with filling.lock:
        filling.kept.append(made)
    return made


@contextlib.contextmanager
def graph(
    cuda_graph: torch.cuda.CUDAGraph, region: Region, *, pool: Any = None, timeout_s: float = TIMEOUT_S, **options: Any
) -> Iterator[Any]:
    """Capture a CUDA graph whose own memory lies in a region, so that it sleeps with it and replays after waking.

    As ``torch.cuda.graph``, under a guard of everything the region's manager has: nothing is evicted meanwhile, since
    the fence of an eviction would end the capture. Replay under a guard too. If the body or the capture fails, the
    graph is reset, the stream is the one from before, and the memory goes as that of a graph that is gone.

    Parameters
    ----------
    cuda_graph
        The graph.
    region
        Where its memory lies; it is awake.
    pool
        What :func:`pool` gave, or an earlier ``graph`` whose graph still lives, for graphs that share their memory;
        without it, a new one, whose memory goes when the graph is gone or reset.
    timeout_s
        How long entering may take, in seconds.
    options
        Given to ``torch.cuda.graph``: ``stream``, ``capture_error_mode``.

    Yields
    ------
    torch.cuda.MemPool
        Its pool.

    Raises
    ------
    RegionError
        If the region is asleep, was made with a length, or lies on a simulated device, or the pool is not one of its,
        or was one of graphs that are gone.
    DeadlineError, OutOfMemoryError, LeaseError, TransferError
        As :meth:`shoal.MemoryManager.guard`.
    """
    filling = pools._filling(region)
    filling.end_graphs()
    use = region._native.begin_use(timeout_s)
    try:
        with Guard(region._manager, timeout_s), capture(filling, pool, cuda_graph, **options) as own:
            yield own
    finally:
        use.release()


@contextlib.contextmanager
def capture(filling: _Filling, pool: Any, cuda_graph: torch.cuda.CUDAGraph, **options: Any) -> Iterator[Any]:
    """Capture a graph into a pool that fills the region, or into a new one of its own.

    Parameters
    ----------
    filling
        What torch has of the region.
    pool
        One of ``filling.kept`` or of ``filling.graphs``; without it, a new one.
    cuda_graph, options
        As :func:`graph`.

    Yields
    ------
    torch.cuda.MemPool
        The pool.

    Raises
    ------
    RegionError
        If the pool is neither.
    """
    with pools._captures_lock:
        pools._captures[0] += 1
    held: pools._GraphPool | None = None
    try:
        with filling.lock:
            # From here on none of them ends, since a capture is under way.
            shared = next((one for one in filling.graphs if one.pool is pool and not one.is_released), None)
            if shared is not None:
                shared.captures += 1
                held = shared
            elif pool is not None and not any(one is pool for one in filling.kept):
                raise RegionError(
                    f"region {filling.name!r}: the graph's pool has to be one that shoal.torch.pool gave for this "
                    f"region, or shoal.torch.graph for a graph that still lives, not {pool!r}",
                    kind="state",
                )
        if pool is None:
            held = pools._GraphPool(filling.make())
            held.captures = 1
            with filling.lock:
                filling.graphs.append(held)
        own = pool if held is None else held.pool
        uses, stream, is_begun = own.use_count(), torch.cuda.current_stream(), False
        try:
            with torch.cuda.graph(cuda_graph, pool=own.id, **options):
                is_begun = True
                yield own
        except BaseException:
            torch.cuda.set_stream(stream)
            if is_begun:
                cuda_graph.reset()
            if own.use_count() > uses:
                _end_capture(filling.device, own)
            raise
    finally:
        if held is not None:
            with filling.lock:
                held.captures -= 1
        with pools._captures_lock:
            pools._captures[0] -= 1


def _end_capture(device: torch.device, own: Any) -> None:
    """Tell torch's allocator of the end of a capture that failed before torch told it itself."""
    # It says that there is none where torch got as far as that.
    with contextlib.suppress(RuntimeError):
        torch._C._cuda_endAllocateToPool(device.index, own.id)
    torch._C._cuda_releasePool(device.index, own.id)
