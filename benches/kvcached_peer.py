"""kvcached as a peer of the KV block manager, on a machine without a GPU: how it is built, and what its calls cost.

``python benches/kvcached_peer.py build CHECKOUT FOLDER`` builds the extension of a checkout of
https://github.com/ovg-project/kvcached into FOLDER, with driver calls that do nothing and take no time: timed is its
own work alone, which favours it. It takes a compiler (``CXX``, else ``g++``) and this environment's torch.

``python benches/kvcached_peer.py run FOLDER`` prints what ``alloc`` and ``free`` cost there and in
``shoal.compat.kvcached``, one after the other. Other benchmarks call :func:`load`.
"""

from __future__ import annotations

import argparse
import functools
import importlib
import itertools
import math
import os
import random
import shutil
import subprocess
import sys
import sysconfig
import threading
import time
from pathlib import Path
from typing import Any

LAYERS = 2
BLOCK_TOKENS = 16
TOKEN_BYTES = 2048
BLOCKS = 65536
BATCHES = ((1, 400), (16, 400), (64, 80), (256, 20), (4096, 2))
PART_FILLED = 400
PER_PAGE = (2 << 20) // (BLOCK_TOKENS * TOKEN_BYTES)
# Of so many blocks that lie side by side one is free.
SCATTERED = 3
# How blocks lie, as it is said in a case.
STATES = ("", f", {PART_FILLED} part-filled pages", f", {PART_FILLED} pages with 0 to 63 in use", ", scattered")
MIXED = 2
REPEATS = 50

# Declares what kvcached calls of the CUDA runtime; the real header needs a compiler's own headers.
RUNTIME = """
#pragma once
#include <cstddef>
#define CUDARTAPI
typedef enum cudaError { cudaSuccess = 0 } cudaError_t;
extern "C" {
cudaError_t cudaFree(void *);
cudaError_t cudaSetDevice(int);
cudaError_t cudaGetDevice(int *);
cudaError_t cudaDeviceSynchronize();
cudaError_t cudaMemGetInfo(size_t *, size_t *);
const char *cudaGetErrorString(cudaError_t);
}
"""

# A device of 80 GiB, 70 of them free for ever.
STUB = """
#include <cuda.h>
#include <cuda_runtime.h>
#define DRIVER(name, ...) extern "C" CUresult CUDAAPI name(__VA_ARGS__)
DRIVER(cuMemAddressReserve, CUdeviceptr *, size_t, size_t, CUdeviceptr, unsigned long long) { return CUDA_SUCCESS; }
DRIVER(cuMemAddressFree, CUdeviceptr, size_t) { return CUDA_SUCCESS; }
DRIVER(cuMemCreate, CUmemGenericAllocationHandle *, size_t, const CUmemAllocationProp *, unsigned long long) {
  return CUDA_SUCCESS;
}
DRIVER(cuMemRelease, CUmemGenericAllocationHandle) { return CUDA_SUCCESS; }
DRIVER(cuMemMap, CUdeviceptr, size_t, size_t, CUmemGenericAllocationHandle, unsigned long long) {
  return CUDA_SUCCESS;
}
DRIVER(cuMemUnmap, CUdeviceptr, size_t) { return CUDA_SUCCESS; }
DRIVER(cuMemSetAccess, CUdeviceptr, size_t, const CUmemAccessDesc *, size_t) { return CUDA_SUCCESS; }
DRIVER(cuMemGetAllocationGranularity, size_t *bytes, const CUmemAllocationProp *, CUmemAllocationGranularity_flags) {
  *bytes = 2 << 20;
  return CUDA_SUCCESS;
}
DRIVER(cuDeviceGetAttribute, int *value, CUdevice_attribute, CUdevice) {
  *value = 1;
  return CUDA_SUCCESS;
}
DRIVER(cuGetErrorString, CUresult, const char **text) {
  *text = "stub";
  return CUDA_SUCCESS;
}
extern "C" cudaError_t cudaFree(void *) { return cudaSuccess; }
extern "C" cudaError_t cudaSetDevice(int) { return cudaSuccess; }
extern "C" cudaError_t cudaGetDevice(int *device) {
  *device = 0;
  return cudaSuccess;
}
extern "C" cudaError_t cudaDeviceSynchronize() { return cudaSuccess; }
extern "C" cudaError_t cudaMemGetInfo(size_t *free, size_t *total) {
  *free = 70ull << 30;
  *total = 80ull << 30;
  return cudaSuccess;
}
extern "C" const char *cudaGetErrorString(cudaError_t) { return "stub"; }
"""


