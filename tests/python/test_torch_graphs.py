"""Graphs whose memory lies in a region: when their pools go. torch's part is played here, the memory is simulated."""

from __future__ import annotations

import contextlib
import gc
import itertools
import threading
import time
from types import SimpleNamespace
from typing import TYPE_CHECKING, Any

import pytest

import shoal
from shoal import testing

torch = pytest.importorskip("torch")
import test_torch_hooks as hooks  # noqa: E402

import shoal.torch as st  # noqa: E402
from shoal.torch import pools  # noqa: E402

if TYPE_CHECKING:
    from collections.abc import Iterator

MIB = 1 << 20


class Pool:
    """What torch keeps of one pool: segments of a region, and how many use it."""

    serials = itertools.count(1)

    def __init__(self, filling: Any) -> None:
        self.id = (0, next(self.serials))
        self.alloc = hooks.alloc_of(SimpleNamespace(_native=filling.native))  # type: ignore[arg-type]
        self.uses = 1
        self.is_captured = False
        self.segments: list[dict[str, Any]] = []

    def use_count(self) -> int:
        return self.uses

    def snapshot(self, **_: object) -> list[dict[str, Any]]:
        return [{**one, "blocks": [{"size": one["total_size"], "state": "inactive"}]} for one in self.segments]

    def make(self, nbytes: int, *, lives: bool = False) -> dict[str, Any]:
        at = self.alloc(nbytes)
        assert at is not None
        self.segments.append({"address": at, "total_size": nbytes, "active_size": nbytes if lives else 0})
        return self.segments[-1]


class Graph:
    """A ``torch.cuda.CUDAGraph``."""

    def __init__(self) -> None:
        self.pool: Pool | None = None
        self.resets = 0

    def reset(self) -> None:
        self.resets += 1
        if self.pool is not None:
            self.pool.uses -= 1
            self.pool = None


class Torch:
    """torch's allocator and its captures."""

    def __init__(self, monkeypatch: pytest.MonkeyPatch) -> None:
        self.pools: dict[tuple[int, int], Pool] = {}
        self.fails_at_end = False
        self.streams: list[object] = []

        def make(filling: pools._Filling) -> Pool:
            made = Pool(filling)
            self.pools[made.id] = made
            return made

        monkeypatch.setattr(pools, "device_of", lambda _: torch.device("cuda", 0))
        monkeypatch.setattr(pools._Filling, "make", make)
        monkeypatch.setattr(torch.cuda, "graph", self.graph)
        monkeypatch.setattr(torch.cuda, "current_stream", lambda *_: "before")
        monkeypatch.setattr(torch.cuda, "set_stream", self.streams.append)
        monkeypatch.setattr(torch._C, "_cuda_releasePool", self.release, raising=False)
        monkeypatch.setattr(torch._C, "_cuda_endAllocateToPool", self.end_allocate, raising=False)

    def release(self, _: int, name: tuple[int, int]) -> None:
        # What a region of another test left is no part of this one.
        if name in self.pools:
            self.pools[name].uses -= 1
            assert self.pools[name].uses >= 0

    def end_allocate(self, _: int, name: tuple[int, int]) -> None:
        if not self.pools[name].is_captured:
            raise RuntimeError("endAllocatePool: not currently recording to mempool_id")
        self.pools[name].is_captured = False

    @contextlib.contextmanager
    def graph(self, cuda_graph: Graph, pool: tuple[int, int], **_: object) -> Iterator[None]:
        if cuda_graph.pool is not None:
            raise RuntimeError("This CUDAGraph instance already owns a captured graph.")
        # It empties its cache first: what pools have that nobody uses goes back.
        for gone in [one for one in self.pools.values() if not one.uses]:
            for segment in [one for one in gone.segments if not one["active_size"]]:
                gone.segments.remove(segment)
                hooks.free(segment["address"], segment["total_size"])
        own = self.pools[pool]
        assert own.uses > 0, "torch asserts that a pool that was released is not captured into"
        own.uses += 1
        own.is_captured = True
        try:
            yield
        finally:
            # As torch.cuda.graph: where the capture cannot be ended, the allocator hears nothing of its end.
            if self.fails_at_end:
                raise RuntimeError("operation failed due to a previous error during capture")
            own.is_captured = False
            cuda_graph.pool = own


