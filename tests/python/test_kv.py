"""KV blocks against a plain model: what is backed, what it holds, and what it costs."""

from __future__ import annotations

import contextlib

import pytest
from helpers import PAGE
from hypothesis import HealthCheck, settings
from hypothesis import strategies as st
from hypothesis.stateful import RuleBasedStateMachine, initialize, invariant, precondition, rule

import shoal
from shoal import testing

BLOCKS = 24
BLOCK_BYTES = 384 << 10  # no multiple or divisor of a page, so that blocks straddle pages


def pages_of(block: int) -> set[int]:
    return set(range(block * BLOCK_BYTES // PAGE, ((block + 1) * BLOCK_BYTES - 1) // PAGE + 1))


def test_backing_is_all_or_nothing_and_twice_is_an_error() -> None:
    with testing.simulated_memory("16MiB") as mem:
        kv = shoal.KvBacking(mem.region("kv", BLOCKS * BLOCK_BYTES, kind="kv"), block_bytes=BLOCK_BYTES, blocks=BLOCKS)
        assert kv.back([0, 1])
        live = kv.live_bytes
        assert live == 2 * BLOCK_BYTES
        for ids in ([1], [2, 1], [3, 3], [BLOCKS], [4, BLOCKS]):
            with pytest.raises(shoal.RegionError):
                kv.back(ids)
            assert kv.live_bytes == live
        for ids in ([2], [0, 2], [0, 0], [BLOCKS]):
            with pytest.raises(shoal.RegionError):
                kv.unback(ids)
            assert kv.live_bytes == live
        with pytest.raises(OverflowError):
            kv.back([-1])
        kv.unback([1, 0])
        assert kv.live_bytes == 0
        assert kv.back([])


def test_no_room_is_a_value_and_changes_nothing() -> None:
    with testing.simulated_memory("4MiB") as mem:
        kv = shoal.KvBacking(mem.region("kv", 8 * PAGE, kind="kv"), block_bytes=PAGE, blocks=8)
        assert kv.back([0])
        assert kv.back([1, 2]) is False
        assert kv.live_bytes == PAGE
        assert kv.back([7])
        assert kv.back([5]) is False
        kv.unback([0])
        assert kv.idle_bytes == PAGE
        assert kv.trim().freed == PAGE
        assert kv.back([5])


def test_weights_make_room_for_kv_only_when_asked() -> None:
    with testing.simulated_memory("8MiB") as mem:
        weights = mem.region("weights", 3 * PAGE)
        weights.stage(0, b"w" * 3 * PAGE)
        weights.seal()
        weights.wake()
        kv = shoal.KvBacking(mem.region("kv", 4 * PAGE, kind="kv"), block_bytes=PAGE, blocks=4)
        assert kv.back([0])
        assert kv.back([1]) is False
        assert weights.usage()["device"] == 3 * PAGE


def test_idle_kv_yields_before_weights() -> None:
    with testing.simulated_memory("16MiB") as mem:
        weights = mem.region("weights", 3 * PAGE)
        weights.stage(0, b"w" * 3 * PAGE)
        weights.seal()
        weights.wake()
        kv = shoal.KvBacking(mem.region("kv", 4 * PAGE, kind="kv"), block_bytes=PAGE, blocks=4)
        assert kv.back([0, 1, 2])
        kv.unback([1, 2])
        mem.reclaim(2 * PAGE)
        assert weights.usage()["device"] == 3 * PAGE
        assert kv.backed_bytes == PAGE


def test_kv_content_survives_when_everything_is_reclaimed() -> None:
    with testing.simulated_memory("16MiB") as mem:
        region = mem.region("kv", 4 * PAGE, kind="kv")
        kv = shoal.KvBacking(region, block_bytes=PAGE, blocks=4)
        assert kv.back([1, 3])
        with mem.guard():
            memoryview(region.buffer(PAGE, 4))[:] = b"keep"
            memoryview(region.buffer(3 * PAGE, 4))[:] = b"this"
        report = mem.reclaim("1GiB")
        assert report.freed == 2 * PAGE
        assert mem.device_memory()["used_by_this_process"] == 0
        with mem.guard():
            assert bytes(memoryview(region.buffer(PAGE, 4))) == b"keep"
            assert bytes(memoryview(region.buffer(3 * PAGE, 4))) == b"this"


def test_new_blocks_are_refused_where_old_ones_could_not_come_back() -> None:
    with testing.simulated_memory(4 * PAGE) as mem:
        region = mem.region("kv", 8 * PAGE, kind="kv")
        kv = shoal.KvBacking(region, block_bytes=PAGE, blocks=8)
        assert kv.back([0, 1, 2])
        with mem.guard():
            memoryview(region.buffer(2 * PAGE, 4))[:] = b"kept"
        assert mem.reclaim("1GiB").freed == 3 * PAGE
        assert kv.back([3, 4]) is False, "five pages on a budget of four"
        assert kv.live_bytes == 3 * PAGE
        with mem.guard():
            assert bytes(memoryview(region.buffer(2 * PAGE, 4))) == b"kept"
        assert kv.back([3])
        with mem.guard():
            assert bytes(memoryview(region.buffer(2 * PAGE, 4))) == b"kept"


class Blocks(RuleBasedStateMachine):
    """Any order of backing, giving back, writing, reclaiming and waking leaves what a dictionary would hold."""

    @initialize(room=st.integers(2, 8))
    def begin(self, room: int) -> None:
        self.stack = contextlib.ExitStack()
        self.mem = self.stack.enter_context(testing.simulated_memory(room * PAGE, host_budget="64MiB"))
        self.region = self.mem.region("kv", BLOCKS * BLOCK_BYTES, kind="kv")
        self.kv = shoal.KvBacking(self.region, block_bytes=BLOCK_BYTES, blocks=BLOCKS)
        self.room = room * PAGE
        self.held: dict[int, bytes] = {}

    def teardown(self) -> None:
        if hasattr(self, "stack"):
            del self.kv, self.region, self.mem
            self.stack.close()

    def wanted_bytes(self) -> int:
        return len(set().union(*map(pages_of, self.held), set())) * PAGE

    def enter(self) -> shoal.Guard:
        """Enter a guard. It is never refused: memory for blocks is granted together with that for all before them."""
        assert self.kv.backed_bytes <= self.room
        return self.mem.guard(20).__enter__()

    @rule(ids=st.sets(st.integers(0, BLOCKS - 1), min_size=1, max_size=6))
    def back(self, ids: set[int]) -> None:
        order = sorted(ids)
        if ids & self.held.keys():
            with pytest.raises(shoal.RegionError):
                self.kv.back(order)
            return
        if not self.kv.back(order):
            return
        for block in order:
            self.held[block] = b""

    @precondition(lambda self: self.held)
    @rule(data=st.data())
    def unback(self, data: st.DataObject) -> None:
        ids = data.draw(st.sets(st.sampled_from(sorted(self.held)), min_size=1))
        self.kv.unback(sorted(ids))
        for block in ids:
            del self.held[block]

    @precondition(lambda self: self.held)
    @rule(data=st.data(), content=st.binary(min_size=1, max_size=8))
    def write(self, data: st.DataObject, content: bytes) -> None:
        block = data.draw(st.sampled_from(sorted(self.held)))
        guard = self.enter()
        with contextlib.ExitStack() as stack:
            stack.push(guard.__exit__)
            view = memoryview(self.region.buffer(block * BLOCK_BYTES, BLOCK_BYTES))
            view[: len(content)] = content
            view[-len(content) :] = content
            view.release()
        self.held[block] = content

    @rule(pages=st.integers(1, 8))
    def reclaim(self, pages: int) -> None:
        before = self.mem.device_memory()["used_by_this_process"]
        freed = self.mem.reclaim(pages * PAGE).freed
        assert self.mem.device_memory()["used_by_this_process"] == before - freed
        assert freed >= min(before, pages * PAGE)

    @rule()
    def check(self) -> None:
        guard = self.enter()
        with contextlib.ExitStack() as stack:
            stack.push(guard.__exit__)
            for block, content in self.held.items():
                if content:
                    view = memoryview(self.region.buffer(block * BLOCK_BYTES, BLOCK_BYTES))
                    assert bytes(view[: len(content)]) == content
                    assert bytes(view[-len(content) :]) == content
                    view.release()

    @invariant()
    def counts(self) -> None:
        if hasattr(self, "kv"):
            assert self.kv.live_bytes == len(self.held) * BLOCK_BYTES
            assert self.mem.device_memory()["used_by_this_process"] <= self.room
            assert self.kv.backed_bytes == self.kv.idle_bytes + self.wanted_bytes()


Blocks.TestCase.settings = settings(
    max_examples=100, stateful_step_count=25, deadline=None, suppress_health_check=list(HealthCheck)
)
TestBlocks = Blocks.TestCase
