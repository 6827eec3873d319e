"""Requests whose prefix is on its way from a tier below the device: they wait, and the others go on.

Apart because a request is between two states here: it has looked for its prefix, and cannot run yet. It stays among
those that wait, the scheduler passes it over, and when its blocks have come it is looked at again, before others that
wait: they may lack what it has. Few loads are under way at a time, since what has come of each keeps its blocks: who
comes later looks again when one of them has ended, unless the tiers know that they have nothing for it (a remote has
to be asked first).

On the engine's thread only. What was found on the device stands in the request's block table meanwhile; what is loaded
is the load's until it is done, so a request that is dropped leaves nothing behind (I7).
"""

from __future__ import annotations

import time
from dataclasses import dataclass
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from collections.abc import Sequence

    from .memory import KvBlocks, Loading

_TOGETHER = 4  # loads under way; the tiers' thread does one after another
_AT_ONCE_S = 0.002  # a load that takes no longer is waited for: to be passed over costs a request a whole step
_LONGEST_S = 300.0  # each has a deadline of its own and few are before it; one that is silent so long has nobody left


@dataclass(frozen=True)
class Prefix:
    """What was found of a prompt.

    Attributes
    ----------
    blocks
        How many blocks, which the request owns now.
    cached
        How many blocks were nobody's before it looked on the device.
    found
        How many of these it has now.
    """

    blocks: int
    cached: int
    found: int


class Loads:
    """Loads that are under way, each for one request.

    Attributes
    ----------
    has_passed
        Whether a request was passed over because of its load, since this was last set to false.
    """

    def __init__(self, kv: KvBlocks, table: dict[str, list[int]]) -> None:
        self._kv = kv
        self._table = table  # the blocks of each request
        self._under_way: dict[str, tuple[Loading, Prefix, float]] = {}  # in the order in which they end; since when
        self._later: set[str] = set()  # they have looked, and wait until another load has ended
        self.has_passed = False

    def waits(self, name: str) -> bool:
        """Whether a request cannot run yet."""
        return name in self._under_way or name in self._later

    def look(self, name: str, prompt: Sequence[int], salt: str) -> Prefix | None:
        """Find what there is of a prompt on the device and below; what is found stands in the block table then.

        Returns
        -------
        Prefix or None
            None while some of it is on its way: look again.
        """
        under_way = self._under_way.get(name)
        if under_way is None:
            if name in self._later and len(self._under_way) >= _TOGETHER:
                self.has_passed = True
                return None
            prefix = self._begin(name, prompt, salt)
            if prefix is not None:
                return prefix
            under_way = self._under_way.get(name)
        more = None if under_way is None else under_way[0].take()
        if under_way is not None and more is None and time.monotonic() - under_way[2] > _LONGEST_S:
            under_way[0].cancel()
            more = []
        if under_way is None or more is None:
            self.has_passed = True
            return None
        del self._under_way[name]
        if more:
            self._table.setdefault(name, []).extend(more)
        prefix = under_way[1]
        return Prefix(prefix.blocks + len(more), prefix.cached, prefix.found)

    def _begin(self, name: str, prompt: Sequence[int], salt: str) -> Prefix | None:
        """Look on the device, and begin a load of what may follow; None where there is one, or will be."""
        self._later.discard(name)
        cached = self._kv.cached_blocks()
        blocks = self._kv.match(prompt, salt)
        prefix = Prefix(len(blocks), cached, max(0, cached - self._kv.cached_blocks()))
        if len(self._under_way) >= _TOGETHER and self._kv.may_load(prompt, len(blocks), salt):
            self._kv.free(blocks)
            self._later.add(name)
            return None
        if blocks:
            self._table[name] = blocks
        loading = self._kv.begin_load(prompt, len(blocks), salt)
        if loading is None:
            return prefix
        self._under_way[name] = loading, prefix, time.monotonic()
        loading.wait(_AT_ONCE_S)
        return None

    def wait(self, timeout_s: float) -> bool:
        """Wait until the next load is done. Whether one is, or none is under way: the next batch takes what is done."""
        undone = (loading for loading, _, _ in self._under_way.values() if not loading.done)
        loading = next(undone, None)
        return loading is None or loading.wait(timeout_s)

    def turn(self, name: str) -> int:
        """Say when a request that waits is looked at: 0 if its load is done, 1 if it is under way, 2 if it has none."""
        under_way = self._under_way.get(name)
        return 2 if under_way is None else 0 if under_way[0].done else 1

    def drop(self, name: str) -> None:
        """Forget a request."""
        self._later.discard(name)
        under_way = self._under_way.pop(name, None)
        if under_way is not None:
            under_way[0].cancel()

    def drop_all(self) -> None:
        """Forget all of them."""
        self._later.clear()
        for name in list(self._under_way):
            self.drop(name)
