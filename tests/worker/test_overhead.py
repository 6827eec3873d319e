"""What a worker counts of a GPU beside its regions, with a GPU that is figures only."""

from __future__ import annotations

import stat
import time
from concurrent.futures import ThreadPoolExecutor
from typing import TYPE_CHECKING

import pytest
import torch

from shoal.worker import device, loading
from shoal.worker.loading import ModelFiles, TensorPlace
from shoal.worker.spec import WorkerSpec

if TYPE_CHECKING:
    from pathlib import Path

MIB = 1 << 20


class Gpu:
    """Free memory and torch's pool, as figures."""

    def __init__(self, monkeypatch: pytest.MonkeyPatch, free: int) -> None:
        self.free, self.reserved, self.reserved_max = free, 0, 0
        monkeypatch.setattr(torch.cuda, "memory_reserved", lambda _device: self.reserved)
        monkeypatch.setattr(torch.cuda, "max_memory_reserved", lambda _device: self.reserved_max)
        monkeypatch.setattr(torch.cuda, "set_device", lambda _device: None)
        monkeypatch.setattr(torch.cuda, "init", lambda: None)

    def device_memory(self) -> dict[str, int]:
        return {"free": self.free}


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
    monkeypatch.setattr(device, "_free_by_nvidia_smi", lambda _ordinal: before)
    gpu = Gpu(monkeypatch, 1000 * MIB)
    overhead = device.Overhead("cuda:0", tmp_path)
    assert overhead.open(lambda: gpu) is gpu
    assert overhead.peak() == counted


def test_the_peak_holds_torchs_pool_and_never_falls(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    monkeypatch.setattr(device, "_free_by_nvidia_smi", lambda _ordinal: 1600 * MIB)
    gpu = Gpu(monkeypatch, 1000 * MIB)
    overhead = device.Overhead("cuda:1", tmp_path)
    overhead.open(lambda: gpu)
    gpu.reserved_max = 100 * MIB
    assert overhead.peak() == 700 * MIB
    gpu.reserved_max = 50 * MIB
    assert overhead.peak() == 700 * MIB
    memory = device.DeviceMemory(gpu, overhead)
    assert memory.overhead_peak() == 700 * MIB
    assert device.DeviceMemory(gpu).overhead_peak() is None


def test_workers_measure_one_after_another(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    path = tmp_path / "overhead.lock"
    inside: list[int] = []

    def enter(number: int) -> None:
        with device._alone(path):
            inside.append(number)
            time.sleep(0.05)
            assert inside[-1] == number, "another one was inside"

    with ThreadPoolExecutor(4) as pool:
        list(pool.map(enter, range(4)))
    assert sorted(inside) == [0, 1, 2, 3]
    monkeypatch.setattr(device, "_ALONE_S", 0.05)
    with device._alone(path), device._alone(path):
        pass  # waiting has an end


def test_nvidia_smi_is_asked_for_the_gpu_the_process_sees(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    monkeypatch.setenv("PATH", str(tmp_path))
    assert device._free_by_nvidia_smi(0) is None
    program = tmp_path / "nvidia-smi"
    program.write_text("#!/bin/sh\ncase $1 in --id=0) echo 10;; --id=GPU-b) echo 20;; *) exit 6;; esac\n")
    program.chmod(program.stat().st_mode | stat.S_IXUSR)
    monkeypatch.delenv("CUDA_VISIBLE_DEVICES", raising=False)
    assert device._free_by_nvidia_smi(0) == 10 * MIB
    assert device._free_by_nvidia_smi(3) is None
    monkeypatch.setenv("CUDA_VISIBLE_DEVICES", "0, GPU-b")
    assert [device._free_by_nvidia_smi(ordinal) for ordinal in (0, 1, 2)] == [10 * MIB, 20 * MIB, None]


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
    assert loading._dtype(files, WorkerSpec(source="x", device=at, dtype=wanted)) == expected
