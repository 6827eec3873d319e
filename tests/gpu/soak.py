"""A thousand sleeps and wakes of a region of gigabytes, and of a model with CUDA graphs: nothing lost, nothing changed.

Run by `tests/gpu/run.sh soak`. After a warm-up what the process holds is written down, awake and asleep: device memory
as the driver counts it, leases, host copies, descriptors, threads, resident host memory. At the end it must be the
same; what lies in the regions is compared bit by bit after every wake. `SHOAL_SOAK_CYCLES` is how often (1000).
"""

from __future__ import annotations

import gc
import json
import os
import subprocess
import sys
import time
from collections.abc import Callable
from pathlib import Path

import torch
from benches.results import Row, of_samples, save_gpu

import shoal
import shoal.torch as st

CYCLES = int(os.environ.get("SHOAL_SOAK_CYCLES", "1000"))
WARM_UP = 20
MIB = 1 << 20
REGION_MIB = 2048
FIGURES = {
    "device memory": "bytes", "regions on the device": "bytes", "host copies": "bytes", "resident host memory": "bytes",
    "descriptors": "descriptors", "threads": "threads",
}  # fmt: skip
# The C library's heap and Python's own take and give pages.
SLACK = {"resident host memory": 16 * MIB}


def settled() -> dict[str, int]:
    """What the process holds at this moment."""
    torch.cuda.synchronize()
    free, total = torch.cuda.mem_get_info()
    status = dict(
        line.split(":", 1) for line in Path("/proc/self/status").read_text().splitlines() if ":" in line
    )  # fmt: skip
    return {
        "device memory": total - free,
        "descriptors": len(os.listdir("/proc/self/fd")),
        "threads": int(status["Threads"]),
        "resident host memory": int(status["VmRSS"].split()[0]) * 1024,
    }


def of_manager(mem: shoal.MemoryManager) -> dict[str, int]:
    usage = mem.usage()
    return {"regions on the device": usage["weights_device"], "host copies": usage["host"]}


class Part:
    """One thing that sleeps and wakes again and again."""

    def __init__(self, name: str, mem: shoal.MemoryManager, regions: list[shoal.Region]) -> None:
        self.name, self.mem, self.regions = name, mem, regions
        self.rows: list[Row] = []
        self.failed = 0

    def check(self, what: str, is_so: bool, value: float, unit: str, target: float) -> None:
        self.failed += not is_so
        self.rows.append(Row(self.name, what, value, unit, "lower", target=target, met=is_so))

    def run(self, verify: Callable[[int], bool]) -> None:
        sleeps: list[float] = []
        wakes: list[float] = []
        wrong = 0
        marks: dict[int, tuple[dict[str, int], dict[str, int]]] = {}
        asleep_figures: set[int] = set()
        began = time.perf_counter()
        for cycle in range(WARM_UP + CYCLES):
            start = time.perf_counter()
            for region in self.regions:
                region.sleep()
            slept = time.perf_counter()
            is_mark = cycle in {WARM_UP - 1, WARM_UP + CYCLES - 1}
            asleep = settled() | of_manager(self.mem) if is_mark else {}
            if cycle >= WARM_UP:
                free, total = torch.cuda.mem_get_info()
                asleep_figures.add(total - free)
            before_wake = time.perf_counter()
            for region in self.regions:
                region.wake()
            woken = time.perf_counter()
            sleeps.append(slept - start)
            wakes.append(woken - before_wake)
            wrong += not verify(cycle)
            if is_mark:
                gc.collect()
                marks[cycle] = asleep, settled() | of_manager(self.mem)
        (asleep_first, awake_first), (asleep_last, awake_last) = marks.values()
        print(f"{self.name}: {WARM_UP + CYCLES} cycles in {time.perf_counter() - began:.0f} s", flush=True)
        self.check("cycles whose bytes were not the same", wrong == 0, wrong, "cycles", 0)
        self.check(
            "device memory asleep, most less least", len(asleep_figures) == 1,
            max(asleep_figures) - min(asleep_figures), "bytes", 0,
        )  # fmt: skip
        for what, unit in FIGURES.items():
            more = max(asleep_last[what] - asleep_first[what], awake_last[what] - awake_first[what])
            allowed = SLACK.get(what, 0)
            self.check(
                f"{what} more than after {WARM_UP} cycles, asleep or awake", more <= allowed, more, unit, allowed
            )
        self.rows.append(of_samples(self.name, "sleep", sleeps[WARM_UP:], "s", "lower"))
        self.rows.append(of_samples(self.name, "wake", wakes[WARM_UP:], "s", "lower"))


