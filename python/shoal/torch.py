"""torch tensors that lie in a region, and a module's weights placed there.

This is the only module of the package that imports torch. ``import shoal`` does not import it.

A tensor made here is an ordinary tensor over a region's addresses. Making it touches nothing; reading or writing it
while its region is not resident faults, so do it under ``mem.guard()``. Printing a tensor reads it.
"""

from __future__ import annotations

import ctypes
import json
import struct
from dataclasses import dataclass, field
from pathlib import Path
from typing import TYPE_CHECKING, Any, Literal

import torch

from shoal.errors import RegionError
from shoal.memory import Region, SourcePiece

if TYPE_CHECKING:
    import os
    from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence

    from shoal.memory import MemoryManager

__all__ = ["Placed", "Placement", "device_of", "place", "safetensors_sources", "tensor"]

# A tensor starts where a vector load and a copy engine like it: large ones on a coarser boundary, which costs little.
_ALIGN_SMALL = 64
_ALIGN_LARGE = 256
_LARGE_BYTES = 64 << 10

_SAFETENSORS_HEADER_BYTES_MAX = 100_000_000
_SAFETENSORS_DTYPES = {
    "F64": torch.float64,
    "F32": torch.float32,
    "F16": torch.float16,
    "BF16": torch.bfloat16,
    "I64": torch.int64,
    "I32": torch.int32,
    "I16": torch.int16,
    "I8": torch.int8,
    "U8": torch.uint8,
    "BOOL": torch.bool,
    "F8_E4M3": torch.float8_e4m3fn,
    "F8_E5M2": torch.float8_e5m2,
}


def tensor(
    region: Region,
    offset: int,
    shape: Sequence[int],
    dtype: torch.dtype,
    stride: Sequence[int] | None = None,
) -> torch.Tensor:
    """Make a tensor over a region's addresses, without touching them.

    Parameters
    ----------
    region
        Where it lies. The tensor keeps the region's addresses reserved.
    offset
        Where its first element lies, in bytes; a multiple of the element's size.
    shape
        Its shape.
    dtype
        Its element type.
    stride
        Its strides in elements; row-major without it. They may leave gaps, as between the layers of a KV cache.

    Returns
    -------
    torch.Tensor
        A writable tensor on the region's device: the GPU's, or the CPU's, which is where a simulated device lies.

    Raises
    ------
    RegionError
        If it reaches past the region's end.
    ValueError
        If a size or stride is negative, or the offset is not a multiple of the element's size.
    """
    shape = tuple(int(size) for size in shape)
    stride = _row_major(shape) if stride is None else tuple(int(step) for step in stride)
    if len(shape) != len(stride) or any(size < 0 for size in shape) or any(step < 0 for step in stride):
        raise ValueError(f"shape {shape} and stride {stride} do not describe a tensor")
    item_bytes = dtype.itemsize
    if offset % item_bytes:
        raise ValueError(f"offset {offset} is not a multiple of {item_bytes}, the bytes of one {dtype}")
    if 0 in shape:
        return torch.empty_strided(shape, stride, dtype=dtype, device=device_of(region))
    elements = 1 + sum((size - 1) * step for size, step in zip(shape, stride, strict=True))
    # Bytes through DLPack, then a view: that way no element type is foreign, and nobody asks the driver whose the
    # address is, which it does not know while nothing is mapped there.
    flat = torch.from_dlpack(region.buffer(offset, elements * item_bytes)).view(dtype)
    return flat.as_strided(shape, stride)