@pytest.fixture
def fake(monkeypatch: pytest.MonkeyPatch) -> Iterator[Torch]:
    fake = Torch(monkeypatch)
    yield fake
    for pool in fake.pools.values():
        pool.segments, pool.uses = [], 1
    gc.collect()
    pools._sweep()


@pytest.fixture
def mem() -> Iterator[shoal.MemoryManager]:
    with testing.simulated_machine("64MiB") as device:
        yield device.manager(host_budget="128MiB")


@pytest.fixture
def region(fake: Torch, mem: shoal.MemoryManager) -> shoal.Region:
    return mem.region("weights")


def capture(region: shoal.Region, graph: Graph | None = None, nbytes: int = 16 * MIB, **options: Any) -> Graph:
    """Capture what needs 16 MiB of its own, in which no tensor lives afterwards."""
    made: Any = Graph() if graph is None else graph
    with st.graph(made, region, **options) as own:
        own.make(nbytes)
    return made


def committed(region: shoal.Region, at_most: int | None = None) -> int:
    """Give the bytes of memory it has; what was given up goes in a thread of ours once the device's work is done."""
    deadline = time.monotonic() + 30
    while True:
        nbytes = int(st.stats(region)["committed"])
        if at_most is None or nbytes <= at_most or time.monotonic() > deadline:
            return nbytes
        time.sleep(0.005)


def test_what_a_graph_had_goes_with_it(region: shoal.Region) -> None:
    graph = capture(region)
    first = committed(region)
    assert first >= 16 * MIB
    for _ in range(20):
        graph.reset()
        graph = capture(region)
        assert committed(region, first) == first
    assert len(pools._filling(region).graphs) == 1
    graph.reset()
    assert committed(region, 0) == 0
    assert not pools._filling(region).graphs


@pytest.mark.parametrize("by", ["graph", "freeze", "stats", "region"])
def test_who_gives_it_up(region: shoal.Region, mem: shoal.MemoryManager, fake: Torch, by: str) -> None:
    graph = capture(region)
    own = graph.pool
    assert own is not None
    filling = pools._filling(region)
    graph.reset()
    assert own.uses == 1
    if by == "graph":
        capture(region)
    elif by == "freeze":
        region.freeze()
        assert region.usage()["total"] == 0
    elif by == "stats":
        assert committed(region, 0) == 0
    else:
        assert filling.drop()
    assert own.uses == 0
    assert [one.pool for one in filling.graphs if one.pool is own] == []


def test_a_graph_that_lives_keeps_its_memory(region: shoal.Region) -> None:
    kept = capture(region)
    assert kept.pool is not None
    at = kept.pool.segments[0]["address"]
    memoryview(region.buffer(at - region.address, 4))[:] = b"used"
    for _ in range(5):
        capture(region).reset()
    region.freeze(wait=True)
    assert committed(region) >= 16 * MIB
    assert bytes(memoryview(region.buffer(at - region.address, 4))) == b"used"
    region.sleep()
    region.wake()
    assert bytes(memoryview(region.buffer(at - region.address, 4))) == b"used"


def test_graphs_that_share_a_pool_keep_it_until_the_last_is_gone(region: shoal.Region) -> None:
    first = capture(region)
    own = first.pool
    second = capture(region, pool=own)
    first.reset()
    assert committed(region) >= 32 * MIB
    third = capture(region, pool=own, nbytes=2 * MIB)
    second.reset()
    third.reset()
    assert committed(region, 0) == 0
    with pytest.raises(shoal.RegionError, match="graph that still lives"):
        capture(region, pool=own)


def test_a_pool_that_ends_before_the_capture_begins_is_refused(
    region: shoal.Region, monkeypatch: pytest.MonkeyPatch
) -> None:
    first = capture(region)
    own = first.pool
    waits = shoal.torch.graphs.Guard

    def guard(*arguments: Any) -> Any:
        # Another thread's graph goes while this one waits for its guard.
        first.reset()
        assert committed(region, 0) == 0
        return waits(*arguments)

    monkeypatch.setattr(shoal.torch.graphs, "Guard", guard)
    with pytest.raises(shoal.RegionError, match="graph that still lives"):
        capture(region, pool=own)
    assert pools._captures == [0]


