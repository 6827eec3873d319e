"""torch with regions: tensors that lie in one, a module's weights placed there, and torch's own allocations.

This package is the only part of the library that imports torch. ``import shoal`` does not import it.

A tensor made here is an ordinary tensor over a region's addresses. Making it touches nothing; reading or writing it
while its region is not resident faults, so do it under ``mem.guard()``. Printing a tensor reads it.
"""

from __future__ import annotations

from shoal.torch.attachment import Attachment, attach
from shoal.torch.graphs import graph, pool
from shoal.torch.placement import Placed, Placement, place
from shoal.torch.pools import disable, stats, use_region
from shoal.torch.safetensors import safetensors_sources
from shoal.torch.stored import store_weights
from shoal.torch.tensors import device_of, tensor

__all__ = [
    "Attachment",
    "Placed",
    "Placement",
    "attach",
    "device_of",
    "disable",
    "graph",
    "place",
    "pool",
    "safetensors_sources",
    "stats",
    "store_weights",
    "tensor",
    "use_region",
]
