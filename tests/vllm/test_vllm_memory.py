"""A step that waits for memory which others have, on the simulated device."""

from __future__ import annotations

import threading
import time

import pytest

import shoal

torch = pytest.importorskip("torch")

from shoal.vllm.memory import EngineMemory  # noqa: E402

MIB = 1 << 20


def engine() -> tuple[EngineMemory, shoal.Region, list[int]]:
    """Give an engine whose weights are asleep, and somebody who has their memory."""
    mem = shoal.MemoryManager("sim", device_budget="16MiB", host_budget="32MiB")
    memory = EngineMemory("sim", mem)
    memory.place(torch.nn.Linear(1024, 2048, bias=False))
    other = mem.region("other", "16MiB", kind="kv")
    other._native.set_yields(False)
    other.commit(0, 12 * MIB)
    return memory, other, []


def test_a_step_waits_until_its_memory_is_back() -> None:
    memory, other, waited = engine()

    def give_back() -> None:
        time.sleep(0.2)
        waited.append(1)
        other.decommit(0, 12 * MIB)

    thread = threading.Thread(target=give_back)
    thread.start()
    with memory.step(20):
        assert waited == [1], "it began without its memory"
        assert memory.mem.usage()["weights_device"] == 8 * MIB
    thread.join()


def test_a_step_whose_memory_does_not_come_fails_in_time() -> None:
    memory, other, _ = engine()
    begun = time.monotonic()
    with pytest.raises((shoal.LeaseError, shoal.OutOfMemoryError, shoal.DeadlineError)), memory.step(0.3):
        pytest.fail("it began without its memory")
    assert time.monotonic() - begun >= 0.3
    assert other.usage()["device"] == 12 * MIB


def test_who_waits_says_so() -> None:
    memory, other, _ = engine()
    entered = []

    class Waiting:
        def __enter__(self) -> None:
            entered.append("in")

        def __exit__(self, *_: object) -> None:
            entered.append("out")

    memory.waiting = Waiting  # type: ignore[assignment]
    with pytest.raises(shoal.Error), memory.step(0.1):
        pass
    assert entered[:2] == ["in", "out"]
    assert other.usage()["device"] == 12 * MIB
