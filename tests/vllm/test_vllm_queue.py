"""The queue of blocks that nobody uses, against a plain model, over a real cache on the simulated device."""

from __future__ import annotations

import random
import types
from dataclasses import dataclass, field
from types import SimpleNamespace

import pytest
from hypothesis import given
from hypothesis import strategies as st

import shoal
from shoal.errors import OutOfMemoryError, RegionError
from shoal.vllm.cache import ElasticCache, Plan
from shoal.vllm.queue import ElasticQueue

LAYERS, BLOCK_BYTES, BLOCKS = 2, 64 << 10, 150
MIB = 1 << 20


@dataclass
class Block:
    block_id: int
    block_hash: object = None
    ref_cnt: int = 0


def config(blocks: int = BLOCKS, size: int = BLOCK_BYTES, layers: int = LAYERS, **packed: int) -> types.SimpleNamespace:
    tensors = [
        types.SimpleNamespace(size=blocks * size, shared_by=[f"layer {number}"], block_stride=packed.get("stride", 0))
        for number in range(layers)
    ]
    return types.SimpleNamespace(num_blocks=blocks, kv_cache_tensors=tensors)


@dataclass
class Engine:
    """A queue over a cache, and what a plain model says of it."""

    mem: shoal.MemoryManager = field(default_factory=lambda: shoal.MemoryManager("sim", device_budget="64MiB"))
    used: dict[int, Block] = field(default_factory=dict)
    kept: list[int] = field(default_factory=list)

    def __post_init__(self) -> None:
        self.cache = ElasticCache(self.mem, Plan.of(config()))
        self.cache.hold(1)
        self.blocks = [Block(number) for number in range(BLOCKS)]
        self.queue = ElasticQueue(self.blocks, self.cache.kv, self.cache.kv.groups[0].blocks)
        self.queue.adopt(1)

    def take(self, n: int) -> bool:
        """As vLLM does: say how many, ask how many there are, take them."""
        self.queue.expect(n)
        if n > self.queue.num_free_blocks:
            return False
        for block in self.queue.popleft_n(n):
            assert block.block_id not in self.used, "a block that is in use was handed out"
            assert 0 < block.block_id < BLOCKS
            if block.block_id in self.kept:
                self.kept.remove(block.block_id)
            block.block_hash = None
            self.used[block.block_id] = block
        return True

    def free(self, ids: list[int], *, is_kept: bool) -> None:
        blocks = [self.used.pop(number) for number in ids]
        if is_kept:
            for block in blocks:
                block.block_hash = object()
            self.queue.append_n(blocks)
            self.kept += ids
        else:
            self.queue.prepend_n(blocks)

    def touch(self, number: int) -> None:
        self.queue.remove(self.blocks[number])
        self.kept.remove(number)
        self.used[number] = self.blocks[number]

    def check(self) -> None:
        assert self.queue.used == len(self.used) + 1
        assert [block.block_id for block in self.queue.get_all_free_blocks()] == self.kept
        group = self.cache.kv.usage()["groups"][0]
        ours = len(self.used) + 1 + len(self.kept) + len(self.queue._ready) + len(self.queue._aside)
        assert group["owned_blocks"] == ours, "the cache and the queue count other blocks"
        for number in [0, *self.used, *self.kept]:
            assert self.cache.kv.groups[0].owners(number) == 1
        self.cache.kv.check()


@given(seed=st.integers(0, 1 << 30))
def test_blocks_are_neither_lost_nor_handed_out_twice(seed: int) -> None:
    chance = random.Random(seed)
    engine = Engine()
    for _ in range(60):
        what = chance.randrange(7)
        if what <= 1:
            engine.take(chance.randrange(1, 60))
        elif what <= 3 and engine.used:
            ids = chance.sample(sorted(engine.used), chance.randrange(1, len(engine.used) + 1))
            engine.free(ids, is_kept=what == 3)
        elif what == 4 and engine.kept:
            engine.touch(chance.choice(engine.kept))
        elif what == 5:
            engine.cache.set_limit(chance.choice([2, 4, 8, 20, 64]) * MIB)
        elif what == 6:
            engine.queue.expect(chance.randrange(BLOCKS))
            assert engine.queue.num_free_blocks >= 0
        engine.check()


