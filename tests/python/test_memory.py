"""Regions through the public names: addresses that stay, contents that stay, and errors that say what they know."""

from __future__ import annotations

import gc
import os
import threading
import time
from pathlib import Path

import pytest
from helpers import PAGE, pattern, read

import shoal
from shoal import testing


def staged(mem: shoal.MemoryManager, nbytes: int, name: str = "weights", seed: int = 7) -> tuple[shoal.Region, bytes]:
    region = mem.region(name, nbytes)
    data = pattern(nbytes, seed)
    region.stage(0, data)
    region.seal()
    return region, data


def test_staging_takes_no_device_memory(mem: shoal.MemoryManager) -> None:
    region, _ = staged(mem, 3 * PAGE + 5)
    assert mem.device_memory()["used_by_this_process"] == 0
    assert region.usage()["device"] == 0
    assert mem.usage()["weights_device"] == 0
    assert mem.usage()["weights_total"] == region.bytes


def test_address_and_contents_stay_through_sleep_and_wake(mem: shoal.MemoryManager) -> None:
    region, data = staged(mem, 5 * PAGE + 123)
    address = region.address
    for trust_clean in (False, True, False):
        with mem.guard():
            assert region.address == address
            assert region.buffer().address == address
            assert read(region, 0, len(data)) == data
            assert read(region, len(data)) == bytes(region.bytes - len(data))
        report = region.sleep(trust_clean=trust_clean)
        assert report.freed == region.bytes
        assert region.usage()["device"] == 0
        assert mem.device_memory()["used_by_this_process"] == 0


def test_a_clean_region_sleeps_without_a_copy(mem: shoal.MemoryManager) -> None:
    region, _ = staged(mem, 4 * PAGE)
    region.wake()
    assert region.sleep().copied == 0


def test_what_was_written_after_the_seal_is_not_lost(mem: shoal.MemoryManager) -> None:
    region, data = staged(mem, 4 * PAGE)
    with mem.guard():
        memoryview(region.buffer())[PAGE : PAGE + 5] = b"fresh"
    assert region.sleep().copied > 0
    with mem.guard():
        assert read(region, 0, len(data)) == data[:PAGE] + b"fresh" + data[PAGE + 5 :]


@pytest.mark.parametrize("keep", [0.0, 0.3, 0.5, 1.0])
def test_partial_sleep_keeps_the_front(mem: shoal.MemoryManager, keep: float) -> None:
    region, data = staged(mem, 8 * PAGE)
    region.wake()
    region.sleep(keep=keep)
    device = region.usage()["device"]
    # Extents are indivisible, so what stays is at most the share: here an extent is one page of eight.
    assert keep * region.bytes - PAGE < device <= keep * region.bytes
    if device:
        assert read(region, 0, PAGE) == data[:PAGE]
    with mem.guard():
        assert read(region) == data


def test_evict_gives_at_least_what_is_asked(mem: shoal.MemoryManager) -> None:
    region, data = staged(mem, 8 * PAGE)
    region.wake()
    before = region.usage()["device"]
    report = region.evict("3MiB")
    assert report.freed >= 3 << 20
    assert region.usage()["device"] == before - report.freed
    with mem.guard():
        assert read(region) == data
    assert region.evict(1 << 40).freed == region.bytes


def test_guard_wakes_what_is_missing(mem: shoal.MemoryManager) -> None:
    first, first_data = staged(mem, 2 * PAGE, "first")
    second, second_data = staged(mem, 2 * PAGE, "second", seed=8)
    first.wake()
    first.sleep()
    with mem.guard():
        assert first.usage()["device"] == first.bytes
        assert read(first) == first_data
        assert read(second) == second_data


def test_eviction_waits_for_guards(mem: shoal.MemoryManager) -> None:
    region, data = staged(mem, 2 * PAGE)
    asleep = threading.Event()

    def sleep() -> None:
        region.sleep()
        asleep.set()

    sleeper = threading.Thread(target=sleep)
    with mem.guard(), mem.guard():
        sleeper.start()
        assert not asleep.wait(0.2), "slept under a guard"
        assert read(region) == data
    sleeper.join(10)
    assert asleep.is_set()
    assert region.usage()["device"] == 0


