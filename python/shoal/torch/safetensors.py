"""Where in safetensors files a module's weights can be read again."""

from __future__ import annotations

import ctypes
import json
import struct
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Literal

import torch

from shoal.memory import SourcePiece
from shoal.torch.parts import collect

if TYPE_CHECKING:
    import os
    from collections.abc import Iterable, Iterator, Mapping

__all__ = ["safetensors_sources"]

_LIBC = ctypes.CDLL(None)
_LIBC.memcmp.argtypes = (ctypes.c_void_p, ctypes.c_void_p, ctypes.c_size_t)
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
    entries, _ = collect(module, None)
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
    flat = ours.detach().reshape(-1)
    if record.path not in mapped:
        mapped[record.path] = torch.from_file(
            str(record.path), shared=False, size=record.path.stat().st_size, dtype=torch.uint8
        )
    theirs = mapped[record.path][record.offset : record.offset + record.nbytes]
    if conversion is None:
        # The C library compares at the speed of memory, torch element by element: a start of 13 GiB waits for this.
        same = record.nbytes == flat.nbytes and not _LIBC.memcmp(theirs.data_ptr(), flat.data_ptr(), record.nbytes)
    else:
        # bfloat16 is the upper half of a float32, so bits are compared as bits: a NaN is itself here.
        low_high = flat.view(torch.int16).view(-1, 2)
        same = not bool(low_high[:, 0].any()) and torch.equal(
            theirs.view(-1, 2), low_high[:, 1].contiguous().view(torch.uint8).view(-1, 2)
        )
    if not same:
        return None
    return SourcePiece(record.path, record.offset, flat.numel() * flat.element_size(), conversion)
