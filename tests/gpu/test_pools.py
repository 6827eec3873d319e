"""torch's allocations in regions, on a GPU. Run by `tests/gpu/run.sh torch`."""

from __future__ import annotations

import gc
import threading
import time
from typing import TYPE_CHECKING

import pytest

import shoal

if TYPE_CHECKING:
    import subprocess
    from collections.abc import Callable, Iterator

    from shoal import MemoryManager

torch = pytest.importorskip("torch")
import shoal.torch as st  # noqa: E402

MIB = 1 << 20


def inside(value: torch.Tensor, region: shoal.Region) -> bool:
    return region.address <= value.data_ptr() < region.address + region.bytes


@pytest.fixture(autouse=True)
def no_fault() -> Iterator[None]:
    yield
    torch.cuda.synchronize()


def test_tensors_made_in_a_region_lie_there_and_sleep(mem: MemoryManager) -> None:
    region = mem.region("weights")
    with st.use_region(region):
        model = torch.nn.Sequential(*(torch.nn.Linear(1024, 1024, device="cuda") for _ in range(8))).eval()
    outside = torch.ones(8, device="cuda")
    assert all(inside(value, region) for value in model.parameters())
    assert not inside(outside, region)
    x = torch.randn(4, 1024, device="cuda")
    with torch.no_grad():
        expected = model(x).clone()
        flush = region.freeze()
        assert flush.sealed >= 8 * 4 * MIB
        assert flush.wait().dirty == 0
        for _ in range(5):
            report = region.sleep()
            assert region.usage()["device"] == 0
            assert report.copied == 0, "clean"
            region.wake()
            with mem.guard():
                assert torch.equal(model(x), expected)
    assert region._native.last_error() is None


def test_nested_regions_and_disable(mem: MemoryManager) -> None:
    one, two = mem.region("one"), mem.region("two")
    with st.use_region(one):
        first = torch.empty(MIB, device="cuda")
        with st.use_region(two):
            second = torch.empty(MIB, device="cuda")
            with st.use_region(one):
                third = torch.empty(MIB, device="cuda")
                with st.disable():
                    fourth = torch.empty(MIB, device="cuda")
                fifth = torch.empty(3 * MIB, device="cuda")
        sixth = torch.empty(2 * MIB, device="cuda")
    seventh = torch.empty(MIB, device="cuda")
    for value in (first, third, fifth, sixth):
        assert inside(value, one)
    assert inside(second, two)
    for value in (fourth, seventh):
        assert not inside(value, one)
        assert not inside(value, two)
    with pytest.raises(RuntimeError, match="inside"), st.use_region(one):
        raise RuntimeError("inside")
    assert not inside(torch.empty(5 * MIB, device="cuda"), one)


