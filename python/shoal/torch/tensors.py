"""torch tensors that lie in a region."""

from __future__ import annotations

from typing import TYPE_CHECKING

import torch

if TYPE_CHECKING:
    from collections.abc import Sequence

    from shoal.memory import Region

__all__ = ["device_of", "tensor"]


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


def _row_major(shape: Sequence[int]) -> tuple[int, ...]:
    stride: list[int] = []
    step = 1
    for size in reversed(shape):
        stride.append(step)
        step *= max(size, 1)
    return tuple(reversed(stride))