def test_guards_and_sleeps_in_many_threads(mem: shoal.MemoryManager) -> None:
    region, data = staged(mem, 2 * PAGE)
    begun = time.monotonic()
    failures: list[str] = []
    rounds = [0, 0]

    def goes_on() -> bool:
        """For a second and a half, and for longer where the machine is slow."""
        ran_s = time.monotonic() - begun
        return not failures and (ran_s < 1.5 or (min(rounds) <= 3 and ran_s < 60))

    def forward() -> None:
        while goes_on():
            with mem.guard():
                if read(region, PAGE - 50, 100) != data[PAGE - 50 : PAGE + 50]:
                    failures.append("other bytes")
            rounds[0] += 1

    def disturb() -> None:
        while goes_on():
            region.sleep(keep=rounds[1] % 2 / 2)
            rounds[1] += 1
            time.sleep(0.001)

    threads = [threading.Thread(target=forward), threading.Thread(target=forward), threading.Thread(target=disturb)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join(120)
        assert not thread.is_alive(), "stuck"
    assert not failures
    assert min(rounds) > 3


def test_a_guard_is_for_one_with(mem: shoal.MemoryManager) -> None:
    guard = mem.guard()
    with guard, pytest.raises(RuntimeError, match="already held"):
        guard.__enter__()
    with guard:
        pass


def test_a_guard_is_released_by_an_error(mem: shoal.MemoryManager) -> None:
    region, _ = staged(mem, PAGE)
    with pytest.raises(KeyError), mem.guard():
        raise KeyError
    assert region.sleep().freed == region.bytes


def test_out_of_memory_says_what_it_knows() -> None:
    with testing.simulated_memory("8MiB") as mem:
        region, data = staged(mem, 6 * PAGE)
        with pytest.raises((shoal.OutOfMemoryError, shoal.LeaseError)) as caught:
            region.wake()
        assert caught.value.requested is not None
        assert caught.value.requested >= PAGE
        assert "MiB" in str(caught.value)
        # Nothing is lost by a wake that failed, and what fits still works.
        region.sleep()
        small, small_data = staged(mem, PAGE, "small", seed=3)
        small.wake()
        assert read(small) == small_data
        del data


def test_capacity_is_shared_by_the_managers_of_a_machine(machine: testing.SimulatedMachine) -> None:
    one, other = machine.manager(), machine.manager()
    first, _ = staged(one, 20 * PAGE)
    second, data = staged(other, 20 * PAGE)
    first.wake()
    with pytest.raises(shoal.OutOfMemoryError) as caught:
        second.wake()
    assert caught.value.tier == "device"
    assert caught.value.capacity == 64 << 20
    assert caught.value.requested > caught.value.free
    first.sleep()
    second.wake()
    assert read(second) == data


def test_host_budget_smaller_than_the_weights_needs_sources(tmp_path: Path) -> None:
    data = pattern(6 * PAGE)
    file = tmp_path / "weights.bin"
    file.write_bytes(b"header" + data)
    with testing.simulated_memory("32MiB", host_budget=2 * PAGE) as mem:
        region = mem.region("weights", len(data))
        for start in range(0, len(data), PAGE):
            region.stage(start, data[start : start + PAGE], shoal.SourcePiece(file, 6 + start, PAGE))
        region.seal()
        usage = region.usage()
        assert usage["host"] <= 2 * PAGE
        assert usage["source_only"] >= 4 * PAGE
        for _ in range(2):
            with mem.guard():
                assert read(region) == data
            region.sleep()
            assert mem.usage()["host"] <= 2 * PAGE

    with testing.simulated_memory("32MiB", host_budget=2 * PAGE) as mem:
        region = mem.region("weights", len(data))
        with pytest.raises(shoal.OutOfMemoryError) as caught:
            for start in range(0, len(data), PAGE):
                region.stage(start, data[start : start + PAGE])
        assert caught.value.tier == "host"


def test_a_source_that_changed_is_an_error_and_not_other_bytes(tmp_path: Path) -> None:
    data = pattern(4 * PAGE)
    file = tmp_path / "weights.bin"
    file.write_bytes(data)
    with testing.simulated_memory("32MiB", host_budget="1MiB") as mem:
        region = mem.region("weights", len(data))
        region.stage(0, data, shoal.SourcePiece(file, 0, len(data)))
        region.seal()
        file.write_bytes(data[:-1] + bytes([data[-1] ^ 1]))
        with pytest.raises(shoal.Error):
            region.wake()


def test_a_source_is_compared_when_it_is_needed(tmp_path: Path) -> None:
    data = pattern(PAGE)
    file = tmp_path / "weights.bin"
    file.write_bytes(bytes(PAGE))
    with testing.simulated_memory("32MiB", host_budget="1MiB") as mem:
        region = mem.region("weights", len(data))
        with pytest.raises(shoal.Error):
            region.stage(0, data, shoal.SourcePiece(file, 0, PAGE))
            region.seal()


def test_bfloat16_in_the_file_float32_in_the_region(tmp_path: Path) -> None:
    narrow = pattern(PAGE)
    wide = b"".join(b"\0\0" + narrow[at : at + 2] for at in range(0, PAGE, 2))
    file = tmp_path / "weights.bin"
    file.write_bytes(narrow)
    with testing.simulated_memory("32MiB", host_budget="1MiB") as mem:
        region = mem.region("weights", len(wide))
        region.stage(0, wide, shoal.SourcePiece(file, 0, len(wide), "bf16_to_f32"))
        region.seal()
        with mem.guard():
            assert read(region) == wide


@pytest.mark.parametrize(("offset", "nbytes"), [(-1, 1), (0, 2 * PAGE + 1), (2 * PAGE, 1), (1 << 62, 1)])
def test_ranges_outside_a_region_are_refused(mem: shoal.MemoryManager, offset: int, nbytes: int) -> None:
    region = mem.region("weights", 2 * PAGE)
    refused = (shoal.RegionError, OverflowError, ValueError)
    with pytest.raises(refused):
        region.buffer(offset, nbytes)
    with pytest.raises(refused):
        region.stage(offset, bytes(nbytes))
    with pytest.raises(refused):
        region.commit(offset, nbytes)


def test_bad_arguments_are_refused(mem: shoal.MemoryManager) -> None:
    region, _ = staged(mem, PAGE)
    with pytest.raises(ValueError, match="keep"):
        region.sleep(keep=1.5)
    with pytest.raises(ValueError, match="keep"):
        region.sleep(keep=float("nan"))
    with pytest.raises(ValueError, match="kind"):
        mem.region("x", PAGE, kind="nonsense")  # type: ignore[arg-type]
    with pytest.raises(ValueError, match="backing"):
        mem.region("x", PAGE, backing="nonsense")  # type: ignore[arg-type]
    with pytest.raises((ValueError, shoal.RegionError)):
        mem.region("x", 0)
    with pytest.raises(ValueError, match="12 parsecs"):
        mem.region("x", "12 parsecs")
    with pytest.raises(ValueError, match="negative"):
        mem.region("x", -1)
    with pytest.raises(ValueError):
        mem.guard(-1).__enter__()
    with pytest.raises(shoal.RegionError):
        region.stage(0, b"after the seal")
    with pytest.raises(TypeError):
        mem.region("y", PAGE).stage(0, 7)  # type: ignore[arg-type]
    with pytest.raises((ValueError, shoal.DeviceError)):
        shoal.MemoryManager("abacus")


def test_workspace_is_committed_zeroed_and_dropped(mem: shoal.MemoryManager) -> None:
    region = mem.region("scratch", 4 * PAGE, kind="workspace")
    region.commit(0, 2 * PAGE)
    with mem.guard():
        view = memoryview(region.buffer(0, 2 * PAGE))
        assert bytes(view) == bytes(2 * PAGE)
        view[:3] = b"abc"
        assert bytes(view[:3]) == b"abc"
        view.release()
    region.decommit(0, 2 * PAGE)
    assert region.usage()["device"] == 0
    region.commit(0, PAGE)
    with mem.guard():
        assert read(region, 0, PAGE) == bytes(PAGE)


def test_the_buffer_keeps_the_address_reserved(mem: shoal.MemoryManager) -> None:
    region, _ = staged(mem, 2 * PAGE)
    address = region.address
    buffer = region.buffer(PAGE, 10)
    view = memoryview(buffer)
    assert (view.nbytes, view.readonly, view.format, view.itemsize) == (10, False, "B", 1)
    del buffer, region
    gc.collect()
    others = [mem.region(f"other-{index}", 2 * PAGE) for index in range(20)]
    assert address not in {other.address for other in others}
    assert f"{address:x}-" in Path("/proc/self/maps").read_text(), "the reservation is gone"
    view.release()


def test_memory_for_host_copies_says_what_it_is(mem: shoal.MemoryManager) -> None:
    assert mem.host_memory()["made"] == 0
    region, _ = staged(mem, 4 * PAGE)
    found = mem.host_memory()
    assert found["used"] == region.bytes
    assert found["used"] + found["spare"] <= found["made"] <= found["budget"]
    assert any("made of" in reason for reason in found["reasons"]), found


def test_a_dropped_region_gives_its_memory_back(mem: shoal.MemoryManager) -> None:
    region, _ = staged(mem, 4 * PAGE)
    region.wake()
    assert mem.device_memory()["used_by_this_process"] == region.bytes
    del region
    gc.collect()
    assert mem.device_memory()["used_by_this_process"] == 0
    assert mem.usage()["host"] == 0
    again, data = staged(mem, 20 * PAGE, "again")
    with mem.guard():
        assert read(again) == data


def test_wake_in_the_background_reports_progress(mem: shoal.MemoryManager) -> None:
    region, data = staged(mem, 8 * PAGE)
    transfer = region.wake(wait=False, timeout_s=30)
    report = transfer.wait(30)
    assert transfer.done
    done, total = transfer.progress()
    assert done == total == region.bytes
    assert report.restored == report.copied == region.bytes
    assert "Transfer" in repr(transfer)
    assert read(region) == data


def test_a_cancelled_wake_loses_nothing(mem: shoal.MemoryManager) -> None:
    region, data = staged(mem, 16 * PAGE)
    transfer = region.wake(wait=False)
    transfer.cancel()
    try:
        transfer.wait(30)
    except shoal.TransferError as error:
        assert "cancel" in str(error)
    with mem.guard():
        assert read(region) == data


def test_reclaim_takes_weights_from_the_back(mem: shoal.MemoryManager) -> None:
    region, data = staged(mem, 8 * PAGE)
    region.wake()
    report = mem.reclaim(2 * PAGE, reason="a test")
    assert report.freed >= 2 * PAGE
    assert read(region, 0, PAGE) == data[:PAGE]
    with mem.guard():
        assert read(region) == data


def test_two_devices_of_one_process_do_not_mix() -> None:
    with testing.simulated_memory("16MiB") as one, testing.simulated_memory("16MiB") as other:
        first, first_data = staged(one, 2 * PAGE, seed=1)
        second, second_data = staged(other, 2 * PAGE, seed=2)
        with one.guard(), other.guard():
            assert read(first) == first_data
            assert read(second) == second_data


def test_the_embedded_default_works_and_cleans_up() -> None:
    before = set(os.listdir("/proc/self/fd"))
    mem = shoal.MemoryManager("sim", device_budget="8MiB", host_budget="8MiB")
    region, data = staged(mem, PAGE)
    with mem.guard():
        assert read(region) == data
    assert "sim" in repr(mem)
    assert "weights" in repr(region)
    del mem, region
    gc.collect()
    assert set(os.listdir("/proc/self/fd")) == before


def test_sizes_are_read() -> None:
    assert shoal.parse_size("1.5 GiB") == 3 << 29
    assert shoal.parse_size(17) == 17
    with pytest.raises(ValueError, match="negative"):
        shoal.parse_size(-1)