def device_of(region: Region) -> torch.device:
    """Give torch's name for the device that a region lies on.

    Parameters
    ----------
    region
        The region.

    Returns
    -------
    torch.device
        ``cuda:N``, or ``cpu`` for a simulated device.

    Raises
    ------
    ForkError
        In a process other than the one that made the region.
    """
    name = region.device
    return torch.device(name if name.startswith("cuda") else "cpu")


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
    """

    region: Region
    tensors: tuple[Placed, ...]
    left_out: tuple[str, ...] = ()
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


@dataclass(slots=True)
class _Entry:
    """One stretch of memory of the module: its names, and every tensor object that stands for it."""

    names: list[str]
    tensors: list[torch.Tensor]
    offset: int = 0

    @property
    def one(self) -> torch.Tensor:
        return self.tensors[0]

    @property
    def nbytes(self) -> int:
        return self.one.numel() * self.one.element_size()


def place(
    module: torch.nn.Module,
    mem: MemoryManager,
    name: str = "weights",
    *,
    sources: Mapping[str, SourcePiece] | None = None,
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
        For parameters by name: where their bytes can be read again. See :func:`safetensors_sources`.
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
    DeviceError
        If the range of addresses cannot be reserved.
    """
    sources = sources or {}
    entries, left_out = _collect(module, None if example is None else _order_of_use(module, example))
    if not entries:
        raise ValueError("the module has no parameters")
    for entry in entries:
        if entry.one.device.type != "cpu":
            raise ValueError(
                f"{entry.names[0]!r} is on {entry.one.device}, not on the CPU: load the module there first"
            )
    end = 0
    for entry in entries:
        align = _ALIGN_LARGE if entry.nbytes >= _LARGE_BYTES else _ALIGN_SMALL
        entry.offset = -(-end // align) * align
        end = entry.offset + entry.nbytes
    region = mem.region(name, max(end, 1), kind="weights", backing="keep")
    placed = []
    swaps: list[tuple[_Entry, torch.Tensor]] = []
    done, total = 0, sum(entry.nbytes for entry in entries)
    for entry in entries:
        source = next((sources[alias] for alias in entry.names if alias in sources), None)
        stride = entry.one.stride() if _is_dense(entry.one) else None
        if entry.nbytes:
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
    region.seal()
    for entry, target in swaps:
        _swap(entry, target)
    _move_buffers(module, device_of(region))
    return Placement(region, tuple(placed), tuple(left_out))


def safetensors_sources(directory: str | os.PathLike[str], module: torch.nn.Module) -> dict[str, SourcePiece]:
    """Find the file and place that each of a module's tensors came from, and check that the bytes are the same.

    A name matches as it stands, or with or without the module's ``base_model_prefix``, or by its longest common ending
    if only one tensor of the files has it. A file in bfloat16 matches a parameter in float32, which is the same bits
    widened. What does not match, byte for byte, is left out: it is kept in host memory then.

    Parameters
    ----------
    directory
        Where the ``*.safetensors`` files are.
    module
        The loaded module, on the CPU.

    Returns
    -------
    dict of str to SourcePiece
        For :func:`place`. Tied weights have an entry for each of their names.

    Raises
    ------
    ValueError
        If a file is not a safetensors file, or is shorter than its header says.
    OSError
        If a file cannot be read.
    """
    stored: dict[str, _Stored] = {}
    for path in sorted(Path(directory).glob("*.safetensors")):
        stored.update((record.name, record) for record in _read_header(path))
    prefix = getattr(module, "base_model_prefix", "")
    endings: dict[str, list[str]] = {}
    for stored_name in stored:
        for ending in _endings(stored_name):
            endings.setdefault(ending, []).append(stored_name)
    mapped: dict[Path, torch.Tensor] = {}
    found: dict[str, SourcePiece] = {}
    entries, _ = _collect(module, None)
    for entry in entries:
        if not entry.nbytes or not entry.one.is_contiguous():
            continue
        for record in _candidates(entry.names, stored, endings, prefix):
            piece = _same_bytes(entry.one, record, mapped)
            if piece is not None:
                found.update((name, piece) for name in entry.names)
                break
    return found


@dataclass(frozen=True, slots=True)
class _Stored:
    """One tensor of a safetensors file."""

    name: str
    path: Path
    offset: int
    nbytes: int
    dtype: torch.dtype | None
    shape: tuple[int, ...]


def _read_header(path: Path) -> list[_Stored]:
    """Read what a safetensors file holds: eight bytes of length, then that much JSON, then the tensors."""
    file_bytes = path.stat().st_size
    with path.open("rb") as file:
        length = file.read(8)
        header_bytes = struct.unpack("<Q", length)[0] if len(length) == 8 else 0
        if not 0 < header_bytes <= min(_SAFETENSORS_HEADER_BYTES_MAX, file_bytes - 8):
            raise ValueError(f"{path} is not a safetensors file: its header would be {header_bytes} bytes long")
        try:
            header = json.loads(file.read(header_bytes))
            records = [
                _Stored(
                    name,
                    path,
                    8 + header_bytes + int(entry["data_offsets"][0]),
                    int(entry["data_offsets"][1]) - int(entry["data_offsets"][0]),
                    _SAFETENSORS_DTYPES.get(entry["dtype"]),
                    tuple(int(size) for size in entry["shape"]),
                )
                for name, entry in header.items()
                if name != "__metadata__"
            ]
        except (ValueError, KeyError, TypeError, IndexError, AttributeError) as error:
            raise ValueError(f"{path} is not a safetensors file: its header cannot be read") from error
    for record in records:
        if record.nbytes < 0 or record.offset < 8 + header_bytes or record.offset + record.nbytes > file_bytes:
            raise ValueError(f"{path} is truncated: {record.name!r} reaches past its end at {file_bytes} bytes")
    return records


def _endings(name: str) -> Iterator[str]:
    """Give the endings of a dotted name that have at least two parts, longest first."""
    parts = name.split(".")
    for start in range(1, len(parts) - 1):
        yield ".".join(parts[start:])


def _candidates(
    names: Iterable[str], stored: Mapping[str, _Stored], endings: Mapping[str, list[str]], prefix: str
) -> Iterator[_Stored]:
    """Give the stored tensors that may be this one, likeliest first."""
    names = list(names)
    for name in names:
        guesses = [name]
        if prefix:
            guesses += [f"{prefix}.{name}", name.removeprefix(f"{prefix}.")]
        yield from (stored[guess] for guess in dict.fromkeys(guesses) if guess in stored)
    for name in names:
        for ending in (name, *_endings(name)):
            match endings.get(ending, []):
                case [only]:
                    yield stored[only]


def _same_bytes(ours: torch.Tensor, record: _Stored, mapped: dict[Path, torch.Tensor]) -> SourcePiece | None:
    """Give the piece if the file's bytes, widened if need be, are the tensor's; else nothing."""
    if record.dtype is None or record.shape != tuple(ours.shape):
        return None
    if record.dtype == ours.dtype:
        conversion: Literal["bf16_to_f32"] | None = None
    elif (record.dtype, ours.dtype) == (torch.bfloat16, torch.float32):
        conversion = "bf16_to_f32"
    else:
        return None
    if record.path not in mapped:
        mapped[record.path] = torch.from_file(
            str(record.path), shared=False, size=record.path.stat().st_size, dtype=torch.uint8
        )
    theirs = mapped[record.path][record.offset : record.offset + record.nbytes]
    flat = ours.detach().reshape(-1)
    if conversion is None:
        same = torch.equal(theirs, flat.view(torch.uint8))
    else:
        # bfloat16 is the upper half of a float32, so bits are compared as bits: a NaN is itself here.
        low_high = flat.view(torch.int16).view(-1, 2)
        same = not bool(low_high[:, 0].any()) and torch.equal(
            theirs.view(-1, 2), low_high[:, 1].contiguous().view(torch.uint8).view(-1, 2)
        )
    if not same:
        return None
    return SourcePiece(record.path, record.offset, flat.numel() * flat.element_size(), conversion)


def _collect(module: torch.nn.Module, used: list[torch.nn.Module] | None) -> tuple[list[_Entry], list[str]]:
    """Give what is to be placed, in order, and the names of what is not."""
    entries: dict[tuple[Any, ...], _Entry] = {}
    left_out: list[str] = []
    parts = list(module.named_modules(remove_duplicate=True))
    if used is None:
        parts.sort(key=lambda part: _rank(module, *part))
    else:
        place_of = {id(part): index for index, part in enumerate(used)}
        parts.sort(key=lambda part: place_of.get(id(part[1]), len(used)))
    seen: set[int] = set()
    names = _all_names(module)
    for prefix, part in parts:
        dot = f"{prefix}." if prefix else ""
        here: list[tuple[str, torch.Tensor | None]] = [(dot + key, value) for key, value in part._parameters.items()]
        for key, buffer in part._buffers.items():
            if key in part._non_persistent_buffers_set:
                left_out.append(dot + key)
            else:
                here.append((dot + key, buffer))
        for full, value in here:
            if value is None or id(value) in seen:
                continue
            seen.add(id(value))
            entry = entries.setdefault(_key(value), _Entry([], []))
            entry.names += names.get(id(value), [full])
            entry.tensors.append(value)
    return list(entries.values()), left_out


def _all_names(module: torch.nn.Module) -> dict[int, list[str]]:
    """Give every name of every tensor, by the object's identity: tied weights have several."""
    names: dict[int, list[str]] = {}
    for prefix, part in module.named_modules(remove_duplicate=False):
        dot = f"{prefix}." if prefix else ""
        for key, value in (*part._parameters.items(), *part._buffers.items()):
            if value is not None:
                names.setdefault(id(value), []).append(dot + key)
    return names


def _rank(module: torch.nn.Module, name: str, part: torch.nn.Module) -> int:
    """Sort parts that are used first to the front and the head to the end; sorting is stable."""
    get_head = getattr(module, "get_output_embeddings", None)
    head = get_head() if callable(get_head) else None
    if (head is not None and part is head) or name.rpartition(".")[2] == "lm_head":
        return 2
    return 0 if isinstance(part, torch.nn.Embedding) else 1


def _order_of_use(module: torch.nn.Module, example: Callable[[torch.nn.Module], Any]) -> list[torch.nn.Module]:
    """Run the module once and give its parts in the order in which they were entered."""
    used: dict[int, torch.nn.Module] = {}

    def enter(part: torch.nn.Module, _arguments: Any) -> None:
        used.setdefault(id(part), part)

    hooks = [part.register_forward_pre_hook(enter) for part in module.modules()]
    try:
        with torch.no_grad():
            example(module)
    finally:
        for hook in hooks:
            hook.remove()
    return list(used.values())


def _key(value: torch.Tensor) -> tuple[Any, ...]:
    """Name the memory a tensor stands for: two tensors with one key are tied."""
    if value.numel() == 0:
        return (id(value),)
    return (
        value.untyped_storage().data_ptr(), value.storage_offset(), tuple(value.shape), value.stride(), value.dtype,
    )  # fmt: skip


def _row_major(shape: Sequence[int]) -> tuple[int, ...]:
    stride: list[int] = []
    step = 1
    for size in reversed(shape):
        stride.append(step)
        step *= max(size, 1)
    return tuple(reversed(stride))


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


def _swap(entry: _Entry, target: torch.Tensor) -> None:
    for value in entry.tensors:
        if tuple(value.shape) != tuple(target.shape):
            raise RegionError(f"{entry.names[0]!r} changed its shape while it was placed", kind="state")
        value.data = target
