"""Shoal: virtual memory for GPUs that serve language models.

Importing this package needs neither torch nor CUDA and starts nothing: no thread, no socket, no device call. What needs
torch is in :mod:`shoal.torch`; a simulated device for tests is in :mod:`shoal.testing`.
"""

from __future__ import annotations

import importlib
from typing import TYPE_CHECKING

from shoal import _native
from shoal._native import __version__
from shoal.blocks import BlockStore
from shoal.errors import (
    BrokerError,
    DeadlineError,
    DeviceError,
    Error,
    ForkError,
    LeaseError,
    OutOfMemoryError,
    RegionError,
    TierError,
    TransferError,
)
from shoal.kv import KvBacking
from shoal.kv_cache import KvCache, KvGroup, KvGroupSpec
from shoal.memory import (
    BrokerClient,
    Flush,
    FlushReport,
    Guard,
    MemoryManager,
    Region,
    RegionGuard,
    Report,
    SourcePiece,
    Transfer,
    parse_size,
)
from shoal.tiers import DiskTier, HostTier, KvTier, Loading, Prefetch, RemoteTier, TierStack
from shoal.weights import StoredWeights, WeightStore

if TYPE_CHECKING:
    from collections.abc import Sequence
else:

    def __getattr__(name):  # noqa: ANN001, ANN202  (a type checker shall see the names there are, and no others)
        """Import what needs torch when it is first spoken of: ``import shoal`` is enough to say ``shoal.torch``."""
        if name == "torch":
            return importlib.import_module("shoal.torch")
        raise AttributeError(f"module {__name__!r} has no attribute {name!r}")


__all__ = [
    "BlockStore",
    "BrokerClient",
    "BrokerError",
    "DeadlineError",
    "DeviceError",
    "DiskTier",
    "Error",
    "Flush",
    "FlushReport",
    "ForkError",
    "Guard",
    "HostTier",
    "KvBacking",
    "KvCache",
    "KvGroup",
    "KvGroupSpec",
    "KvTier",
    "LeaseError",
    "Loading",
    "MemoryManager",
    "OutOfMemoryError",
    "Prefetch",
    "Region",
    "RegionError",
    "RegionGuard",
    "RemoteTier",
    "Report",
    "SourcePiece",
    "StoredWeights",
    "TierError",
    "TierStack",
    "Transfer",
    "TransferError",
    "WeightStore",
    "__version__",
    "main",
    "parse_size",
]


def main(argv: Sequence[str]) -> int:
    """Run the command line.

    Parameters
    ----------
    argv
        The program's name, then its arguments: ``["shoal", "serve", "shoal.toml"]``.

    Returns
    -------
    int
        The exit status.

    Raises
    ------
    TypeError
        If an argument is not a string.
    """
    return _native.main(list(argv))
