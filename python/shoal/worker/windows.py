"""Blocks and prefixes of models in which some layers, or all, see a window of the sequence only.

transformers keeps a window in a few blocks that it writes round and round, so what a prefix needs is overwritten. Here
every token of a windowed group has a place of its own, as in the others: a full block is sealed and not written again,
and freed when it has left the window, after which it is cached like any other. A prefix is found where the groups that
see everything have all its blocks, and the windowed ones the blocks of the last window: the rule of vLLM's hybrid
cache manager.

All groups take their blocks from one pool, because their blocks have one size; so what is cached goes in one order,
whichever group it belongs to, and no memory is set apart for one kind. What a block is found by is a key: its group,
and a BLAKE2b of all tokens up to its end. A key of a windowed group stands alone in the cache's index, since nothing
needs the blocks before it; the keys of a full group follow one another.

What is left out: a chunk of a prompt may be longer than the window. Where there is memory, all its windowed blocks are
kept, so that a prompt which goes on differently finds them; where memory was just refused, only those that the next
chunk reads get blocks, as in transformers.

Recurrent state has no place here: a state holds for one length only, so it would have to be copied at chosen ends of
blocks, which transformers' continuous batching has no means for. Such models are refused when they are loaded.
"""

from __future__ import annotations

import hashlib
from array import array
from itertools import repeat
from typing import TYPE_CHECKING, Any

from transformers.generation.continuous_batching.cache_manager import SlidingAttentionCacheAllocator

if TYPE_CHECKING:
    from collections.abc import Iterator, Sequence

    from transformers.generation.continuous_batching.cache_manager import BlockManager, CacheAllocator

    from .memory import KvBlocks

NO_BLOCK = -1
_KEY_BYTES = 32


