"""vLLM's ``BlockPool`` over memory that comes and goes. Imported only inside vLLM's engine process."""

from __future__ import annotations

import functools
from typing import TYPE_CHECKING, Any

from vllm.v1.core import block_pool, kv_cache_coordinator

from shoal.vllm.queue import ElasticQueue

if TYPE_CHECKING:
    from collections.abc import Iterable

    from shoal.vllm.cache import ElasticCache

__all__ = ["ElasticBlockPool", "install"]


class ElasticBlockPool(block_pool.BlockPool):
    """vLLM's books of blocks, with :class:`~shoal.vllm.queue.ElasticQueue` for those that nobody uses.

    Parameters
    ----------
    cache
        Where the blocks lie. Its first block is already out: it is vLLM's null block.
    arguments
        vLLM's own.
    """

    def __init__(self, cache: ElasticCache, *arguments: Any, **named: Any) -> None:
        super().__init__(*arguments, **named)
        self.cache = cache
        self._is_counting = False
        self.free_block_queue = ElasticQueue(self.blocks, cache.kv, cache.kv.groups[0].blocks)
        (self.null_block,) = self.free_block_queue.adopt(1)
        if cache.transfers is not None:
            self.free_block_queue.read = cache.transfers.read
            cache.transfers.ended = self.free_block_queue.look_again
        cache.pool = self

    def get_num_free_blocks(self) -> int:
        """Say how many blocks can be promised.

        Returns
        -------
        int
            While blocks are taken: only those that have memory, if what is wanted has none.
        """
        queue = self.free_block_queue
        return self.num_gpu_blocks - queue.used if self._is_counting else queue.num_free_blocks

    def get_usage(self) -> float:
        """Give the share of all blocks that is in use, as vLLM shows it.

        Returns
        -------
        float
            From 0 to 1.
        """
        total = self.num_gpu_blocks - 1
        return (self.free_block_queue.used - 1) / total if total else 0.0

    def reset_prefix_cache(self) -> bool:
        """Forget what is cached, and give its memory back.

        Returns
        -------
        bool
            Whether that could be: nothing may be in use.
        """
        self._is_counting = True
        try:
            done = super().reset_prefix_cache()
        finally:
            self._is_counting = False
        if done:
            self.free_block_queue.give_up(self.free_block_queue.get_all_free_blocks())
        return done

    def free_blocks(self, ordered_blocks: Iterable[Any]) -> None:
        """Take blocks back; under a limit, memory beyond it goes at once.

        Parameters
        ----------
        ordered_blocks
            vLLM's blocks, in the order in which they shall go.
        """
        super().free_blocks(ordered_blocks)
        self.cache.keep_limit()

    def forget(self, units: int | None = None) -> int:
        """Let cached blocks go by whole pieces of memory, the longest unused first.

        Parameters
        ----------
        units
            How many of the shortest pieces; all that can go, without it.

        Returns
        -------
        int
            How many went.
        """
        self.free_block_queue.look_again()
        used = (block.block_id for block in self.blocks if block.ref_cnt > 0)
        cache = self.cache
        gone = self.free_block_queue.idle(cache.block_bytes, cache.unit_bytes, cache.units_per_piece, used)[:units]
        for blocks in gone:
            for block in blocks:
                self._maybe_evict_cached_block(block)
            self.free_block_queue.give_up(blocks)
        return len(gone)


def install(cache: ElasticCache) -> None:
    """Let the next pool of as many blocks as the cache has be ours.

    Parameters
    ----------
    cache
        Its memory.
    """

    def make(*arguments: Any, **named: Any) -> block_pool.BlockPool:
        number = named.get("num_gpu_blocks", arguments[0] if arguments else None)
        if cache.pool is None and number == cache.blocks:
            return ElasticBlockPool(cache, *arguments, **named)
        return block_pool.BlockPool(*arguments, **named)

    kv_cache_coordinator.BlockPool = make
    _announce(kv_cache_coordinator.KVCacheCoordinator)


def _announce(coordinator: Any) -> None:
    """Let a coordinator tell our pool how many blocks are about to be taken, before it is asked how many there are."""
    original = coordinator.get_num_blocks_to_allocate
    if getattr(original, "_is_shoals", False):
        return

    @functools.wraps(original)
    def get_num_blocks_to_allocate(self: Any, *arguments: Any, **named: Any) -> int:
        number = original(self, *arguments, **named)
        if isinstance(self.block_pool, ElasticBlockPool):
            self.block_pool.free_block_queue.expect(number)
        return number

    get_num_blocks_to_allocate._is_shoals = True  # type: ignore[attr-defined]
    coordinator.get_num_blocks_to_allocate = get_num_blocks_to_allocate
