"""A module's weights placed in a region, in order of use."""

from __future__ import annotations

import ctypes
import logging
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Any

from shoal.errors import OutOfMemoryError, RegionError, TierError
from shoal.torch.parts import Entry, collect, order_of_use
from shoal.torch.stored import layout_of, source_of, sources_in
from shoal.torch.tensors import device_of, tensor

if TYPE_CHECKING:
    import os
    from collections.abc import Callable, Iterator, Mapping

    import torch

    from shoal.memory import MemoryManager, Region, SourcePiece
    from shoal.weights import StoredWeights

__all__ = ["Placed", "Placement", "place"]

logger = logging.getLogger(__name__)

LAYOUT = "1"
"""Stands for how tensors are placed and regions cut: what is stored of another one is not looked for."""

# A tensor starts where a vector load and a copy engine like it: large ones on a coarser boundary, which costs little.
# The largest where direct I/O can begin, so that each is one piece in a store of weights.
_ALIGNMENTS = ((1 << 20, 4096), (64 << 10, 256), (0, 64))


@dataclass(frozen=True, slots=True)
class Placed:
    """Where one tensor of a module lies.

    Parameters
    ----------
    name
        Its first name in the module.
    offset
        Where it starts in the region, in bytes.
    dtype
        Its element type.
    shape
        Its shape.
    nbytes
        Its length in bytes.
    aliases
        Its other names, where weights are tied.
    source
        Whether its bytes can be read again from the file they came from.
    """

    name: str
    offset: int
    dtype: torch.dtype
    shape: tuple[int, ...]
    nbytes: int
    aliases: tuple[str, ...] = ()
    source: bool = False


@dataclass(frozen=True, slots=True)
class Placement:
    """A module's tensors in a region, in order of use. Made by :func:`place`.

    Parameters
    ----------
    region
        The region, sealed and asleep.
    tensors
        Where each tensor lies, in order.
    left_out
        Names of buffers that were left in normal memory (the device's), because they are not persistent.
    layout
        Stands for where which tensor lies.
    sources
        Where tensors can be read again, by name.
    from_store
        Whether the bytes came from a store of weights.
    """

    region: Region
    tensors: tuple[Placed, ...]
    left_out: tuple[str, ...] = ()
    layout: str = ""
    sources: Mapping[str, SourcePiece] = field(default_factory=dict, repr=False)
    from_store: bool = False
    _by_name: dict[str, Placed] = field(default_factory=dict, repr=False, compare=False)

    def __post_init__(self) -> None:
        for placed in self.tensors:
            for name in (placed.name, *placed.aliases):
                self._by_name[name] = placed

    def __getitem__(self, name: str) -> Placed:
        return self._by_name[name]

    def __iter__(self) -> Iterator[Placed]:
        return iter(self.tensors)

    def __len__(self) -> int:
        return len(self.tensors)

    @property
    def nbytes(self) -> int:
        """Bytes of all tensors, without the gaps between them."""
        return sum(placed.nbytes for placed in self.tensors)


