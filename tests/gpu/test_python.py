"""The Python package on a GPU: regions, tensors in them, KV blocks, processes. Run by `tests/gpu/run.sh python`."""

from __future__ import annotations

import os
import random
import signal
import subprocess
import sys
import threading
import time
from pathlib import Path
from typing import TYPE_CHECKING

import pytest

import shoal

if TYPE_CHECKING:
    from collections.abc import Callable, Iterator

    from shoal import MemoryManager

torch = pytest.importorskip("torch")
import shoal.torch as st  # noqa: E402

MIB = 1 << 20


def pattern(nbytes: int, seed: int = 7) -> bytes:
    return random.Random(seed).randbytes(nbytes)


def free_bytes() -> int:
    return torch.cuda.mem_get_info(0)[0]


@pytest.fixture(autouse=True)
def no_fault() -> Iterator[None]:
    """A fault of a kernel ends the context: the test that caused it must be the one that fails."""
    yield
    torch.cuda.synchronize()


def test_weights_that_the_host_has_no_room_for_come_from_their_file(tmp_path: Path) -> None:
    narrow = pattern(40 * MIB)
    file = tmp_path / "weights.bin"
    file.write_bytes(b"header" + narrow)
    data = torch.frombuffer(bytearray(narrow), dtype=torch.bfloat16)
    wide = data.float().view(torch.uint8)
    mem = shoal.MemoryManager("cuda:0", device_budget="1GiB", host_budget="16MiB")
    region, widened = mem.region("weights", len(narrow)), mem.region("widened", len(wide))
    region.stage(0, narrow, shoal.SourcePiece(file, 6, len(narrow)))
    widened.stage(0, wide.numpy(), shoal.SourcePiece(file, 6, len(wide), "bf16_to_f32"))
    for one, expected in ((region, data.view(torch.uint8)), (widened, wide)):
        one.seal()
        view = st.tensor(one, 0, (len(expected),), torch.uint8)
        assert one.usage()["source_only"] >= len(expected) - 16 * MIB
        for _ in range(3):
            with one.guard():
                assert torch.equal(view.cpu(), expected)
            assert one.sleep().copied == 0
            assert mem.usage()["host"] <= 16 * MIB


def test_staged_weights_come_up_by_a_guard_and_are_what_was_staged(mem: MemoryManager) -> None:
    data = pattern(24 * MIB + 4099)
    region = mem.region("weights", len(data))
    region.stage(0, data)
    region.seal()
    expected = torch.frombuffer(bytearray(data), dtype=torch.uint8)
    view = st.tensor(region, 0, (len(data),), torch.uint8)
    assert view.device == torch.device("cuda:0")
    assert view.data_ptr() == region.address
    assert region.usage()["device"] == 0
    for _ in range(3):
        with mem.guard():
            assert torch.equal(view.cpu(), expected)
        report = region.sleep()
        assert report.freed == region.bytes
        assert report.copied == 0, "clean: nothing needs a copy"
        assert region.usage()["device"] == 0


def test_what_was_written_on_the_gpu_is_found_by_hash_and_kept(mem: MemoryManager) -> None:
    data = pattern(8 * MIB)
    region = mem.region("weights", len(data))
    region.stage(0, data)
    region.seal()
    view = st.tensor(region, 0, (2 * MIB,), torch.int32)
    with mem.guard():
        view[12345] = 77
        expected = view.cpu()
    report = region.sleep()
    assert report.copied > 0
    with mem.guard():
        assert torch.equal(view.cpu(), expected)


def test_partial_eviction_leaves_the_front(mem: MemoryManager) -> None:
    data = pattern(64 * MIB)
    region = mem.region("weights", len(data))
    region.stage(0, data)
    region.seal()
    region.wake()
    freed = region.evict("16MiB").freed
    assert 16 * MIB <= freed < 64 * MIB
    assert region.usage()["device"] == 64 * MIB - freed
    half = region.sleep(keep=0.25)
    assert half.freed > 0
    assert 0 < region.usage()["device"] <= 16 * MIB
    with mem.guard():
        view = st.tensor(region, 0, (64 * MIB,), torch.uint8)
        assert torch.equal(view.cpu(), torch.frombuffer(bytearray(data), dtype=torch.uint8))


