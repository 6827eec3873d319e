"""What torch's allocator calls, called by hand on a simulated device: segments, refusals, threads, forks."""

from __future__ import annotations

import ctypes
import gc
import os
import threading
from types import SimpleNamespace
from typing import TYPE_CHECKING, Any

import pytest
from helpers import PAGE

import shoal
from shoal import _native, testing

if TYPE_CHECKING:
    from collections.abc import Callable, Iterator

pytestmark = [pytest.mark.filterwarnings("ignore::DeprecationWarning")]

MIB = 1 << 20
_library = ctypes.CDLL(_native.__file__)
_free = _library.shoal_torch_free
_free.argtypes = [ctypes.c_void_p, ctypes.c_ssize_t, ctypes.c_int, ctypes.c_void_p]
_free.restype = None


def alloc_of(region: shoal.Region) -> Callable[..., int | None]:
    """Give the function that torch would call for a region."""
    function = getattr(_library, f"shoal_torch_alloc_{region._native.torch_bind()}")
    function.argtypes = [ctypes.c_ssize_t, ctypes.c_int, ctypes.c_void_p]
    function.restype = ctypes.c_void_p

    def alloc(nbytes: int, device: int = 0, stream: int = 0) -> int | None:
        return function(nbytes, device, stream)

    return alloc


def free(address: int, nbytes: int, stream: int = 0) -> None:
    _free(address, nbytes, 0, stream)


@pytest.fixture
def mem() -> Iterator[shoal.MemoryManager]:
    with testing.simulated_machine("64MiB") as device:
        yield device.manager(host_budget="128MiB")


def test_segments_lie_in_the_region_and_hold_their_bytes_through_sleep(mem: shoal.MemoryManager) -> None:
    region = mem.region("weights")
    assert region.grows
    alloc = alloc_of(region)
    first, second = alloc(20 * MIB), alloc(2 * MIB, 0, 0)
    assert first == region.address
    assert second == first + 20 * MIB
    view = memoryview(region.buffer(20 * MIB, 2 * MIB))
    view[:5] = b"bytes"
    assert region.freeze().sealed >= 22 * MIB
    for _ in range(3):
        region.sleep()
        assert region.usage()["device"] == 0
        assert alloc(MIB) is None, "it is asleep"
        assert "asleep" in str(region._native.last_error())
        region.wake()
        assert bytes(view[:5]) == b"bytes"
    free(first, 20 * MIB)
    free(second, 2 * MIB)
    figures = region._native.segments_usage()
    assert (figures["segments"], figures["allocations"], figures["frees"], figures["refusals"]) == (0, 2, 2, 3)
    assert mem.device_memory()["used_by_this_process"] == mem.usage()["pooled"]


def test_a_refusal_is_a_null_pointer_with_a_reason_and_changes_nothing(mem: shoal.MemoryManager) -> None:
    region = mem.region("weights")
    alloc = alloc_of(region)
    assert alloc(65 * MIB) is None
    assert isinstance(region._native.last_error(), shoal.OutOfMemoryError | shoal.LeaseError)
    assert alloc(-1) is None
    kept = alloc(64 * MIB)
    assert kept is not None
    assert alloc(PAGE) is None
    free(kept, 64 * MIB)
    assert alloc(64 * MIB) == kept, "the room is there again"


def test_what_is_no_segment_is_not_freed(mem: shoal.MemoryManager) -> None:
    region = mem.region("weights")
    alloc = alloc_of(region)
    first = alloc(4 * MIB)
    assert first is not None
    free(first + PAGE, PAGE)
    free(0x1000, PAGE)
    free(first, 4 * MIB)
    free(first, 4 * MIB)
    assert region._native.segments_usage()["frees"] == 1


def test_a_shortage_takes_from_a_frozen_region(mem: shoal.MemoryManager) -> None:
    old, new = mem.region("old"), mem.region("new")
    at = alloc_of(old)(40 * MIB)
    assert at is not None
    memoryview(old.buffer(0, 40 * MIB))[:3] = b"old"
    assert alloc_of(new)(40 * MIB) is None, "nothing yields that was not frozen"
    old.freeze()
    assert alloc_of(new)(40 * MIB) is not None
    assert old.usage()["device"] < 40 * MIB


