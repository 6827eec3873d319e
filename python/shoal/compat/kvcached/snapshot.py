"""What a pool looks like at one moment, in kvcached's words (schema ``kvcached.observability.v1``)."""

from __future__ import annotations

from dataclasses import asdict, dataclass
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from shoal.compat.kvcached.kv_cache_manager import KVCacheManager

__all__ = ["KVCachePoolSnapshot", "pool_snapshot"]


@dataclass(frozen=True)
class KVCachePoolSnapshot:
    """One pool's figures. Counts of blocks overlap: reserved ones count as allocated and as available."""

    schema_version: str
    pool_type: str
    integration: str | None
    pool_name: str | None
    group_id: int
    num_layers: int
    num_kv_buffers: int
    page_size_bytes: int
    block_size_bytes: int
    total_blocks: int
    available_blocks: int
    allocated_blocks: int
    reserved_blocks: int
    available_bytes: int
    allocated_bytes: int
    reserved_bytes: int
    null_block_reserved: bool
    virtual_per_layer_bytes: int
    virtual_total_bytes: int
    mapped_bytes: int
    total_pages: int
    free_pages: int
    inuse_pages: int
    reserved_pages: int
    available_physical_pages: int
    effective_free_pages: int
    in_shrink: bool
    shrink_target_blocks: int | None
    resize_target_bytes: int

    def to_dict(self) -> dict[str, Any]:
        """Give it as a dict that JSON can hold."""
        return asdict(self)


def pool_snapshot(manager: KVCacheManager, integration: str | None) -> KVCachePoolSnapshot:
    """Take a pool's figures.

    Parameters
    ----------
    manager
        The pool; its lock is held by the caller.
    integration
        The engine's name, as the caller gives it.

    Returns
    -------
    KVCachePoolSnapshot
        The figures.
    """
    pages = manager.page_allocator.get_page_state()
    physical = manager.page_allocator.get_avail_physical_pages()
    layers = manager.num_layers * manager.num_kv_buffers
    block_bytes = manager.block_mem_size * layers
    available, allocated = manager.available_size(), manager._get_num_alloced_blocks()
    reserved = len(manager.reserved_blocks)
    return KVCachePoolSnapshot(
        schema_version="kvcached.observability.v1",
        pool_type="kv_cache",
        integration=integration,
        pool_name=manager.pool_name,
        group_id=manager.group_id,
        num_layers=manager.num_layers,
        num_kv_buffers=manager.num_kv_buffers,
        page_size_bytes=manager.page_size,
        block_size_bytes=manager.block_mem_size,
        total_blocks=manager.num_blocks,
        available_blocks=available,
        allocated_blocks=allocated,
        reserved_blocks=reserved,
        available_bytes=available * block_bytes,
        allocated_bytes=allocated * block_bytes,
        reserved_bytes=reserved * block_bytes,
        null_block_reserved=manager.null_block is not None,
        virtual_per_layer_bytes=manager.mem_size * manager.num_kv_buffers,
        virtual_total_bytes=manager.mem_size * layers,
        mapped_bytes=pages["inuse_pages"] * manager.page_size * layers,
        total_pages=pages["total_pages"],
        free_pages=pages["free_pages"],
        inuse_pages=pages["inuse_pages"],
        reserved_pages=pages["reserved_pages"],
        available_physical_pages=physical,
        effective_free_pages=min(pages["free_pages"], physical + pages["reserved_pages"]),
        in_shrink=manager.in_shrink,
        shrink_target_blocks=manager.target_num_blocks,
        resize_target_bytes=manager.page_allocator.get_resize_target(),
    )
