"""The seam between the engines and Shoal's memory.

The engines see only :class:`Memory` and :class:`KvSpace`: enter a guard, place weights once, back and unback KV blocks.
Apart, so that an engine reads (and is tested) without knowing how bytes move between tiers.

Invariants: I13 (a forward runs inside a guard; eviction never happens inside one).
"""

from __future__ import annotations

from typing import TYPE_CHECKING, Any, Protocol

if TYPE_CHECKING:
    from collections.abc import Sequence
    from contextlib import AbstractContextManager

    import torch


class ShortageError(Exception):
    """Device memory could not be had in time; what asked may ask again later."""


class KvSpace(Protocol):
    """Address space for KV blocks, each with memory only while it is backed."""

    def tensor(self, offset: int, shape: Sequence[int], stride: Sequence[int], dtype: torch.dtype) -> torch.Tensor:
        """Make a strided view that starts `offset` elements into the space; making it touches nothing."""

    def back(self, blocks: Sequence[int]) -> bool:
        """Give all `blocks` memory; False, and nothing changed, where it cannot be had now."""

    def unback(self, blocks: Sequence[int]) -> None:
        """Take the memory of `blocks` away; their content is gone."""

    @property
    def backed_bytes(self) -> int:
        """Device bytes committed, whole pages."""

    @property
    def live_bytes(self) -> int:
        """Bytes of the blocks that have memory because somebody asked for it."""


class Memory(Protocol):
    """Device memory of one worker."""

    def guard(self, timeout_s: float) -> AbstractContextManager[Any]:
        """Keep everything resident while inside; entering brings back what is missing.

        Raises
        ------
        ShortageError
            What is missing could not be brought back in time.
        """

    def kv(self, block_bytes: int, blocks: int) -> KvSpace:
        """Reserve address space for `blocks` KV blocks."""

    def overhead_peak(self) -> int | None:
        """Device bytes that the process has taken at most beside its regions; None where there is nothing to count."""

    def trim(self) -> None:
        """Give back device memory that nothing uses now, such as backed KV pages without a block."""
