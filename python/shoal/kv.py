"""KV blocks that have device memory only while they are in use.

A :class:`KvBacking` lies over a region of kind ``"kv"`` and knows its blocks by number. Backing a block commits the
pages it lies on, unless a neighbour did already. A page that no block lies on may lose its memory, and does as soon as
it is needed elsewhere.
"""

from __future__ import annotations

from typing import TYPE_CHECKING

from shoal import _native
from shoal.memory import Report, parse_size

if TYPE_CHECKING:
    from collections.abc import Iterable

    from shoal.memory import Region, Size

__all__ = ["KvBacking"]

_ALL = (1 << 63) - 1


class KvBacking:
    """Which blocks of a KV region have device memory.

    Parameters
    ----------
    region
        A region of kind ``"kv"``, long enough for all blocks. Block ``i`` lies at ``i * block_bytes``.
    block_bytes
        Bytes of one block: all layers, K and V.
    blocks
        How many blocks there are.

    Raises
    ------
    RegionError
        If the region is not of kind ``"kv"``, or too short.
    """

    __slots__ = ("_native", "block_bytes", "blocks", "region")

    def __init__(self, region: Region, *, block_bytes: int, blocks: int) -> None:
        self.region = region
        self.block_bytes = block_bytes
        self.blocks = blocks
        self._native = _native.KvBacking(region._native, block_bytes, blocks)

    def back(self, ids: Iterable[int]) -> bool:
        """Give blocks device memory, all or none. It is zeroed where it is new.

        Parameters
        ----------
        ids
            The blocks.

        Returns
        -------
        bool
            False if there is no room now, or memory that was there before is not unmapped yet: nothing has changed, and
            trying later may work.

        Raises
        ------
        RegionError
            If a block does not exist or is backed already. Nothing has changed then.
        """
        return self._native.back(list(ids))

    def unback(self, ids: Iterable[int]) -> None:
        """Give blocks back. Pages without any block lose their memory, at once or when it is needed elsewhere.

        Parameters
        ----------
        ids
            The blocks.

        Raises
        ------
        RegionError
            If a block is not backed. Nothing has changed then.
        """
        self._native.unback(list(ids))

    def trim(self, nbytes: Size = _ALL) -> Report:
        """Give up memory of pages that no block lies on. No step may be running on blocks that were given back.

        Parameters
        ----------
        nbytes
            How many bytes; all there are, without it.

        Returns
        -------
        Report
            What was freed.

        Raises
        ------
        DeadlineError
            If another operation did not end in time.
        """
        return Report._of(self._native.trim(parse_size(nbytes)), whole=True)

    @property
    def idle_bytes(self) -> int:
        """Bytes of pages with memory that no block lies on."""
        return self._native.idle_bytes

    @property
    def backed_bytes(self) -> int:
        """Bytes of pages committed for blocks (after a reclaim, their contents may lie on the host)."""
        return self._native.backed_bytes

    @property
    def live_bytes(self) -> int:
        """Bytes of the blocks that are backed now."""
        return self._native.live_bytes
