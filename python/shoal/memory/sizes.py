"""Sizes in bytes, as people write them."""

from __future__ import annotations

from typing import TypeAlias

from shoal import _native

__all__ = ["Size", "parse_size"]

Size: TypeAlias = int | str
"""Bytes, or a string such as ``"640MiB"`` or ``"1.5 GiB"``."""


def parse_size(size: Size) -> int:
    """Give a size in bytes.

    Parameters
    ----------
    size
        Bytes, or a string with a unit: ``"640MiB"``, ``"1.5 GiB"``, ``"2GB"``.

    Returns
    -------
    int
        Bytes.

    Raises
    ------
    ValueError
        If it is negative or cannot be read as a size.
    """
    if isinstance(size, str):
        return _native.parse_bytes(size)
    size = int(size)
    if size < 0:
        raise ValueError(f"a size cannot be negative: {size}")
    return size
