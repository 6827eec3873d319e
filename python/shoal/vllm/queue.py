"""The blocks that nobody uses, in the place of vLLM's ``FreeKVCacheBlockQueue``: which go out next, which have memory.

vLLM's own queue walks through the whole reservation before it hands a block out again. Here a block that holds nothing
goes back to the cache, which hands out the fullest memory first, and whose empty memory goes. A block that is found by
its hash stays, in order of last use, until blocks or memory are short. Apart from the pool because it needs nothing of
vLLM's but three attributes of a block.
"""

from __future__ import annotations

import time
from collections import OrderedDict
from typing import TYPE_CHECKING, Any, Protocol

from shoal.errors import DeadlineError, LeaseError, OutOfMemoryError

if TYPE_CHECKING:
    from collections.abc import Callable, Container, Iterable, Sequence

__all__ = ["BlockMemory", "ElasticQueue"]

RETRY_S = 0.05
"""How long after a refusal memory is not asked for again, if cached blocks do."""


class BlockMemory(Protocol):
    """What is asked of :class:`shoal.KvCache`."""

    def alloc(self, n: int) -> list[int] | None:
        """Take blocks that have memory."""

    def free(self, ids: Iterable[int]) -> None:
        """Give blocks back."""

    def available(self) -> int:
        """Say how many more there could be."""


