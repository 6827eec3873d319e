"""How fast a forgotten prefix comes back from host memory and from disk: by bytes, and until the first token.

By bytes: KV of an 8B model's shape (32 layers, 8 KV heads of 128, bfloat16: 128 KiB a token) of 4k, 16k and 64k tokens
on the simulated device, against a plain copy of as many bytes in memory and against direct reads of as many bytes from
the same disk, 1 MiB each, 32 at a time. Lengths for which this machine has too little memory or disk are left out, and
that is said. Until the first token: a small Llama in the worker's own engine, its prompt computed, found on the device,
in host memory and on disk; no HTTP. Both on the simulated device: nothing here says anything about a GPU.

`$SHOAL_DISK` names a directory on the disk to measure (the build folder by default). `python -m benches.tiers_restore
[--quick]`.
"""

from __future__ import annotations

import argparse
import asyncio
import contextlib
import mmap
import os
import random
import shutil
import sys
import tempfile
import time
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import TYPE_CHECKING

os.environ["HF_HUB_OFFLINE"] = "1"
sys.path.insert(0, str(Path(__file__).resolve().parents[1]))

import numpy as np

from benches.ceilings import memcpy_s
from benches.results import Row, of_samples, save
from shoal import DiskTier, HostTier, TierStack
from shoal.testing import simulated_memory

if TYPE_CHECKING:
    from collections.abc import Iterator

    from shoal import KvCache, MemoryManager
    from shoal.worker.engine_causal import CausalEngine

ROOT = Path(__file__).resolve().parents[1]
GIB, MIB = 1 << 30, 1 << 20
TOKEN_BYTES = 2 * 32 * 8 * 128 * 2
BLOCK_TOKENS = 16
LENGTHS = (4 << 10, 16 << 10, 64 << 10)
READ_BYTES, DEPTH = MIB, 32
WAIT_S = 600.0
HOST_TARGET, DISK_TARGET = 0.88, 0.95
"""Of the ceiling, as docs/benchmarks.md has them."""


def free_bytes(where: Path) -> tuple[int, int]:
    """Give what memory can be had, and what the disk has left."""
    fields = dict(line.split(":", 1) for line in Path("/proc/meminfo").read_text("ascii").splitlines())
    return int(fields["MemAvailable"].split()[0]) << 10, shutil.disk_usage(where).free


@contextlib.contextmanager
def folder() -> Iterator[Path]:
    """Make a directory on the disk to be measured."""
    base = Path(os.environ.get("SHOAL_DISK") or os.environ.get("CARGO_TARGET_DIR") or ROOT / "target")
    base.mkdir(parents=True, exist_ok=True)
    with tempfile.TemporaryDirectory(prefix="tiers-restore-", dir=base) as made:
        yield Path(made)


