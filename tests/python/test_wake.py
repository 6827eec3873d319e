"""Wakes in the background: steps beside them, ranges that are waited for, event loops."""

from __future__ import annotations

import asyncio
import random
import threading
import time
from typing import TYPE_CHECKING

import pytest
from helpers import PAGE, pattern, read

import shoal
from shoal import testing

if TYPE_CHECKING:
    from collections.abc import Callable


def asleep(mem: shoal.MemoryManager, pages: int = 16) -> tuple[shoal.Region, bytes]:
    region = mem.region("weights", pages * PAGE)
    data = pattern(pages * PAGE)
    region.stage(0, data)
    region.seal()
    return region, data


def test_a_step_beside_a_wake_sees_each_range_once_it_waited_for_it(mem: shoal.MemoryManager) -> None:
    region, data = asleep(mem)
    pages = list(range(16))[::-1]
    region.set_order((page * PAGE, PAGE) for page in pages)
    beside = 0
    for _ in range(10):
        with region.guard(in_order=True) as guard:
            beside += guard.wake is not None
            for page in pages:
                if guard.wake is not None:
                    guard.wake.wait_stream(page * PAGE, PAGE)
                assert read(region, page * PAGE, PAGE) == data[page * PAGE :][:PAGE], page
            with region.guard():
                assert read(region) == data
        assert guard.wake is None, "it was left"
        assert region.sleep().freed == region.bytes
    assert beside > 0


def test_a_sleep_takes_what_a_wake_under_way_will_have_brought(mem: shoal.MemoryManager) -> None:
    region, data = asleep(mem)
    for _ in range(20):
        region.wake(wait=False)
        with region.guard(in_order=True):
            pass
        assert region.sleep().freed == region.bytes
        assert region.usage()["device"] == 0
    with region.guard():
        assert read(region) == data


def test_a_guard_of_one_region_leaves_the_others_asleep(mem: shoal.MemoryManager) -> None:
    region, data = asleep(mem, 4)
    other, _ = asleep(mem, 4)
    with region.guard():
        assert read(region) == data
        assert other.usage()["device"] == 0
        with pytest.raises(shoal.DeadlineError):
            region.sleep(timeout_s=0.05)
        assert other.sleep().freed == 0
    guard = region.guard()
    with guard, pytest.raises(RuntimeError, match="already held"):
        guard.__enter__()


def test_what_a_wake_does_not_bring_is_said(mem: shoal.MemoryManager) -> None:
    region, _ = asleep(mem, 4)
    wake = region.wake()
    assert region.waking is None
    wake.wait_host(0, 4 * PAGE)
    with pytest.raises(shoal.RegionError):
        wake.wait_host(PAGE, 4 * PAGE)
    region.sleep()
    with pytest.raises(shoal.RegionError, match="evicted since"):
        wake.wait_stream(0, PAGE)
    with pytest.raises(ValueError, match="timeout_s"):
        wake.wait_host(0, PAGE, timeout_s=-1)


def test_a_failed_wake_is_told_to_those_who_wait(mem: shoal.MemoryManager) -> None:
    # The simulated device has 64 MiB.
    full = mem.region("full", 60 << 20, kind="kv")
    full.commit(0, 60 << 20)
    region, data = asleep(mem, 8)
    wake = region.wake(wait=False)
    with pytest.raises((shoal.LeaseError, shoal.OutOfMemoryError)):
        wake.wait_stream(0, PAGE)
    with pytest.raises((shoal.LeaseError, shoal.OutOfMemoryError)), region.guard(in_order=True):
        pass
    with full.guard(), pytest.raises(shoal.RegionError, match="holds a guard already"), region.guard(in_order=True):
        pass
    assert region.usage()["device"] == 0
    full.decommit(0, 60 << 20)
    with region.guard():
        assert read(region) == data


def test_an_event_loop_goes_on_during_a_wake(mem: shoal.MemoryManager) -> None:
    region, data = asleep(mem)

    async def wake_both() -> int:
        ticks = 0
        woken = asyncio.create_task(region.wake_async(30))
        while not woken.done():
            ticks += 1
            await asyncio.sleep(0)
        assert (await woken).done
        return ticks

    assert asyncio.run(wake_both()) > 0
    assert read(region) == data