def build(checkout: Path, folder: Path) -> None:
    """Build the checkout's extension with a stub of the driver, beside a copy of its Python files."""
    import torch

    torch_home = Path(torch.__file__).parent
    cuda_headers = sorted(torch_home.parent.glob("nvidia/cu*/include/cuda.h"))
    if not cuda_headers:
        raise SystemExit("no cuda.h beside torch: it comes with torch's CUDA build (nvidia-cuda-runtime)")
    include = folder / "include"
    include.mkdir(parents=True, exist_ok=True)
    (include / "cuda_runtime.h").write_text(RUNTIME, "utf-8")
    (folder / "stub.cpp").write_text(STUB, "utf-8")
    shutil.copytree(checkout / "kvcached", folder / "kvcached", dirs_exist_ok=True)
    headers = (
        include, checkout / "csrc/inc", torch_home / "include", torch_home / "include/torch/csrc/api/include",
        cuda_headers[-1].parent, sysconfig.get_paths()["include"],
    )  # fmt: skip
    # The flags of its own build, with the stub's names bound inside.
    command = [
        os.environ.get("CXX", "g++"), "-O3", "-DNDEBUG", "-std=c++17", "-fPIC", "-shared", "-Wl,-Bsymbolic",
        "-DKVCACHED_USE_CUDA", f"-D_GLIBCXX_USE_CXX11_ABI={int(torch._C._GLIBCXX_USE_CXX11_ABI)}",
        "-DTORCH_EXTENSION_NAME=vmm_ops", "-DTORCH_API_INCLUDE_EXTENSION_H", *(f"-I{path}" for path in headers),
        *map(str, sorted((checkout / "csrc").rglob("*.cpp"))), str(folder / "stub.cpp"),
        f"-L{torch_home / 'lib'}", "-lc10", "-ltorch", "-ltorch_cpu", "-ltorch_python",
        "-o", str(folder / "kvcached/vmm_ops.so"),
    ]  # fmt: skip
    subprocess.run(command, check=True)


def load(folder: Path, blocks: int = BLOCKS, layers: int = LAYERS) -> Any:
    """Import what :func:`build` built and give a ``KVCacheManager`` over its tensors, ready for calls."""
    # Freed pages stay mapped in both, so that neither asks its device for anything: ours would really map.
    os.environ.setdefault("KVCACHED_MAX_RESERVED_PAGES", "128")
    os.environ.setdefault("KVCACHED_LOG_LEVEL", "ERROR")
    os.environ["KVCACHED_IPC_NAME"] = f"shoal_peer_{os.getpid()}"
    sys.path.insert(0, str(folder))
    vmm_ops = importlib.import_module("kvcached.vmm_ops")
    manager = importlib.import_module("kvcached.kv_cache_manager")
    return _manager(vmm_ops, manager, blocks, layers)


def load_ours() -> Any:
    """Give the same of ``shoal.compat.kvcached``, on a simulated device (which really maps) of 16 GiB."""
    vmm_ops: Any = importlib.import_module("shoal.compat.kvcached.vmm_ops")
    vmm_ops.MemoryManager = functools.partial(vmm_ops.MemoryManager, device_capacity="16GiB")
    manager = importlib.import_module("shoal.compat.kvcached.kv_cache_manager")
    return _manager(vmm_ops, manager)


def _manager(vmm_ops: Any, module: Any, blocks: int = BLOCKS, layers: int = LAYERS) -> Any:
    vmm_ops.init_kvcached("cpu", 0, True)
    vmm_ops.create_kv_tensors(2 * blocks * BLOCK_TOKENS * TOKEN_BYTES, 2, "cpu", layers)
    made = module.KVCacheManager(blocks, BLOCK_TOKENS, TOKEN_BYTES, layers)
    made._wait_post_init()
    return made


def pair_us(manager: Any, blocks: int, rounds: int) -> list[float]:
    """Time ``alloc(blocks)`` and ``free`` of what came, in microseconds: some rounds' means."""
    samples = []
    for _ in range(REPEATS):
        start = time.perf_counter()
        for _ in range(rounds):
            manager.free(manager.alloc(blocks))
        samples.append((time.perf_counter() - start) / rounds * 1e6)
    return samples


