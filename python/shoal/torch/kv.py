"""Tensors over the layers of a KV cache."""

from __future__ import annotations

from typing import TYPE_CHECKING, TypeAlias

import torch

from shoal.torch.tensors import tensor

if TYPE_CHECKING:
    from collections.abc import Iterable, Sequence

    from shoal.memory import Region

__all__ = ["Tensor", "layer_tensors"]

Tensor: TypeAlias = torch.Tensor


def layer_tensors(
    region: Region, views: Iterable[tuple[int, Sequence[int], Sequence[int]]], dtype: str
) -> list[Tensor]:
    """Make a tensor for each view, without touching what it shows.

    Parameters
    ----------
    region
        Where they lie.
    views
        Offset in bytes, shape, and strides in elements of each.
    dtype
        The name of the element type.

    Returns
    -------
    list of torch.Tensor
        One a view.

    Raises
    ------
    RegionError
        If one reaches past the region's end.
    """
    kind = getattr(torch, dtype)
    return [tensor(region, offset, shape, kind, strides) for offset, shape, strides in views]
