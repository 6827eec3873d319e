"""The face of torch_memory_saver on a GPU. Run by `tests/gpu/run.sh tms`, before that library's own examples."""

from __future__ import annotations

import gc
import os
import re
import subprocess
import threading
import time
from collections.abc import Callable, Iterator
from pathlib import Path

import pytest

import shoal

torch = pytest.importorskip("torch")

from shoal.compat.torch_memory_saver import TorchMemorySaver  # noqa: E402
from shoal.compat.torch_memory_saver.settings import Settings  # noqa: E402
from shoal.torch import pools  # noqa: E402

MIB = 1 << 20


def used() -> int:
    # Without what torch caches of its own, such as what a comparison took.
    torch.cuda.empty_cache()
    free, total = torch.cuda.mem_get_info()
    return total - free


def settle() -> None:
    """Let what tests before have left go, which it does by itself, a little later."""
    gc.collect()
    pools._sweep()
    last, deadline = -1, time.monotonic() + 20
    while (now := used()) != last and time.monotonic() < deadline:
        last = now
        time.sleep(1.5)


def noise(nbytes: int, seed: int) -> torch.Tensor:
    generator = torch.Generator(device="cuda").manual_seed(seed)
    return torch.randint(0, 256, (nbytes,), dtype=torch.uint8, device="cuda", generator=generator)


@pytest.fixture
def saver(mem: shoal.MemoryManager, tmp_path: Path) -> Iterator[TorchMemorySaver]:
    made = TorchMemorySaver(Settings(disk_dir=str(tmp_path), chunk_bytes=16 * MIB))
    made.use_manager(mem)
    yield made
    torch.cuda.synchronize()


@pytest.mark.parametrize("backup", ["none", "cpu", "disk"])
def test_memory_goes_and_comes_at_the_same_addresses(saver: TorchMemorySaver, backup: str) -> None:
    with saver.region("tag", enable_cpu_backup=backup == "cpu", enable_disk_backup=backup == "disk"):
        value = noise(600 * MIB, 1)
    at, expected = value.data_ptr(), noise(600 * MIB, 1)
    # What the first copies and comparisons of a process load stays.
    assert torch.equal(value, expected)
    saver.pause()
    saver.resume()
    value.copy_(expected)
    settle()
    before = used()
    for _ in range(3):
        saver.pause("tag")
        saver.pause("tag")
        assert saver.is_paused("tag")
        assert before - used() >= 592 * MIB
        saver.resume("tag")
        saver.resume()
        assert abs(used() - before) <= 8 * MIB
        assert value.data_ptr() == at
        if backup != "none":
            assert torch.equal(value, expected)
        else:
            value.copy_(expected)


def test_what_is_allocated_and_freed_while_paused(saver: TorchMemorySaver, mem: shoal.MemoryManager) -> None:
    with saver.region("tag", enable_cpu_backup=True):
        kept, gone, cached = noise(64 * MIB, 1), noise(64 * MIB, 2), noise(64 * MIB, 3)
        del cached
        saver.pause("tag")
        # torch has a block of this size in the paused pool, and must not hand it out.
        inside = noise(64 * MIB, 4)
        assert torch.equal(inside, noise(64 * MIB, 4))
    with saver.region("tag", enable_cpu_backup=True):
        later = noise(64 * MIB, 5)
    del gone
    gc.collect()
    torch.cuda.empty_cache()
    saver.pause("tag")
    saver.resume("tag")
    for value, seed in ((kept, 1), (inside, 4), (later, 5)):
        assert torch.equal(value, noise(64 * MIB, seed))
    with saver.region("tag", enable_cpu_backup=True):
        again = noise(64 * MIB, 6)
    saver.pause()
    saver.resume()
    assert torch.equal(again, noise(64 * MIB, 6))
    del kept, inside, later, again, value
    gc.collect()
    assert used() > 0


def test_tags_are_apart_and_nest(saver: TorchMemorySaver) -> None:
    with saver.region("one", enable_cpu_backup=True):
        first = noise(32 * MIB, 1)
        with saver.region("two"):
            second = noise(32 * MIB, 2)
            with saver.disable():
                third = noise(32 * MIB, 3)
        fourth = noise(32 * MIB, 4)
    saver.pause("one")
    assert torch.equal(second, noise(32 * MIB, 2))
    assert torch.equal(third, noise(32 * MIB, 3))
    saver.pause("two")
    assert torch.equal(third, noise(32 * MIB, 3))
    saver.resume("one")
    assert torch.equal(first, noise(32 * MIB, 1))
    assert torch.equal(fourth, noise(32 * MIB, 4))
    saver.resume("two")
    second.fill_(0)


