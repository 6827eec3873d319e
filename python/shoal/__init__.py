"""Shoal: virtual memory for GPUs that serve language models.

Importing this package needs neither torch nor CUDA and starts nothing: no thread, no socket, no device call.
"""

from __future__ import annotations

from shoal._native import __version__
from shoal.errors import (
    BrokerError,
    DeadlineError,
    DeviceError,
    Error,
    ForkError,
    LeaseError,
    OutOfMemoryError,
    RegionError,
    TransferError,
)

__all__ = [
    "BrokerError",
    "DeadlineError",
    "DeviceError",
    "Error",
    "ForkError",
    "LeaseError",
    "OutOfMemoryError",
    "RegionError",
    "TransferError",
    "__version__",
]
