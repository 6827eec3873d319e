"""Ordinary memory behind the worker's seam, with a budget, and poison wherever no block is."""

from __future__ import annotations

import contextlib
import threading
from dataclasses import dataclass
from typing import TYPE_CHECKING

import torch

from shoal.worker.memory import ShortageError

if TYPE_CHECKING:
    import random


class PlainKv:
    """A model of the KV cache: lists and dictionaries. Blocks that are neither owned nor cached are NaN."""

    back_us_per_mib = found_milli = 0

    def __init__(self, memory: PlainMemory, layout, blocks: int, *, is_caching: bool) -> None:
        self.memory = memory
        self.is_caching = is_caching
        self.block_bytes = layout.block_bytes
        self.tokens = layout.block_tokens
        self.arena = torch.full((blocks * layout.block_bytes,), 0xFF, dtype=torch.uint8)  # NaN in every float type
        self.shape = (blocks, layout.block_tokens, layout.token_elements)
        self.dtype = layout.dtype
        self.owners: dict[int, int] = {}
        self.sealed: dict[int, tuple[str, object]] = {}  # block: salt, and all tokens up to its end or a key
        self.known: dict[tuple[str, object], int] = {}
        self.cached: list[int] = []  # sealed and nobody's, the next to be evicted first
        self.digests: dict[int, bytes] = {}
        self.peak = self.refusals = self.evicted = self.found = self.moved = 0
        self.hints: list[int] = []
        self.lookups: list[tuple[int, int]] = []  # of each request that came: what was cached, and what it found of it

    def tensor(self):
        return self.arena.view(self.dtype).view(self.shape)

    def _of(self, block):
        return self.arena[block * self.block_bytes : (block + 1) * self.block_bytes]

    @property
    def ids(self):
        return set(self.owners)

    def alloc(self, count):
        if len(self.owners) + count > min(self.memory.blocks_max, self.shape[0]):
            self.refusals += 1
            return None
        while len(self.owners) + len(self.cached) + count > min(self.memory.blocks_max, self.shape[0]):
            self._evict()
        free = (block for block in range(self.shape[0]) if block not in self.owners and block not in self.sealed)
        taken = [next(free) for _ in range(count)]
        for block in taken:
            assert bool((self._of(block) == 0xFF).all()), f"somebody wrote to block {block} while it had no memory"
            self._of(block).zero_()
            self.owners[block] = 1
        self.peak = max(self.peak, len(self.owners) + len(self.cached))
        return taken

    def _evict(self):
        self.evicted += 1
        self._forget(self.cached[0])

    def _forget(self, block):
        self.check(block)
        del self.known[self.sealed.pop(block)], self.digests[block]
        if block in self.cached:
            self.cached.remove(block)
            self._of(block).fill_(0xFF)

    def check(self, block):
        """What a sealed block holds is what was sealed: nobody writes to it any more."""
        assert self._of(block).numpy().tobytes() == self.digests[block], f"somebody wrote to the sealed block {block}"

    def free(self, blocks):
        for block in blocks:
            assert block in self.owners, f"freed block {block}, which nobody owns"
            self.owners[block] -= 1
            if self.owners[block] == 0:
                del self.owners[block]
                if block in self.sealed:
                    self.cached.append(block)
                else:
                    self._of(block).fill_(0xFF)

    def available(self):
        return max(0, self.shape[0] - len(self.owners))

    def ready(self):
        return max(0, min(self.memory.blocks_max, self.shape[0]) - len(self.owners))

    def match(self, tokens, salt):
        ends = range(self.tokens, len(tokens) + 1, self.tokens)
        return self.match_keys([tuple(tokens[:end]) for end in ends], salt)

    def may_load(self, tokens, held, salt):
        return False

    def begin_load(self, tokens, held, salt):
        return None

    def cached_blocks(self):
        return len(self.cached)

    def looked(self, cached, found):
        assert 0 <= found <= cached
        self.lookups.append((cached, found))

    def match_keys(self, keys, salt):
        assert self.is_caching
        blocks = []
        for key in keys:
            block = self.known.get((salt, key))
            if block is None:
                break
            self.check(block)
            blocks.append(block)
        for block in blocks:
            self.owners[block] = self.owners.get(block, 0) + 1
            if block in self.cached:
                self.cached.remove(block)
        self.found += len(blocks) * self.tokens
        return blocks

    def save(self, tokens, new, salt):
        pass

    def computed(self, tokens, seconds, requests):
        assert tokens >= requests >= 1
        assert seconds >= 0
        self.memory.computed.append(tokens)

    def prefetch(self, tokens, salt):
        ahead = Ahead(tuple(tokens), salt)
        self.memory.ahead.append(ahead)
        return ahead

    def seal(self, tokens, blocks, salt):
        ends = range(self.tokens, len(tokens) + 1, self.tokens)
        self.seal_keys([tuple(tokens[:end]) for end in ends], blocks, salt, None)

    def seal_keys(self, keys, blocks, salt, after):
        del after
        assert self.is_caching
        for place, key in enumerate(keys):
            content, block = (salt, key), blocks[place]
            assert block in self.owners
            assert self.sealed.get(block, content) == content, "sealed twice with different tokens"
            found = self.known.setdefault(content, block)
            if found != block and found in self.owners:
                self.owners[found] += 1
                self.free([block])
                blocks[place] = found
            elif found == block and block not in self.sealed:
                assert not bool(torch.isnan(self._of(block).view(self.dtype)).any()), "sealed before it was filled"
                self.sealed[block] = content
                self.digests[block] = self._of(block).numpy().tobytes()

    def forget_all(self):
        for block in list(self.sealed):
            self._forget(block)

    def hint(self, blocks):
        self.hints.append(blocks)

    def compact(self):
        """Move blocks to where none is, at random: whoever does not follow reads poison."""
        draw, moves = self.memory.moves, {}
        if draw is None:
            return moves
        free = [block for block in range(self.shape[0]) if block not in self.owners and block not in self.sealed]
        for block in sorted({*self.owners, *self.sealed}):
            if not free or draw.random() < 0.5:
                continue
            target = moves[block] = free.pop(draw.randrange(len(free)))
            self._of(target).copy_(self._of(block))
            self._of(block).fill_(0xFF)
            if block in self.owners:
                self.owners[target] = self.owners.pop(block)
            if block in self.sealed:
                content = self.sealed[target] = self.sealed.pop(block)
                self.digests[target] = self.digests.pop(block)
                self.known[content] = target
            self.cached = [target if cached == block else cached for cached in self.cached]
        self.moved += len(moves)
        return moves

    def record_step(self, stream):
        assert stream == 0

    @property
    def mapped_bytes(self):
        return (len(self.owners) + len(self.cached)) * self.block_bytes

    @property
    def live_bytes(self):
        return len(self.owners) * self.block_bytes