class WindowedAllocator(SlidingAttentionCacheAllocator):
    """Hook 1: the block tables of a windowed group, by place in the sequence; `NO_BLOCK` where there is none.

    Attributes
    ----------
    keeps_all
        Whether a chunk that is longer than the window gets all its blocks, or only those that are read later.
    """

    keeps_all = False

    def __init__(self, *args: Any) -> None:
        super().__init__(*args)
        self._gone: dict[str, int] = {}  # so many places of a table have left the window

    @classmethod
    def of(cls, other: SlidingAttentionCacheAllocator) -> WindowedAllocator:
        """Make one in the place of transformers'."""
        return cls(other._index, other.block_size, other.sliding_window, other.sentinel_index, other.write_trash_index)

    @property
    def needed(self) -> int:
        """How many whole blocks before a token it needs, when it is the first of a block."""
        return -(-(self.sliding_window - 1) // self.block_size)

    def wanted(self, n_blocks: int) -> int:
        """Count the blocks that are taken when a request goes on for `n_blocks`."""
        # The scheduler asks for up to a block more than the tokens need, so their window begins a block earlier.
        return n_blocks if self.keeps_all else min(n_blocks, -(-self.sliding_window // self.block_size) + 1)

    def allocate_blocks(self, n_blocks: int, request_id: str, block_manager: BlockManager) -> int | None:
        """Take blocks for the last places, as many as are wanted."""
        table = self.block_table.setdefault(request_id, [])
        count = self.wanted(n_blocks)
        taken = block_manager.get_free_blocks(count, None, self.uses_block_sharing, self._index)
        if taken is None:
            return None
        table += [*repeat(NO_BLOCK, n_blocks - count), *taken]
        return n_blocks

    def free_blocks(self, request_id: str, block_manager: BlockManager) -> None:
        """Free what a request has."""
        self._gone.pop(request_id, None)
        if request_id in self.block_table:
            self.block_table[request_id] = self.held(request_id)
        super().free_blocks(request_id, block_manager)

    def held(self, request_id: str) -> list[int]:
        """Give the blocks that a request has, in order."""
        return [block for block in self.block_table.get(request_id, ()) if block != NO_BLOCK]

    def release(self, request_id: str, tokens: int, block_manager: BlockManager) -> None:
        """Free the blocks that no token after the first `tokens` sees."""
        table, start = self.block_table.get(request_id), self._gone.get(request_id, 0)
        gone = max(0, tokens - (self.sliding_window - 1)) // self.block_size
        if not table or gone <= start:
            return
        left = [block for block in table[start:gone] if block != NO_BLOCK]
        table[start:gone] = repeat(NO_BLOCK, gone - start)
        self._gone[request_id] = gone
        block_manager.free_blocks(left, self.uses_block_sharing)

    def get_read_indices(self, request_id: str, past_length: int, query_length: int) -> list[int]:
        """Tell where the window before the new tokens lies, and that the new ones follow it."""
        start = max(0, past_length - (self.sliding_window - 1))
        places: list[int] = []
        for block, first, last in self._parts(request_id, start, past_length):
            if block == NO_BLOCK:
                raise ValueError(f"request {request_id} has no block for tokens of its window, group {self._index}")
            places.extend(range(block * self.block_size + first, block * self.block_size + last))
        return [*places, *repeat(self.sentinel_index, query_length)]

    def get_write_indices(self, request_id: str, past_length: int, query_length: int) -> list[int]:
        """Tell where the new tokens go: to their blocks, or, where they have none, to where nobody reads."""
        places: list[int] = []
        for block, first, last in self._parts(request_id, past_length, past_length + query_length):
            if block == NO_BLOCK:
                places.extend(repeat(self.write_trash_index, last - first))
            else:
                places.extend(range(block * self.block_size + first, block * self.block_size + last))
        return places

    def _parts(self, request_id: str, start: int, end: int) -> Iterator[tuple[int, int, int]]:
        """Go through the blocks of these tokens: each block, and from where to where in it."""
        table, size = self.block_table[request_id], self.block_size
        for at in range(start // size, -(-end // size)):
            yield table[at], max(start - at * size, 0), min(end - at * size, size)


class _Keys:
    """The keys of one sequence's full blocks, made once."""

    def __init__(self) -> None:
        self.digests: list[bytes] = []
        self.sealed = 0  # so many of its blocks were sealed, or found

    def extend(self, tokens: Sequence[int], block_tokens: int) -> None:
        """Make those that are missing."""
        start = len(self.digests) * block_tokens
        for at in range(start, len(tokens) - block_tokens + 1, block_tokens):
            digest = hashlib.blake2b(self.digests[-1] if self.digests else b"", digest_size=_KEY_BYTES)
            digest.update(array("q", tokens[at : at + block_tokens]).tobytes())
            self.digests.append(digest.digest())


class HybridPrefixes:
    """Prefixes of several groups, or of windowed ones: found and sealed group by group.

    Parameters
    ----------
    blocks
        The pool.
    groups
        transformers' allocators, whose tables are filled and changed here.
    """

    def __init__(self, blocks: KvBlocks, groups: Sequence[CacheAllocator], block_tokens: int) -> None:
        self._kv = blocks
        self._block_tokens = block_tokens
        self._windowed = {at: group for at, group in enumerate(groups) if isinstance(group, WindowedAllocator)}
        self._full = {at: group for at, group in enumerate(groups) if at not in self._windowed}
        self._keys: dict[str, _Keys] = {}

    def find(self, name: str, tokens: Sequence[int], salt: str) -> int:
        """Find the longest prefix that every group can go on from, own its blocks and put them into the tables.

        Returns
        -------
        int
            Its length in tokens; 0 leaves the tables as they were.
        """
        # A request that waits asks again and again, always for the same tokens.
        keys = self._keys.setdefault(name, _Keys())
        keys.extend(tokens, self._block_tokens)
        length = len(tokens) // self._block_tokens
        digests = keys.digests[:length]
        full: dict[int, list[int]] = {}
        for at in self._full:
            full[at] = self._kv.match_keys(_of(at, digests[:length]), salt)
            length = min(length, len(full[at]))
        windows, length = self._windows(digests, length, salt)
        for blocks in full.values():
            if blocks[length:]:
                self._kv.free(blocks[length:])
        if length:
            for at, group in self._full.items():
                group.block_table[name] = full[at][:length]
            for at, windowed in self._windowed.items():
                windowed.block_table[name] = [*repeat(NO_BLOCK, length - len(windows[at])), *windows[at]]
        keys.sealed = length
        return length * self._block_tokens

    def _windows(self, digests: list[bytes], length: int, salt: str) -> tuple[dict[int, list[int]], int]:
        """Find the longest prefix of at most `length` blocks whose last window every windowed group has; own those."""
        found: dict[int, list[int]] = {}
        ends: dict[int, int] = {}  # for which length a group's blocks were found
        while length:
            at = next((at for at in self._windowed if ends.get(at) != length), None)
            if at is None:
                return found, length
            if found.get(at):
                self._kv.free(found.pop(at))
            first = max(0, length - self._windowed[at].needed)
            found[at] = self._kv.match_keys(_of(at, digests[first:length]), salt)
            ends[at] = length
            # A shorter prefix has to end before the block that is missing.
            length = first + len(found[at])
        for blocks in found.values():
            if blocks:
                self._kv.free(blocks)
        return {}, 0

    def seal(self, name: str, tokens: Sequence[int], salt: str) -> None:
        """Let the full blocks of a request's computed tokens be found; what was there already takes a copy's place."""
        keys = self._keys.setdefault(name, _Keys())
        keys.extend(tokens, self._block_tokens)
        first, last = keys.sealed, len(tokens) // self._block_tokens
        if first >= last:
            return
        for at, group in self._full.items():
            (after,) = _of(at, keys.digests[first - 1 : first]) if first else (None,)
            blocks = group.block_table[name][first:last]
            self._kv.seal_keys(_of(at, keys.digests[first:last]), blocks, salt, after)
            group.block_table[name][first:last] = blocks
        for at, windowed in self._windowed.items():
            table = windowed.block_table[name]
            for place in range(first, last):
                if table[place] != NO_BLOCK:
                    one = [table[place]]
                    self._kv.seal_keys(_of(at, keys.digests[place : place + 1]), one, salt, None)
                    table[place] = one[0]
        keys.sealed = last

    def forget(self, name: str) -> None:
        """Forget the keys of a request that has no blocks any more."""
        self._keys.pop(name, None)

    def forget_all(self) -> None:
        """Forget the keys of all requests."""
        self._keys.clear()


def _of(group: int, digests: Sequence[bytes]) -> list[bytes]:
    """Make the keys of one group."""
    mark = group.to_bytes(2, "little")
    return [mark + digest for digest in digests]
