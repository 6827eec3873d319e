"""The worker's memory for real: Shoal's regions, guards and KV backing behind the engines' seam."""

from __future__ import annotations

import logging
from contextlib import contextmanager
from typing import TYPE_CHECKING, Any

import shoal.torch
from shoal import DeadlineError, Error, KvBacking, LeaseError, MemoryManager, OutOfMemoryError, TransferError

from .errors import LoadError
from .memory import ShortageError

if TYPE_CHECKING:
    from collections.abc import Callable, Iterator, Sequence
    from pathlib import Path

    import torch


logger = logging.getLogger(__name__)


class DeviceKv:
    """KV blocks in one region of address space."""

    def __init__(self, mem: MemoryManager, block_bytes: int, blocks: int) -> None:
        self._region = mem.region("kv", block_bytes * blocks, kind="kv")
        self._backing = KvBacking(self._region, block_bytes=block_bytes, blocks=blocks)

    def tensor(self, offset: int, shape: Sequence[int], stride: Sequence[int], dtype: torch.dtype) -> torch.Tensor:
        """Make a strided view that starts `offset` elements into the region."""
        return shoal.torch.tensor(self._region, offset * dtype.itemsize, shape, dtype, stride)

    def back(self, blocks: Sequence[int]) -> bool:
        """Give all `blocks` memory; False where it cannot be had now."""
        return self._backing.back(blocks)

    def unback(self, blocks: Sequence[int]) -> None:
        """Take the memory of `blocks` away."""
        self._backing.unback(blocks)

    def trim(self) -> None:
        """Give back the pages that no block lies on."""
        if idle := self._backing.idle_bytes:
            self._backing.trim(idle)

    @property
    def backed_bytes(self) -> int:
        """Device bytes committed, whole pages."""
        return self._backing.backed_bytes

    @property
    def live_bytes(self) -> int:
        """Bytes of the blocks that are backed."""
        return self._backing.live_bytes


class DeviceMemory:
    """One worker's share of a device.

    Parameters
    ----------
    mem
        The process's memory manager.
    """

    def __init__(self, mem: MemoryManager) -> None:
        self._mem = mem
        self._kv: DeviceKv | None = None

    @contextmanager
    def guard(self, timeout_s: float) -> Iterator[None]:
        """Keep everything resident while inside.

        Raises
        ------
        ShortageError
            What is missing could not be brought back in time.
        """
        guard = self._mem.guard(timeout_s=timeout_s)
        try:
            guard.__enter__()
        except (OutOfMemoryError, LeaseError, DeadlineError) as error:
            raise ShortageError(str(error)) from error
        try:
            yield
        finally:
            guard.__exit__(None, None, None)

    def place(
        self, module: torch.nn.Module, files: Path | None = None, progress: Callable[[int, int], None] | None = None
    ) -> int:
        """Move the parameters of `module` into a region; returns their bytes. Needs no device memory.

        Parameters
        ----------
        module
            On the CPU.
        files
            The directory it was loaded from: what is there need not be kept in host memory as well.
        progress
            Told bytes placed and bytes in all.

        Raises
        ------
        LoadError
            The host budget is too small, or the files changed while they were read.
        """
        sources: dict[str, Any] = {} if files is None else shoal.torch.safetensors_sources(files, module)
        try:
            placement = shoal.torch.place(module, self._mem, sources=sources, release_early=True, progress=progress)
        except OutOfMemoryError as error:
            raise LoadError("host_budget", f"the weights do not fit into the host budget: {error}") from error
        except TransferError as error:
            raise LoadError("model_corrupt", f"{files}: the files changed while they were read: {error}") from error
        return placement.nbytes

    def kv(self, block_bytes: int, blocks: int) -> DeviceKv:
        """Reserve address space for `blocks` KV blocks."""
        self._kv = DeviceKv(self._mem, block_bytes, blocks)
        return self._kv

    def trim(self) -> None:
        """Give back KV pages that were kept although no block lies on them."""
        if self._kv is not None:
            try:
                self._kv.trim()
            except Error as error:  # a reclaim finds these pages first anyway
                logger.warning("KV pages without a block stay for now: %s", error)