def test_a_pool_by_name_stays(region: shoal.Region) -> None:
    own = st.pool(region)
    capture(region, pool=own).reset()
    assert committed(region) >= 16 * MIB
    capture(region, pool=own, nbytes=MIB).reset()
    assert committed(region) >= 16 * MIB
    assert own.uses == 1


def test_a_tensor_of_a_graph_outlives_it(region: shoal.Region, fake: Torch) -> None:
    graph: Any = Graph()
    with st.graph(graph, region) as own:
        own.make(16 * MIB)
        out = own.make(2 * MIB, lives=True)
    offset = out["address"] - region.address
    memoryview(region.buffer(offset, 3))[:] = b"out"
    graph.reset()
    assert 2 * MIB <= committed(region, 4 * MIB) <= 4 * MIB, "only what the tensor lies in is left"
    assert bytes(memoryview(region.buffer(offset, 3))) == b"out"
    assert own.uses == 0, "torch hands out nothing of it any more"
    with pytest.raises(shoal.RegionError, match="graph that still lives"):
        capture(region, pool=own)
    out["active_size"] = 0
    assert committed(region, 0) == 0
    assert not pools._filling(region).graphs


@pytest.mark.parametrize("shared", [False, True])
@pytest.mark.parametrize("fails", ["body", "end"])
def test_a_capture_that_fails_leaves_nothing(region: shoal.Region, fake: Torch, fails: str, shared: bool) -> None:
    other = capture(region) if shared else None
    before, own = committed(region), other.pool if other is not None else None
    graph: Any = Graph()
    fake.fails_at_end = fails == "end"
    with pytest.raises(RuntimeError, match=r"the body|a previous error"), st.graph(graph, region, pool=own) as used:
        used.make(16 * MIB)
        if fails == "body":
            raise RuntimeError("the body")
    fake.fails_at_end = False
    assert fake.streams == ["before"]
    assert graph.resets == 1
    assert not used.is_captured
    if other is None:
        assert committed(region, 0) == before == 0
        assert not pools._filling(region).graphs
    else:
        assert used.uses == 2, "the pool itself, and the graph that lives"
        assert other.pool is own
        other.reset()
        assert committed(region, 0) == 0
    capture(region)


def test_a_graph_that_has_been_captured_is_not_reset_by_a_second_capture(region: shoal.Region) -> None:
    graph = capture(region)
    before = committed(region)
    with pytest.raises(RuntimeError, match="already owns"):
        capture(region, graph)
    assert graph.resets == 0
    assert graph.pool is not None
    assert graph.pool.uses == 2
    assert committed(region) == before
    assert len(pools._filling(region).graphs) == 1


def test_nothing_is_given_up_while_another_thread_captures(
    region: shoal.Region, fake: Torch, mem: shoal.MemoryManager
) -> None:
    gone = capture(region)
    inside, leave = threading.Event(), threading.Event()
    made: list[Graph] = []

    def body() -> None:
        graph: Any = Graph()
        with st.graph(graph, region) as own:
            own.make(2 * MIB)
            inside.set()
            leave.wait(60)
        made.append(graph)

    thread = threading.Thread(target=body)
    thread.start()
    assert inside.wait(60)
    gone.reset()
    assert committed(region) >= 18 * MIB, "marking all work would end the capture"
    leave.set()
    thread.join(60)
    assert 2 * MIB <= committed(region, 4 * MIB) <= 4 * MIB
    assert len(made) == 1
    assert pools._captures == [0]


def test_many_threads_capture_and_drop(region: shoal.Region) -> None:
    failures: list[BaseException] = []
    together = threading.Barrier(4)

    def work(number: int) -> None:
        try:
            for _ in range(25):
                graph = capture(region, nbytes=2 * MIB)
                st.stats(region)
                graph.reset()
                together.wait(60)
                if number == 0:
                    assert committed(region, 0) == 0
                together.wait(60)
        except BaseException as error:  # noqa: BLE001  (it is looked at below)
            failures.append(error)
            together.abort()

    threads = [threading.Thread(target=work, args=(number,)) for number in range(4)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join(120)
    assert not failures
    assert not pools._filling(region).graphs
    assert pools._captures == [0]
