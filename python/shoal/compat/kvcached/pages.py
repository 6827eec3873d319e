"""``InternalPage`` and ``PageAllocator``: page ids, which of them are mapped, and the blocks of one page.

Every page id is in one place: free (no memory), spare (mapped, nobody's), in use, or on its way. The limit is a count
and owns no ids, so shrinking and growing again cannot make one twice.
"""

from __future__ import annotations

import heapq
import logging
import threading
import time
import weakref
from collections import deque
from typing import TYPE_CHECKING

from shoal.compat.kvcached import settings

if TYPE_CHECKING:
    from collections.abc import Callable, Iterable, Sequence

    Broadcast = Callable[[int, list[int]], object]

__all__ = ["InternalPage", "PageAllocator"]

logger = logging.getLogger("shoal.compat.kvcached")

WAIT_S = 10.0
"""How long :meth:`PageAllocator.alloc_page` waits for a page that is on its way."""


class InternalPage:
    """The blocks that lie wholly in one page, and which of them are free.

    Parameters
    ----------
    page_id
        Its number.
    page_size
        Its bytes.
    """

    __slots__ = ("_end", "_free", "_is_free", "_start", "page_id", "page_size")

    def __init__(self, page_id: int, page_size: int) -> None:
        self.page_id = page_id
        self.page_size = page_size
        self._start = self._end = 0
        # A stack with the lowest id on top, and the same ids as a set.
        self._free: list[int] = []
        self._is_free: set[int] = set()

    def init(self, block_mem_size: int) -> None:
        """Cut the page into blocks, all free.

        Parameters
        ----------
        block_mem_size
            Bytes of a block in one buffer of one layer.
        """
        self._start, self._end = self.get_block_range(self.page_id, self.page_size, block_mem_size)
        self._free = list(range(self._end - 1, self._start - 1, -1))
        self._is_free = set(self._free)

    def alloc(self, num_blocks: int = 1) -> list[int]:
        """Take free blocks.

        Parameters
        ----------
        num_blocks
            How many.

        Returns
        -------
        list of int
            Their ids.

        Raises
        ------
        RuntimeError
            If fewer are free. Nothing is changed.
        """
        free = self._free
        if not 0 <= num_blocks <= len(free):
            raise RuntimeError(f"Not enough free blocks in page {self.page_id}: {len(free)}, wanted {num_blocks}")
        taken = free[len(free) - num_blocks :]
        taken.reverse()
        del free[len(free) - num_blocks :]
        self._is_free.difference_update(taken)
        return taken

    def free(self, block_id: int) -> None:
        """Give a block back.

        Parameters
        ----------
        block_id
            The block.

        Raises
        ------
        ValueError
            If it is not in the page, or free already. Nothing is changed.
        """
        self.free_batch([block_id])

    def free_batch(self, block_ids: Sequence[int]) -> None:
        """Give blocks back.

        Parameters
        ----------
        block_ids
            The blocks.

        Raises
        ------
        ValueError
            If one is not in the page, or free already, or named twice. Nothing is changed.
        """
        self.check_free(block_ids)
        self._is_free.update(block_ids)
        self._free.extend(block_ids)

    def check_free(self, block_ids: Sequence[int]) -> None:
        """Make sure that blocks can be given back.

        Parameters
        ----------
        block_ids
            The blocks.

        Raises
        ------
        ValueError
            If one is not in the page, or free already, or named twice.
        """
        if not block_ids:
            return
        if min(block_ids) < self._start or max(block_ids) >= self._end:
            raise ValueError(f"blocks {block_ids}: page {self.page_id} has {self._start} to {self._end - 1}")
        if len(set(block_ids)) != len(block_ids) or not self._is_free.isdisjoint(block_ids):
            raise ValueError(f"of the blocks {block_ids} one is free already, or named twice")

    def empty(self) -> bool:
        """Tell whether all of its blocks are free."""
        return len(self._free) == self._end - self._start

    def full(self) -> bool:
        """Tell whether none of its blocks is free."""
        return not self._free

    def num_free_blocks(self) -> int:
        """Count the free blocks."""
        return len(self._free)

    def get_free_blocks(self) -> list[int]:
        """List the free blocks, in the order in which they are taken."""
        return self._free[::-1]

    @staticmethod
    def get_block_range(page_id: int, page_size: int, block_mem_size: int) -> tuple[int, int]:
        """Give the first block that lies wholly in a page, and the one after the last.

        Parameters
        ----------
        page_id, page_size, block_mem_size
            The page, its bytes, and those of a block.

        Returns
        -------
        tuple of int
            A range; empty (the end not after the start) where every block crosses an edge.
        """
        start = -(-page_id * page_size // block_mem_size)
        return start, max(start, (page_id + 1) * page_size // block_mem_size)

    @staticmethod
    def get_num_blocks(page_size: int, block_mem_size: int) -> int:
        """Give how many blocks fit into a page that begins at one."""
        return page_size // block_mem_size


class PageAllocator:
    """Page ids of one group, mapped when they are handed out.

    Parameters
    ----------
    num_layers, num_kv_buffers
        Layers, and buffers in each.
    mem_size_per_layer
        Bytes of one buffer of one layer: with ``page_size``, how many pages there are.
    page_size
        Bytes of a page in one buffer of one layer.
    world_size, pp_rank
        Processes that hold a part of each layer, and the pipeline stage. With more than one process, pages are mapped
        through the callbacks.
    async_sched
        Taken for compatibility: an unmap always waits for what was launched.
    contiguous_layout
        How offsets are counted: see :func:`shoal.compat.kvcached.vmm_ops.map_to_kv_tensors`.
    enable_page_prealloc
        Whether a thread keeps spare pages mapped.
    group_id
        The group of tensors.
    ipc_name
        Taken for compatibility: there is no shared segment that another process could write a limit into.
    """

    def __init__(  # noqa: PLR0917  (the order is kvcached's)
        self,
        num_layers: int,
        mem_size_per_layer: int,
        page_size: int,
        world_size: int = 1,
        pp_rank: int = 0,
        async_sched: bool = False,
        contiguous_layout: bool = True,
        enable_page_prealloc: bool = True,
        num_kv_buffers: int = 2,
        group_id: int = 0,
        ipc_name: str = "",
    ) -> None:
        del async_sched, ipc_name
        if min(num_layers, page_size, num_kv_buffers) <= 0 or mem_size_per_layer < 0:
            raise ValueError("num_layers, page_size and num_kv_buffers must be 1 or more, and sizes not negative")
        self._page_size = page_size
        self._unit_bytes = page_size * num_layers * num_kv_buffers
        self._step = self._unit_bytes if contiguous_layout else page_size
        self._world_size = world_size
        self.pp_rank = pp_rank
        self._group_id = group_id
        self._capacity = self._total = mem_size_per_layer // page_size
        self._reserve_min = min(settings.MIN_RESERVED_PAGES, self._capacity)
        self._reserve_max = min(settings.MAX_RESERVED_PAGES, self._capacity)
        self._changed = threading.Condition()
        self._free = list(range(self._capacity))  # A heap: the lowest first.
        self._spare: deque[int] = deque()
        self._used: set[int] = set()
        self._map_callback: Broadcast | None = None
        self._unmap_callback: Broadcast | None = None
        self._use_worker_ipc = False
        self._prealloc = enable_page_prealloc
        self._refill = False
        self._thread: threading.Thread | None = None
        self._running = False

    # Pages.

    def alloc_page(self) -> InternalPage:
        """Take a page: a spare one, or one that is mapped now.

        Returns
        -------
        InternalPage
            It has memory, and no blocks yet.

        Raises
        ------
        RuntimeError
            If all are in use, or the page could not be mapped. Nothing is changed.
        """
        until = time.monotonic() + WAIT_S
        with self._changed:
            while True:
                if len(self._used) >= self._total:
                    raise RuntimeError(f"No free pages left: {len(self._used)} in use, the limit is {self._total}")
                if self._spare:
                    page = self._spare.popleft()
                    self._used.add(page)
                    if len(self._spare) < self._reserve_min:
                        self._ask_refill()
                    return InternalPage(page, self._page_size)
                if self._free:
                    page = heapq.heappop(self._free)
                    self._used.add(page)
                    break
                # All others are being mapped or unmapped.
                if not self._changed.wait(until - time.monotonic()):
                    raise RuntimeError(f"No free pages left: those that were on their way did not come in {WAIT_S} s")
        try:
            self._map([page])
        except Exception as error:
            with self._changed:
                self._used.discard(page)
                heapq.heappush(self._free, page)
                self._changed.notify_all()
            raise RuntimeError(f"Failed to map page {page}: {error}") from error
        with self._changed:
            self._ask_refill()
        return InternalPage(page, self._page_size)

    def free_page(self, page_id: int) -> None:
        """Give a page back. See :meth:`free_pages`."""
        self.free_pages([page_id])

    def free_pages(self, page_ids: Sequence[int]) -> None:
        """Give pages back: some stay mapped as spares, the others lose their memory.

        Parameters
        ----------
        page_ids
            The pages.

        Raises
        ------
        ValueError
            If one is not in use, or named twice. Nothing is changed.
        RuntimeError
            If the device did not let one go. They stay mapped, as spares, and can be handed out.
        """
        with self._changed:
            pages = list(page_ids)
            wrong = [page for page in pages if page not in self._used]
            if wrong or len(set(pages)) != len(pages):
                raise ValueError(f"pages {wrong or pages} are not in use, or named twice")
            self._used.difference_update(pages)
            keep = max(0, min(self._reserve_max, self._total - len(self._used)) - len(self._spare))
            self._spare.extend(pages[:keep])
            gone = pages[keep:]
            self._changed.notify_all()
        self._let_go(gone)

    # Limits.

    def resize(self, new_mem_size: int) -> bool:
        """Set how many pages may be in use.

        Parameters
        ----------
        new_mem_size
            Bytes of one buffer of one layer.

        Returns
        -------
        bool
            False if more are in use now, or there are not as many addresses: nothing is changed.
        """
        total = new_mem_size // self._page_size
        with self._changed:
            if not len(self._used) <= total <= self._capacity:
                return False
            self._total = total
            gone = [self._spare.pop() for _ in range(len(self._used) + len(self._spare) - total)]
            self._changed.notify_all()
        self._let_go(gone)
        return True

    def trim(self) -> None:
        """Take the spare pages' memory away."""
        with self._changed:
            gone = list(self._spare)
            self._spare.clear()
        self._let_go(gone)

    def reset_free_page_order(self) -> None:
        """Do nothing: free pages are handed out by number, the lowest first, always."""

    # Figures.

    def get_num_free_pages(self) -> int:
        """Count the pages that may still be handed out, spare ones included."""
        with self._changed:
            return self._total - len(self._used)

    def get_num_inuse_pages(self) -> int:
        """Count the pages in use."""
        return len(self._used)

    def get_num_total_pages(self) -> int:
        """Count the pages that may be in use."""
        return self._total

    def get_num_reserved_pages(self) -> int:
        """Count the spare pages."""
        return len(self._spare)

    def get_page_state(self) -> dict[str, int]:
        """Give all counts, of one moment.

        Returns
        -------
        dict
            ``total_pages``, ``free_pages``, ``inuse_pages`` and ``reserved_pages``.
        """
        with self._changed:
            total, used = self._total, len(self._used)
            return {
                "total_pages": total,
                "free_pages": total - used,
                "inuse_pages": used,
                "reserved_pages": len(self._spare),
            }

    def get_avail_physical_pages(self) -> int:
        """Count the pages that the device has memory for now, less ``1 - KVCACHED_GPU_UTILIZATION`` of it."""
        from shoal.compat.kvcached import vmm_ops

        figures = vmm_ops.device_bytes()
        if figures is None:
            # Pages are another process's to map: its memory is not seen from here.
            return self._capacity
        free, total = figures
        return max(0, int(free - total * (1.0 - settings.GPU_UTILIZATION))) // self._unit_bytes

    def check_and_get_resize_target(self, current_mem_size: int) -> int:
        """Give -1: limits are set by :meth:`resize` only, not by another process's write."""
        del current_mem_size
        return -1

    def get_resize_target(self) -> int:
        """Give -1, as :meth:`check_and_get_resize_target`."""
        return -1

    # Blocks.

    def get_page_id(self, block_id: int, block_mem_size: int) -> int:
        """Give the page in which a block begins."""
        return block_id * block_mem_size // self._page_size

    def group_indices_by_page(self, indices: Iterable[int], block_mem_size: int) -> dict[int, list[int]]:
        """Sort blocks by the page in which they begin.

        Parameters
        ----------
        indices
            The blocks.
        block_mem_size
            Bytes of a block in one buffer of one layer.

        Returns
        -------
        dict
            Blocks by page, in the order given.
        """
        page_size = self._page_size
        grouped: dict[int, list[int]] = {}
        page, end = -1, 0
        blocks: list[int] = []
        for index in indices:
            # Neighbours mostly lie in one page.
            offset = index * block_mem_size
            if not end - page_size <= offset < end:
                page = offset // page_size
                end = (page + 1) * page_size
                blocks = grouped.setdefault(page, [])
            blocks.append(index)
        return grouped

    # Several processes.

    def set_broadcast_map_callback(self, callback: Broadcast) -> None:
        """Set what maps pages in all processes: it is given how many there are, and offsets."""
        self._map_callback = callback

    def set_broadcast_unmap_callback(self, callback: Broadcast) -> None:
        """Set what unmaps pages in all processes."""
        self._unmap_callback = callback

    def set_use_worker_ipc(self, use_worker_ipc: bool) -> None:
        """Say whether the tensors are another process's even if there is only one."""
        self._use_worker_ipc = use_worker_ipc

    # Spare pages.

    def start_prealloc_thread(self) -> None:
        """Start keeping spare pages mapped, if it was enabled."""
        with self._changed:
            if not self._prealloc or self._thread is not None:
                return
            self._running = self._refill = True
            words = (weakref.ref(self), self._changed)
            self._thread = threading.Thread(target=_keep_spare, args=words, name="shoal-kvcached-prealloc", daemon=True)
            self._thread.start()

    def stop_prealloc_thread(self) -> None:
        """Stop keeping spare pages mapped. Those that are, stay."""
        with self._changed:
            thread, self._thread = self._thread, None
            self._running = False
            self._changed.notify_all()
        if thread is not None:
            thread.join(WAIT_S)

    def _ask_refill(self) -> None:
        self._refill = True
        self._changed.notify_all()

    def _refill_spare(self) -> None:
        """Map as many pages as are missing, as far as there is memory."""
        with self._changed:
            missing = min(self._reserve_min, self._total - len(self._used)) - len(self._spare)
        missing = min(missing, self.get_avail_physical_pages()) if missing > 0 else 0
        with self._changed:
            pages = [heapq.heappop(self._free) for _ in range(min(missing, len(self._free)))]
        if not pages:
            return
        try:
            self._map(pages)
        except Exception as error:  # noqa: BLE001  (whatever it is, alloc_page meets it again and tells)
            logger.warning("no spare pages now: %s", error)
            with self._changed:
                for page in pages:
                    heapq.heappush(self._free, page)
                self._changed.notify_all()
            return
        with self._changed:
            self._spare.extend(pages)
            over = len(self._used) + len(self._spare) - self._total
            gone = [self._spare.pop() for _ in range(max(0, over))]
            self._changed.notify_all()
        try:
            self._let_go(gone)
        except RuntimeError as error:
            logger.warning("%s", error)

    # The device.

    def _is_remote(self) -> bool:
        return self._world_size > 1 or self._use_worker_ipc

    def _map(self, pages: list[int]) -> None:
        from shoal.compat.kvcached import vmm_ops

        offsets = [page * self._step for page in pages]
        if self._is_remote() and self._map_callback is not None:
            self._map_callback(self._world_size, offsets)
        elif not vmm_ops.map_to_kv_tensors(offsets, self._group_id):
            raise RuntimeError(f"group {self._group_id} has no KV tensors")

    def _let_go(self, pages: list[int]) -> None:
        from shoal.compat.kvcached import vmm_ops

        if not pages:
            return
        offsets = [page * self._step for page in pages]
        try:
            if self._is_remote() and self._unmap_callback is not None:
                self._unmap_callback(self._world_size, offsets)
            elif not vmm_ops.unmap_from_kv_tensors(offsets, self._group_id):
                raise RuntimeError(f"group {self._group_id} has no KV tensors")
        except Exception as error:
            with self._changed:
                self._spare.extend(pages)
                self._changed.notify_all()
            raise RuntimeError(f"pages {pages} stay mapped: {error}") from error
        with self._changed:
            for page in pages:
                heapq.heappush(self._free, page)
            self._changed.notify_all()


def _keep_spare(of: weakref.ref[PageAllocator], changed: threading.Condition) -> None:
    """Keep spare pages mapped until the allocator says stop, or is gone: the thread does not hold it."""
    while True:
        with changed:
            allocator = of()
            if allocator is None or not allocator._running:
                return
            wanted, allocator._refill = allocator._refill, False
            if not wanted:
                del allocator
                changed.wait(1.0)
                continue
        allocator._refill_spare()
        del allocator
