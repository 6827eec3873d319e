"""What a worker counts of a GPU beside its regions, with a GPU that is figures only."""

from __future__ import annotations

import contextlib
import stat
import time
from concurrent.futures import ThreadPoolExecutor
from types import SimpleNamespace
from typing import TYPE_CHECKING

import pytest
import torch

from shoal import LeaseError
from shoal.worker import device, loading
from shoal.worker import overhead as overheads
from shoal.worker.loading import ModelFiles, TensorPlace
from shoal.worker.memory import ShortageError
from shoal.worker.spec import WorkerSpec

if TYPE_CHECKING:
    from pathlib import Path

MIB = 1 << 20


class Gpu:
    """Free memory and torch's pool, as figures."""

    def __init__(self, monkeypatch: pytest.MonkeyPatch, free: int) -> None:
        self.free, self.reserved, self.reserved_max, self.used_max = free, 0, 0, 0
        self.leased: list[int] = []
        self.is_short = False
        monkeypatch.setattr(torch.cuda, "memory_reserved", lambda _device: self.reserved)
        monkeypatch.setattr(torch.cuda, "memory_stats_as_nested_dict", self.figures)
        monkeypatch.setattr(torch.cuda, "reset_peak_memory_stats", self.reset)
        monkeypatch.setattr(torch.cuda, "set_device", lambda _device: None)
        monkeypatch.setattr(torch.cuda, "init", lambda: None)

    def device_memory(self) -> dict[str, int]:
        return {"free": self.free}

    def figures(self, _device: object) -> dict[str, dict[str, dict[str, int]]]:
        return {
            "reserved_bytes": {"all": {"current": self.reserved, "peak": self.reserved_max}},
            "allocated_bytes": {"all": {"current": 0, "peak": self.used_max}},
        }

    def reset(self, _device: object) -> None:
        self.reserved_max, self.used_max = self.reserved, 0

    def take(self, most: int, kept: int = 0) -> None:
        """So much is used for a moment, for which torch's pool grows where it has less; it keeps some of that."""
        self.used_max = max(self.used_max, most)
        self.reserved, self.reserved_max = kept, max(self.reserved_max, self.reserved, most)

    def set_overhead(self, nbytes: int, *, timeout_s: float = 1.0) -> None:
        if self.is_short and nbytes > (self.leased or [0])[-1]:
            raise LeaseError(f"not within {timeout_s} s")
        self.leased.append(nbytes)


@pytest.mark.parametrize(
    ("before", "counted"),
    [
        (1600 * MIB, 600 * MIB),
        (None, 530 * MIB),
        (900 * MIB, 530 * MIB),
        (1010 * MIB, 530 * MIB),
        (9000 * MIB, 530 * MIB),
    ],
)
def test_the_context_is_what_is_gone_where_that_can_be(
    monkeypatch: pytest.MonkeyPatch, tmp_path: Path, before: int | None, counted: int
) -> None:
    monkeypatch.setattr(overheads, "_free_by_nvidia_smi", lambda _ordinal: before)
    gpu = Gpu(monkeypatch, 1000 * MIB)
    overhead = overheads.Overhead("cuda:0", tmp_path)
    assert overhead.open(lambda: gpu) is gpu
    assert overhead.peak() == counted


