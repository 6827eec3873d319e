"""``kvcached.kv_cache_manager``: blocks, out of pages that are mapped while any of their blocks is in use.

What the names with an underscore do is what kvcached's own tests ask of them.
"""

from __future__ import annotations

import functools
import importlib
import logging
import sys
import threading
import time
from typing import TYPE_CHECKING, Any, Concatenate, ParamSpec, TypeVar

from shoal.compat.kvcached import settings
from shoal.compat.kvcached.pages import InternalPage, PageAllocator
from shoal.compat.kvcached.room import Page, PagesByRoom
from shoal.compat.kvcached.snapshot import KVCachePoolSnapshot, pool_snapshot
from shoal.compat.kvcached.vmm_ops import kv_tensors_created

if TYPE_CHECKING:
    from collections.abc import Callable, Iterable, Mapping, Sequence

__all__ = ["KVCacheManager"]

logger = logging.getLogger("shoal.compat.kvcached")

KV_TENSOR_WAIT_TIMEOUT = 10.0
SANITY_CHECK = settings.SANITY_CHECK
"""Taken for compatibility: a wrong free is an error that changes nothing, with it or without."""

_LOG_EVERY_S = 10.0
_UNITS = {"bytes": 1, "kb": 1 << 10, "mb": 1 << 20, "gb": 1 << 30}

_P = ParamSpec("_P")
_R = TypeVar("_R")


def _synchronized(
    method: Callable[Concatenate[KVCacheManager, _P], _R],
) -> Callable[Concatenate[KVCacheManager, _P], _R]:
    @functools.wraps(method)
    def locked(self: KVCacheManager, *args: _P.args, **kwargs: _P.kwargs) -> _R:
        with self._lock:
            return method(self, *args, **kwargs)

    return locked  # type: ignore[return-value]  # wraps() hides that it is a method