@dataclass
class Ahead:
    """What was to be brought nearer, and whether it still is."""

    tokens: tuple[int, ...]
    salt: str
    cancelled: bool = False

    def cancel(self) -> None:
        self.cancelled = True


class PlainMemory:
    """What the tests turn.

    `beside_wakes`: the bytes of weights are still coming when a guard is entered;
    `blocks_max`: KV blocks that may have memory; `closed`: no guard can be entered; `close_at`: numbers of guards
    before which it closes by itself, so that the moment is the same in every run; `moves`: where blocks go
    when they may be moved.
    """

    steps_in_order = False

    def __init__(self, blocks_max: int = 1 << 30, moves: random.Random | None = None) -> None:
        self.blocks_max = blocks_max
        self.moves = moves
        self.ahead: list[Ahead] = []
        self.computed: list[int] = []
        self.beside_wakes = False
        self.sizes: list[int] = []
        self.closed = False
        self.close_at: set[int] = set()
        self.guards = 0
        self.held = threading.Lock()
        self.space: PlainKv | None = None

    @contextlib.contextmanager
    def guard(self, timeout_s, is_wanted=None, *, tokens=0):
        if self.guards in self.close_at:
            self.close_at.discard(self.guards)
            self.closed = True
        if self.closed:
            raise ShortageError("the test holds the memory")
        with self.held:
            self.guards += 1
            self.sizes.append(tokens)
            yield self.beside_wakes

    def kv(self, layout, blocks, *, is_caching):
        self.space = PlainKv(self, layout, blocks, is_caching=is_caching)
        return self.space

    def trim(self, *, cached=False):
        while cached and self.space is not None and self.space.cached:
            self.space._evict()

    def overhead_peak(self):
        return None

    def overhead(self):
        return None

    def tiers(self):
        return []

    def close(self):
        pass