def test_cancelling_the_task_cancels_the_wake(mem: shoal.MemoryManager) -> None:
    region, data = asleep(mem)
    held = threading.Event()

    async def give_up() -> None:
        with mem.guard():
            held.set()
        region.sleep()
        woken = asyncio.create_task(region.wake_async())
        await asyncio.sleep(0)
        woken.cancel()
        with pytest.raises(asyncio.CancelledError):
            await woken

    asyncio.run(give_up())
    deadline = time.monotonic() + 10
    while region.waking is not None and time.monotonic() < deadline:
        time.sleep(0.01)
    assert region.waking is None
    with mem.guard():
        assert read(region) == data


@pytest.mark.parametrize("is_written", [False, True])
def test_two_regions_swap_in_the_room_of_one(is_written: bool) -> None:
    with testing.simulated_memory("16MiB") as mem:
        (one, first), (two, second) = asleep(mem, 8), asleep(mem, 8)
        one.wake()
        if is_written:
            with one.guard():
                memoryview(one.buffer())[:] = first = pattern(8 * PAGE, 9)
        with pytest.raises((shoal.LeaseError, shoal.OutOfMemoryError)):
            two.wake()
        left, came = mem.swap(one, two)
        assert (left.freed, came.restored) == (one.bytes, two.bytes)
        assert left.copied == (one.bytes if is_written else 0)
        assert one.usage()["device"] == 0
        assert read(two) == second
        with two.guard(), pytest.raises(shoal.DeadlineError):
            mem.swap(two, one, timeout_s=0.05)
        mem.swap(two, one, trust_clean=True)
        assert read(one) == first
        with pytest.raises(shoal.RegionError, match="own place"):
            mem.swap(one, one)
        with pytest.raises(shoal.RegionError, match="another kind"):
            mem.swap(one, mem.region("kv", 2 * PAGE, kind="kv"))


def test_steps_beside_wakes_among_evictions_cancellations_and_swaps() -> None:
    # A step that touches what is not there ends this process: the device faults.
    with testing.simulated_memory("48MiB") as mem:
        (one, first), (two, second) = asleep(mem, 16), asleep(mem, 16)
        begun = time.monotonic()
        failures: list[BaseException] = []
        steps = beside = 0

        def goes_on() -> bool:
            """For three seconds, and for longer where the machine is slow."""
            ran_s, is_enough = time.monotonic() - begun, steps > 10 and beside > 0
            return not failures and (ran_s < 3 or (not is_enough and ran_s < 60))

        def step(region: shoal.Region, data: bytes, seed: int) -> None:
            nonlocal steps, beside
            pages = list(range(16))
            random.Random(seed).shuffle(pages)
            with region.guard(in_order=True, timeout_s=5) as guard:
                for page in pages:
                    if guard.wake is not None:
                        guard.wake.wait_stream(page * PAGE, PAGE)
                    assert read(region, page * PAGE, 4096) == data[page * PAGE :][:4096]
                steps += 1
                beside += guard.wake is not None

        def disturb(seed: int) -> None:
            chance = random.Random(seed)
            region, other = (one, two) if seed % 2 else (two, one)
            match chance.randrange(5):
                case 0:
                    region.sleep(keep=chance.random(), timeout_s=5)
                case 1:
                    wake = region.wake(wait=False, timeout_s=5)
                    time.sleep(chance.random() / 300)
                    wake.cancel()
                case 2:
                    mem.swap(region, other, timeout_s=5)
                case 3:
                    mem.reclaim(chance.randrange(16) * PAGE, timeout_s=5)
                case _:
                    region.wake(timeout_s=5)

        def repeat(act: Callable[[int], None], seed: int) -> None:
            while goes_on():
                seed += 2
                try:
                    act(seed)
                except (shoal.LeaseError, shoal.OutOfMemoryError, shoal.TransferError, shoal.DeadlineError):
                    continue
                except BaseException as error:  # noqa: BLE001 - shown by the test
                    failures.append(error)

        acts = [lambda seed: step(one, first, seed), lambda seed: step(two, second, seed), disturb, disturb]
        threads = [threading.Thread(target=repeat, args=(act, seed)) for seed, act in enumerate(acts)]
        for thread in threads:
            thread.start()
        for thread in threads:
            thread.join(120)
            assert not thread.is_alive(), "locked up"
        assert not failures, failures
        assert steps > 10
        assert beside > 0
        for region, data in ((one, first), (two, second)):
            one.sleep()
            two.sleep()
            with region.guard():
                assert read(region) == data