def test_retained_copies(saver: TorchMemorySaver) -> None:
    with saver.region("tag", enable_cpu_backup=True):
        value = noise(MIB, 1)
    assert saver.get_cpu_backup(value) is None
    saver.retain_cpu_backup = True
    saver.pause()
    place = saver.get_cpu_backup(value, zero_copy=True).data_ptr()
    for seed in range(2, 6):
        saver.resume()
        shown = saver.get_cpu_backup(value, zero_copy=True)
        assert shown.data_ptr() == place
        assert torch.equal(shown, value.cpu())
        del shown
        value.copy_(noise(MIB, seed))
        saver.pause()
        assert torch.equal(saver.get_cpu_backup(value), noise(MIB, seed).cpu())
        assert saver.get_cpu_backup(value, zero_copy=True).data_ptr() == place
    saver.retain_cpu_backup = False
    saver.resume()
    assert saver.get_cpu_backup(value) is None
    assert torch.equal(value, noise(MIB, 5))
    typed = value[: 4 * 30].view(torch.float32).view(5, 6)
    saver.pause()
    backup = saver.get_cpu_backup(typed)
    saver.resume()
    assert backup.shape == (5, 6)
    assert torch.equal(backup.view(torch.int32), typed.cpu().view(torch.int32))


def test_graphs_are_paused_too_and_share_a_pool(saver: TorchMemorySaver) -> None:
    with saver.region("weights", enable_cpu_backup=True):
        weight = torch.randn(4096, 4096, device="cuda")
    static = torch.zeros(64, 4096, device="cuda")
    warm = torch.cuda.Stream()
    with torch.cuda.stream(warm):
        (static @ weight).relu().sum()
    torch.cuda.synchronize()
    handle = torch.cuda.graph_pool_handle()
    graphs, outs = [], []
    for number in range(3):
        graph = torch.cuda.CUDAGraph()
        pool = [handle, handle, graphs[0].pool() if graphs else None][number]
        with saver.cuda_graph(graph, pool=pool, tag="graph"):
            big = static.repeat(40, 1) @ weight
            outs.append((big.relu() + number).sum(dim=1))
        graphs.append(graph)
    assert len({tuple(graph.pool()) for graph in graphs}) == 1
    x = torch.randn(64, 4096, device="cuda")
    expected = []
    for graph, out in zip(graphs, outs, strict=True):
        static.copy_(x)
        graph.replay()
        torch.cuda.synchronize()
        expected.append(out.clone())
    before = used()
    for _ in range(3):
        saver.pause("graph")
        assert before - used() > 30 * MIB
        saver.pause("weights")
        saver.resume()
        for graph, out, right in zip(graphs, outs, expected, strict=True):
            static.copy_(x)
            graph.replay()
            torch.cuda.synchronize()
            assert torch.equal(out, right)


def test_a_pause_beside_a_thread_inside_is_refused(saver: TorchMemorySaver) -> None:
    inside, leave = threading.Event(), threading.Event()
    made: list[torch.Tensor] = []

    def work() -> None:
        with saver.region("tag", enable_cpu_backup=True):
            made.append(torch.full((8 * MIB,), 7, dtype=torch.uint8, device="cuda"))
            inside.set()
            leave.wait(60)

    thread = threading.Thread(target=work)
    thread.start()
    inside.wait(60)
    with pytest.raises(shoal.RegionError, match="fills it right now"):
        saver.pause("tag")
    leave.set()
    thread.join(60)
    saver.pause("tag")
    saver.resume("tag")
    assert int(made[0].min()) == int(made[0].max()) == 7