def fragment(manager: Any) -> list[int]:
    """Leave one block in use on each of 400 pages; these."""
    held = [manager.alloc(PER_PAGE) for _ in range(PART_FILLED)]
    for blocks in held:
        manager.free(blocks[1:])
    return [int(blocks[0]) for blocks in held]


def scatter(manager: Any) -> list[int]:
    """Leave two of three blocks in use on each of 400 pages, so that no free one has a free neighbour; these."""
    blocks = sorted(int(block) for block in manager.alloc(PART_FILLED * PER_PAGE))
    manager.free([block for place, block in enumerate(blocks) if place % SCATTERED == 0])
    return [block for place, block in enumerate(blocks) if place % SCATTERED]


def mix(manager: Any) -> list[int]:
    """Leave 400 pages as differently full as can be, with 0 to 63 of 64 blocks in use at places by chance; these."""
    chance = random.Random(7)  # noqa: S311
    blocks = sorted(int(block) for block in manager.alloc(PART_FILLED * PER_PAGE))
    pages = [blocks[number * PER_PAGE :][:PER_PAGE] for number in range(PART_FILLED)]
    held = {block for number, page in enumerate(pages) for block in chance.sample(page, number % PER_PAGE)}
    manager.free([block for block in blocks if block not in held])
    return sorted(held)


def words(state: int, count: int) -> int:
    """Count the words of 64 blocks in which so many free ones lie in a state, if in those that have the most."""
    if state != MIXED:
        return math.ceil(count * (SCATTERED if state == len(STATES) - 1 else 1) / PER_PAGE)
    free = sorted((PER_PAGE - number % PER_PAGE for number in range(PART_FILLED)), reverse=True)
    return 1 + sum(so_far < count for so_far in itertools.accumulate(free))


def threads_rate(manager: Any, blocks: int, count: int, seconds: float) -> float:
    """Count the pairs of calls a second of so many threads at once, each with blocks of its own.

    kvcached's manager takes several threads only with the lock that ``async_sched`` gives it: here it has that.
    """
    done, over, failed = [0] * count, threading.Event(), []
    lock = getattr(manager, "_lock", None)
    if type(lock).__name__ == "NoOpLock":
        manager._lock = threading.RLock()

    def run(me: int) -> None:
        try:
            while not over.is_set():
                for _ in range(100):
                    manager.free(manager.alloc(blocks))
                done[me] += 100
        except Exception as error:
            failed.append(error)
            raise

    started = [threading.Thread(target=run, args=(me,)) for me in range(count)]
    start = time.perf_counter()
    for thread in started:
        thread.start()
    time.sleep(seconds)
    over.set()
    for thread in started:
        thread.join()
    taken = time.perf_counter() - start
    if lock is not None:
        manager._lock = lock
    if failed:
        raise SystemExit(f"{len(failed)} of {count} threads ended: {failed[0]!r}")
    return sum(done) / taken


def measure(manager: Any) -> dict[str, list[float]]:
    """Measure fresh, part-filled in two ways and scattered: microseconds of each round by case."""
    manager.alloc(1)
    figures, held = {}, []
    ways = (list, lambda: fragment(manager), lambda: mix(manager), lambda: scatter(manager))
    for state, make in zip(STATES, ways, strict=True):
        if held:
            manager.free(held)
        held = make()
        figures |= {f"{blocks} blocks{state}": pair_us(manager, blocks, rounds) for blocks, rounds in BATCHES}
    return figures


def main() -> None:
    """Build, or run."""
    parser = argparse.ArgumentParser(description=__doc__.partition("\n")[0])
    commands = parser.add_subparsers(dest="command", required=True)
    builds = commands.add_parser("build")
    builds.add_argument("checkout", type=Path)
    builds.add_argument("folder", type=Path)
    runs = commands.add_parser("run")
    runs.add_argument("folder", type=Path)
    options = parser.parse_args()
    if options.command == "build":
        build(options.checkout.resolve(), options.folder.resolve())
        return
    peer = measure(load(options.folder.resolve()))
    ours = measure(load_ours())
    print(f"{'alloc + free':36} {'kvcached us':>12} {'compat us':>12} {'ratio':>7}")
    for case, us in peer.items():
        print(f"{case:36} {min(us):12.2f} {min(ours[case]):12.2f} {min(us) / min(ours[case]):6.1f}x")


if __name__ == "__main__":
    main()