DTYPES = """
    float64 float32 float16 bfloat16 int64 int32 int16 int8 uint8 bool complex64 uint16 uint32 uint64
    float8_e4m3fn float8_e5m2 float8_e4m3fnuz float8_e8m0fnu
"""


@pytest.mark.parametrize("name", [name for name in DTYPES.split() if hasattr(torch, name)])
def test_every_element_type_lies_over_addresses_without_memory(mem: MemoryManager, name: str) -> None:
    dtype = getattr(torch, name)
    region = mem.region("r", "4MiB", kind="workspace")
    # Made while nothing is mapped: making it may touch nothing.
    made = st.tensor(region, 512, (8, 16), dtype)
    strided = st.tensor(region, 512, (2, 4), dtype, (64, 1))
    assert (made.dtype, made.shape, made.device.type) == (dtype, (8, 16), "cuda")
    assert st.tensor(region, 0, (0, 3), dtype).device.type == "cuda"
    region.commit(0, 4 * MIB)
    with mem.guard():
        numbers = torch.arange(128, dtype=torch.uint8, device="cuda").remainder(2)
        source = numbers.to(torch.float32).reshape(8, 16).to(dtype)
        made.copy_(source)
        assert torch.equal(made.cpu().view(torch.uint8), source.cpu().view(torch.uint8))
        assert strided.data_ptr() == made.data_ptr()
        assert strided.is_contiguous() is False
        assert torch.equal(strided[1].cpu().view(torch.uint8), made.view(-1)[64:68].cpu().view(torch.uint8))


def test_a_tensor_keeps_the_addresses_and_frees_them_when_it_goes(mem: MemoryManager) -> None:
    region = mem.region("r", "8MiB", kind="workspace")
    region.commit(0, 8 * MIB)
    view = st.tensor(region, 0, (MIB,), torch.float32)
    address = region.address
    del region
    with mem.guard():
        view.fill_(3.0)
        assert float(view.sum()) == 3.0 * MIB
    held = mem.device_memory()["used_by_this_process"]
    assert held >= 8 * MIB
    del view
    torch.cuda.synchronize()
    assert mem.device_memory()["used_by_this_process"] == held - 8 * MIB
    assert mem.region("s", "8MiB", kind="workspace").address >= 0
    assert address > 0


def test_memory_the_cpu_cannot_reach_has_no_buffer(mem: MemoryManager) -> None:
    region = mem.region("r", "2MiB")
    with pytest.raises(BufferError, match=r"shoal\.torch\.tensor"):
        memoryview(region.buffer())
    assert region.buffer().__dlpack_device__() == (2, 0)


def test_a_module_computes_the_same_from_a_region(mem: MemoryManager) -> None:
    torch.manual_seed(0)
    made = torch.nn.Sequential(torch.nn.Linear(512, 1024), torch.nn.GELU(), torch.nn.Linear(1024, 64))
    made.register_buffer("scale", torch.tensor(2.0), persistent=False)
    x = torch.randn(4, 512, device="cuda")
    with torch.no_grad():
        expected = made.to("cuda")(x).clone()
        made.to("cpu")
        placement = st.place(made, mem, "weights")
        assert all(p.device.type == "cuda" for p in made.parameters())
        assert made.scale.device.type == "cuda"
        for _ in range(2):
            with mem.guard():
                assert torch.equal(made(x), expected)
            assert placement.region.sleep().copied == 0


def test_a_guard_keeps_evictions_out_and_lets_them_in_after(mem: MemoryManager) -> None:
    region = mem.region("weights", "8MiB")
    region.stage(0, pattern(8 * MIB))
    region.seal()
    order: list[str] = []

    def sleep() -> None:
        region.sleep(timeout_s=30)
        order.append("slept")

    with mem.guard():
        thread = threading.Thread(target=sleep)
        thread.start()
        time.sleep(0.2)
        order.append("left")
    thread.join(30)
    assert order == ["left", "slept"]
    with mem.guard(), pytest.raises(shoal.DeadlineError):
        region.sleep(timeout_s=0.05)


