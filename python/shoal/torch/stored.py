"""A placement in a store of weights: what has to be known of it to be used again.

Apart because a layout is believed only where it is the same to the letter: names, places, types and shapes of all
tensors. Then their bytes are those that were stored under the name that stands for the files they came from.
"""

from __future__ import annotations

import hashlib
import json
from pathlib import Path
from typing import TYPE_CHECKING, Any

from shoal.memory import SourcePiece

if TYPE_CHECKING:
    import os
    from collections.abc import Iterable, Mapping

    from shoal.torch.parts import Entry
    from shoal.torch.placement import Placement
    from shoal.weights import WeightStore

__all__ = ["layout_of", "sources_in", "store_weights"]


def layout_of(entries: Iterable[Entry]) -> str:
    """Name a layout: all that says where which tensor lies, in hexadecimal."""
    digest = hashlib.sha256()
    for entry in entries:
        one = entry.one
        placed = (entry.names, entry.offset, entry.nbytes, str(one.dtype), tuple(one.shape), tuple(one.stride()))
        digest.update(repr(placed).encode())
    return digest.hexdigest()


def sources_in(note: str, layout: str, directory: str | os.PathLike[str]) -> dict[str, SourcePiece] | None:
    """Give where tensors can be read again, by name, as it was noted; None where the layout is another one.

    Parameters
    ----------
    note
        Of what is stored.
    layout
        From :func:`layout_of`, of the module that shall use it.
    directory
        Where the files are now.
    """
    try:
        noted = json.loads(note)
        if noted["layout"] != layout:
            return None
        pieces: dict[str, list[Any]] = noted["sources"]
        return {
            name: SourcePiece(Path(directory) / Path(str(file)).name, int(offset), int(nbytes), conversion)
            for name, (file, offset, nbytes, conversion) in pieces.items()
        }
    except (ValueError, KeyError, TypeError, AttributeError):
        return None


def store_weights(placement: Placement, store: WeightStore, name: str) -> dict[str, Any]:
    """Store what was placed, and read from there from now on what would be read from files.

    It takes as long as writing the bytes does; steps, wakes and sleeps go on meanwhile.

    Parameters
    ----------
    placement
        From :func:`place`.
    store
        Where to.
    name
        What it is found by: 8 to 64 hexadecimal digits that stand for the files and all that makes their bytes those of
        the module (data types, versions of what loads them).

    Returns
    -------
    dict
        As :meth:`WeightStore.fill`.

    Raises
    ------
    TierError
        As :meth:`WeightStore.fill`.
    RegionError
        Bytes of it are on the device alone.
    """
    sources = {
        placed.name: [Path(piece.path).name, piece.offset, piece.nbytes, piece.conversion]
        for placed in placement
        if (piece := source_of(placed.name, placed.aliases, placement.sources)) is not None
    }
    note = json.dumps({"layout": placement.layout, "sources": sources})
    tensors = [(placed.offset, placed.nbytes, None) for placed in placement if placed.nbytes]
    filled = store.fill(placement.region, name, note, tensors)
    stored = store.find(name)
    if stored is not None:
        stored.attach(placement.region)
    return filled


def source_of(name: str, aliases: Iterable[str], sources: Mapping[str, SourcePiece]) -> SourcePiece | None:
    """Give where a tensor can be read again, by whichever of its names."""
    return next((sources[alias] for alias in (name, *aliases) if alias in sources), None)
