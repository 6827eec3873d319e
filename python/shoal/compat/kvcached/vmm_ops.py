"""``kvcached.vmm_ops``: tensors whose pages are mapped and unmapped by offset.

The state is one for the process, as kvcached's is. Device names are torch's (``"cuda:0"``); ``"cpu"`` and ``"sim"`` are
the simulated device.
"""

from __future__ import annotations

import threading
from typing import TYPE_CHECKING

from shoal import MemoryManager
from shoal.compat.kvcached import settings
from shoal.compat.kvcached.pages import InternalPage, PageAllocator
from shoal.compat.kvcached.tensors import KvTensors

if TYPE_CHECKING:
    from collections.abc import Sequence

    import torch

__all__ = [
    "InternalPage",
    "PageAllocator",
    "create_kv_tensors",
    "init_kvcached",
    "kv_tensors_created",
    "map_to_kv_tensors",
    "shutdown_kvcached",
    "unmap_from_kv_tensors",
]


class _State:
    """What :func:`init_kvcached` set up."""

    def __init__(self) -> None:
        self.lock = threading.Lock()
        self.memory: MemoryManager | None = None
        self.page_bytes = settings.PAGE_SIZE
        self.contiguous = True
        self.groups: dict[int, KvTensors] = {}


_state = _State()


def init_kvcached(dev_str: str, page_size: int = 0, contiguous_layout: bool = True) -> None:
    """Choose the device, the page size and the layout. What was there before is shut down.

    Parameters
    ----------
    dev_str
        The device: ``"cuda:N"``, or ``"cpu"`` for the simulated one.
    page_size
        Bytes of a page; 0 keeps the one set before, at first ``KVCACHED_PAGE_SIZE_MB``.
    contiguous_layout
        One tensor for all layers of a group.

    Raises
    ------
    ValueError
        If ``page_size`` is no multiple of 2 MiB.
    DeviceError
        If the device cannot be used.
    """
    if page_size < 0 or page_size % (2 << 20):
        raise ValueError(f"page_size is {page_size}: it must be a multiple of 2 MiB ({2 << 20})")
    shutdown_kvcached()
    device = "sim" if dev_str.startswith(("cpu", "sim")) else "cuda:0" if dev_str == "cuda" else dev_str
    memory = MemoryManager(device)
    with _state.lock:
        _state.memory = memory
        _state.page_bytes = page_size or _state.page_bytes
        _state.contiguous = contiguous_layout


def shutdown_kvcached() -> None:
    """Give all memory back. Tensors that somebody still holds keep their addresses, without memory behind them."""
    with _state.lock:
        groups, _state.groups, _state.memory = _state.groups, {}, None
    for group in groups.values():
        group.close()


def create_kv_tensors(  # noqa: PLR0917  (the order is kvcached's)
    size: int,
    dtype_size: int,
    dev_str: str,
    num_layers: int,
    num_kv_buffers: int = 2,
    group_id: int = 0,
    unified_pool: bool = False,
) -> list[torch.Tensor]:
    """Reserve the addresses of a group's tensors. No page has memory yet.

    Parameters
    ----------
    size
        Bytes of one layer, all its buffers; rounded up to whole pages.
    dtype_size
        Bytes of an element: 1, 2, 4 or 8. The tensors are of the integer type of that size.
    dev_str
        Ignored: the device is that of :func:`init_kvcached`.
    num_layers, num_kv_buffers
        Layers, and buffers in each: 2 for K and V, 1 for one.
    group_id
        The group. The same group asked for twice is the same tensors.
    unified_pool
        K and V side by side in a layer's tensor.

    Returns
    -------
    list of torch.Tensor
        One flat tensor in the contiguous layout, else one a layer.

    Raises
    ------
    RuntimeError
        Before :func:`init_kvcached`, or if the group was created with other sizes, or ``dtype_size`` is none of those.
    ValueError
        If the sizes make no tensors.
    """
    del dev_str
    with _state.lock:
        if _state.memory is None:
            raise RuntimeError("init_kvcached() comes before create_kv_tensors()")
        made = KvTensors(
            _state.memory,
            page_bytes=_state.page_bytes,
            nbytes=size,
            item_bytes=dtype_size,
            layers=num_layers,
            buffers=num_kv_buffers,
            contiguous=_state.contiguous,
            unified=unified_pool,
        )
        known = _state.groups.setdefault(group_id, made)
    if known.made_of != made.made_of:
        raise RuntimeError(
            f"group {group_id} has tensors of (bytes, item bytes, layers, buffers, unified) {known.made_of}, "
            f"not {made.made_of}"
        )
    return list(known.tensors)


def kv_tensors_created(group_id: int = 0) -> bool:
    """Tell whether a group has tensors.

    Parameters
    ----------
    group_id
        The group.

    Returns
    -------
    bool
        False also before :func:`init_kvcached`.
    """
    return group_id in _state.groups


def map_to_kv_tensors(offsets: Sequence[int], group_id: int = 0) -> bool:
    """Give pages zeroed memory, in all layers; all or none.

    Parameters
    ----------
    offsets
        Where the pages begin: page id times the page's bytes (of all layers and buffers, in the contiguous layout).
    group_id
        The group.

    Returns
    -------
    bool
        False if the group has no tensors.

    Raises
    ------
    ValueError
        If an offset is not a page's, or the page is mapped. Nothing is changed.
    MemoryError
        If there is no room now. Nothing is changed.
    """
    group = _state.groups.get(group_id)
    if group is None:
        return False
    group.map(offsets)
    return True


def unmap_from_kv_tensors(offsets: Sequence[int], group_id: int = 0) -> bool:
    """Take pages' memory away, in all layers.

    Parameters
    ----------
    offsets
        As for :func:`map_to_kv_tensors`.
    group_id
        The group.

    Returns
    -------
    bool
        False if the group has no tensors.

    Raises
    ------
    ValueError
        If an offset is not a page's, or the page is not mapped. Nothing is changed.
    """
    group = _state.groups.get(group_id)
    if group is None:
        return False
    group.unmap(offsets)
    return True


def device_bytes() -> tuple[int, int] | None:
    """Give the bytes that can be had and those of the whole device; None before :func:`init_kvcached`."""
    memory = _state.memory
    if memory is None:
        return None
    figures = memory.device_memory()
    # What was given up a moment ago lies in a pool of the process: the next page takes it from there.
    return figures["free"] + memory.usage()["pooled"], figures["total"]