@pytest.mark.parametrize("stream", ["current", "side"])
@pytest.mark.parametrize("how", ["sleep", "evict", "reclaim", "decommit", "drop"])
def test_kernels_that_outlast_their_guard_are_waited_for(mem: MemoryManager, stream: str, how: str) -> None:
    kind = "workspace" if how in ("decommit", "drop") else "kv"
    region = mem.region("r", "16MiB", kind=kind)
    region.commit(0, 16 * MIB)
    view = st.tensor(region, 0, (4 * MIB,), torch.float32)
    with mem.guard():
        view.zero_()
    torch.cuda.synchronize()
    where = torch.cuda.Stream() if stream == "side" else torch.cuda.current_stream()
    begun = time.monotonic()
    with mem.guard(), torch.cuda.stream(where):
        torch.cuda._sleep(600_000_000)  # some 0.3 s
        view.fill_(5.0)
    assert time.monotonic() - begun < 0.15, "leaving a guard does not wait"
    if how == "sleep":
        assert region.sleep().copied == 16 * MIB
    elif how == "evict":
        assert region.evict("16MiB").copied == 16 * MIB
    elif how == "reclaim":
        assert mem.reclaim("16MiB").freed == 16 * MIB
    elif how == "decommit":
        region.decommit(0, 16 * MIB)
    else:
        del region, view
    assert time.monotonic() - begun > 0.2, "it did not wait for the kernels"
    torch.cuda.synchronize()  # a fault would show here
    if kind == "kv":
        with mem.guard():
            assert float(view.min()) == 5.0, "what the kernel wrote was lost"


def test_nothing_is_evicted_while_a_graph_is_captured(mem: MemoryManager) -> None:
    region = mem.region("weights", "8MiB")
    region.stage(0, bytes(8 * MIB))
    region.seal()
    view = st.tensor(region, 0, (2 * MIB,), torch.int32)
    graph = torch.cuda.CUDAGraph()
    with mem.guard():
        view.add_(0)
        torch.cuda.synchronize()
        with torch.cuda.graph(graph):
            view.add_(1)
            # Out of its turn: refused by the gate, so the capture is not harmed.
            with pytest.raises(shoal.DeadlineError):
                region.sleep(timeout_s=0.05)
            mem.region("gone", "2MiB", kind="workspace").commit(0, 2 * MIB)
    for expected in (1, 2):
        with mem.guard():
            graph.replay()
            torch.cuda.synchronize()
            assert int(view.min()) == int(view.max()) == expected
        assert region.sleep().copied > 0


