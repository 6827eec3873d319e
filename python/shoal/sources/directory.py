"""A look at a model's directory that costs a few kilobytes of reading, and finds out whether all is there.

A truncated or mixed-up file shows in its safetensors header against its size, so it is named before a process spends a
minute loading. Pickled weights are refused unread: unpickling runs code.
"""

from __future__ import annotations

import json
import struct
from typing import TYPE_CHECKING, Any

from shoal.sources.errors import SourceCorruptError, SourceMissingError, SourceUnsupportedError

if TYPE_CHECKING:
    from pathlib import Path

INDEX = "model.safetensors.index.json"
SINGLE = "model.safetensors"
_HEADER_BYTES_MAX = 100 << 20
PICKLED = (".bin", ".pt", ".pth", ".ckpt", ".pkl", ".msgpack", ".h5")


def check_directory(path: Path, source: str) -> Path:
    """Return ``path`` if it holds a model in safetensors form, complete as far as headers and sizes tell.

    Raises
    ------
    SourceMissingError
        There is no such directory, or no ``config.json`` in it.
    SourceUnsupportedError
        It has weights, but none in safetensors form.
    SourceCorruptError
        A file is truncated, or the index names one that is not there.
    """
    if not path.exists():
        raise SourceMissingError(source, f"there is no directory {path}")
    if not path.is_dir():
        raise SourceMissingError(source, f"{path} is a file; a model is a directory with config.json in it")
    config = path / "config.json"
    if not config.is_file():
        raise SourceMissingError(source, f"{path} has no config.json, so it is not a model's directory")
    if not isinstance(_read_json(config, source), dict):
        raise SourceCorruptError(source, f"{config} does not hold a JSON object")
    for weights in weight_files(path, source):
        check_safetensors(weights, source)
    return path


def weight_files(path: Path, source: str) -> list[Path]:
    """Return the safetensors files that make up the model in ``path``, in the order of their names."""
    index = path / INDEX
    if index.is_file():
        names = index_names(_read_json(index, source), str(index), source)
        missing = [name for name in names if not (path / name).is_file()]
        if missing:
            raise SourceCorruptError(
                source, f"{index} names {len(names)} files, of which {len(missing)} are missing: {missing[0]}"
            )
        return [path / name for name in names]
    found = choose_weights([entry.name for entry in path.iterdir() if entry.is_file()])
    if found:
        return [path / name for name in found]
    raise no_safetensors(source, str(path), [entry.name for entry in path.iterdir()])


def choose_weights(names: list[str]) -> list[str]:
    """Pick, from the names at a model's root, the safetensors files to load where there is no index."""
    if SINGLE in names:
        return [SINGLE]
    # `consolidated*` repeats the weights in another layout; `adapter_*` is a patch to another model.
    return sorted(
        name for name in names if name.endswith(".safetensors") and not name.startswith(("consolidated", "adapter_"))
    )


def index_names(index: Any, where: str, source: str) -> list[str]:
    """Return the file names an index speaks of; each must lie right beside it."""
    table = index.get("weight_map") if isinstance(index, dict) else None
    if not isinstance(table, dict) or not table or not all(isinstance(name, str) for name in table.values()):
        raise SourceCorruptError(source, f"{where} has no weight_map from tensors to files")
    names = sorted(set(table.values()))
    for name in names:
        if "/" in name or "\\" in name or name.startswith(".") or not name.endswith(".safetensors"):
            raise SourceCorruptError(source, f"{where} names {name!r}, which is not a safetensors file beside it")
    return names


def no_safetensors(source: str, where: str, names: list[str]) -> SourceUnsupportedError:
    """Say what there is instead of safetensors files."""
    pickled = sorted(name for name in names if name.endswith(PICKLED))
    if any(name.startswith("adapter_") for name in names):
        return SourceUnsupportedError(source, f"{where} is an adapter to another model, not a model by itself")
    if pickled:
        return SourceUnsupportedError(
            source,
            f"{where} has only pickled weights ({pickled[0]}): loading them runs code from the file, so they "
            "are not; convert them to safetensors, or take a revision that has them",
        )
    if any(name.endswith(".gguf") for name in names):
        return SourceUnsupportedError(source, f"{where} has its weights as GGUF only; this engine reads safetensors")
    return SourceUnsupportedError(source, f"{where} has no *.safetensors file, so it holds no weights")


def check_safetensors(path: Path, source: str) -> int:
    """Check a file's header against its size; return how many tensors it holds."""
    size = path.stat().st_size
    with path.open("rb") as handle:
        head = handle.read(8)
        header_bytes = struct.unpack("<Q", head)[0] if len(head) == 8 else 0
        if not 2 <= header_bytes <= min(_HEADER_BYTES_MAX, size - 8):
            raise SourceCorruptError(source, f"{path} is not a safetensors file, or is cut off ({size} bytes)")
        try:
            header = json.loads(handle.read(header_bytes))
            entries = [entry for name, entry in header.items() if name != "__metadata__"]
            end = max((entry["data_offsets"][1] for entry in entries), default=0)
        except (ValueError, KeyError, IndexError, TypeError, AttributeError) as error:
            raise SourceCorruptError(source, f"{path} has a header that cannot be read: {error}") from error
    if not isinstance(end, int) or 8 + header_bytes + end != size:
        raise SourceCorruptError(
            source,
            f"{path} is {size} bytes, but its header speaks of {8 + header_bytes + end}: it is cut off or mixed up",
        )
    return len(entries)


def _read_json(path: Path, source: str) -> Any:
    try:
        return json.loads(path.read_bytes())
    except (OSError, ValueError) as error:
        raise SourceCorruptError(source, f"{path} cannot be read as JSON: {error}") from error