class ElasticQueue:
    """Blocks that nobody uses.

    Parameters
    ----------
    blocks
        vLLM's blocks, by id.
    memory
        Where ids come from. It may have more than there are blocks: those are put aside.
    total
        How many ids the memory has.

    Attributes
    ----------
    used : int
        Blocks that are out.
    found : int
        How often a cached block was used again.
    read
        Gives the blocks that somebody may still read although nobody has them; nothing, where nobody does that.
    """

    def __init__(self, blocks: Sequence[Any], memory: BlockMemory, total: int) -> None:
        self._blocks = blocks
        self._memory = memory
        self._kept: OrderedDict[int, Any] = OrderedDict()
        self._ready: list[int] = []
        self._spare_ids = max(total - len(blocks), 0)
        self._aside: list[int] = []
        self._expected = 0
        self._refused_at = -RETRY_S
        # Nobody has them and they hold nothing that is to be found, but their bytes are not done with.
        self._kept_back: set[int] = set()
        self.read: Callable[[], Container[int]] | None = None
        self.used = 0
        self.found = 0

    @property
    def kept_back(self) -> int:
        """Blocks that nobody has, and whose memory stays until what is read of them was read."""
        return len(self._kept_back)

    @property
    def cached(self) -> int:
        """Blocks that nobody uses and that keep what they hold."""
        return len(self._kept)

    def expect(self, n: int) -> None:
        """Say how many blocks are about to be taken: :attr:`num_free_blocks` promises so many only if they have memory.

        Parameters
        ----------
        n
            How many; those among the cached ones that are about to be used again count too.
        """
        self._expected = n
        if len(self._ready) > n:
            self._memory.free(self._ready[n:])
            del self._ready[n:]

    @property
    def num_free_blocks(self) -> int:
        """How many blocks could be taken now: as many as there could be, if what is expected has memory."""
        if self._expected and not self._secure(self._expected):
            return len(self._ready) + len(self._kept)
        return self._room()

    def popleft(self) -> Any:
        """Take a block.

        Returns
        -------
        KVCacheBlock
            A block with memory.

        Raises
        ------
        ValueError
            If there is none.
        """
        return self.popleft_n(1)[0]

    def popleft_n(self, n: int) -> list[Any]:
        """Take blocks: empty ones, then cached ones, the longest unused first.

        Parameters
        ----------
        n
            How many.

        Returns
        -------
        list of KVCacheBlock
            They have memory.

        Raises
        ------
        ValueError
            If there are not so many. Nothing is changed.
        """
        if n == 0:
            return []
        if not self._secure(n):
            raise ValueError(f"Cannot get {n} free blocks: {len(self._ready) + len(self._kept)} have memory")
        fresh = min(n, len(self._ready))
        taken = [self._blocks[number] for number in self._ready[:fresh]]
        del self._ready[:fresh]
        taken += [self._kept.popitem(last=False)[1] for _ in range(n - fresh)]
        self._expected = max(self._expected - n, 0)
        self.used += n
        return taken

    def remove(self, block: Any) -> None:
        """Take a cached block that is used again.

        Parameters
        ----------
        block
            The block.

        Raises
        ------
        RuntimeError
            If it is not here.
        """
        if self._kept.pop(block.block_id, None) is None:
            raise RuntimeError(f"remove() called on a block that is in use or holds nothing: {block}")
        self.used += 1
        self.found += 1

    def append(self, block: Any) -> None:
        """Put a block back that is to be found again.

        Parameters
        ----------
        block
            The block.
        """
        self.append_n([block])

    def append_n(self, blocks: Sequence[Any]) -> None:
        """Put blocks back that are to be found again, in the order in which they shall go.

        Parameters
        ----------
        blocks
            The blocks.
        """
        self._kept.update((block.block_id, block) for block in blocks)
        self.used -= len(blocks)
        self._settle()

    def prepend_n(self, blocks: Sequence[Any]) -> None:
        """Put blocks back that hold nothing: their memory may go.

        Parameters
        ----------
        blocks
            The blocks.
        """
        if blocks:
            self._free([block.block_id for block in blocks])
            self.used -= len(blocks)
        self._settle()

    def get_all_free_blocks(self) -> list[Any]:
        """Give the blocks that nobody uses and that keep what they hold.

        Returns
        -------
        list of KVCacheBlock
            In the order in which they go.
        """
        return list(self._kept.values())

    def adopt(self, n: int) -> list[Any]:
        """Count blocks as used that were taken from the memory before.

        Parameters
        ----------
        n
            How many; they are the first ones.

        Returns
        -------
        list of KVCacheBlock
            The blocks.
        """
        self.used += n
        return list(self._blocks[:n])

    def give_up(self, blocks: Iterable[Any]) -> None:
        """Let cached blocks hold nothing any more: their memory may go. The caller forgets their hashes.

        Parameters
        ----------
        blocks
            Some that are cached.
        """
        ids = [block.block_id for block in blocks]
        for number in ids:
            del self._kept[number]
        if ids:
            self._free(ids)

    def look_again(self) -> None:
        """Free what was kept back and is not read any more."""
        if self._kept_back:
            ids, self._kept_back = sorted(self._kept_back), set()
            self._free(ids)

    def idle(self, block_bytes: int, unit_bytes: int, units_per_piece: int, users: Iterable[int]) -> list[list[Any]]:
        """Give the cached blocks of memory in which only such lie, by unit, the longest unused first.

        Memory goes in pieces of one unit or of several: units that may be of one piece come one after the other, and
        those of pieces in which nothing is in use come first. A block may lie in two units, or in many: it is given
        with the first of them that is, and they all have to be given until the memory of the others is empty.

        Parameters
        ----------
        block_bytes, unit_bytes
            Of a block, and of the shortest piece of memory: blocks lie one after another in it, from the first on.
        units_per_piece
            Units of the longest one.
        users
            Ids of the blocks that are in use.

        Returns
        -------
        list of list of KVCacheBlock
            One list a unit.
        """

        def units_of(number: int) -> range:
            return range(number * block_bytes // unit_bytes, ((number + 1) * block_bytes - 1) // unit_bytes + 1)

        busy = {unit for number in users for unit in units_of(number)}
        busy_pieces = {unit // units_per_piece for unit in busy}
        units: dict[int, list[Any]] = {}
        newest: dict[int, int] = {}
        for age, (number, block) in enumerate(self._kept.items()):
            for unit in units_of(number):
                if unit not in busy:
                    units.setdefault(unit, []).append(block)
                    newest[unit // units_per_piece] = age

        def order(unit: int) -> tuple[bool, int, int]:
            piece = unit // units_per_piece
            return piece in busy_pieces, newest[piece], unit

        given: set[int] = set()
        found = []
        for unit in sorted(units, key=order):
            found.append([block for block in units[unit] if block.block_id not in given])
            given.update(block.block_id for block in found[-1])
        return found

    def _free(self, ids: list[int]) -> None:
        """Let blocks go, but for those that are still read."""
        if self.read is not None:
            read = self.read()
            self._kept_back.update(number for number in ids if number in read)
            ids = [number for number in ids if number not in read]
        if ids:
            self._memory.free(ids)

    def _room(self) -> int:
        # Ids beyond vLLM's may be among what there could be.
        spare = self._spare_ids - len(self._aside)
        return len(self._kept) + len(self._ready) + max(self._memory.available() - spare, 0)

    def _secure(self, n: int) -> bool:
        """See to it that so many blocks can be taken without asking for memory; whether they can."""
        lack = n - len(self._ready)
        if lack <= 0:
            return True
        if n > self._room():
            return False
        covered = lack <= len(self._kept)
        if covered and time.monotonic() - self._refused_at < RETRY_S:
            return True
        if self._take(lack):
            return True
        self._refused_at = time.monotonic()
        return covered or self._take(lack - len(self._kept))

    def _take(self, n: int) -> bool:
        """Get blocks that are empty; all or none."""
        taken: list[int] = []
        while len(taken) < n:
            try:
                got = self._memory.alloc(n - len(taken))
            except (LeaseError, OutOfMemoryError, DeadlineError):
                got = None
            if got is None:
                if taken:
                    self._memory.free(taken)
                return False
            for number in got:
                (taken if number < len(self._blocks) else self._aside).append(number)
        self._ready += taken
        return True

    def _settle(self) -> None:
        """Give back what was taken and not used."""
        self._expected = 0
        if self._ready:
            self._memory.free(self._ready)
            self._ready = []