def test_kv_blocks_have_memory_while_they_are_backed(mem: MemoryManager) -> None:
    block_bytes, blocks = 96 << 10, 512
    region = mem.region("kv", block_bytes * blocks, kind="kv")
    backing = shoal.KvBacking(region, block_bytes=block_bytes, blocks=blocks)
    cache = st.tensor(region, 0, (blocks, block_bytes // 2), torch.bfloat16)
    ids = list(range(0, 200, 3))
    assert backing.back(ids)
    with mem.guard():
        index = torch.tensor(ids, device="cuda")
        cache[index] = torch.arange(len(ids), device="cuda", dtype=torch.bfloat16)[:, None]
    freed = mem.reclaim("1GiB").freed
    assert freed > 0
    assert mem.usage()["kv_device"] == 0
    with mem.guard():
        got = cache[index][:, 5].float().cpu()
        assert torch.equal(got, torch.arange(len(ids), dtype=torch.bfloat16).float())
    backing.unback(ids)
    assert backing.trim("1GiB").freed > 0
    assert backing.backed_bytes == 0


def test_a_budget_is_a_limit_and_memory_comes_back(mem: MemoryManager) -> None:
    torch.cuda.empty_cache()
    before = free_bytes()
    small = shoal.MemoryManager("cuda:0", device_budget="64MiB", host_budget="1GiB")
    region = small.region("r", "128MiB", kind="workspace")
    region.commit(0, 64 * MIB)
    with pytest.raises(shoal.LeaseError):
        region.commit(64 * MIB, 64 * MIB)
    assert before - free_bytes() >= 64 * MIB
    region.decommit(0, 128 * MIB)
    # What was given up is kept for the next growth, until somebody wants it.
    assert small.usage()["pooled"] > 0
    small.reclaim("1GiB")
    del region
    assert before - free_bytes() < 8 * MIB


def test_without_a_budget_a_gibibyte_is_left() -> None:
    manager = shoal.MemoryManager("cuda:0", host_budget="1GiB")
    free = manager.device_memory()["free"]
    region = manager.region("r", free + (2 << 30), kind="workspace")
    with pytest.raises(shoal.LeaseError, match="left of a budget"):
        region.commit(0, free - (1 << 29))


@pytest.mark.filterwarnings("ignore:.*fork:DeprecationWarning")
def test_after_a_fork_handles_raise(mem: MemoryManager) -> None:
    region = mem.region("r", "2MiB", kind="workspace")
    region.commit(0, 2 * MIB)
    view = st.tensor(region, 0, (16,), torch.float32)
    with mem.guard():
        view.fill_(1.0)
    child = os.fork()
    if child == 0:
        code = 1
        try:
            for use in (region.usage, mem.device_memory, lambda: mem.region("s", 1), lambda: region.buffer(0, 4)):
                try:
                    use()
                except shoal.ForkError:
                    continue
                os._exit(2)
            code = 0
        finally:
            os._exit(code)
    assert os.waitstatus_to_exitcode(os.waitpid(child, 0)[1]) == 0
    with mem.guard():
        assert float(view.sum()) == 16.0


RESTORER = """
import os, sys
import shoal
mem = shoal.MemoryManager("cuda:0", device_budget="4GiB", host_budget="3GiB")
region = mem.region("weights", "1536MiB")
block = os.urandom(1 << 20) * 64
for at in range(0, 1536 << 20, len(block)):
    region.stage(at, block)
region.seal()
print("ready", flush=True)
while True:
    region.wake()
    region.sleep(trust_clean=True)
"""


def test_killed_in_a_restore_a_process_gives_its_memory_back() -> None:
    torch.cuda.empty_cache()
    before = free_bytes()
    for delay in (0.011, 0.037, 0.09):
        process = subprocess.Popen(
            [sys.executable, "-c", RESTORER],
            stdout=subprocess.PIPE,
            stderr=subprocess.STDOUT,
            text=True,
        )
        assert process.stdout is not None
        line = process.stdout.readline()
        assert line == "ready\n", line + process.stdout.read()
        time.sleep(delay)
        process.send_signal(signal.SIGKILL)
        process.wait(30)
        process.stdout.close()
        deadline = time.monotonic() + 20
        while before - free_bytes() > 32 * MIB and time.monotonic() < deadline:
            time.sleep(0.02)
        assert before - free_bytes() <= 32 * MIB


NEIGHBOUR = """
import sys, torch, shoal
import shoal.torch as st
seed = int(sys.argv[1])
mem = shoal.MemoryManager("cuda:0", device_budget="1GiB", host_budget="1GiB")
torch.manual_seed(seed)
data = torch.randint(0, 256, (96 << 20,), dtype=torch.uint8)
region = mem.region("weights", len(data))
region.stage(0, memoryview(data.numpy()))
region.seal()
view = st.tensor(region, 0, (len(data),), torch.uint8)
for _ in range(10):
    with mem.guard():
        assert torch.equal(view.cpu(), data)
    assert region.sleep().copied == 0
print("exact")
"""


def test_two_processes_share_a_gpu(run_python: Callable[..., subprocess.CompletedProcess[str]]) -> None:
    outcomes: list[subprocess.CompletedProcess[str]] = []
    threads = [
        threading.Thread(target=lambda seed=seed: outcomes.append(run_python(NEIGHBOUR, str(seed)))) for seed in (1, 2)
    ]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join(120)
    assert [outcome.stdout for outcome in outcomes] == ["exact\n", "exact\n"], [o.stderr for o in outcomes]


def test_the_face_of_kvcached_takes_no_memory_from_under_a_kernel() -> None:
    from shoal.compat.kvcached import vmm_ops

    page = 2 << 20
    vmm_ops.init_kvcached("cuda:0", page)
    try:
        (tensor,) = vmm_ops.create_kv_tensors(8 * page, 1, "cuda:0", 1, num_kv_buffers=1)
        side = torch.cuda.Stream()
        for turn in range(4):
            vmm_ops.map_to_kv_tensors([number * page for number in range(8)])
            with torch.cuda.stream(side):
                torch.cuda._sleep(200_000_000)
                for _ in range(20):
                    tensor.add_(1)
            began = side.query()
            vmm_ops.unmap_from_kv_tensors([number * page for number in range(8)])
            assert not began, turn
            assert side.query(), "the kernels that were launched have ended"
        torch.cuda.synchronize()
    finally:
        vmm_ops.shutdown_kvcached()