def test_what_is_promised_has_memory() -> None:
    engine = Engine(shoal.MemoryManager("sim", device_budget="20MiB"))
    assert engine.take(50)
    # A neighbour takes what is left of the device.
    other = engine.mem.region("other", "20MiB")
    held = 0
    while True:
        try:
            other.commit(held, 2 * MIB)
        except shoal.Error:
            break
        held += 2 * MIB
    assert held
    before = dict(engine.used)
    assert not engine.take(BLOCKS - 51)
    assert engine.used == before
    engine.check()
    # What a request gives back serves the next one.
    engine.free(sorted(engine.used)[:30], is_kept=True)
    assert engine.take(25)
    engine.check()


@pytest.mark.parametrize("error", [shoal.LeaseError, shoal.OutOfMemoryError, shoal.DeadlineError])
def test_memory_that_cannot_be_had_now_is_a_shortage_and_no_failure(error: type[shoal.Error]) -> None:
    class Memory:
        def alloc(self, n: int) -> list[int] | None:
            raise error(f"{n} blocks: not now")

        def free(self, ids: list[int]) -> None:
            raise AssertionError(ids)

        def available(self) -> int:
            return BLOCKS

    queue = ElasticQueue([Block(number) for number in range(BLOCKS)], Memory(), BLOCKS)
    queue.adopt(1)
    queue.expect(5)
    assert queue.num_free_blocks == 0
    with pytest.raises(ValueError, match="0 have memory"):
        queue.popleft_n(5)
    assert queue.used == 1


def test_a_step_that_does_not_end_lets_a_limit_wait(monkeypatch: pytest.MonkeyPatch) -> None:
    engine = Engine()
    assert engine.take(120)
    monkeypatch.setattr(ElasticCache, "shrink", lambda *_: (_ for _ in ()).throw(shoal.DeadlineError("a step runs")))
    engine.cache.set_limit(2 * MIB)
    monkeypatch.undo()
    engine.free(sorted(engine.used), is_kept=False)
    engine.cache.keep_limit()
    assert engine.cache.kv.usage()["mapped"] <= 2 * MIB + engine.cache.kv.groups[0].granule_min


def test_more_than_there_are_is_an_error_that_changes_nothing() -> None:
    engine = Engine()
    with pytest.raises(ValueError, match="free blocks"):
        engine.queue.popleft_n(BLOCKS)
    engine.check()
    with pytest.raises(RuntimeError, match="in use or holds nothing"):
        engine.queue.remove(engine.blocks[5])


def test_the_longest_unused_goes_first() -> None:
    engine = Engine()
    assert engine.take(BLOCKS - 1)
    order = sorted(engine.used)
    random.Random(3).shuffle(order)
    engine.free(order, is_kept=True)
    assert engine.take(10)
    assert sorted(engine.used) == sorted(order[:10])