def direct_read_s(path: Path, nbytes: int, repeats: int) -> list[float]:
    """Read a file of random bytes past the page cache, `DEPTH` reads at a time."""
    piece = np.random.default_rng(1).bytes(READ_BYTES)
    with path.open("wb") as file:
        for _ in range(nbytes // READ_BYTES):
            file.write(piece)
        file.flush()
        os.fsync(file.fileno())
    descriptor = os.open(path, os.O_RDONLY | os.O_DIRECT)
    try:
        buffers = [mmap.mmap(-1, READ_BYTES) for _ in range(DEPTH)]

        def read(worker: int) -> None:
            for at in range(worker * READ_BYTES, nbytes, DEPTH * READ_BYTES):
                if os.preadv(descriptor, [buffers[worker]], at) != READ_BYTES:
                    raise RuntimeError("a short read")

        times = []
        with ThreadPoolExecutor(DEPTH) as pool:
            for _ in range(repeats):
                start = time.perf_counter()
                list(pool.map(read, range(DEPTH)))
                times.append(time.perf_counter() - start)
        return times
    finally:
        os.close(descriptor)
        path.unlink()


def fill(kv: KvCache, tokens: list[int]) -> list[int]:
    """Take blocks for a sequence, write something that does not compress into them, and seal them."""
    ids = kv.groups[0].alloc(len(tokens) // BLOCK_TOKENS)
    if ids is None:
        raise RuntimeError("no blocks")
    noise = np.random.default_rng(0)
    for tensor in kv.tensors():
        whole = np.asarray(tensor).view(np.uint16)
        sample = noise.integers(0, 1 << 16, whole[ids[0]].shape, dtype=np.uint16)
        for number, block in enumerate(ids):
            whole[block] = sample + np.uint16(number)
    kv.seal(tokens, ids)
    return ids


def restore_s(
    mem: MemoryManager, tokens: list[int], store: HostTier | DiskTier | TierStack, repeats: int
) -> tuple[list[float], dict[str, float]]:
    """Save a sequence, forget it on the device and bring it back, again and again; seconds each, and what took them."""
    nbytes = len(tokens) * TOKEN_BYTES
    # As wide as bfloat16, which numpy has not.
    kv = mem.kv_cache(layers=32, kv_heads=8, head_dim=128, dtype="float16", max_bytes=nbytes + 64 * MIB, patience_s=60)
    below = kv.attach_store(store, {"model": "8b"}, load_s=WAIT_S, put_s=WAIT_S)
    ids = fill(kv, tokens)
    below.save(tokens)
    if not below.flush(WAIT_S):
        raise RuntimeError("it was not saved in time")
    kv.groups[0].free(ids)
    if below.usage()["saved"] != len(ids):
        raise RuntimeError(f"{below.usage()['saved']} of {len(ids)} blocks were saved")
    times = []
    for _ in range(repeats):
        kv.forget_all()
        start = time.perf_counter()
        ids = below.load(tokens, [])
        times.append(time.perf_counter() - start)
        if len(ids) * BLOCK_TOKENS != len(tokens):
            raise RuntimeError(f"{len(ids)} blocks came back: {below.usage()}")
        kv.groups[0].free(ids)
    shares = shares_of(below.usage(), {})
    del below
    return times, shares


def shares_of(after: dict[str, int], before: dict[str, int]) -> dict[str, float]:
    """Give what loads went to between two readings, as shares of the whole."""
    names = ("lookup", "read", "copy", "verify")
    spent = {name: after[f"{name}_us"] - before.get(f"{name}_us", 0) for name in names}
    whole = max(1, after["load_us"] - before.get("load_us", 0))
    return {**{name: us / whole for name, us in spent.items()}, "rest": 1 - sum(spent.values()) / whole}


def shares_line(shares: dict[str, float]) -> str:
    """Give the shares in a line."""
    return "  of it " + ", ".join(f"{name} {share:.1%}" for name, share in shares.items())


def by_bytes(where: Path, lengths: tuple[int, ...], repeats: int) -> list[Row]:
    """Restore prefixes of an 8B shape."""
    rows = []
    for length in lengths:
        tokens, nbytes = list(range(length)), length * TOKEN_BYTES
        memory, disk = free_bytes(where)
        # On the device, in the tier, and twice for the plain copy, which comes after those.
        if 2.5 * nbytes > memory or 2.2 * nbytes > disk:
            print(f"{length} tokens are left out: {nbytes >> 20} MiB, with {memory >> 20} MiB of memory free and "
                  f"{disk >> 20} MiB of disk")  # fmt: skip
            continue
        name = f"{length >> 10}k tokens of an 8B shape"
        with simulated_memory(nbytes + 256 * MIB, host_budget="256MiB") as mem:
            times, shares = restore_s(mem, tokens, HostTier(nbytes + nbytes // 16 + 64 * MIB, memory=mem), repeats)
        host = of_samples(name, "restored from host memory", [nbytes / one / GIB for one in times], "GiB/s", "higher")
        host.ceiling = nbytes / min(memcpy_s(min(nbytes, GIB), 5)) / GIB * min(nbytes, GIB) / nbytes
        with simulated_memory(nbytes + 256 * MIB, host_budget="256MiB") as mem:
            tier = DiskTier([(where / f"kv-{length}", nbytes * 5 // 4 + 512 * MIB, 1 << 50)])
            times, disk_shares = restore_s(mem, tokens, tier, repeats)
            tier.close(60)
        shutil.rmtree(where / f"kv-{length}")
        disk_row = of_samples(name, "restored from disk", [nbytes / one / GIB for one in times], "GiB/s", "higher")
        ceiling = min(direct_read_s(where / "plain", nbytes, 3))
        disk_row.ceiling = nbytes / ceiling / GIB
        for row, target, went in ((host, HOST_TARGET, shares), (disk_row, DISK_TARGET, disk_shares)):
            assert row.ceiling is not None
            row.target = target * row.ceiling
            row.met = row.value >= row.target
            rows.append(row)
            print(row.line())
            print(shares_line(went))
    return rows


CONTEXT, END = 4096, 16


def first_tokens(where: Path, stems: tuple[int, ...], rounds: int) -> list[Row]:
    """Ask for prompts whose beginning is nowhere, on the device, in host memory, on disk."""
    import torch

    from benches.prefix_first_token import VOCABULARY, first_token, model
    from shoal.worker.device import DeviceMemory
    from shoal.worker.engine_causal import CausalEngine
    from shoal.worker.kv import KvLayout
    from shoal.worker.limits import CausalLimits
    from shoal.worker.spec import DiskShare, WorkerSpec

    draw = random.Random(1)  # noqa: S311 - made-up prompts

    def prompt_of(count: int) -> list[int]:
        return [draw.randrange(1, VOCABULARY) for _ in range(count)]

    def engine_on(mem: MemoryManager, tier: str) -> tuple[CausalEngine, DeviceMemory]:
        spec = WorkerSpec(source="x", kv_max_bytes=256 << 20)
        torch.set_num_threads(spec.threads)
        memory, llama = DeviceMemory(mem), model(CONTEXT)
        memory.place(llama)
        layout = KvLayout.of(llama.config, llama.dtype, spec.block_tokens)
        engine = CausalEngine(llama, memory, spec, CausalLimits.of(layout, CONTEXT, spec))
        disks = [DiskShare(str(where / "tokens"), 2 * GIB, 1 << 50)] if tier == "disk" else []
        memory.keep_below(512 * MIB if tier == "host" else 0, disks, lambda: {"model": "small"}, 60.0)
        deadline = time.monotonic() + 60
        while any(told["reason"] for told in memory.tiers()) and time.monotonic() < deadline:
            time.sleep(0.01)
        engine.start()
        return engine, memory

    async def measure(engine: CausalEngine, memory: DeviceMemory, stem: int) -> dict[str, list[float]]:
        seconds: dict[str, list[float]] = {"computed": [], "device": [], "below": []}
        for number in range(rounds + 1):
            prompt = prompt_of(stem + END)
            whole = (stem + END - 1) // BLOCK_TOKENS * BLOCK_TOKENS
            for case, wanted in (("computed", 0), ("device", whole), ("below", whole)):
                if case == "below":
                    kv = memory._kv
                    assert kv is not None
                    assert kv.below is not None
                    tier = kv.below._tier
                    assert tier is not None
                    if not tier.flush(60):
                        raise RuntimeError("it was not saved in time")
                    kv.cache.forget_all()
                taken, found = await first_token(engine, prompt)
                if found != wanted:
                    raise RuntimeError(f"{case}: {found} tokens were found, not {wanted}")
                if number:  # the first round brings the weights
                    seconds[case].append(taken)
        return seconds

    rows = []
    for tier in ("host", "disk"):
        with simulated_memory("1GiB", host_budget="512MiB") as mem:
            engine, memory = engine_on(mem, tier)
            try:
                for stem in stems:
                    seconds = asyncio.run(measure(engine, memory, stem))
                    row = of_samples(f"{stem} tokens from {tier}", "first token", seconds["below"], "s", "lower")
                    on_device = of_samples("", "", seconds["device"], "s", "lower").value
                    row.ceiling, row.peer = on_device, "computing them"
                    row.peer_value = of_samples("", "", seconds["computed"], "s", "lower").value
                    rows.append(row)
                    print(row.line())
            finally:
                engine.stop()
                memory.close()
    return rows


def main() -> None:
    """Run it."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--quick", action="store_true", help="shorter, and nothing is written")
    options = parser.parse_args()
    with folder() as where:
        rows = by_bytes(where, LENGTHS[:1] if options.quick else LENGTHS, 2 if options.quick else 5)
        rows += first_tokens(where, (512,) if options.quick else (1024, 3072), 2 if options.quick else 9)
    if not options.quick:
        save("tiers_restore", rows)


if __name__ == "__main__":
    main()
