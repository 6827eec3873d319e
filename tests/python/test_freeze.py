"""Freezing: sealed at once, copied to the host in the background; what is written meanwhile is not lost."""

from __future__ import annotations

import threading
import time
from typing import TYPE_CHECKING

import pytest
from helpers import PAGE

import shoal
from shoal import testing

if TYPE_CHECKING:
    from collections.abc import Iterator

MIB = 1 << 20
NBYTES = 24 * PAGE


@pytest.fixture
def mem() -> Iterator[shoal.MemoryManager]:
    with testing.simulated_machine("128MiB") as device:
        yield device.manager(host_budget="128MiB")


def filled(mem: shoal.MemoryManager, byte: int) -> shoal.Region:
    region = mem.region("weights", NBYTES, kind="workspace", backing="keep")
    region.commit(0, NBYTES)
    view = memoryview(region.buffer())
    for at in range(0, NBYTES, 4096):
        view[at] = byte
    return region


def test_the_first_sleep_after_a_freeze_copies_nothing(mem: shoal.MemoryManager) -> None:
    region = filled(mem, 1)
    flush = region.freeze()
    assert flush.sealed == NBYTES
    report = flush.wait()
    assert (report.sealed, report.copied, report.dirty, report.error) == (NBYTES, NBYTES, 0, None)
    assert flush.done
    assert flush.progress() == (NBYTES, NBYTES)
    assert f"{NBYTES} of" in repr(flush)
    assert region.usage()["host"] == NBYTES
    slept = region.sleep()
    assert (slept.freed, slept.copied) == (NBYTES, 0)
    region.wake()
    assert memoryview(region.buffer())[4096] == 1
    assert region.freeze(wait=True).sealed == 0, "nothing came since"


def test_bytes_written_in_place_while_they_are_copied_are_not_lost(mem: shoal.MemoryManager) -> None:
    """The writer tells nobody: it stores through the address, as a kernel would."""
    region = filled(mem, 1)
    view = memoryview(region.buffer())
    stop = threading.Event()
    last = 0

    def write() -> None:
        nonlocal last
        while not stop.is_set():
            last += 1
            for at in range(0, NBYTES, PAGE // 4):
                view[at] = last % 251

    for _ in range(4):
        stop.clear()
        writer = threading.Thread(target=write)
        writer.start()
        flush = region.freeze()
        time.sleep(0.01)
        stop.set()
        writer.join()
        report = flush.wait()
        assert report.copied + report.dirty <= NBYTES
        region.sleep()
        region.wake()
        assert all(view[at] == last % 251 for at in range(0, NBYTES, PAGE // 4))
        assert view[4096] == 1


def test_a_host_budget_that_is_too_small_leaves_the_rest_dirty_and_says_so() -> None:
    with testing.simulated_machine("128MiB") as device:
        region = filled(device.manager(host_budget="32MiB"), 3)
        report = region.freeze().wait()
        assert report.copied + report.dirty == NBYTES
        assert report.copied
        assert report.dirty
        assert isinstance(report.error, shoal.OutOfMemoryError)
        assert memoryview(region.buffer())[0] == 3


def test_a_cancelled_freeze_says_so_and_goes_on_when_asked_again(mem: shoal.MemoryManager) -> None:
    region = filled(mem, 4)
    flush = region.freeze()
    flush.cancel()
    try:
        assert flush.wait().dirty == 0, "it was quicker"
    except shoal.TransferError as error:
        assert "cancelled" in str(error)
    assert region.freeze().wait().dirty == 0
    assert region.sleep().copied == 0


def test_a_region_that_is_staged_has_nothing_to_copy(mem: shoal.MemoryManager) -> None:
    region = mem.region("weights", 4 * PAGE)
    region.stage(0, b"x" * 4 * PAGE)
    flush = region.freeze()
    assert (flush.sealed, flush.progress()) == (4 * PAGE, (0, 0))
    assert flush.wait().copied == 0
    region.wake()
    assert region.sleep().copied == 0
