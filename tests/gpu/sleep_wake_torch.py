"""13 GiB of 8B-shaped weights in torch: sleep and wake, against torch_memory_saver and against the link, in turn.

Run by `tests/gpu/run.sh sleep_wake_torch`; needs torch_memory_saver 0.0.10 importable. Both libraries hold the same
weights at the same time in this process, and each round measures the link (page-locked torch tensors, both ways), ours
clean, theirs, ours dirty. After every wake all bytes are compared with what they were.
"""

from __future__ import annotations

import os
import statistics
import sys
import time
from collections.abc import Callable
from pathlib import Path

import torch
from benches.results import Row, of_samples, save_gpu

import shoal
import shoal.torch as st

GIB = 1 << 30
ROUNDS = int(os.environ.get("SHOAL_PEER_ROUNDS", "4"))
LAYERS = 28
HIDDEN, KV, INNER, VOCABULARY = 4096, 1024, 14336, 128256
SHAPES = [(VOCABULARY, HIDDEN), *[
    (HIDDEN, HIDDEN), (KV, HIDDEN), (KV, HIDDEN), (HIDDEN, HIDDEN), (INNER, HIDDEN), (INNER, HIDDEN), (HIDDEN, INNER),
    (HIDDEN,), (HIDDEN,),
] * LAYERS, (VOCABULARY, HIDDEN)]  # fmt: skip
PEER = "torch_memory_saver 0.0.10"


def build() -> list[torch.Tensor]:
    """Make the weights: the same bits each time."""
    generator = torch.Generator(device="cuda").manual_seed(0)
    return [
        torch.empty(shape, dtype=torch.bfloat16, device="cuda").view(torch.int16).random_(generator=generator)
        for shape in SHAPES
    ]


def digest(weights: list[torch.Tensor]) -> int:
    """Give a number that any changed bit changes, places included."""
    total = 0
    for number, weight in enumerate(weights):
        flat = weight.view(-1).view(torch.int64)
        factors = torch.arange(1, flat.numel() + 1, device="cuda", dtype=torch.int64) * 2 + 1
        total = total * 31 + int((flat * factors).sum()) + number
    return total & ((1 << 64) - 1)


def timed(work: Callable[[], object]) -> float:
    torch.cuda.synchronize()
    began = time.perf_counter()
    work()
    torch.cuda.synchronize()
    return time.perf_counter() - began


class Link:
    """Page-locked memory and device memory, 2 GiB each, to copy between."""

    def __init__(self) -> None:
        self.host = torch.empty(2 * GIB, dtype=torch.uint8, pin_memory=True)
        self.device = torch.empty(2 * GIB, dtype=torch.uint8, device="cuda")
        self.host.fill_(1)
        self.rates: dict[str, list[float]] = {"up": [], "down": []}

    def measure(self) -> None:
        for way, (into, source) in {"up": (self.device, self.host), "down": (self.host, self.device)}.items():
            best = min(timed(lambda into=into, source=source: into.copy_(source, non_blocking=True)) for _ in range(3))
            self.rates[way].append(2 * GIB / best / GIB)

    def rate(self, way: str) -> float:
        return statistics.median(self.rates[way])