def test_no_room_at_a_resume_is_an_error_and_may_be_tried_again(saver: TorchMemorySaver) -> None:
    with saver.region("tag", enable_cpu_backup=True):
        value = noise(2048 * MIB, 1)
    saver.pause("tag")
    with saver.region("other"):
        taken = torch.empty(3 * 1024 * MIB, dtype=torch.uint8, device="cuda")
        with pytest.raises(torch.OutOfMemoryError) as caught:
            torch.empty(3 * 1024 * MIB, dtype=torch.uint8, device="cuda")
    assert caught.value is not None
    with pytest.raises((shoal.OutOfMemoryError, shoal.LeaseError)):
        saver.resume("tag")
    assert saver.is_paused("tag")
    saver.pause("other")
    saver.resume("tag")
    assert torch.equal(value, noise(2048 * MIB, 1))
    del taken


def test_a_margin_is_left_free(saver: TorchMemorySaver) -> None:
    free, _ = torch.cuda.mem_get_info()
    saver.memory_margin_bytes = free - 512 * MIB
    with saver.region("tag"):
        torch.empty(256 * MIB, dtype=torch.uint8, device="cuda")
        with pytest.raises(torch.OutOfMemoryError) as caught:
            torch.empty(1024 * MIB, dtype=torch.uint8, device="cuda")
    assert caught.value is not None
    saver.memory_margin_bytes = 0
    with saver.region("tag"):
        torch.empty(1024 * MIB, dtype=torch.uint8, device="cuda")


def test_files_on_disk_are_private_and_go(saver: TorchMemorySaver, tmp_path: Path) -> None:
    with saver.region("tag", enable_disk_backup=True):
        value = noise(300 * MIB, 1)
    saver.pause()
    files = list(tmp_path.iterdir())
    assert len(files) >= 2
    assert all(path.stat().st_mode & 0o777 == 0o600 for path in files)
    damaged = max(files, key=lambda path: path.stat().st_size)
    with damaged.open("r+b") as file:
        file.seek(12345)
        byte = file.read(1)
        file.seek(12345)
        file.write(bytes([byte[0] ^ 255]))
    with pytest.raises(shoal.TransferError, match="has changed"):
        saver.resume()
    assert saver.is_paused()
    with damaged.open("r+b") as file:
        file.seek(12345)
        file.write(byte)
    saver.resume()
    assert torch.equal(value, noise(300 * MIB, 1))
    assert not list(tmp_path.iterdir())


def test_everything_of_a_thread_can_be_pausable(run_python: Callable[..., subprocess.CompletedProcess[str]]) -> None:
    os.environ.update(TMS_INIT_ENABLE="1", TMS_INIT_ENABLE_CPU_BACKUP="1")
    try:
        said = run_python("""
            from shoal.compat.torch_memory_saver import torch_memory_saver as saver
            import torch
            weight = torch.full((64 << 20,), 3, dtype=torch.uint8, device="cuda")
            def used():
                torch.cuda.synchronize()
                free, total = torch.cuda.mem_get_info()
                return total - free
            for turn in range(3):
                activations = torch.ones((512 << 20,), dtype=torch.uint8, device="cuda")
                del activations
                before = used()
                saver.pause()
                assert before - used() >= 512 << 20
                with saver.disable():
                    other = torch.full((256 << 20,), 5, dtype=torch.uint8, device="cuda")
                    assert int(other.min()) == 5
                    del other
                between = torch.full((8 << 20,), turn, dtype=torch.uint8, device="cuda")
                saver.resume()
                assert int(weight.min()) == int(weight.max()) == 3
                assert int(between.min()) == int(between.max()) == turn
            print("fine")
        """)
    finally:
        del os.environ["TMS_INIT_ENABLE"], os.environ["TMS_INIT_ENABLE_CPU_BACKUP"]
    assert said.returncode == 0, said.stderr[-3000:]
    assert "fine" in said.stdout


def test_what_the_page_shows_runs(run_python: Callable[..., subprocess.CompletedProcess[str]]) -> None:
    page = (Path(__file__).parents[2] / "docs/torch.md").read_text("utf-8")
    first, second = re.findall(r"^```python no-run\n(.*?)^```$", page, re.MULTILINE | re.DOTALL)
    build = "import torch\ndef build_and_load(): return torch.nn.Linear(4096, 4096, device='cuda')\n"
    use = "\nassert bool(model(torch.ones(1, 4096, device='cuda')).sum() != 0)\n"
    said = run_python(second + build + first + use)
    assert said.returncode == 0, said.stderr[-3000:]
