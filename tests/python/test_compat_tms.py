"""The face of torch_memory_saver, as far as it goes without a GPU: what torch would call is called by hand."""

from __future__ import annotations

import ctypes
import gc
import os
import signal
import subprocess
import sys
import threading
from pathlib import Path
from typing import TYPE_CHECKING

import pytest
from helpers import pattern, read

import shoal
from shoal import _native, testing

torch = pytest.importorskip("torch")

from shoal.compat import torch_memory_saver as face  # noqa: E402
from shoal.compat.torch_memory_saver.disk import Spill  # noqa: E402
from shoal.compat.torch_memory_saver.groups import Backup, Generation, Group, Key  # noqa: E402
from shoal.compat.torch_memory_saver.settings import Settings  # noqa: E402

if TYPE_CHECKING:
    from collections.abc import Callable, Iterator

MIB = 1 << 20
_library = ctypes.CDLL(_native.__file__)
_library.shoal_torch_free.argtypes = [ctypes.c_void_p, ctypes.c_ssize_t, ctypes.c_int, ctypes.c_void_p]
_library.shoal_torch_free.restype = None


def allocate(generation: Generation, nbytes: int) -> int | None:
    """Allocate as torch would in a pool of that region."""
    function = getattr(_library, f"shoal_torch_alloc_{generation.region._native.torch_bind()}")
    function.argtypes, function.restype = [ctypes.c_ssize_t, ctypes.c_int, ctypes.c_void_p], ctypes.c_void_p
    return function(nbytes, 0, 0)


def free(address: int, nbytes: int) -> None:
    _library.shoal_torch_free(address, nbytes, 0, 0)


def fill(generation: Generation, nbytes: int, seed: int = 7) -> tuple[int, bytes]:
    at, data = allocate(generation, nbytes), pattern(nbytes, seed)
    assert at is not None, generation.region._native.last_error()
    memoryview(generation.region.buffer(at - generation.region.address, nbytes))[:] = data
    return at, data


def content(generation: Generation, at: int, nbytes: int) -> bytes:
    return read(generation.region, at - generation.region.address, nbytes)


@pytest.fixture
def mem() -> Iterator[shoal.MemoryManager]:
    with testing.simulated_machine("96MiB") as device:
        yield device.manager(host_budget="128MiB")


@pytest.fixture
def make(mem: shoal.MemoryManager, tmp_path: Path) -> Callable[..., Group]:
    def make(backup: Backup = "cpu", backend: str = "pinned", **settings: object) -> Group:
        given = Settings(disk_dir=str(tmp_path), chunk_bytes=4 * MIB)
        for name, value in settings.items():
            setattr(given, name, value)
        return Group(Key("tag", backup, backend if backup == "cpu" else "", 0), mem, given)

    return make


@pytest.mark.parametrize("backup", ["cpu", "disk"])
def test_bytes_come_back_and_the_region_grows_between(make: Callable[..., Group], backup: Backup) -> None:
    group = make(backup)
    home = group.current()
    kept = [fill(home, 5 * MIB)]
    for turn in range(3):
        assert group.pause(30)
        assert not group.pause(30), "again is fine"
        assert group.is_paused
        assert home.region.usage()["device"] == 0
        assert group.resume(30)
        assert not group.resume(30)
        for at, data in kept:
            assert content(home, at, len(data)) == data
        assert group.current() is home
        kept.append(fill(home, 3 * MIB, turn))


def test_without_a_backup_the_addresses_stay_and_the_bytes_do_not(make: Callable[..., Group]) -> None:
    group = make("none")
    home = group.current()
    at, data = fill(home, 4 * MIB)
    group.pause(30)
    group.resume(30)
    assert content(home, at, 4 * MIB) != data
    memoryview(home.region.buffer(at - home.region.address, 4 * MIB))[:] = data
    assert content(home, at, 4 * MIB) == data


def test_what_is_allocated_meanwhile_lies_apart(make: Callable[..., Group]) -> None:
    group = make()
    home = group.current()
    first = fill(home, 4 * MIB)
    group.pause(30)
    assert allocate(home, MIB) is None, "never into what is paused"
    other = group.current()
    assert other is not home
    second = fill(other, 4 * MIB, 2)
    assert not home.has(second[0])
    assert group.find(second[0]) is other
    assert group.pause(30), "now it is paused too"
    third = group.current()
    assert third not in {home, other}
    group.resume(30)
    assert group.current() is home
    assert third not in group.generations, "it was empty"
    assert content(home, first[0], 4 * MIB) == first[1]
    assert content(other, second[0], 4 * MIB) == second[1]
    free(second[0], 4 * MIB)


