"""The host tier, up and down, by the length of blocks and their layout, against the link in the same run.

Run by `tests/gpu/run.sh tiers_blocks`; no engine, about two minutes. Caches of blocks from 16 KiB to 8 MiB, whole or in
pieces of 16 KiB to 256 KiB (one for each layer), are saved to page-locked host memory and come back from there. Up is
what a request waits for: from the call of `load` to blocks that are found on the device, whose memory is mapped
already; its shares say what the time went to. Down is from the call of `save` to the last block that is kept, with its
checksum: the first time into memory that is made meanwhile, then into that of blocks which make room. Before each load
all blocks are overwritten, and every place of every restored block is compared with what was saved.
$SHOAL_TIERS_DEVICE=sim makes a small dry run.
"""

from __future__ import annotations

import contextlib
import os
import sys
import time
from pathlib import Path
from typing import TYPE_CHECKING

import torch
from benches.results import Row, of_samples, save_gpu
from benches.tiers_restore import HOST_TARGET, shares_line, shares_of

from shoal import HostTier, MemoryManager
from shoal.testing import simulated_memory

if TYPE_CHECKING:
    from collections.abc import Iterator

    from shoal import KvCache, KvTier

DEVICE = os.environ.get("SHOAL_TIERS_DEVICE", "cuda:0")
ON_GPU = DEVICE.startswith("cuda")
GIB, MIB = 1 << 30, 1 << 20
WAIT_S = 120.0
REPEATS = 3
CASES = (
    # layers, KV heads, layout, bytes: 1 KiB a layer and head for each token's keys or values of a block of 16, twice
    (1, 2, "block", GIB // 2), (1, 8, "block", 2 * GIB), (4, 8, "block", 2 * GIB), (32, 8, "block", 2 * GIB),
    (128, 8, "block", 2 * GIB), (32, 2, "layer", 2 * GIB), (32, 8, "layer", 2 * GIB), (32, 32, "layer", 2 * GIB),
) if ON_GPU else ((1, 8, "block", 16 * MIB), (4, 2, "layer", 16 * MIB))  # fmt: skip


def link_bytes_per_s(*, up: bool) -> float:
    """Measure one long copy to the device or from it, with page-locked memory of torch's where there is a GPU."""
    host = torch.empty(GIB, dtype=torch.uint8, pin_memory=ON_GPU)
    there = torch.empty(GIB, dtype=torch.uint8, device=DEVICE if ON_GPU else "cpu")
    source, target = (host, there) if up else (there, host)
    times = []
    for _ in range(6):
        begun = time.perf_counter()
        target.copy_(source, non_blocking=True)
        if ON_GPU:
            torch.cuda.synchronize()
        times.append(time.perf_counter() - begun)
    return GIB / min(times)


@contextlib.contextmanager
def device_memory(bytes_needed: int) -> Iterator[MemoryManager]:
    """Give a manager of the device, or of a simulated one."""
    if ON_GPU:
        yield MemoryManager(DEVICE, device_budget=bytes_needed, host_budget="20GiB")
    else:
        with simulated_memory(bytes_needed, host_budget="512MiB") as mem:
            yield mem


class Case:
    """One cache over one host tier."""

    def __init__(self, mem: MemoryManager, layers: int, heads: int, layout: str, nbytes: int) -> None:
        self.block = layers * heads * 8 << 10
        self.count = nbytes // self.block
        self.kv: KvCache = mem.kv_cache(
            layers=layers, kv_heads=heads, head_dim=128, dtype="bfloat16", layout=layout, patience_s=30,
            max_bytes=nbytes + 64 * MIB,
        )  # fmt: skip
        # A slot of short blocks is longer than they are, by 4 KiB at most.
        room = (self.block + 4096) * self.count
        self.tier = HostTier(room + room // 8 + 64 * MIB, memory=mem)
        self.below: KvTier = self.kv.attach_store(self.tier, {"model": "blocks"}, load_s=WAIT_S, put_s=WAIT_S)
        self.tokens = list(range(self.count * 16))
        self.bytes = self.count * self.block
        piece = self.block if layout == "block" else self.block // layers
        self.name = f"blocks of {self.block >> 10} KiB in pieces of {piece >> 10} KiB"

    def down(self, salt: str) -> float:
        """Save all of it under another name, from new contents; bytes a second."""
        self.kv.forget_all()
        ids = self.kv.groups[0].alloc(self.count)
        if ids is None:
            raise RuntimeError("no blocks")
        for number, layer in enumerate(self.tensors()):
            layer[ids] = self.contents(number, layer, salt)
        if ON_GPU:
            torch.cuda.synchronize()
        self.kv.seal(self.tokens, ids, salt=salt)
        before = self.below.usage()["saved"]
        begun = time.perf_counter()
        self.below.save(self.tokens, salt=salt)
        while self.below.usage()["saved"] - before < self.count:
            if time.perf_counter() - begun > WAIT_S or self.below.usage()["unsaved"]:
                raise RuntimeError(f"not all was saved: {self.below.usage()}")
            time.sleep(0.0002)
        taken = time.perf_counter() - begun
        self.kv.groups[0].free(ids)
        return self.bytes / taken

    def scribble(self) -> None:
        """Leave nothing of what was there before in any block: what is loaded is given these again."""
        self.kv.forget_all()
        ids = self.kv.groups[0].alloc(self.count)
        if ids is None:
            raise RuntimeError("no blocks")
        for layer in self.tensors():
            layer[ids] = -1
        if ON_GPU:
            torch.cuda.synchronize()
        self.kv.groups[0].free(ids)

    def contents(self, number: int, layer: torch.Tensor, salt: str) -> torch.Tensor:
        """Make what all blocks hold in a layer: another number at each place, in each layer and each block."""
        shape = layer.shape[1:]
        at = (torch.arange(shape.numel(), device=layer.device) % 128).view(1, -1)
        block = (torch.arange(self.count, device=layer.device) * 7 + number * 11 + int(salt) * 29) % 127
        # Up to 256, bfloat16 has every whole number.
        return (at.to(layer.dtype) + block.to(layer.dtype).view(-1, 1)).view(self.count, *shape)

    def up(self, salt: str) -> tuple[float, dict[str, float]]:
        """Bring all of it back, and compare it; bytes a second, and what the time went to."""
        self.scribble()
        before = self.below.usage()
        ids = self.below.load(self.tokens, [], salt=salt)
        after = self.below.usage()
        if len(ids) != self.count:
            raise RuntimeError(f"{len(ids)} of {self.count} blocks came back: {after}")
        for number, layer in enumerate(self.tensors()):
            if not torch.equal(layer[ids], self.contents(number, layer, salt)):
                raise RuntimeError(f"{self.name}: what came back is not what was saved")
        self.kv.groups[0].free(ids)
        return self.bytes / ((after["load_us"] - before["load_us"]) / 1e6), shares_of(after, before)

    def tensors(self) -> list[torch.Tensor]:
        """Give every layer's tensor."""
        return [torch.from_dlpack(layer) for layer in self.kv.tensors()]


def row_of(case: str, rates: list[float], link: float) -> Row:
    """Make the row of some rates."""
    row = of_samples(case, "rate", [rate / GIB for rate in rates], "GiB/s", "higher")
    row.ceiling = link / GIB
    row.target = HOST_TARGET * row.ceiling
    row.met = row.value >= row.target
    print(row.line(), flush=True)
    return row


def measure(up_link: float, down_link: float) -> list[Row]:
    """Measure every case."""
    rows: list[Row] = []
    for layers, heads, layout, nbytes in CASES:
        with device_memory(nbytes + GIB) as mem:
            case = Case(mem, layers, heads, layout, nbytes)
            first = case.down("0")
            ups = [case.up("0") for _ in range(REPEATS)]
            downs = [case.down(str(number)) for number in range(1, REPEATS + 1)]
            rows.append(row_of(f"{case.name}, up", [rate for rate, _ in ups], up_link))
            shares = sorted(ups, key=lambda one: one[0])[REPEATS // 2][1]
            print(shares_line(shares), flush=True)
            rows += [
                Row(rows[-1].case, f"share of the time: {name}", share, "", "lower") for name, share in shares.items()
            ]
            rows.append(row_of(f"{case.name}, down, others make room", downs, down_link))
            rows.append(row_of(f"{case.name}, down, memory is made", [first], down_link))
            del case
    return rows


def main() -> int:
    """Measure."""
    up_link, down_link = link_bytes_per_s(up=True), link_bytes_per_s(up=False)
    links = [
        Row("the link, host to device", "rate", up_link / GIB, "GiB/s", "higher"),
        Row("the link, device to host", "rate", down_link / GIB, "GiB/s", "higher"),
    ]
    rows = links + measure(up_link, down_link)
    if ON_GPU:
        save_gpu(Path(os.environ["SHOAL_RESULT"]), rows)
    return 0


if __name__ == "__main__":
    sys.exit(main())
