"""KV blocks that an engine takes and gives back, with memory behind those that are in use.

A :class:`KvCache` has one or more groups of layers (:class:`KvGroup`), each with its own block ids. Memory comes
ahead of need and goes when it is empty; tensors over the cache stay valid for ever, because addresses never change.
"""

from __future__ import annotations

from shoal.kv_cache.cache import KvCache, Sealed
from shoal.kv_cache.groups import GroupKind, KvGroup, KvGroupSpec

__all__ = ["GroupKind", "KvCache", "KvGroup", "KvGroupSpec", "Sealed"]
