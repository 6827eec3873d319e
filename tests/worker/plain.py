"""Ordinary memory behind the worker's seam, with a budget, and poison wherever nothing is backed."""

from __future__ import annotations

import contextlib
import threading

import torch

from shoal.worker.memory import ShortageError


class PlainKv:
    def __init__(self, memory: PlainMemory, block_bytes: int, blocks: int) -> None:
        self.memory = memory
        self.block_bytes = block_bytes
        self.arena = torch.full((block_bytes * blocks,), 0xFF, dtype=torch.uint8)  # NaN in every float type
        self.ids: set[int] = set()
        self.peak = 0
        self.refusals = 0

    def tensor(self, offset, shape, stride, dtype):
        return self.arena.view(dtype).as_strided(tuple(shape), tuple(stride), offset)

    def _of(self, block):
        return self.arena[block * self.block_bytes : (block + 1) * self.block_bytes]

    def back(self, blocks):
        assert not self.ids & set(blocks), "backed twice"
        if len(self.ids) + len(blocks) > self.memory.blocks_max:
            self.refusals += 1
            return False
        for block in blocks:
            assert bool((self._of(block) == 0xFF).all()), f"somebody wrote to block {block} while it had no memory"
            self._of(block).zero_()
            self.ids.add(block)
        self.peak = max(self.peak, len(self.ids))
        return True

    def unback(self, blocks):
        assert set(blocks) <= self.ids, "unbacked what is not backed"
        for block in blocks:
            self._of(block).fill_(0xFF)
            self.ids.discard(block)

    @property
    def backed_bytes(self):
        return len(self.ids) * self.block_bytes

    live_bytes = backed_bytes


class PlainMemory:
    """What the tests turn.

    `blocks_max`: KV blocks that may have memory; `closed`: no guard can be entered; `close_at`: numbers of guards
    before which it closes by itself, so that the moment is the same in every run.
    """

    def __init__(self, blocks_max: int = 1 << 30) -> None:
        self.blocks_max = blocks_max
        self.closed = False
        self.close_at: set[int] = set()
        self.guards = 0
        self.held = threading.Lock()
        self.space: PlainKv | None = None

    @contextlib.contextmanager
    def guard(self, timeout_s):
        if self.guards in self.close_at:
            self.close_at.discard(self.guards)
            self.closed = True
        if self.closed:
            raise ShortageError("the test holds the memory")
        with self.held:
            self.guards += 1
            yield

    def kv(self, block_bytes, blocks):
        self.space = PlainKv(self, block_bytes, blocks)
        return self.space

    def trim(self):
        pass

    def overhead_peak(self):
        return None