def region_of_gigabytes(*, is_dirty: bool) -> Part:
    mem = shoal.MemoryManager("cuda:0", device_budget="8GiB", host_budget="8GiB")
    region = mem.region("gigabytes")
    with st.use_region(region):
        values = [
            torch.randint(0, 256, (256 * MIB,), dtype=torch.uint8, device="cuda") for _ in range(REGION_MIB // 256)
        ]
    expected = [value.clone() for value in values]
    region.freeze(wait=True)
    kind = "written in place between" if is_dirty else "clean"
    part = Part(f"{REGION_MIB // 1024} GiB, {kind}", mem, [region])

    def verify(cycle: int) -> bool:
        with region.guard():
            same = all(torch.equal(value, right) for value, right in zip(values, expected, strict=True))
            if is_dirty:
                # One byte of one extent, without a word to anyone.
                which, at = cycle % len(values), (cycle * 7919 * 4096) % (256 * MIB)
                values[which][at] += 1
                expected[which][at] += 1
            torch.cuda.synchronize()
        return same

    part.run(verify)
    return part


def model_with_graphs() -> Part:
    mem = shoal.MemoryManager("cuda:0", device_budget="8GiB", host_budget="8GiB")
    weights, graphs = mem.region("weights"), mem.region("graphs")
    torch.manual_seed(0)
    with st.use_region(weights):
        model = torch.nn.Sequential(
            *(torch.nn.Sequential(torch.nn.Linear(4096, 4096, device="cuda", dtype=torch.bfloat16), torch.nn.GELU())
              for _ in range(24))
        ).eval()  # fmt: skip
    sizes = (1, 8, 64)
    static = {size: torch.randn(size, 4096, device="cuda", dtype=torch.bfloat16) for size in sizes}
    captured, outs = {}, {}
    pool = st.pool(graphs)
    with torch.no_grad():
        side = torch.cuda.Stream()
        with torch.cuda.stream(side):
            for size in sizes:
                model(static[size])
        torch.cuda.synchronize()
        for size in sizes:
            captured[size] = torch.cuda.CUDAGraph()
            with st.graph(captured[size], graphs, pool=pool):
                outs[size] = model(static[size])
    expected = {}
    for size in sizes:
        captured[size].replay()
        torch.cuda.synchronize()
        expected[size] = outs[size].clone()
    weights.freeze(wait=True)
    graphs.freeze(wait=True)
    part = Part("a model of 0.8 GiB with three CUDA graphs", mem, [weights, graphs])

    def verify(_: int) -> bool:
        same = True
        with mem.guard():
            for size in sizes:
                outs[size].zero_()
                captured[size].replay()
                same &= torch.equal(outs[size], expected[size])
            torch.cuda.synchronize()
        return same

    part.run(verify)
    return part


PARTS = {
    "clean": lambda: region_of_gigabytes(is_dirty=False),
    "written": lambda: region_of_gigabytes(is_dirty=True),
    "model": model_with_graphs,
}


def main() -> None:
    """Run the parts, each in a process of its own, and write the file; fail if something was lost or changed."""
    target = Path(os.environ["SHOAL_RESULT"])
    if len(sys.argv) > 1:
        torch.cuda.init()
        part = PARTS[sys.argv[1]]()
        save_gpu(target, part.rows)
        sys.exit(f"{part.failed} figures are not what they should be" if part.failed else 0)
    failed: list[str] = []
    rows: list[object] = []
    record: dict[str, object] = {}
    for name in PARTS:
        # What one part holds until it is idle would be counted to the next.
        command = [sys.executable, "-X", "faulthandler", "-m", "tests.gpu.soak", name]
        if subprocess.run(command, check=False).returncode:
            failed.append(name)
        if target.exists():
            record = json.loads(target.read_text("utf-8"))
            rows += record["rows"]
            target.unlink()
    target.write_text(json.dumps(record | {"rows": rows}, indent=1) + "\n", "utf-8")
    if failed:
        sys.exit(f"it did not hold: {', '.join(failed)}")


if __name__ == "__main__":
    main()