class KVCacheManager:
    """Blocks of one group of layers.

    Parameters
    ----------
    num_blocks
        How many blocks there are addresses for.
    block_size
        Tokens in a block.
    cell_size
        Bytes of a token in one buffer of one layer.
    num_layers, num_kv_buffers
        Layers, and buffers in each: 2 for K and V apart, 1 for one.
    world_size, pp_rank
        Processes that hold a part of each layer, and the pipeline stage. More than one needs an installed kvcached,
        whose sockets carry the messages.
    async_sched
        Taken for compatibility: several threads may call.
    reserve_null_block
        Whether block 0 is kept, for padding.
    group_id
        The group of tensors.
    pool_name
        A name for reports.

    Raises
    ------
    KVCachedConfigError
        If a block is larger than a page.
    """

    def __init__(  # noqa: PLR0917  (the order is kvcached's)
        self,
        num_blocks: int,
        block_size: int,
        cell_size: int,
        num_layers: int,
        world_size: int = 1,
        pp_rank: int = 0,
        async_sched: bool = False,
        reserve_null_block: bool = False,
        num_kv_buffers: int = 2,
        group_id: int = 0,
        pool_name: str | None = None,
    ) -> None:
        self.num_blocks = num_blocks
        self.block_mem_size = block_size * cell_size
        self.num_layers = num_layers
        self.num_kv_buffers = num_kv_buffers
        self.reserve_null_block = reserve_null_block
        self.group_id = group_id
        self._pool_name = pool_name
        self.page_size = settings.PAGE_SIZE
        if self.block_mem_size > self.page_size:
            megabytes = -(-self.block_mem_size // (2 << 20)) * 2
            raise _config_error()(
                f"a block of {self.block_mem_size} bytes is larger than a page of {self.page_size}: "
                f"set KVCACHED_PAGE_SIZE_MB={megabytes} or more, a multiple of 2"
            )
        self.mem_size = num_blocks * self.block_mem_size
        self.world_size = world_size
        self.pp_rank = pp_rank
        self.page_allocator = PageAllocator(
            num_layers,
            self.mem_size,
            self.page_size,
            world_size,
            pp_rank=pp_rank,
            async_sched=async_sched,
            contiguous_layout=settings.CONTIGUOUS_LAYOUT,
            enable_page_prealloc=settings.PAGE_PREALLOC_ENABLED,
            num_kv_buffers=num_kv_buffers,
            group_id=group_id,
        )
        self._is_remote = world_size > 1 or _uses_worker_ipc()
        self.page_allocator.set_use_worker_ipc(self._is_remote)
        if self._is_remote:
            self._connect()
        self.num_avail_blocks = 0  # Free blocks of pages in use.
        self.avail_pages = PagesByRoom()
        self.full_pages: dict[int, Page] = {}
        self.reserved_blocks: list[int] = []
        self.null_block: list[int] | None = None
        self.in_shrink = False
        self.target_num_blocks: int | None = None
        self._memory_limit_bytes: int | None = None
        self._memory_limit_effective_bytes: int | None = None
        self._memory_limit_revision = -1
        self._lock = threading.RLock()
        self._post_init_done = threading.Event()
        self._post_init_error: Exception | None = None
        threading.Thread(target=self._post_init, name="shoal-kvcached-init", daemon=True).start()

    # Blocks.

    def alloc(self, need_size: int) -> list[int] | None:
        """Take blocks.

        Parameters
        ----------
        need_size
            How many.

        Returns
        -------
        list of int or None
            Their ids, or None if so many cannot be had now.

        Raises
        ------
        RuntimeError
            If the pool could not be set up.
        """
        return self._alloc(need_size)

    @_synchronized
    def _alloc(self, need_size: int, _skip_wait: bool = False) -> list[int] | None:
        if not _skip_wait:
            self._wait_post_init()
        target = self.page_allocator.get_resize_target()
        if target > 0:
            self.resize(target)
        # What the device has free costs a question to the driver, so it is asked last.
        if self.num_avail_blocks + len(self.reserved_blocks) < need_size and self.available_size() < need_size:
            return None
        from_reserved = min(len(self.reserved_blocks), need_size)
        taken, self.reserved_blocks = self.reserved_blocks[:from_reserved], self.reserved_blocks[from_reserved:]
        while (missing := need_size - len(taken)) > 0:
            if self.avail_pages:
                page = self._pick_avail_page(missing)
            else:
                # What is free in fact is another matter than what was free when it was counted. What goes wrong
                # elsewhere is a mistake, and is heard of.
                try:
                    page = self.page_allocator.alloc_page()
                    page.init(self.block_mem_size)
                except RuntimeError as error:
                    self._rollback_partial_alloc(taken, from_reserved)
                    logger.info("no page for %d of %d blocks: %s", missing, need_size, error)
                    return None
                if page.num_free_blocks() == 0:
                    # Every block of it lies across an edge.
                    self.full_pages[page.page_id] = page
                    continue
                self.num_avail_blocks += page.num_free_blocks()
            count = min(page.num_free_blocks(), missing)
            taken.extend(page.alloc(count))
            self.num_avail_blocks -= count
            self._put(page)
        return taken

    @_synchronized
    def free(self, indices: Sequence[int]) -> None:
        """Give blocks back. Pages without any block in use may lose their memory.

        Parameters
        ----------
        indices
            The blocks.

        Raises
        ------
        ValueError
            If one is not in use, or reserved, or named twice. Nothing is changed.
        """
        self._wait_post_init()
        if not indices:
            return
        reserved = self.reserved_blocks and set(self.reserved_blocks).intersection(indices)
        if reserved:
            raise ValueError(f"blocks {sorted(reserved)} are reserved: free_reserved() gives those back")
        grouped = self.page_allocator.group_indices_by_page(indices, self.block_mem_size)
        pages = {}
        for page_id, blocks in grouped.items():
            page = self.full_pages.get(page_id) or self.avail_pages.get(page_id)
            if page is None:
                raise ValueError(f"blocks {blocks} are not in use: page {page_id} has none that is")
            if isinstance(page, InternalPage):
                page.check_free(blocks)
            pages[page_id] = page
        unused = []
        for page_id, page in pages.items():
            if self.full_pages.pop(page_id, None) is None:
                self.avail_pages.pop(page_id)
            page.free_batch(grouped[page_id])
            self.num_avail_blocks += len(grouped[page_id])
            if page.empty():
                unused.append(page_id)
                self.num_avail_blocks -= page.num_free_blocks()
            else:
                self.avail_pages[page_id] = page
        if unused:
            self.page_allocator.free_pages(unused)
        if self.in_shrink and self.target_num_blocks is not None:
            self._go_on_shrinking(self.target_num_blocks)

    def _put(self, page: Page) -> None:
        if page.full():
            self.full_pages[page.page_id] = page
        else:
            self.avail_pages[page.page_id] = page

    def _pick_avail_page(self, remaining_need: int) -> Page:
        return self.avail_pages.take(remaining_need)

    def _rollback_partial_alloc(self, taken: list[int], from_reserved: int) -> None:
        # Off the pages first: the reserved ones are no free blocks yet.
        if len(taken) > from_reserved:
            self.free(taken[from_reserved:])
        self.reserved_blocks = taken[:from_reserved] + self.reserved_blocks

    @property
    def avail_pages(self) -> PagesByRoom:
        """Pages with free blocks and blocks in use."""
        return self._avail_pages

    @avail_pages.setter
    def avail_pages(self, pages: Mapping[int, Page] | Iterable[tuple[int, Page]]) -> None:
        self._avail_pages = PagesByRoom(pages)

    # Reservations.

    @_synchronized
    def try_to_reserve(self, need_size: int) -> bool:
        """See to it that at least so many blocks are kept for the next :meth:`alloc`.

        Parameters
        ----------
        need_size
            How many.

        Returns
        -------
        bool
            Whether they could be had.
        """
        self._wait_post_init()
        blocks = self.alloc(need_size)
        if blocks is None:
            return False
        self.reserved_blocks.extend(blocks)
        return True

    @_synchronized
    def free_reserved(self) -> None:
        """Give the reserved blocks back."""
        if self.reserved_blocks:
            blocks, self.reserved_blocks = self.reserved_blocks, []
            self.free(blocks)

    # Limits.

    @_synchronized
    def resize(self, new_mem_size: int) -> bool:
        """Set how much may be in use.

        Parameters
        ----------
        new_mem_size
            Bytes of one buffer of one layer.

        Returns
        -------
        bool
            True if it holds now; False if more is in use: nothing new is handed out then, and it holds as soon as
            enough was given back.

        Raises
        ------
        ValueError
            If it is negative, or more than there are addresses for. Nothing is changed.
        """
        self._wait_post_init()
        if new_mem_size < 0:
            raise ValueError("new_mem_size must not be negative")
        size = getattr(self, "mem_size", None)
        if size is not None and new_mem_size > size:
            raise ValueError(f"new_mem_size is {new_mem_size}: there are addresses for {size} bytes")
        if self.page_allocator.resize(new_mem_size):
            self.in_shrink = False
            self.target_num_blocks = None
            return True
        self.free_reserved()
        self.in_shrink = True
        self.target_num_blocks = new_mem_size // self.block_mem_size
        return False

    def _go_on_shrinking(self, target: int) -> None:
        if self._get_num_alloced_blocks() <= target and self.page_allocator.resize(target * self.block_mem_size):
            self.in_shrink = False
            self.target_num_blocks = None

    @_synchronized
    def set_memory_limit(self, limit_bytes: int, *, revision: int) -> dict[str, Any]:
        """Set how much memory may be in use, in all layers and buffers.

        Parameters
        ----------
        limit_bytes
            Bytes; rounded down to whole pages of all layers, and to what there are addresses for.
        revision
            A number that grows with each change: an older one is not heard, and one number stands for one limit.

        Returns
        -------
        dict
            As :meth:`memory_limit_state`; ``status`` may also be ``"stale"`` or ``"conflict"``: nothing was changed.

        Raises
        ------
        ValueError
            If a number is negative.
        """
        limit_bytes, revision = int(limit_bytes), int(revision)
        if limit_bytes < 0 or revision < 0:
            raise ValueError("limit_bytes and revision must not be negative")
        if revision < self._memory_limit_revision:
            return self._memory_limit_state("stale")
        if revision == self._memory_limit_revision:
            return self._memory_limit_state(None if limit_bytes == self._memory_limit_bytes else "conflict")
        unit = self._memory_limit_page_bundle_bytes()
        pages = min(limit_bytes // unit, self.mem_size // self.page_size)
        self.resize(pages * self.page_size)
        self._memory_limit_bytes = limit_bytes
        self._memory_limit_effective_bytes = pages * unit
        self._memory_limit_revision = revision
        return self._memory_limit_state()

    @_synchronized
    def memory_limit_state(self) -> dict[str, Any]:
        """Give the limit and how far it is kept.

        Returns
        -------
        dict
            ``status`` (``"applied"``, or ``"deferred"`` while more is in use), ``limit_bytes``,
            ``effective_limit_bytes``, ``current_capacity_bytes``, ``revision``, ``mapped_bytes``, ``remaining_bytes``,
            ``overage_bytes``, ``reason``, ``pool_name`` and ``group_id``.
        """
        return self._memory_limit_state()

    def _memory_limit_page_bundle_bytes(self) -> int:
        return self.page_size * self.num_layers * self.num_kv_buffers

    def _memory_limit_state(self, status: str | None = None) -> dict[str, Any]:
        pages = self.page_allocator.get_page_state()
        unit = self._memory_limit_page_bundle_bytes()
        mapped = (pages["inuse_pages"] + pages["reserved_pages"]) * unit
        limit = self._memory_limit_effective_bytes
        status = status or ("deferred" if self.in_shrink else "applied")
        reasons = {"deferred": "inuse_capacity_above_limit", "conflict": "revision_reused_with_different_limit"}
        return {
            "status": status,
            "pool_name": self.pool_name or "",
            "group_id": self.group_id,
            "limit_bytes": self._memory_limit_bytes,
            "effective_limit_bytes": limit,
            "current_capacity_bytes": pages["total_pages"] * unit,
            "revision": self._memory_limit_revision,
            "mapped_bytes": mapped,
            "remaining_bytes": None if limit is None else max(0, limit - mapped),
            "overage_bytes": 0 if limit is None else max(0, mapped - limit),
            "reason": reasons.get(status, ""),
        }

    # Figures.

    @_synchronized
    def available_size(self) -> int:
        """Count the blocks that could be had now, reserved ones included.

        Where blocks cross the edges of pages it may be a few too many: pages then differ in how many they hold.
        """
        blocks = self.num_avail_blocks + len(self.reserved_blocks)
        if self.in_shrink:
            return blocks
        allocator = self.page_allocator
        physical = allocator.get_avail_physical_pages() + allocator.get_num_reserved_pages()
        pages = min(allocator.get_num_free_pages(), physical)
        return blocks + pages * InternalPage.get_num_blocks(self.page_size, self.block_mem_size)

    @_synchronized
    def get_page_occupancy(self, page_ids: Iterable[int]) -> dict[int, int]:
        """Count the blocks in use on each page.

        Parameters
        ----------
        page_ids
            The pages.

        Returns
        -------
        dict
            Blocks by page; 0 for pages of which none is in use.
        """
        occupancy = {}
        for page_id in page_ids:
            page = self.full_pages.get(page_id) or self.avail_pages.get(page_id)
            start, end = InternalPage.get_block_range(page_id, self.page_size, self.block_mem_size)
            occupancy[page_id] = 0 if page is None else end - start - page.num_free_blocks()
        return occupancy

    @_synchronized
    def get_mapped_memory_size(self, unit: str = "bytes") -> float:
        """Give the memory of pages in use, in all layers and buffers.

        Parameters
        ----------
        unit
            ``"bytes"``, ``"kb"``, ``"mb"`` or ``"gb"`` (powers of 1024).

        Returns
        -------
        float
            How much.

        Raises
        ------
        ValueError
            If the unit is unknown.
        """
        if unit not in _UNITS:
            raise ValueError(f"Unknown unit: {unit}; it can be {', '.join(_UNITS)}")
        nbytes = self.page_allocator.get_num_inuse_pages() * self._memory_limit_page_bundle_bytes()
        return nbytes if unit == "bytes" else nbytes / _UNITS[unit]

    @property
    def pool_name(self) -> str | None:
        """The name given when it was made."""
        return self._pool_name

    @_synchronized
    def observability_snapshot(self, *, integration: str | None = None) -> KVCachePoolSnapshot:
        """Give all figures of one moment.

        Parameters
        ----------
        integration
            An engine's name, to be put into it.

        Returns
        -------
        KVCachePoolSnapshot
            The figures.
        """
        return pool_snapshot(self, integration)

    def observability_snapshot_dict(self, *, integration: str | None = None) -> dict[str, Any]:
        """Give :meth:`observability_snapshot` as a dict that JSON can hold."""
        return self.observability_snapshot(integration=integration).to_dict()

    @_synchronized
    def _get_num_alloced_blocks(self) -> int:
        """Count the blocks in use, reserved ones included."""
        per_page = InternalPage.get_num_blocks(self.page_size, self.block_mem_size)
        pages = len(self.full_pages) + len(self.avail_pages)
        if self.page_size % self.block_mem_size == 0:
            return pages * per_page - self.num_avail_blocks
        # Blocks across an edge are nobody's: each page has its own number.
        spans = (
            InternalPage.get_block_range(page_id, self.page_size, self.block_mem_size)
            for page_id in (*self.full_pages, *self.avail_pages)
        )
        return sum(end - start for start, end in spans) - self.num_avail_blocks

    # All of it.

    @_synchronized
    def trim(self) -> None:
        """Take the memory of spare pages away."""
        self._wait_post_init()
        self.page_allocator.trim()

    @_synchronized
    def clear(self) -> None:
        """Give all blocks back, whoever holds them, and begin anew."""
        self._wait_post_init()
        self.page_allocator.stop_prealloc_thread()
        self.reserved_blocks = []
        pages = [*self.avail_pages, *self.full_pages]
        self.avail_pages.clear()
        self.full_pages.clear()
        self.num_avail_blocks = 0
        if pages:
            self.page_allocator.free_pages(pages)
        self.trim()
        self.page_allocator.reset_free_page_order()
        self.in_shrink = False
        self.target_num_blocks = None
        self.null_block = None
        self._reserve_null_block()
        self.page_allocator.start_prealloc_thread()

    # Setting up.

    def _post_init(self) -> None:
        try:
            until = time.monotonic() + KV_TENSOR_WAIT_TIMEOUT
            while not self._tensors_created():
                if time.monotonic() > until:
                    raise TimeoutError(f"KV tensors not created after {KV_TENSOR_WAIT_TIMEOUT} seconds")
                time.sleep(0.001)
            self._reserve_null_block()
            self.page_allocator.start_prealloc_thread()
        except Exception as error:
            logger.exception("the pool could not be set up")
            self._post_init_error = error
        finally:
            self._post_init_done.set()

    def _wait_post_init(self) -> None:
        if not self._post_init_done.is_set():
            self._post_init_done.wait()
        error = getattr(self, "_post_init_error", None)
        if error is not None:
            raise RuntimeError(f"the pool could not be set up: {error}") from error

    def _tensors_created(self) -> bool:
        if not self._is_remote:
            return kv_tensors_created(group_id=self.group_id)
        created = importlib.import_module("kvcached.tp_ipc_util").broadcast_kv_tensors_created
        return bool(created(self.world_size, self.pp_rank, group_id=self.group_id))

    def _connect(self) -> None:
        try:
            tp_ipc_util = importlib.import_module("kvcached.tp_ipc_util")
        except ImportError as error:
            raise RuntimeError(
                "several processes need an installed kvcached, for its sockets to the workers"
            ) from error
        pp_rank, group_id = self.pp_rank, self.group_id

        def map_pages(world_size: int, offsets: list[int]) -> None:
            tp_ipc_util.broadcast_map_to_kv_tensors(world_size, offsets, pp_rank, group_id)

        def unmap_pages(world_size: int, offsets: list[int]) -> None:
            tp_ipc_util.broadcast_unmap_from_kv_tensors(world_size, offsets, pp_rank, group_id)

        self.page_allocator.set_broadcast_map_callback(map_pages)
        self.page_allocator.set_broadcast_unmap_callback(unmap_pages)

    def _reserve_null_block(self) -> None:
        """Take block 0, however long it takes until there is memory for it."""
        if not self.reserve_null_block:
            self.null_block = None
            return
        began = time.monotonic()
        logged_at, logged, waits = 0.0, "", 0
        while True:
            available = self.available_size()
            block = self._alloc(1, _skip_wait=True) if available >= 1 else None
            if block is not None:
                break
            reason = "no_effective_capacity" if available < 1 else "alloc_returned_none_after_capacity_check"
            now = time.monotonic()
            if reason != logged or now - logged_at >= _LOG_EVERY_S:
                logger.warning(
                    f"Waiting for memory for the null block: reason={reason}, elapsed={now - began:.1f}s, "
                    f"available={available}"
                )
                logged_at, logged = now, reason
            waits += 1
            time.sleep(0.01)
        if block != [0]:
            raise RuntimeError(f"Failed to reserve null block at index 0: block {block} was handed out first")
        self.null_block = block
        elapsed = time.monotonic() - began
        if waits:
            logger.info(f"Reserved null block after waiting for memory: elapsed={elapsed:.1f}s")


def _uses_worker_ipc() -> bool:
    """Whether kvcached's vLLM integration says that the tensors are another process's."""
    interfaces = sys.modules.get("kvcached.integration.vllm.interfaces")
    return bool(interfaces is not None and interfaces.should_use_worker_ipc())


def _config_error() -> type[Exception]:
    """Give kvcached's own class if it is there, because its integrations catch that."""
    return getattr(sys.modules.get("kvcached.utils"), "KVCachedConfigError", settings.KVCachedConfigError)
