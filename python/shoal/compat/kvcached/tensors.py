"""The tensors of one group of layers, and which of their pages have memory.

Apart from ``vmm_ops`` because that is a face with global state, and this is one object with a lock. Each tensor lies
over a region of its own and keeps its addresses for ever, also after :meth:`KvTensors.close`: touching it then faults,
as touching any page without memory does. There is no page of zeros behind unmapped addresses.
"""

from __future__ import annotations

import logging
import threading
from typing import TYPE_CHECKING

import torch

import shoal

if TYPE_CHECKING:
    from collections.abc import Iterable, Sequence

    from shoal import MemoryManager

__all__ = ["KvTensors"]

_log = logging.getLogger(__name__)
_DTYPES = {1: torch.int8, 2: torch.int16, 4: torch.int32, 8: torch.int64}


class KvTensors:
    """One group's tensors.

    Parameters
    ----------
    memory
        Where they lie.
    page_bytes
        kvcached's page size, in bytes.
    nbytes
        Bytes of one layer, all its buffers; rounded up to whole pages.
    item_bytes
        Bytes of an element: 1, 2, 4 or 8.
    layers
        How many layers.
    buffers
        2 for K and V apart, 1 for one buffer a layer.
    contiguous
        One tensor of all layers, whose page is that of all layers together; else a tensor a layer.
    unified
        K and V side by side in each layer's tensor: a page is mapped once, not once for each half.
    """

    def __init__(
        self,
        memory: MemoryManager,
        *,
        page_bytes: int,
        nbytes: int,
        item_bytes: int,
        layers: int,
        buffers: int,
        contiguous: bool,
        unified: bool,
    ) -> None:
        # Here, because programs put stand-ins for torch in its place where they need no tensors.
        from shoal.torch import tensor

        if item_bytes not in _DTYPES:
            raise RuntimeError(f"Unsupported dtype size: {item_bytes}; it can be 1, 2, 4 or 8")
        if nbytes <= 0 or layers <= 0 or buffers not in (1, 2):
            raise ValueError(f"{nbytes} bytes in {layers} layers of {buffers} buffers are no KV tensors")
        nbytes = -(-nbytes // page_bytes) * page_bytes
        self.made_of = (nbytes, item_bytes, layers, buffers, unified)
        self._lock = threading.Lock()
        self._mapped: set[int] = set()
        # A unit is what one page id stands for in one tensor; halves are where it is mapped besides its own place.
        if contiguous:
            self.unit_bytes = page_bytes * layers * buffers
            length, count, halves = nbytes * layers, 1, 1
        else:
            self.unit_bytes = page_bytes
            halves = 1 if unified else buffers
            length, count = nbytes, layers
        if length % (halves * self.unit_bytes):
            raise ValueError(
                f"a tensor of {length} bytes does not hold {halves} times a whole number of pages of {self.unit_bytes}"
            )
        self.units = length // self.unit_bytes // halves
        self._halves = halves
        self._regions = [memory.region(f"kvcached {layer}", length, kind="kv") for layer in range(count)]
        self._backings = [
            shoal.KvBacking(region, block_bytes=self.unit_bytes, blocks=self.units * halves) for region in self._regions
        ]
        dtype = _DTYPES[item_bytes]
        self.tensors = [tensor(region, 0, (length // item_bytes,), dtype) for region in self._regions]

    def map(self, offsets: Sequence[int]) -> None:
        """Give pages zeroed memory, all or none.

        Parameters
        ----------
        offsets
            Where they begin in their tensor, in bytes.

        Raises
        ------
        ValueError
            If an offset is not a page's, or the page has memory, or is named twice. Nothing is changed.
        MemoryError
            If there is no room now. Nothing is changed.
        """
        with self._lock:
            units = self._units(offsets)
            if taken := sorted(units & self._mapped):
                raise ValueError(f"pages {taken} are mapped already")
            self._back(units)
            self._mapped |= units

    def unmap(self, offsets: Sequence[int]) -> None:
        """Take pages' memory away, once what was launched on them is done.

        Parameters
        ----------
        offsets
            Where they begin in their tensor, in bytes.

        Raises
        ------
        ValueError
            If an offset is not a page's, or the page has no memory, or is named twice. Nothing is changed.
        """
        with self._lock:
            units = self._units(offsets)
            if missing := sorted(units - self._mapped):
                raise ValueError(f"pages {missing} are not mapped")
            self._unback(units)
            self._mapped -= units

    @property
    def mapped(self) -> int:
        """How many pages have memory."""
        return len(self._mapped)

    def close(self) -> None:
        """Give all memory back. The tensors' addresses stay reserved as long as somebody holds the tensors."""
        with self._lock:
            self._unback(self._mapped)
            self._mapped = set()

    def _units(self, offsets: Sequence[int]) -> set[int]:
        units = set()
        for offset in offsets:
            unit, rest = divmod(offset, self.unit_bytes)
            if rest or not 0 <= unit < self.units:
                raise ValueError(
                    f"offset {offset} is not that of a page: pages are {self.unit_bytes} bytes, there are {self.units}"
                )
            units.add(unit)
        if len(units) != len(offsets):
            raise ValueError("a page is named twice")
        return units

    def _blocks(self, units: Iterable[int]) -> list[int]:
        return [unit + half * self.units for unit in sorted(units) for half in range(self._halves)]

    def _back(self, units: set[int]) -> None:
        blocks = self._blocks(units)
        done = []
        try:
            for backing in self._backings:
                if not backing.back(blocks):
                    raise MemoryError(f"no device memory for {len(units)} pages of {len(self._backings)} tensors")
                done.append(backing)
        except BaseException:
            for backing in done:
                backing.unback(blocks)
                _trim(backing)
            raise

    def _unback(self, units: set[int]) -> None:
        blocks = self._blocks(units)
        for backing in self._backings:
            backing.unback(blocks)
            # What a neighbour does not need goes now: whoever frees pages wants them free.
            _trim(backing)


def _trim(backing: shoal.KvBacking) -> None:
    """Take the memory of pages that are nobody's, after the work that uses it."""
    try:
        backing.trim()
    except shoal.Error as error:
        # That work has not ended in time, or the device refused: the pages are nobody's all the same, and their memory
        # goes with the next page that is unmapped, or as soon as it is needed.
        _log.warning("memory of unmapped pages stays for now: %s", error)