def test_threads_fill_one_region_at_once(mem: MemoryManager) -> None:
    region, failures = mem.region("weights"), []
    made: list[torch.Tensor] = []
    barrier = threading.Barrier(4)

    def work(number: int) -> None:
        try:
            with torch.cuda.stream(torch.cuda.Stream()), st.use_region(region):
                barrier.wait(30)
                for _ in range(20):
                    value = torch.full((MIB // 4,), float(number), device="cuda")
                    if not inside(value, region) or not bool((value == number).all()):
                        failures.append(number)
                    made.append(value)
                barrier.wait(30)
        except Exception as error:  # noqa: BLE001  (it is told below)
            failures.append(error)

    threads = [threading.Thread(target=work, args=(number,)) for number in range(4)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join(60)
    assert not failures
    assert len({value.data_ptr() for value in made}) == 80
    assert st.stats(region)["users"] == 0


def test_out_of_memory_is_torchs_own_error_with_the_reason(mem: MemoryManager) -> None:
    old, new = mem.region("old"), mem.region("new")
    with st.use_region(old):
        kept = torch.arange(640 * MIB, dtype=torch.int32, device="cuda")
    with pytest.raises(torch.OutOfMemoryError) as caught, st.use_region(new):
        torch.empty(2048 * MIB, device="cuda", dtype=torch.uint8)
    assert "Shoal had no memory" in "".join(caught.value.__notes__)
    old.freeze()
    with st.use_region(new):
        made = torch.ones(2048 * MIB, device="cuda", dtype=torch.uint8)
    assert old.usage()["device"] < 2560 * MIB, "the frozen one made room"
    with pytest.raises(shoal.RegionError, match="asleep"), st.use_region(old):
        pass
    del made
    assert st.stats(new)["cached"] >= 2048 * MIB
    new.freeze()
    assert new.usage()["device"] == 0, "nothing lives in it"
    with mem.guard():
        assert int(kept[-1]) == 640 * MIB - 1
        assert int(kept.sum(dtype=torch.int64)) == (640 * MIB - 1) * (320 * MIB)


def test_freezing_seals_the_pool_and_leaves_dead_segments_out(mem: MemoryManager) -> None:
    region = mem.region("weights")
    with st.use_region(region):
        kept = torch.full((64 * MIB,), 3, dtype=torch.uint8, device="cuda")
        scratch = torch.ones(256 * MIB, dtype=torch.uint8, device="cuda")
        del scratch
        with pytest.raises(shoal.RegionError, match="being filled"):
            region.freeze()
    region.freeze()
    figures = st.stats(region)
    assert figures["dropped"] == 256 * MIB
    assert figures["committed"] < 160 * MIB, figures
    with st.use_region(region):
        later = torch.full((128 * MIB,), 5, dtype=torch.uint8, device="cuda")
    assert inside(later, region)
    region.freeze()
    region.sleep()
    region.wake()
    with mem.guard():
        assert int(kept.min()) == int(kept.max()) == 3
        assert int(later.min()) == int(later.max()) == 5


def test_a_write_that_nobody_tells_of_is_not_lost(mem: MemoryManager) -> None:
    region = mem.region("weights")
    with st.use_region(region):
        value = torch.zeros(96 * MIB, dtype=torch.uint8, device="cuda")
    region.freeze()
    region.sleep()
    for number in range(1, 4):
        region.wake()
        with mem.guard():
            value[number * 1000] = number
        region.sleep()
    region.wake()
    with mem.guard():
        assert [int(value[number * 1000]) for number in range(1, 4)] == [1, 2, 3]
        assert int(value.sum()) == 6


def test_a_graph_whose_memory_is_the_regions_sleeps_and_replays(mem: MemoryManager) -> None:
    region = mem.region("weights")
    with st.use_region(region):
        model = torch.nn.Sequential(
            *(torch.nn.Linear(2048, 2048, device="cuda", dtype=torch.float32) for _ in range(6))
        ).eval()
    x = torch.randn(64, 2048, device="cuda")
    static = torch.empty_like(x)
    with torch.no_grad():
        side = torch.cuda.Stream()
        side.wait_stream(torch.cuda.current_stream())
        with torch.cuda.stream(side):
            for _ in range(3):
                model(static.copy_(x))
        torch.cuda.current_stream().wait_stream(side)
        captured = torch.cuda.CUDAGraph()
        with st.graph(captured, region):
            out = model(static)
            big = (torch.ones(64 * MIB, device="cuda") * out.sum()).sum()
        assert inside(out, region)
        assert inside(big, region)
        captured.replay()
        torch.cuda.synchronize()
        expected, expected_big = out.clone(), big.clone()
        region.freeze()
        for turn in range(4):
            region.sleep()
            assert region.usage()["device"] == 0
            region.wake()
            with mem.guard():
                static.copy_(x)
                if turn:
                    out.fill_(0)
                captured.replay()
                torch.cuda.synchronize()
                assert torch.equal(out, expected)
                assert torch.equal(big, expected_big)


def settled(region: shoal.Region, nbytes: int) -> int:
    """The region's memory, once it is no more than that: a thread of ours frees what was given up."""
    deadline = time.monotonic() + 30
    while (committed := st.stats(region)["committed"]) > nbytes and time.monotonic() < deadline:
        time.sleep(0.01)
    return committed


def captured(
    region: shoal.Region, static: torch.Tensor, **options: object
) -> tuple[torch.cuda.CUDAGraph, torch.Tensor]:
    """A graph that needs 256 MiB between its input and its output."""
    made = torch.cuda.CUDAGraph()
    with st.graph(made, region, **options):
        out = (torch.ones(64 * MIB, device="cuda") * static.sum()).view(-1, 1024).sum(dim=0) + static[0]
    return made, out


def test_capturing_again_and_again_takes_no_more_memory(mem: MemoryManager) -> None:
    region = mem.region("graphs")
    static = torch.arange(1024, device="cuda", dtype=torch.float32)[None].repeat(4, 1)
    kept, kept_out = captured(region, static)
    kept.replay()
    torch.cuda.synchronize()
    want, alone = kept_out.clone(), settled(region, 0)
    assert alone >= 256 * MIB
    both = 0
    for turn in range(20):
        other, out = captured(region, static)
        other.replay()
        torch.cuda.synchronize()
        assert torch.equal(out, want)
        both = both or st.stats(region)["committed"]
        assert settled(region, both) <= both, turn
        del other, out
        gc.collect()
        assert settled(region, alone) <= alone, turn
    for _ in range(3):
        kept_out.zero_()
        with mem.guard():
            kept.replay()
            torch.cuda.synchronize()
            assert torch.equal(kept_out, want)
        region.freeze(wait=True)
        region.sleep()
        region.wake()
    # A tensor of a graph that is gone stays readable, and only what it lies in stays.
    del kept
    gc.collect()
    assert settled(region, 64 * MIB) <= 64 * MIB
    assert torch.equal(kept_out, want)
    del kept_out
    assert settled(region, 0) == 0


def test_graphs_that_share_a_pool_and_one_that_goes(mem: MemoryManager) -> None:
    region = mem.region("graphs")
    static = torch.ones(4, 1024, device="cuda")
    made = torch.cuda.CUDAGraph()
    with st.graph(made, region) as own:
        first_out = torch.ones(64 * MIB, device="cuda").sum() * static.sum()
    second, out = captured(region, static, pool=own)
    second.replay()
    torch.cuda.synchronize()
    want = out.clone()
    del made, first_out
    gc.collect()
    for _ in range(3):
        st.stats(region)
        out.zero_()
        second.replay()
        torch.cuda.synchronize()
        assert torch.equal(out, want)
    del second, out
    gc.collect()
    assert settled(region, 0) == 0
    with pytest.raises(shoal.RegionError, match="still lives"):
        captured(region, static, pool=own)


FAILED_CAPTURE = """
import gc, sys, time
import torch, shoal, shoal.torch as st
MIB = 1 << 20
mem = shoal.MemoryManager("cuda:0", device_budget="2GiB", host_budget="1GiB")
region = mem.region("graphs")
torch.ones(8, device="cuda")
normal = torch.cuda.current_stream()

def settled():
    deadline = time.monotonic() + 30
    while (nbytes := st.stats(region)["committed"]) and time.monotonic() < deadline:
        time.sleep(0.01)
    return nbytes

for _ in range(3):
    graph = torch.cuda.CUDAGraph()
    try:
        with st.graph(graph, region, capture_error_mode="thread_local"):
            torch.ones(64 * MIB, device="cuda") * 2
            if sys.argv[1] == "body":
                raise RuntimeError("the body")
            torch.cuda.synchronize()
    except RuntimeError as error:
        print(sys.argv[1], type(error).__name__, str(error).splitlines()[0])
    else:
        raise AssertionError("it was captured")
    gc.collect()
    assert torch.cuda.current_stream() == normal
    assert settled() == 0, st.stats(region)
    del graph
    good = torch.cuda.CUDAGraph()
    with st.graph(good, region, capture_error_mode="thread_local"):
        out = (torch.ones(64 * MIB, device="cuda") * 2).sum()
    good.replay()
    torch.cuda.synchronize()
    assert float(out) == 128 * MIB
    del good, out
    gc.collect()
    assert settled() == 0, st.stats(region)
torch.ones(8).pin_memory()
torch.cuda.empty_cache()
with st.use_region(region):
    ours = torch.full((MIB,), 7, dtype=torch.uint8, device="cuda")
region.freeze(); region.sleep(); region.wake()
assert int(ours.min()) == int(ours.max()) == 7
print("fine")
"""


@pytest.mark.parametrize("fails", ["body", "capture"])
def test_a_capture_that_fails_leaves_nothing(
    run_python: Callable[..., subprocess.CompletedProcess[str]], fails: str
) -> None:
    said = run_python(FAILED_CAPTURE, fails)
    assert said.returncode == 0, said.stdout + said.stderr[-3000:]
    assert "fine" in said.stdout


def test_a_write_while_the_background_copy_runs_is_not_lost(mem: MemoryManager) -> None:
    beside = 0
    for turn in range(4):
        region = mem.region(f"weights {turn}")
        with st.use_region(region):
            value = torch.zeros(1 << 30, dtype=torch.uint8, device="cuda")
        torch.cuda.synchronize()
        flush = region.freeze()
        numbers = []
        while len(numbers) < 64 and not flush.done:
            number = len(numbers)
            # From the end backwards and from the start: what was copied already, and what was not yet.
            for at in (number * 8 * MIB + turn, (1 << 30) - 1 - number * 8 * MIB - turn):
                value[at] = 1 + number
                numbers.append((at, 1 + number))
            torch.cuda.current_stream().synchronize()
            beside += not flush.done
        flush.wait()
        region.sleep()
        assert region.usage()["device"] == 0
        region.wake()
        with mem.guard():
            found = value.cpu()
        expected = torch.zeros_like(found)
        for at, number in numbers:
            expected[at] = number
        assert torch.equal(found, expected), turn
        del value, region, flush
        gc.collect()
    assert beside >= 4, "writes have to run beside the copy"


def test_what_lives_outlasts_its_region_and_goes_with_the_last_tensor(mem: MemoryManager) -> None:
    region = mem.region("weights")
    with st.use_region(region):
        value = torch.full((64 * MIB,), 9, dtype=torch.uint8, device="cuda")
    before = mem.device_memory()["used_by_this_process"]
    del region
    gc.collect()
    assert int(value.max()) == 9
    del value
    other = mem.region("other")
    with st.use_region(other):
        pass
    torch.cuda.synchronize()
    until_used_is_at_most(mem, before - 64 * MIB)
    torch.cuda.empty_cache()
    assert mem.device_memory()["used_by_this_process"] <= before - 64 * MIB


def until_used_is_at_most(mem: MemoryManager, nbytes: int) -> None:
    """A thread of ours frees what was given up, once its last work is done."""
    deadline = time.monotonic() + 30
    while mem.device_memory()["used_by_this_process"] > nbytes:
        assert time.monotonic() < deadline, mem.device_memory()
        time.sleep(0.01)


OTHERS_POOL = """
import gc, threading
import torch, shoal, shoal.torch as st
MIB = 1 << 20
mem = shoal.MemoryManager("cuda:0", device_budget="1GiB", host_budget="1GiB")
gone = mem.region("gone")
with st.use_region(gone):
    torch.ones(32 * MIB, dtype=torch.uint8, device="cuda")
del gone
gc.collect()
inside, leave = threading.Event(), threading.Event()

def other():
    with torch.cuda.use_mem_pool(torch.cuda.MemPool()):
        inside.set()
        leave.wait(60)

thread = threading.Thread(target=other)
thread.start()
inside.wait(60)
region = mem.region("weights")
with st.use_region(region):
    ours = torch.full((MIB,), 7, dtype=torch.uint8, device="cuda")
leave.set()
thread.join()
torch.cuda.empty_cache()
region.freeze(); region.sleep(); region.wake()
assert int(ours.min()) == int(ours.max()) == 7
print("fine")
"""


def test_letting_go_of_a_pool_while_others_fill_theirs(
    run_python: Callable[..., subprocess.CompletedProcess[str]],
) -> None:
    said = run_python(OTHERS_POOL)
    assert said.returncode == 0, said.stderr[-3000:]
    assert "fine" in said.stdout


def test_an_eviction_during_a_capture_waits_for_it(mem: MemoryManager) -> None:
    region, other = mem.region("graph"), mem.region("other")
    with st.use_region(other):
        torch.ones(8 * MIB, device="cuda")
    other.freeze()
    captured, said = torch.cuda.CUDAGraph(), []

    def sleep() -> None:
        try:
            other.sleep(timeout_s=0.3)
        except shoal.Error as error:
            said.append(error)

    with st.graph(captured, region, capture_error_mode="thread_local"):
        value = torch.ones(MIB, device="cuda") * 2
        thread = threading.Thread(target=sleep)
        thread.start()
        thread.join(30)
        value += 1
    assert len(said) == 1
    assert isinstance(said[0], shoal.DeadlineError)
    captured.replay()
    torch.cuda.synchronize()
    assert float(value.min()) == float(value.max()) == 3.0
    other.sleep()


NEIGHBOURS = """
import os, sys
import torch, shoal, shoal.torch as st
MIB = 1 << 20
mem = shoal.MemoryManager("cuda:0", device_budget="2GiB", host_budget="2GiB")
region = mem.region("weights")
plain = torch.cuda.MemPool()
with torch.cuda.use_mem_pool(plain):
    other = torch.full((32 * MIB,), 4, dtype=torch.uint8, device="cuda")
    with st.use_region(region):
        ours = torch.full((32 * MIB,), 7, dtype=torch.uint8, device="cuda")
    after = torch.full((48 * MIB,), 5, dtype=torch.uint8, device="cuda")
assert region.address <= ours.data_ptr() < region.address + region.bytes
for value in (other, after):
    assert not region.address <= value.data_ptr() < region.address + region.bytes
if "nccl" in sys.argv[1:]:
    import torch.distributed as dist
    os.environ.update(MASTER_ADDR="127.0.0.1", MASTER_PORT="29533")
    dist.init_process_group("nccl", rank=0, world_size=1)
    dist.all_reduce(ours)
for _ in range(3):
    normal = [torch.empty(size * MIB, device="cuda", dtype=torch.uint8) for size in (3, 30, 90)]
    region.freeze(); region.sleep()
    del normal
    torch.cuda.empty_cache()
    region.wake()
    if "nccl" in sys.argv[1:]:
        dist.all_reduce(ours)
    assert int(ours.min()) == int(ours.max()) == 7
assert int(other.sum(dtype=torch.int64)) == 4 * 32 * MIB
print("fine")
"""


@pytest.mark.parametrize("neighbour", ["expandable", "pool", "nccl"])
def test_neighbours(run_python: Callable[..., subprocess.CompletedProcess[str]], neighbour: str, monkeypatch) -> None:  # type: ignore[no-untyped-def]
    if neighbour == "expandable":
        monkeypatch.setenv("PYTORCH_CUDA_ALLOC_CONF", "expandable_segments:True")
        monkeypatch.setenv("PYTORCH_ALLOC_CONF", "expandable_segments:True")
    said = run_python(NEIGHBOURS, neighbour)
    assert said.returncode == 0, said.stderr[-3000:]
    assert "fine" in said.stdout