def test_the_peak_holds_torchs_pool_and_never_falls(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    monkeypatch.setattr(overheads, "_free_by_nvidia_smi", lambda _ordinal: 1600 * MIB)
    gpu = Gpu(monkeypatch, 1000 * MIB)
    overhead = overheads.Overhead("cuda:1", tmp_path)
    overhead.open(lambda: gpu)
    gpu.reserved_max = 100 * MIB
    assert overhead.peak() == 700 * MIB
    assert overhead.peak() == 700 * MIB
    memory = device.DeviceMemory(gpu, overhead)
    assert memory.overhead_peak() == 700 * MIB
    assert device.DeviceMemory(gpu).overhead_peak() is None


@pytest.fixture
def busy(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> Busy:
    return Busy(monkeypatch, tmp_path)


class Busy:
    """One that has 600 MiB of context and has leased 832, at a clock that a test sets."""

    def __init__(self, monkeypatch: pytest.MonkeyPatch, home: Path) -> None:
        monkeypatch.setattr(overheads, "_free_by_nvidia_smi", lambda _ordinal: 1600 * MIB)
        self.gpu, self.now = Gpu(monkeypatch, 1000 * MIB), 0.0
        self.overhead = overheads.Overhead("cuda:0", home, 832 * MIB, lambda: self.now)
        self.overhead.open(lambda: self.gpu)

    def step(self, tokens: int, most: int, kept: int = 0) -> None:
        self.overhead.begin_step(tokens, 1.0)
        self.gpu.take(most, kept)
        self.overhead.end_step(tokens)

    def pass_by(self, seconds: int) -> None:
        for _ in range(seconds):
            self.now += 1
            self.overhead.measured()


def test_what_was_not_taken_for_a_while_is_given_back_and_leased_again_before_it_is_taken(busy: Busy) -> None:
    busy.step(2000, 900 * MIB)
    assert busy.overhead.measured() == 1500 * MIB
    assert busy.overhead.measured() == 600 * MIB, "that was said before"
    busy.step(2000, 900 * MIB)
    assert busy.gpu.leased == [1500 * MIB], "the second one is known to take it, and asks before"
    busy.pass_by(29)
    assert busy.gpu.leased == [1500 * MIB], "it may come again any moment"
    busy.pass_by(3)
    assert busy.gpu.leased[-1] == 600 * MIB
    # Steps of another size are what they are.
    busy.step(40, 50 * MIB)
    busy.step(40, 50 * MIB)
    assert busy.gpu.leased[-1] == 650 * MIB
    busy.step(1900, 0)
    assert busy.gpu.leased[-1] == 1500 * MIB
    assert busy.overhead.peak() == 1500 * MIB


def test_a_step_that_cannot_have_its_lease_does_not_begin(busy: Busy) -> None:
    busy.step(2000, 900 * MIB)
    busy.pass_by(40)
    busy.gpu.is_short = True
    with pytest.raises(ShortageError, match="a step of 2000 tokens takes 1572864000 bytes"):
        busy.overhead.begin_step(2000, 1.0)
    busy.step(8, 0)
    busy.gpu.is_short = False
    busy.overhead.begin_step(2000, 1.0)
    # While it runs, nothing of it goes, however long it takes nothing yet.
    busy.pass_by(50)
    assert busy.gpu.leased[-1] == 1500 * MIB
    # It did not run in the end.
    busy.overhead.leave_step()
    busy.pass_by(40)
    assert busy.gpu.leased[-1] == 600 * MIB


def test_what_a_large_step_left_in_torchs_pool_is_not_what_a_small_one_takes(busy: Busy) -> None:
    busy.step(2000, 900 * MIB, kept=900 * MIB)
    busy.step(8, 40 * MIB, kept=900 * MIB)
    # It grows by a little beside what lies there.
    busy.overhead.begin_step(8, 1.0)
    busy.gpu.reserved_max = 910 * MIB
    busy.gpu.take(44 * MIB, kept=0)
    busy.overhead.end_step(8)
    busy.pass_by(40)
    assert busy.gpu.leased[-1] == 600 * MIB, "the pool was emptied"
    busy.step(8, 40 * MIB)
    assert busy.gpu.leased[-1] == 654 * MIB, "it asks for what small ones take"
    busy.step(2000, 900 * MIB)
    assert busy.gpu.leased[-1] == 1500 * MIB, "and a large one for what large ones do"


def test_what_one_step_took_is_not_leased_for_each_one_after_it_for_ever(busy: Busy) -> None:
    busy.step(1, 900 * MIB)
    for _ in range(overheads._STEPS_KEPT - 1):
        busy.step(1, 20 * MIB)
    busy.pass_by(40)
    busy.step(1, 20 * MIB)
    assert busy.gpu.leased[-1] == 1500 * MIB, "it was one of the newest"
    busy.pass_by(40)
    busy.step(1, 20 * MIB)
    busy.pass_by(40)
    assert busy.gpu.leased[-1] == 620 * MIB, "it is none of them"


def test_a_server_that_is_gone_does_not_end_what_reports_to_it(busy: Busy) -> None:
    busy.step(2000, 900 * MIB)
    busy.step(2000, 900 * MIB)

    def gone(*_arguments: object, **_named: object) -> None:
        raise LeaseError("the server is gone")

    busy.gpu.set_overhead = gone  # type: ignore[method-assign]
    busy.pass_by(40)
    assert busy.overhead.measured() == 600 * MIB
    assert busy.gpu.leased[-1] == 1500 * MIB


def test_a_step_does_not_wait_for_a_few_mib_more_than_are_leased(busy: Busy) -> None:
    busy.step(40, 250 * MIB)
    busy.gpu.is_short = True
    # 850 of 832 MiB: the server sees it in the figures.
    busy.step(40, 250 * MIB)
    assert busy.gpu.leased == []
    assert busy.overhead.measured() == 850 * MIB
    busy.step(40, 270 * MIB)
    with pytest.raises(ShortageError):
        busy.overhead.begin_step(40, 1.0)


def test_a_figure_that_goes_up_and_down_gives_nothing_back(busy: Busy) -> None:
    for _ in range(20):
        busy.gpu.take(200 * MIB)
        busy.pass_by(20)
    assert busy.gpu.leased == [800 * MIB]
    busy.gpu.take(180 * MIB, kept=180 * MIB)
    busy.pass_by(100)
    assert busy.gpu.leased == [800 * MIB], "that little is not worth it"


def test_a_step_waits_for_its_lease_and_for_its_bytes_no_longer_than_it_may(monkeypatch: pytest.MonkeyPatch) -> None:
    now = 100.0
    allowed: list[float] = []

    class Slow:
        def begin_step(self, tokens: int, timeout_s: float) -> None:
            nonlocal now
            assert (tokens, timeout_s) == (8, 5.0)
            now += 3.5

        def end_step(self, tokens: int) -> None:
            assert tokens == 8

        def leave_step(self) -> None:
            raise AssertionError("it began")

    class Guard(contextlib.nullcontext[None]):
        wake = None

    class Mem:
        def guard(self, *, timeout_s: float, in_order: object) -> Guard:
            assert in_order is None
            allowed.append(timeout_s)
            return Guard()

    monkeypatch.setattr(device, "time", SimpleNamespace(monotonic=lambda: now))
    memory = device.DeviceMemory(Mem(), Slow())  # type: ignore[arg-type]
    for _ in range(2):
        with memory.guard(5.0, tokens=8):
            pass
    assert allowed == [1.5, 1.5]


def test_workers_measure_one_after_another(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    path = tmp_path / "overhead.lock"
    inside: list[int] = []

    def enter(number: int) -> None:
        with overheads._alone(path):
            inside.append(number)
            time.sleep(0.05)
            assert inside[-1] == number, "another one was inside"

    with ThreadPoolExecutor(4) as pool:
        list(pool.map(enter, range(4)))
    assert sorted(inside) == [0, 1, 2, 3]
    monkeypatch.setattr(overheads, "_ALONE_S", 0.05)
    with overheads._alone(path), overheads._alone(path):
        pass  # waiting has an end


def test_nvidia_smi_is_asked_for_the_gpu_the_process_sees(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    monkeypatch.setenv("PATH", str(tmp_path))
    assert overheads._free_by_nvidia_smi(0) is None
    program = tmp_path / "nvidia-smi"
    program.write_text("#!/bin/sh\ncase $1 in --id=0) echo 10;; --id=GPU-b) echo 20;; *) exit 6;; esac\n")
    program.chmod(program.stat().st_mode | stat.S_IXUSR)
    monkeypatch.delenv("CUDA_VISIBLE_DEVICES", raising=False)
    assert overheads._free_by_nvidia_smi(0) == 10 * MIB
    assert overheads._free_by_nvidia_smi(3) is None
    monkeypatch.setenv("CUDA_VISIBLE_DEVICES", "0, GPU-b")
    assert [overheads._free_by_nvidia_smi(ordinal) for ordinal in (0, 1, 2)] == [10 * MIB, 20 * MIB, None]


@pytest.mark.parametrize(
    ("at", "kind", "stored", "wanted", "expected"),
    [
        ("cuda:0", "causal", "F32", "auto", torch.bfloat16),
        ("cuda:0", "causal", "F16", "auto", "auto"),
        ("cuda:0", "causal", "F32", "float32", torch.float32),
        ("cuda:0", "embedding", "F32", "auto", "auto"),
        ("sim", "causal", "F32", "auto", "auto"),
    ],
)
def test_a_causal_model_in_float32_runs_in_bfloat16_on_a_gpu(  # noqa: PLR0917 - a table's columns
    tmp_path: Path, at: str, kind: str, stored: str, wanted: str, expected: object
) -> None:
    tensors = {"w": TensorPlace(tmp_path, stored, (2,), 0, 8), "i": TensorPlace(tmp_path, "I64", (1,), 8, 8)}
    files = ModelFiles(tmp_path, kind, {}, tensors)
    assert loading.dtype_of(files, WorkerSpec(source="x", device=at, dtype=wanted)) == expected
