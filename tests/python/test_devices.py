"""The choice of a device, and what is said where it cannot be used."""

from __future__ import annotations

import sys
from pathlib import Path

import pytest
from helpers import run_python

import shoal
from shoal.memory import machine

no_driver = pytest.mark.skipif(
    machine.has_nvidia_device() or Path("/dev/nvidiactl").exists(), reason="there is an NVIDIA device here"
)


@no_driver
def test_without_a_driver_cuda_says_what_is_missing_and_what_would_do() -> None:
    with pytest.raises(shoal.DeviceError, match=r"no NVIDIA driver .*470 or newer") as caught:
        shoal.MemoryManager("cuda:1")
    assert caught.value.kind == "unavailable"
    assert caught.value.device == "cuda:1"


@no_driver
def test_auto_is_simulated_only_where_there_is_no_nvidia_device(monkeypatch: pytest.MonkeyPatch) -> None:
    assert shoal.MemoryManager("auto").device == "sim"
    # A device that cannot be used: never a silent fall back.
    monkeypatch.setattr(machine, "has_nvidia_device", lambda: True)
    with pytest.raises(shoal.DeviceError, match="no NVIDIA driver"):
        shoal.MemoryManager("auto")


@no_driver
def test_a_driver_that_is_too_old_is_named(tmp_path: Path) -> None:
    # A library of that name without the functions that are needed, found first.
    cc = run_python(
        """
        import shutil, subprocess, sys
        compiler = shutil.which("cc")
        if compiler is None:
            sys.exit(77)
        source = "int cuInit(unsigned flags) { return 0; }"
        command = [compiler, "-shared", "-fPIC", "-xc", "-", "-o", sys.argv[1]]
        subprocess.run(command, input=source, text=True, check=True)
        """,
        str(tmp_path / "libcuda.so.1"),
    )
    if cc.returncode == 77:
        pytest.skip("no C compiler")
    said = run_python(
        """
        import os, subprocess, sys
        code = "import shoal; shoal.MemoryManager('cuda:0')"
        environment = {**os.environ, "LD_LIBRARY_PATH": sys.argv[1]}
        said = subprocess.run([sys.executable, "-c", code], env=environment, capture_output=True, text=True)
        print(said.stderr)
        """,
        str(tmp_path),
    )
    assert "the NVIDIA driver is too old: it has no cu" in said.stdout, said.stdout
    assert "470 or newer" in said.stdout


@pytest.mark.parametrize("device", ["gpu", "cuda:x", "sim:-1", "cuda:0:1", ""])
def test_a_name_that_is_no_device_is_refused(device: str) -> None:
    with pytest.raises(ValueError, match="device"):
        shoal.MemoryManager(device)


def test_a_region_speaks_dlpack_without_being_touched(mem: shoal.MemoryManager) -> None:
    torch = pytest.importorskip("torch")
    region = mem.region("r", "4MiB", kind="workspace")
    assert region.device == "sim:0"
    buffer = region.buffer(64, 4096)
    assert buffer.__dlpack_device__() == (1, 0)
    with pytest.raises(BufferError, match="never copied"):
        buffer.__dlpack__(copy=True)
    before = sys.getrefcount(region)
    flat = torch.from_dlpack(buffer)
    assert flat.data_ptr() == region.address + 64
    assert flat.numel() == 4096
    assert sys.getrefcount(region) == before
    # A capsule nobody takes gives up what it holds; so does a tensor.
    buffer.__dlpack__()
    address = region.address
    del region, buffer
    assert address <= flat.data_ptr()
    region = mem.region("s", "4MiB", kind="workspace")
    assert region.address != address, "the tensor still holds the first region's addresses"
    del flat


def test_what_control_groups_allow_is_what_they_have_left(tmp_path: Path) -> None:
    def group(path: str, **files: object) -> None:
        (tmp_path / path).mkdir(parents=True, exist_ok=True)
        for name, value in files.items():
            (tmp_path / path / f"memory.{name}").write_text(f"{value}\n")

    left = machine.control_group_left
    group("slice/service", max="max", current=50)
    assert left("0::/slice/service\n", tmp_path) is None
    group("slice", max=1000, current=700, stat="anon 600\ninactive_file 60")
    assert left("0::/slice/service\n", tmp_path) == 360, "of a group above, whose idle cached files can go"
    group("slice/service", max=200, current=300)
    assert left("1:cpu:/\n0::/slice/service\n", tmp_path) == 0
    # In a container the name is the host's, and what is mounted is the group itself.
    group("", max=500, current=100)
    assert left("0::/docker/0123\n", tmp_path) == 400
    group("memory/job", limit_in_bytes=900, usage_in_bytes=400, stat="inactive_file 1\ntotal_inactive_file 50")
    group("memory", limit_in_bytes=9223372036854771712, usage_in_bytes=5000)
    assert left("4:memory:/job\n", tmp_path) == 550
    assert left("4:cpu,cpuacct:/job\n", tmp_path) is None
    assert machine.host_budget_default() > 0