def test_threads_fill_several_regions_at_once(mem: shoal.MemoryManager) -> None:
    regions = [mem.region(f"r{number}") for number in range(4)]
    allocs = [alloc_of(region) for region in regions]
    failures: list[str] = []

    def work(number: int) -> None:
        for turn in range(60):
            region, nbytes = regions[(number + turn) % 4], (1 + turn % 3) * PAGE
            at = allocs[(number + turn) % 4](nbytes, 0, number)
            if at is None or not region.address <= at < region.address + region.bytes:
                failures.append(f"{at} in {region}: {region._native.last_error()}")
                return
            buffer = memoryview(region.buffer(at - region.address, 8))
            buffer[:] = bytes([number] * 8)
            if bytes(buffer) != bytes([number] * 8):
                failures.append("two threads have the same bytes")
            free(at, nbytes, number)

    threads = [threading.Thread(target=work, args=(number,)) for number in range(4)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join(60)
    assert not failures
    assert all(region._native.segments_usage()["segments"] == 0 for region in regions)


def test_a_fork_gets_nothing_and_frees_nothing(mem: shoal.MemoryManager) -> None:
    region = mem.region("weights")
    alloc = alloc_of(region)
    at = alloc(4 * MIB)
    assert at is not None
    child = os.fork()
    if child == 0:
        free(at, 4 * MIB)
        os._exit(0 if alloc(PAGE) is None else 1)
    assert os.waitstatus_to_exitcode(os.waitpid(child, 0)[1]) == 0
    assert region._native.segments_usage()["frees"] == 0
    memoryview(region.buffer(0, 4))[:] = b"here"


def test_a_region_that_is_gone_lives_until_torch_has_no_segment_of_it(mem: shoal.MemoryManager) -> None:
    region = mem.region("weights")
    at = alloc_of(region)(4 * MIB)
    assert at is not None
    view = memoryview(region.buffer(0, 4))
    region._native.torch_unbind()
    del region
    view[:] = b"here"
    view.release()
    assert mem.device_memory()["used_by_this_process"] >= 4 * MIB
    free(at, 4 * MIB)
    assert mem.device_memory()["used_by_this_process"] == mem.usage()["pooled"]


def test_slots_run_out_and_come_back(mem: shoal.MemoryManager) -> None:
    regions = [mem.region(f"r{number}") for number in range(65)]
    bound: list[shoal.Region] = []
    try:
        with pytest.raises(shoal.RegionError, match="64 regions"):
            for region in regions:
                region._native.torch_bind()
                bound.append(region)
    finally:
        for region in bound:
            region._native.torch_unbind()
    assert regions[-1]._native.torch_bind() == 0 or bound


def test_a_simulated_device_says_what_to_use_instead(mem: shoal.MemoryManager) -> None:
    pytest.importorskip("torch")
    import shoal.torch as st

    with (
        pytest.raises(shoal.RegionError, match=r"shoal\.torch\.place"),
        st.use_region(mem.region("weights")),
    ):
        pass
    with pytest.raises(shoal.RegionError, match="with a length"), st.use_region(mem.region("short", "4MiB")):
        pass
    with st.disable():
        pass


@pytest.fixture
def cuda_mem(mem: shoal.MemoryManager, monkeypatch: pytest.MonkeyPatch) -> Iterator[shoal.MemoryManager]:
    """A manager whose regions torch takes for a GPU's: what it would make of them is not made here."""
    torch = pytest.importorskip("torch")
    from shoal.torch import pools

    monkeypatch.setattr(pools, "device_of", lambda _: torch.device("cuda", 0))
    monkeypatch.setattr(pools._Filling, "make", lambda _: SimpleNamespace(use_count=lambda: 1, snapshot=lambda **_: []))
    monkeypatch.setattr(pools._Filling, "end", lambda *_: None)
    monkeypatch.setattr(pools._Entry, "begin", lambda _: None)
    yield mem
    gc.collect()
    pools._sweep()


def test_a_region_may_go_in_a_thread_that_holds_the_lock(cuda_mem: shoal.MemoryManager) -> None:
    from shoal.torch import pools

    # As an attached model holds its region: in a cycle, which goes where Python happens to collect it.
    cycle: list[object] = [cuda_mem.region("weights")]
    cycle.append(cycle)
    slot = pools._filling(cycle[0]).slot  # type: ignore[arg-type]
    del cycle
    gone = threading.Event()

    def collect() -> None:
        with pools._lock:
            gc.collect()
        gone.set()

    threading.Thread(target=collect, daemon=True).start()
    assert gone.wait(60), "the garbage collector waits for a lock that its own thread holds"
    pools._sweep()
    assert cuda_mem.region("next")._native.torch_bind() == slot


def test_what_a_region_left_is_not_forgotten_by_a_failure(
    cuda_mem: shoal.MemoryManager, monkeypatch: pytest.MonkeyPatch
) -> None:
    from shoal.torch import pools

    region = cuda_mem.region("weights")
    slot = pools._filling(region).slot
    del region
    gc.collect()

    def fail(_: object) -> bool:
        raise RuntimeError("torch said no")

    with monkeypatch.context() as patched:
        patched.setattr(pools._Filling, "drop", fail)
        with pytest.raises(RuntimeError, match="torch said no"):
            pools._sweep()
    pools._sweep()
    assert cuda_mem.region("next")._native.torch_bind() == slot


def test_one_use_region_may_be_entered_by_several_threads(cuda_mem: shoal.MemoryManager) -> None:
    import shoal.torch as st
    from shoal.torch import pools

    region = cuda_mem.region("weights")
    use = st.use_region(region)
    entered, leave = threading.Barrier(2), threading.Event()
    failures: list[BaseException] = []

    def fill() -> None:
        try:
            with use:
                entered.wait(60)
                leave.wait(60)
        except BaseException as error:  # noqa: BLE001  (it is looked at below)
            failures.append(error)

    other = threading.Thread(target=fill)
    with use:
        other.start()
        entered.wait(60)
    leave.set()
    other.join(60)
    assert not failures
    filling = pools._filling(region)
    assert (filling.users, len(filling.idle)) == (0, 2)
    with pytest.raises(RuntimeError, match="not entered on this thread"):
        use.__exit__(None, None, None)


def test_a_torch_that_asks_no_pool_is_said(cuda_mem: shoal.MemoryManager, monkeypatch: pytest.MonkeyPatch) -> None:
    import shoal.torch as st

    monkeypatch.setenv("PYTORCH_NO_CUDA_MEMORY_CACHING", "1")
    with (
        pytest.raises(shoal.RegionError, match=r"PYTORCH_NO_CUDA_MEMORY_CACHING is set.*without it"),
        st.use_region(cuda_mem.region("weights")),
    ):
        pass


def test_a_graphs_pool_is_one_of_its_region(cuda_mem: shoal.MemoryManager) -> None:
    import shoal.torch as st
    from shoal.torch import pools

    region, other = cuda_mem.region("weights"), cuda_mem.region("other")
    graph: Any = object()
    for foreign in ((0, 7), st.pool(other)):
        with (
            pytest.raises(shoal.RegionError, match=r"one that shoal\.torch\.pool gave"),
            st.graph(graph, region, pool=foreign),
        ):
            pass
    # A region that is asleep gets no pool that nobody would ever give back.
    assert alloc_of(region)(2 * MIB) == region.address
    region.freeze(wait=True)
    region.sleep()
    with pytest.raises(shoal.RegionError, match="asleep"), st.graph(graph, region):
        pass
    assert not pools._filling(region).kept
    assert not pools._filling(region).graphs
    free(region.address, 2 * MIB)
