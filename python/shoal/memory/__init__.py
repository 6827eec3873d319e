"""Regions of device memory that keep their address while their bytes move.

A :class:`MemoryManager` owns one device's share of this process. A :class:`Region` is a range of addresses: reserved
once, backed by device memory while it is used, and asleep (its bytes in host memory, or in the file they came from)
while it is not. An address handed out stays reserved until the region and every buffer over it are gone.

Touching a region that is not resident faults, as any unmapped address does: do it inside ``with mem.guard():``, which
brings back what is missing and keeps it there.
"""

from __future__ import annotations

from shoal._native import BrokerClient
from shoal.memory.flush import Flush, FlushReport
from shoal.memory.manager import MemoryManager
from shoal.memory.region import Backing, Kind, Region, SourcePiece
from shoal.memory.sizes import Size, parse_size
from shoal.wake import Guard, RegionGuard, Report, Transfer

__all__ = [
    "Backing",
    "BrokerClient",
    "Flush",
    "FlushReport",
    "Guard",
    "Kind",
    "MemoryManager",
    "Region",
    "RegionGuard",
    "Report",
    "Size",
    "SourcePiece",
    "Transfer",
    "parse_size",
]