def test_freeing_while_paused_is_safe(make: Callable[..., Group], mem: shoal.MemoryManager) -> None:
    for backup in ("none", "cpu", "disk"):
        group = make(backup)
        home = group.current()
        kept, gone = fill(home, 8 * MIB), fill(home, 8 * MIB, 3)
        group.pause(30)
        free(gone[0], 8 * MIB)
        group.resume(30)
        if backup != "none":
            assert content(home, kept[0], 8 * MIB) == kept[1]
        again = allocate(home, 8 * MIB)
        assert again == gone[0]
        free(again, 8 * MIB)
        free(kept[0], 8 * MIB)
        del group, home
        gc.collect()
    assert mem.device_memory()["used_by_this_process"] == 0


@pytest.mark.parametrize("backend", ["pinned", "mmap"])
def test_host_copies_are_shown_while_paused_and_while_retained(make: Callable[..., Group], backend: str) -> None:
    group = make("cpu", backend)
    home = group.current()
    at, data = fill(home, 1024)
    assert home.cpu_backup(at, 1024, False) is None, "not paused yet"
    group.pause(30)
    shown = home.cpu_backup(at, 1024, True)
    place = shown.data_ptr()
    assert bytes(shown.tolist()) == data
    del shown
    group.settings.retain = True
    group.resume(30)
    for turn in range(3):
        shown = home.cpu_backup(at, 1024, True)
        assert shown.data_ptr() == place
        assert bytes(shown.tolist()) == data
        del shown
        data = pattern(1024, turn)
        memoryview(home.region.buffer(at - home.region.address, 1024))[:] = data
        group.pause(30)
        group.resume(30)
        assert content(home, at, 1024) == data
    group.settings.retain = False
    group.pause(30)
    group.resume(30)
    assert home.cpu_backup(at, 1024, False) is None
    assert home.region.usage()["host"] == 0
    assert content(home, at, 1024) == data


def test_a_backup_of_several_extents_is_given_as_a_copy(make: Callable[..., Group]) -> None:
    group = make()
    home = group.current()
    at, data = fill(home, 22 * MIB)
    group.pause(30)
    assert len(home.region._native.resident_ranges()) == 0
    whole = home.cpu_backup(at + 5, 22 * MIB - 10, True)
    assert bytes(memoryview(whole.numpy())) == data[5:-5]


def test_a_pause_that_finds_no_host_memory_changes_nothing(
    mem: shoal.MemoryManager, make: Callable[..., Group]
) -> None:
    # Held by somebody else: a region that sleeps.
    other = mem.region("other", "64MiB")
    other.stage(0, pattern(64 * MIB))
    other.stage(0, pattern(64 * MIB, 8))
    held = mem.region("held", "32MiB")
    held.stage(0, bytes(32 * MIB))
    group = make()
    home = group.current()
    at, data = fill(home, 40 * MIB)
    with pytest.raises(shoal.OutOfMemoryError):
        group.pause(30)
    assert not group.is_paused
    assert content(home, at, len(data)) == data
    del held
    gc.collect()
    group.pause(30)
    group.resume(30)
    assert content(home, at, len(data)) == data


def test_a_resume_that_finds_no_room_leaves_it_paused(mem: shoal.MemoryManager, make: Callable[..., Group]) -> None:
    group, tenant = make(), make("none")
    home = group.current()
    at, data = fill(home, 50 * MIB)
    group.pause(30)
    elsewhere = tenant.current()
    taken = allocate(elsewhere, 60 * MIB)
    assert taken is not None
    with pytest.raises((shoal.OutOfMemoryError, shoal.LeaseError)):
        group.resume(5)
    assert group.is_paused
    free(taken, 60 * MIB)
    group.resume(30)
    assert content(home, at, len(data)) == data


def test_files_are_private_several_and_gone_after_the_resume(make: Callable[..., Group], tmp_path: Path) -> None:
    group = make("disk")
    home = group.current()
    at, data = fill(home, 13 * MIB)
    group.pause(30)
    files = sorted(tmp_path.iterdir())
    assert len(files) >= 2
    assert sum(path.stat().st_size for path in files) >= 13 * MIB
    assert all(path.stat().st_mode & 0o777 == 0o600 for path in files)
    assert home.region.usage()["host"] == 0
    group.resume(30)
    assert not list(tmp_path.iterdir())
    assert content(home, at, len(data)) == data
    group.pause(30)
    assert list(tmp_path.iterdir())
    del group, home
    gc.collect()
    assert not list(tmp_path.iterdir()), "they go with the region"