def test_idle_units_are_those_without_users_and_pieces_without_users_come_first() -> None:
    engine = Engine()
    assert engine.take(BLOCKS - 1)
    engine.free([number for number in sorted(engine.used) if number != 40], is_kept=True)
    units = engine.queue.idle(MIB // 32, MIB, 2, [40])
    numbers = [{block.block_id // 32 for block in unit} for unit in units]
    assert {1} not in numbers
    # Unit 0 shares its piece with the one that is in use.
    assert numbers[-1] == {0}
    assert sum(len(unit) for unit in units) == BLOCKS - 1 - 32


def test_a_block_that_lies_in_two_units_keeps_both_and_is_given_once() -> None:
    engine = Engine()
    assert engine.take(BLOCKS - 1)
    engine.free([number for number in sorted(engine.used) if number != 3], is_kept=True)
    # Of 36 layers: 2.25 MiB in units of 4.
    block, unit = 9, 16
    units = engine.queue.idle(block, unit, 64, [3])
    given = [one.block_id for some in units for one in some]
    assert len(given) == len(set(given))
    # Block 3 lies in the units 1 and 2; what lies in none but these two stays.
    assert set(range(1, BLOCKS)) - set(given) == {2, 3, 4}
    # Once so many of them are given, nothing lies in that much memory any more.
    gone = {one.block_id for some in units[:5] for one in some}
    held = {number for number in range(BLOCKS) if number not in gone}
    touched = {at for number in held for at in range(number * block // unit, ((number + 1) * block - 1) // unit + 1)}
    all_units = -(-BLOCKS * block // unit)
    assert all_units - len(touched) >= 5, (all_units, touched)


def test_blocks_that_straddle_units_are_counted_by_their_bytes() -> None:
    """All layers of a block side by side, 36 of 64 KiB: 2.25 MiB in units of 4."""
    mem = shoal.MemoryManager("sim", device_budget="400MiB")
    cache = ElasticCache(mem, Plan(80, 36 << 16, (("a", "b"),)))
    assert (cache.unit_bytes, cache.units_per_piece) == (4 * MIB, 64), "a handle has 256 MiB at most"
    ids = cache.kv.alloc(16)
    assert ids is not None
    cache.pool = SimpleNamespace(free_block_queue=SimpleNamespace(cached=8, used=8))
    usage = cache.kv.usage()
    could_go = usage["mapped"] - usage["empty"] - 5 * 4 * MIB
    assert cache.kept_bytes() == min(8 * (36 << 16), could_go) >= 12 * MIB
    cache.kv.free(ids)


def test_an_idle_cache_keeps_one_piece_of_memory() -> None:
    engine = Engine()
    assert engine.cache.kv.usage()["mapped"] == engine.cache.kv.groups[0].granule_min
    assert engine.take(120)
    engine.free(sorted(engine.used), is_kept=False)
    engine.cache.shrink(64 * MIB)
    assert engine.cache.kv.usage()["mapped"] == engine.cache.kv.groups[0].granule_min


def test_warming_up_has_the_first_blocks_and_gives_them_back() -> None:
    mem = shoal.MemoryManager("sim", device_budget="64MiB")
    cache = ElasticCache(mem, Plan.of(config()))
    cache.hold(70)
    assert all(cache.kv.groups[0].owners(number) == 1 for number in range(70))
    assert cache.kv.usage()["groups"][0]["owned_blocks"] == 70
    cache.release()
    assert cache.kv.groups[0].owners(0) == 1
    assert cache.kv.usage()["groups"][0]["owned_blocks"] == 1
    assert {tuple(tensor.shape) for tensor in cache.tensors().values()} == {(BLOCKS * BLOCK_BYTES,)}


def test_too_little_memory_to_warm_up_is_an_error_with_figures() -> None:
    mem = shoal.MemoryManager("sim", device_budget="4MiB")
    cache = ElasticCache(mem, Plan.of(config()))
    with pytest.raises(OutOfMemoryError, match="needs 100 KV blocks to start"):
        cache.hold(100)
    assert cache.kv.usage()["groups"][0]["owned_blocks"] == 0


def test_layers_side_by_side_are_one_plane() -> None:
    plan = Plan.of(config(layers=4, stride=BLOCK_BYTES))
    assert plan.planes == (("layer 0", "layer 1", "layer 2", "layer 3"),)
    assert plan.nbytes == BLOCKS * BLOCK_BYTES


@pytest.mark.parametrize("wrong", ["sizes", "rest", "none"])
def test_a_cache_that_cannot_be_elastic_is_refused(wrong: str) -> None:
    asked = config()
    if wrong == "sizes":
        asked.kv_cache_tensors[0].size *= 2
    elif wrong == "rest":
        for tensor in asked.kv_cache_tensors:
            tensor.size += 1
    else:
        asked.kv_cache_tensors = []
    with pytest.raises(RegionError):
        Plan.of(asked)