def main() -> None:
    """Measure, compare, write the file; fail if a bit changed."""
    from torch_memory_saver import torch_memory_saver as peer

    peer.hook_mode = "torch"
    link = Link()
    link.measure()
    mem = shoal.MemoryManager("cuda:0", device_budget="30GiB", host_budget="30GiB")
    region = mem.region("weights")
    with st.use_region(region):
        ours = build()
    with peer.region(tag="weights", enable_cpu_backup=True):
        theirs = build()
    nbytes = sum(weight.nbytes for weight in ours)
    right = digest(ours)
    failed = int(digest(theirs) != right)
    torch.cuda.empty_cache()
    freeze = timed(lambda: region.freeze(wait=True, timeout_s=300))
    print(f"{nbytes / GIB:.2f} GiB in {len(ours)} tensors; frozen and copied in {freeze:.2f} s", flush=True)
    times: dict[str, list[float]] = {}

    def take(what: str, work: Callable[[], object], *, first: bool) -> None:
        seconds = timed(work)
        times.setdefault(f"{what}, first" if first else what, []).append(seconds)
        print(f"{what:28} {seconds:8.4f} s  {nbytes / seconds / GIB:7.1f} GiB/s", flush=True)

    def check(weights: list[torch.Tensor], expected: int, whose: str) -> None:
        nonlocal failed
        if digest(weights) != expected:
            failed += 1
            print(f"{whose}: the bytes have changed", flush=True)

    for turn in range(ROUNDS):
        first = turn == 0
        link.measure()
        take("sleep clean", lambda: _copied(region.sleep(), 0), first=first)
        # At once: the driver is still busy with what was released a moment ago.
        take("wake at once", region.wake, first=first)
        check(ours, right, "ours")
        _copied(region.sleep(), 0)
        time.sleep(1)
        take("wake", region.wake, first=first)
        check(ours, right, "ours")
        # What it is by default first, then with what makes it fast.
        take("their pause", lambda: peer.pause("weights"), first=first)
        peer.retain_cpu_backup = True
        time.sleep(1)
        take("their resume", lambda: peer.resume("weights"), first=first)
        check(theirs, right, "theirs")
        link.measure()
        for weight in ours:
            weight.bitwise_xor_(1)
        changed = digest(ours)
        take("sleep dirty", lambda: _copied(region.sleep(timeout_s=120), nbytes), first=first)
        take("wake after dirty", region.wake, first=first)
        check(ours, changed, "ours")
        for weight in ours:
            weight.bitwise_xor_(1)
        check(ours, right, "ours")
        _copied(region.sleep(timeout_s=120), nbytes)
        region.wake()
    size = f"{nbytes / GIB:.1f} GiB of 8B-shaped weights in torch"

    rows = []

    def add_time(case: str, what: str, peer_what: str, peer_name: str, target: float) -> None:
        row = of_samples(f"{size}, {case}", "time", times[what], "s", "lower")
        row.peer, row.peer_value = f"{PEER}, {peer_name}", statistics.median(times[peer_what])
        row.target, row.met = target, row.value <= target
        rows.append(row)

    def add_rate(case: str, what: str, way: str, theirs: tuple[str, str], share: float) -> None:
        peer_what, peer_name = theirs
        row = of_samples(f"{size}, {case}", "rate", [nbytes / GIB / value for value in times[what]], "GiB/s", "higher")
        row.peer, row.peer_value = f"{PEER}, {peer_name}", nbytes / GIB / statistics.median(times[peer_what])
        row.ceiling = link.rate(way)
        row.target = share * row.ceiling
        row.met = row.value >= row.target
        rows.append(row)

    add_time("sleep, clean, hash checked, first", "sleep clean, first", "their pause, first", "first pause", 0.03)
    add_time("sleep, clean, hash checked, later", "sleep clean", "their pause", "retained", 0.03)
    add_rate("sleep, dirty, first", "sleep dirty, first", "down", ("their pause, first", "first pause"), 0.92)
    add_rate("sleep, dirty, later", "sleep dirty", "down", ("their pause", "retained"), 0.92)
    add_rate("wake, first", "wake, first", "up", ("their resume, first", "first resume"), 0.95)
    add_rate("wake, later", "wake", "up", ("their resume", "retained"), 0.95)
    add_rate("wake at once after a clean sleep", "wake at once", "up", ("their resume", "retained"), 0.95)
    rows += [
        of_samples(f"{size}, the link up", "rate", link.rates["up"], "GiB/s", "higher"),
        of_samples(f"{size}, the link down", "rate", link.rates["down"], "GiB/s", "higher"),
        Row(f"{size}, freeze, in the background", "time", freeze, "s", "lower"),
        Row(
            f"{size}, wakes whose bytes were not the same", "count", failed, "wakes", "lower", target=0, met=not failed
        ),
    ]
    save_gpu(Path(os.environ["SHOAL_RESULT"]), rows)
    if failed:
        sys.exit("bytes have changed")


def _copied(report: shoal.Report, least: int) -> None:
    """Refuse to measure another thing than what the row says."""
    if (report.copied > 0) != (least > 0) or report.copied < least:
        raise RuntimeError(f"{report} copied {report.copied} bytes where {least} or more were expected")


if __name__ == "__main__":
    main()