def place(
    module: torch.nn.Module,
    mem: MemoryManager,
    name: str = "weights",
    *,
    sources: Mapping[str, SourcePiece] | Callable[[], Mapping[str, SourcePiece]] | None = None,
    stored: StoredWeights | None = None,
    directory: str | os.PathLike[str] = "",
    is_blank: bool = False,
    example: Callable[[torch.nn.Module], Any] | None = None,
    release_early: bool = False,
    progress: Callable[[int, int], None] | None = None,
) -> Placement:
    """Move a module's parameters and persistent buffers into a region, in order of use.

    On a GPU the module is the GPU's afterwards; buffers that are not persistent are copied to torch's own memory there.
    The bytes are staged: they go to host memory, or stay in their file, and no device memory is taken. The module's own
    ``Parameter`` objects stay; only what they point to changes. Afterwards the region is asleep: the first guard, or
    ``placement.region.wake()``, brings it up.

    Parameters
    ----------
    module
        A module on the CPU.
    mem
        The manager of the device it shall run on.
    name
        The region's name.
    sources
        For parameters by name: where their bytes can be read again. See :func:`safetensors_sources`. What gives them is
        called only where `stored` cannot be used.
    stored
        What was stored of this very module, with these bytes: they are read from there, and not from the module's own
        memory. Where it is of another layout, damaged or cannot be read, it is as if there were none.
    directory
        Where the files are from which what is stored can be read as well.
    is_blank
        The module's own memory holds anything, and what is stored is all there is: where it cannot be used, an error
        says so.
    example
        Called with the module before anything moves; the order in which it uses its parts becomes the order of the
        region. Without it: the order of registration, embeddings first and the language model's head last.
    release_early
        Free each tensor's own memory as soon as it is staged, so that only one tensor is held twice. An error then
        leaves the module unusable; without it, an error leaves the module as it was.
    progress
        Called with bytes staged and bytes in all, after each tensor.

    Returns
    -------
    Placement
        Where each tensor lies.

    Raises
    ------
    ValueError
        If the module has no tensors, or one that is not on the CPU.
    OutOfMemoryError
        If the host budget is short and a tensor has no source.
    TransferError
        If a source does not hold a tensor's bytes.
    TierError
        If the module is blank and what is stored cannot be used: its ``kind`` is ``"not_stored"``.
    DeviceError
        If the range of addresses cannot be reserved.
    """
    entries, left_out = collect(module, None if example is None else order_of_use(module, example))
    if not entries:
        raise ValueError("the module has no parameters")
    for entry in entries:
        if entry.one.device.type != "cpu":
            raise ValueError(
                f"{entry.names[0]!r} is on {entry.one.device}, not on the CPU: load the module there first"
            )
    end = 0
    for entry in entries:
        align = next(align for least, align in _ALIGNMENTS if entry.nbytes >= least)
        entry.offset = -(-end // align) * align
        end = entry.offset + entry.nbytes
    region = mem.region(name, max(end, 1), kind="weights", backing="keep")
    layout = layout_of(entries)
    known = None if stored is None else _load(region, entries, stored, layout, directory)
    if known is None and is_blank:
        raise TierError("what is stored of this module cannot be used", kind="not_stored")
    if known is not None:
        sources = known
    elif callable(sources):
        sources = sources()
    sources = sources or {}
    placed = []
    swaps: list[tuple[Entry, torch.Tensor]] = []
    done, total = 0, sum(entry.nbytes for entry in entries)
    for entry in entries:
        source = source_of(entry.names[0], entry.names[1:], sources)
        stride = entry.one.stride() if _is_dense(entry.one) else None
        if entry.nbytes and known is None:
            flat = _flat(entry.one)
            region.stage(entry.offset, _bytes_of(flat), source)
            del flat
        target = tensor(region, entry.offset, tuple(entry.one.shape), entry.one.dtype, stride)
        first, *aliases = entry.names
        placed.append(
            Placed(
                first, entry.offset, target.dtype, tuple(target.shape), entry.nbytes, tuple(aliases), source is not None
            )
        )
        done += entry.nbytes
        if release_early:
            _swap(entry, target)
        else:
            swaps.append((entry, target))
        if progress is not None:
            progress(done, total)
    if known is None:
        region.seal()
    for entry, target in swaps:
        _swap(entry, target)
    _move_buffers(module, device_of(region))
    return Placement(region, tuple(placed), tuple(left_out), layout, sources, known is not None)


def _load(
    region: Region, entries: list[Entry], stored: StoredWeights, layout: str, directory: str | os.PathLike[str]
) -> dict[str, SourcePiece] | None:
    """Fill the region from what is stored; gives where tensors can be read again, or None where that cannot be done."""
    known = sources_in(stored.note, layout, directory)
    if known is None:
        logger.info("stored weights of another layout are not used")
        return None
    tensors = [
        (entry.offset, entry.nbytes, source_of(entry.names[0], entry.names[1:], known))
        for entry in entries
        if entry.nbytes
    ]
    try:
        stored.load(region, tensors)
    except (TierError, RegionError, OutOfMemoryError) as error:
        logger.warning("stored weights are not used, the model's files are read: %s", error)
        return None
    return known


def _is_dense(value: torch.Tensor) -> bool:
    """Say whether the elements lie without gaps or overlaps, in whatever order of dimensions."""
    expected = 1
    for step, size in sorted(zip(value.stride(), value.shape, strict=True)):
        if size == 1:
            continue
        if step != expected:
            return False
        expected *= size
    return True


def _flat(value: torch.Tensor) -> torch.Tensor:
    """Give the elements in the order in which they will lie, copying only what has gaps."""
    value = value.detach()
    if not _is_dense(value):
        value = value.contiguous()
    return value.as_strided((value.numel(),), (1,))


def _bytes_of(flat: torch.Tensor) -> ctypes.Array[ctypes.c_char]:
    """Give a tensor's memory as a buffer, without a copy and without numpy. The tensor must outlive it."""
    nbytes = flat.numel() * flat.element_size()
    return (ctypes.c_char * nbytes).from_address(flat.data_ptr())


def _move_buffers(module: torch.nn.Module, device: torch.device) -> None:
    """Move what is not persistent, and so not placed, to the device."""
    for part in module.modules():
        for key in part._non_persistent_buffers_set:
            buffer = part._buffers.get(key)
            if buffer is not None and buffer.device != device:
                part._buffers[key] = buffer.to(device)


def _swap(entry: Entry, target: torch.Tensor) -> None:
    for value in entry.tensors:
        if tuple(value.shape) != tuple(target.shape):
            raise RegionError(f"{entry.names[0]!r} changed its shape while it was placed", kind="state")
        value.data = target