def test_files_that_a_killed_process_left_are_in_nobodys_way(make: Callable[..., Group], tmp_path: Path) -> None:
    code = f"""
import os, signal
from shoal import testing
from shoal.compat.torch_memory_saver.disk import Spill
pid = os.getpid()
os.getpid = lambda: 7  # as in a container, where every start has the same
with testing.simulated_machine("64MiB") as machine:
    region = machine.manager(host_budget="64MiB").region("tag", "8MiB", kind="workspace")
    region.commit(0, 8 << 20)
    spill = Spill.write(region, {str(tmp_path)!r}, 1 << 20)
    print(len(spill.paths), flush=True)
    os.kill(pid, signal.SIGKILL)
"""
    for turn in (1, 2):
        said = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=False, timeout=120)
        assert said.returncode == -signal.SIGKILL, said.stderr
        assert len(list(tmp_path.iterdir())) == turn * int(said.stdout)


@pytest.mark.parametrize("damage", ["changed", "short"])
def test_a_damaged_file_is_found_and_it_stays_paused(make: Callable[..., Group], tmp_path: Path, damage: str) -> None:
    group = make("disk")
    home = group.current()
    at, data = fill(home, 6 * MIB)
    group.pause(30)
    path = max(tmp_path.iterdir(), key=lambda path: path.stat().st_size)
    good = path.read_bytes()
    if damage == "changed":
        with path.open("r+b") as file:
            file.seek(len(good) // 2)
            file.write(bytes([good[len(good) // 2] ^ 1]))
    else:
        os.truncate(path, 1000)
    with pytest.raises(shoal.TransferError) as caught:
        group.resume(30)
    assert caught.value.path == str(path)
    assert group.is_paused
    assert home.region.usage()["device"] == 0
    path.write_bytes(good)
    group.resume(30)
    assert content(home, at, len(data)) == data


def test_a_directory_that_cannot_be_used_is_named(make: Callable[..., Group], tmp_path: Path) -> None:
    group = make("disk", disk_dir=None)
    home = group.current()
    at, data = fill(home, 4 * MIB)
    with pytest.raises(shoal.RegionError, match="set_disk_backup_dir"):
        group.pause(30)
    group.settings.disk_dir = str(tmp_path / "missing")
    with pytest.raises(shoal.TransferError, match="missing"):
        group.pause(30)
    assert not group.is_paused
    assert content(home, at, len(data)) == data


def test_files_go_when_the_process_ends(tmp_path: Path) -> None:
    code = f"""
from shoal import testing
from shoal.compat.torch_memory_saver.disk import Spill
with testing.simulated_machine("64MiB") as machine:
    mem = machine.manager(host_budget="64MiB")
    region = mem.region("tag", "8MiB", kind="workspace")
    region.commit(0, 8 << 20)
    spill = Spill.write(region, {str(tmp_path)!r}, 1 << 20)
    assert spill.nbytes == 8 << 20 and all(map(__import__("os").path.exists, spill.paths))
    print(len(spill.paths))
"""
    said = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=False, timeout=120)
    assert said.returncode == 0, said.stderr
    assert int(said.stdout) >= 1
    assert not list(tmp_path.iterdir())


def test_a_full_disk_leaves_no_file(mem: shoal.MemoryManager, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    region = mem.region("tag", "8MiB", kind="workspace")
    region.commit(0, 8 * MIB)

    def full(*_: object) -> int:
        raise OSError(28, "No space left on device")

    monkeypatch.setattr(os, "pwrite", full)
    with pytest.raises(shoal.TransferError, match="No space left"):
        Spill.write(region, tmp_path, MIB)
    assert not list(tmp_path.iterdir())


def test_who_fills_it_on_another_thread_is_named_in_an_error(make: Callable[..., Group]) -> None:
    group = make()
    home = group.current()
    at, data = fill(home, 4 * MIB)
    use = home.region._native.begin_use(30)
    with pytest.raises(shoal.RegionError, match="fills it right now"):
        group.pause(30)
    assert not group.is_paused
    use.release()
    group.pause(30)
    group.resume(30)
    assert content(home, at, len(data)) == data


def test_the_environment() -> None:
    assert Settings.of({}) == Settings()
    full = Settings.of({
        "TMS_INIT_ENABLE": "1", "TMS_INIT_ENABLE_CPU_BACKUP": "true", "TMS_INIT_CPU_BACKUP_BACKEND": "mmap",
        "TMS_RETAIN_CPU_BACKUP": "1", "TMS_DISK_BACKUP_DIR": "/x", "TMS_DISK_BACKUP_CHUNK_MB": "1",
    })  # fmt: skip
    assert full == Settings(True, "cpu", "mmap", True, "/x", MIB)
    for wrong in (
        {"TMS_INIT_ENABLE": "maybe"},
        {"TMS_INIT_CPU_BACKUP_BACKEND": "ram"},
        {"TMS_DISK_BACKUP_CHUNK_MB": "0"},
        {"TMS_INIT_ENABLE_CPU_BACKUP": "1", "TMS_INIT_ENABLE_DISK_BACKUP": "1"},
    ):
        with pytest.raises(ValueError, match=r"TMS_|backend"):
            Settings.of(wrong)


def test_arguments_and_properties(mem: shoal.MemoryManager, tmp_path: Path) -> None:
    saver = face.TorchMemorySaver(Settings())
    with pytest.raises(ValueError, match="exclude one another"), saver.region("a", True, True):
        pass
    with pytest.raises(ValueError, match="enable_cpu_backup"), saver.region(cpu_backup_backend="mmap"):
        pass
    with pytest.raises(ValueError, match="hook_mode"):
        saver.hook_mode = "other"
    saver.hook_mode = "preload"
    assert saver.enabled
    assert not saver.retain_cpu_backup
    saver.retain_cpu_backup = True
    assert saver.retain_cpu_backup
    saver.set_disk_backup_dir(tmp_path / "new" / "one")
    assert (tmp_path / "new" / "one").is_dir()
    saver.memory_margin_bytes = 5 * MIB
    assert saver.memory_margin_bytes == 5 * MIB
    saver.pause("nothing of that name")
    saver.resume()
    assert not saver.is_paused()
    with pytest.raises(shoal.RegionError, match="not made in a region"):
        saver.get_cpu_backup(torch.ones(3))
    with pytest.raises(ValueError, match="contiguous"):
        saver.get_cpu_backup(torch.ones(3, 3).t())
    saver.use_manager(mem)
    with pytest.raises(shoal.RegionError, match="simulated device"), saver.region():
        pass


@pytest.mark.skipif(torch.cuda.is_available(), reason="there is a GPU")
def test_without_a_gpu_it_says_so() -> None:
    saver = face.TorchMemorySaver(Settings())
    with pytest.raises(shoal.DeviceError, match="no CUDA device"), saver.region():
        pass
    with pytest.raises(shoal.DeviceError, match="no CUDA device"):
        saver.enable_everywhere()


def test_a_pause_waits_for_another_threads_and_not_for_ever(mem: shoal.MemoryManager) -> None:
    saver = face.TorchMemorySaver(Settings(), timeout_s=0.05)
    inside, leave = threading.Event(), threading.Event()

    def hold() -> None:
        with saver._quiet:
            inside.set()
            leave.wait(30)

    thread = threading.Thread(target=hold)
    thread.start()
    inside.wait(30)
    with pytest.raises(shoal.DeadlineError) as caught:
        saver.pause()
    assert caught.value.waited_s == 0.05
    leave.set()
    thread.join(30)
    saver.pause()


def test_the_other_librarys_name_can_be_ours() -> None:
    code = """
import os, sys
import shoal.compat.torch_memory_saver as face
face.install(); face.install()
import torch_memory_saver
from torch_memory_saver import torch_memory_saver as saver, configure_subprocess
from torch_memory_saver.testing_utils import get_and_print_gpu_memory, get_device, empty_cache
from torch_memory_saver.utils import change_env
assert saver is face.torch_memory_saver
with configure_subprocess(), change_env("A_VARIABLE", "1"):
    assert os.environ["A_VARIABLE"] == "1"
assert "A_VARIABLE" not in os.environ
del sys.modules["torch_memory_saver"]
sys.modules["torch_memory_saver"] = sys
try:
    face.install()
except RuntimeError as error:
    print(error)
"""
    said = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=False, timeout=120)
    assert said.returncode == 0, said.stderr
    assert "imported already" in said.stdout
