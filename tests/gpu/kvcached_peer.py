"""kvcached beside KV caches of ours on one GPU: growth, alloc and free; and its own tests on `shoal.compat.kvcached`.

Run by `tests/gpu/run.sh kv_peer`, with a checkout of kvcached (see kvcached_build.py). Each library is measured in a
process of its own. What blocks cost by number and fragmentation is another part: kvcached_blocks.py.
"""

from __future__ import annotations

import argparse
import functools
import importlib
import json
import os
import subprocess
import sys
import tempfile
import time
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

import numpy as np
from benches import kvcached_peer as stubbed
from benches.results import ROOT, Row, of_best, of_samples, save_gpu
from tests.gpu import kvcached_build

GIB = 1 << 30
# 32 layers of 8 heads of 128 in bfloat16, 16 tokens a block: 2 MiB a block over all layers, 32 KiB in each K and V.
LAYERS, TOKENS, TOKEN_BYTES = 32, 16, 2048
BLOCK_BYTES = 2 * LAYERS * TOKENS * TOKEN_BYTES
ROUNDS = 5
# How long calls through buffers are timed, in short rounds.
BUFFERS_S = 4.0
TARGET_16_S, TARGET_LAYERS = 0.6e-6, 5.0
NAMES = {"kvcached": "kvcached", "face": "shoal.compat.kvcached", "ours": "mem.kv_cache"}
LAYOUTS = {"block": "layers side by side", "layer": "a plane a layer"}


def growth(made: Any, blocks: int) -> list[float]:
    """Seconds to be given so many blocks at once, from new memory: all of the round before was given back just now.

    `kv_grow` measures it beside bare driver calls, after a pause in which the driver has scrubbed what was given back.
    """
    taken = []
    for _ in range(ROUNDS):
        made.trim()
        start = time.perf_counter()
        ids = made.alloc(blocks)
        taken.append(time.perf_counter() - start)
        if ids is None or len(ids) != blocks:
            raise SystemExit(f"{blocks} blocks could not be had")
        made.free(ids)
    return taken


def of_kvcached(which: str, layout: str, device: str, nbytes: int) -> dict[str, list[float]]:
    """Measure kvcached, or what stands for it here."""
    os.environ["KVCACHED_CONTIGUOUS_LAYOUT"] = "true" if layout == "block" else "false"
    os.environ["KVCACHED_IPC_NAME"] = f"shoal_peer_{os.getpid()}"
    os.environ.setdefault("KVCACHED_LOG_LEVEL", "ERROR")
    package = NAMES[which]
    vmm_ops: Any = importlib.import_module(f"{package}.vmm_ops")
    module: Any = importlib.import_module(f"{package}.kv_cache_manager")
    if device == "cpu" and which == "face":
        vmm_ops.MemoryManager = functools.partial(vmm_ops.MemoryManager, device_capacity="64GiB")
    wanted = nbytes // BLOCK_BYTES
    blocks = wanted + wanted // 2
    vmm_ops.init_kvcached(device, 0, layout == "block")
    vmm_ops.create_kv_tensors(2 * blocks * TOKENS * TOKEN_BYTES, 2, device, LAYERS)
    made = module.KVCacheManager(blocks, TOKENS, TOKEN_BYTES, LAYERS)
    made._wait_post_init()
    figures = {"grow": growth(made, wanted)}
    # So that memory for what follows stays: blocks are what is measured then.
    held = made.alloc(257)
    made.free(held[1:])
    figures |= {f"{count} as a list": _lists(made, count) for count in (16, 256)}
    vmm_ops.shutdown_kvcached()
    return figures


def of_ours(layout: str, device: str, nbytes: int) -> dict[str, list[float]]:
    """Measure `mem.kv_cache`."""
    import shoal

    sizes: dict[str, Any] = {"device_capacity": "64GiB"} if device == "cpu" else {}
    mem = shoal.MemoryManager(
        "sim" if device == "cpu" else device, device_budget=2 * nbytes, host_budget="1GiB", **sizes
    )
    kv = mem.kv_cache(
        max_bytes=nbytes + nbytes // 2, layers=LAYERS, kv_heads=8, head_dim=128, block_tokens=TOKENS,
        layout="block" if layout == "block" else "layer", patience_s=30, spare_max=0,
    )  # fmt: skip

    class Made:
        """With the names of the other."""

        def trim(self) -> None:
            kv.trim()
            mem.reclaim(1 << 60)
            if mem.usage()["pooled"]:
                raise SystemExit("what grows next would not be new memory: the frame pool holds some")

        def alloc(self, count: int) -> np.ndarray | None:
            ids = np.zeros(count, np.int64)
            return ids if kv.alloc_into(ids) == count else None

        def free(self, ids: np.ndarray) -> None:
            kv.free_from(ids)

    figures = {"grow": growth(Made(), nbytes // BLOCK_BYTES)}
    mem = shoal.MemoryManager(
        "sim" if device == "cpu" else device, device_budget=2 * nbytes, host_budget="1GiB", **sizes
    )
    kv = mem.kv_cache(
        max_bytes="4GiB", layers=LAYERS, kv_heads=8, head_dim=128, block_tokens=TOKENS,
        layout="block" if layout == "block" else "layer", patience_s=30, spare_max="1GiB",
    )  # fmt: skip
    held = kv.alloc(257)
    assert held is not None
    kv.free(held[1:])
    for count in (16, 256):
        kv.hint(512)
        figures[f"{count} as a list"] = _lists(kv, count)
    figures |= {f"{count} through a buffer": seconds for count, seconds in _buffers(kv, (16, 256, 0)).items()}
    return figures


def _lists(made: Any, count: int) -> list[float]:
    """Seconds of the two calls in each round."""
    return [us * 1e-6 for us in stubbed.pair_us(made, count, 500)]


def _buffers(kv: Any, counts: tuple[int, ...]) -> dict[int, list[float]]:
    """The same through a buffer, the counts in turn and in short rounds: what else the core does meets all of them."""
    buffers = {count: np.zeros(count, np.int64) for count in counts}
    alloc, free = kv.alloc_into, kv.free_from
    taken: dict[int, list[float]] = {count: [] for count in counts}
    kv.hint(512)
    over = time.monotonic() + BUFFERS_S
    while time.monotonic() < over:
        for count, ids in buffers.items():
            start = time.perf_counter()
            for _ in range(1000):
                alloc(ids)
                free(ids)
            taken[count].append((time.perf_counter() - start) / 1000)
    return taken


def grown(path: Path) -> None:
    """Print how fast kvcached grew in a file of this program, as `kv_grow` wants it: a shell's assignments."""
    rows = json.loads(path.read_text("utf-8"))["rows"] if path.exists() else []
    for layout, said in LAYOUTS.items():
        found = [row["peer_value"] for row in rows if row["metric"] == "rate" and said in row["case"] and row["peer"]]
        if found:
            print(f"export SHOAL_KVCACHED_GROW_{layout.upper()}={found[0]}")


def measured(which: str, layout: str, built: Path, options: argparse.Namespace) -> dict[str, list[float]]:
    """Measure one library in a process of its own."""
    paths = [
        str(ROOT),
        str(ROOT / "python"),
        *([str(built)] if which == "kvcached" else []),
        os.environ.get("PYTHONPATH", ""),
    ]
    command = [
        sys.executable, "-X", "faulthandler", "-m", "tests.gpu.kvcached_peer", "--measure", which, "--layout", layout,
        "--device", options.device, "--gib", str(options.gib),
    ]  # fmt: skip
    environment = os.environ | {"PYTHONPATH": os.pathsep.join(path for path in paths if path)}
    said = subprocess.run(command, env=environment, capture_output=True, text=True, timeout=120, check=False)
    if said.returncode != 0:
        print(f"FAILED  {NAMES[which]}, {LAYOUTS[layout]}\n{said.stdout[-2000:]}\n{said.stderr[-3000:]}", flush=True)
        return {}
    figures: dict[str, list[float]] = json.loads(said.stdout.splitlines()[-1])
    return figures


def compared(built: Path, options: argparse.Namespace) -> list[Row]:
    """Measure all of them, ours against kvcached."""
    rows = []
    for layout, said in LAYOUTS.items():
        figures = {which: measured(which, layout, built, options) for which in NAMES}
        peer, empty = figures["kvcached"], figures["ours"].get("0 through a buffer")
        name = f"kvcached, {said}, 2 MiB a page and buffer"
        granules = {"face": "128 MiB", "ours": "512 MiB at most" if layout == "layer" else "256 MiB at most"}
        for which, granule in granules.items():
            if figures[which]:
                rates = [options.gib / one for one in figures[which].pop("grow")]
                case = (
                    f"grow by {options.gib} GiB, new memory, as much given back just before, {said}, granule {granule}"
                )
                row = of_samples(f"{case}: {NAMES[which]}", "rate", rates, "GiB/s", "higher")
                if peer:
                    row.peer, row.peer_value = name, float(np.median([options.gib / one for one in peer["grow"]]))
                    if which == "ours" and layout == "layer":
                        row.target = TARGET_LAYERS * row.peer_value
                        row.met = row.value >= row.target
                rows.append(row)
            for case, seconds in figures[which].items():
                count = case.split()[0]
                if count == "0":
                    continue
                row = of_best(f"{case}, {said}: {NAMES[which]}", "alloc and free", seconds)
                if peer:
                    row.peer, row.peer_value = f"{name}, lists", min(peer[f"{count} as a list"])
                if case.endswith("buffer"):
                    row.ceiling = min(empty) if empty else None
                    if count == "16":
                        row.target, row.met = TARGET_16_S, row.value <= TARGET_16_S
                rows.append(row)
    return rows


def own_tests(checkout: Path, device: str) -> list[Row]:
    """Run its tests on what stands for it here; a row a file."""
    with tempfile.TemporaryDirectory() as folder:
        counts = Path(folder) / "counts.json"
        script = ROOT / "scripts/run_kvcached_tests.py"
        more = ["--simulate"] if device == "cpu" else []
        said = subprocess.run(
            [sys.executable, str(script), str(checkout), "--counts", str(counts), *more],
            capture_output=True, text=True, timeout=400, check=False,
        )  # fmt: skip
        print(said.stdout[-12000:], said.stderr[-3000:], flush=True)
        found = json.loads(counts.read_text("utf-8")) if counts.exists() else {}
    rows = []
    for name, outcome in found.items():
        passed, skipped = outcome.get("passed", 0), outcome.get("skipped", 0)
        wanted = passed + outcome.get("failed", 0) + outcome.get("error", 0)
        note = f", {skipped} skipped by its author" if skipped else ""
        # What asserts that pages without memory share one: here the write faults, which the script has made sure of.
        note += f", {outcome['faulted']} faults as it has to here" if outcome.get("faulted") else ""
        row = Row(
            f"kvcached's {name}{note}", "passed", passed, "tests", "higher", target=wanted, met=passed == wanted > 0
        )
        rows.append(row)
    return rows


def main() -> None:
    """Build, measure, run the tests and write the file; fail if something of it failed."""
    parser = argparse.ArgumentParser(description=__doc__.partition("\n")[0])
    parser.add_argument("--measure", choices=NAMES)
    parser.add_argument("--layout", choices=LAYOUTS, default="block")
    parser.add_argument("--device", default="cuda:0", help="or cpu: the simulated device, to try this program")
    parser.add_argument("--gib", type=int, default=16)
    parser.add_argument("--built", type=Path, help="a folder with kvcached, built already")
    parser.add_argument("--grown", type=Path, help="print the peer's growth of that result, for kv_grow")
    options = parser.parse_args()
    if options.grown is not None:
        grown(options.grown)
        return
    if options.measure == "ours":
        print(json.dumps(of_ours(options.layout, options.device, options.gib * GIB)))
        return
    if options.measure:
        print(json.dumps(of_kvcached(options.measure, options.layout, options.device, options.gib * GIB)))
        return
    checkout = kvcached_build.checkout()
    with (
        tempfile.TemporaryDirectory(prefix="shoal-kvcached-") as folder,
        ThreadPoolExecutor(1, "kvcached's tests") as beside,
    ):
        # Compiling takes no GPU, and the tests take little; what is timed comes when both are done.
        testing = beside.submit(own_tests, checkout, options.device)
        built = options.built or Path(folder)
        if options.built is None:
            kvcached_build.built(checkout, built)
        tested = testing.result()
        rows = [*compared(built.resolve(), options), *tested]
    save_gpu(Path(os.environ["SHOAL_RESULT"]), rows)
    has_all = all(row.peer or row.metric == "passed" for row in rows) and any(row.metric == "passed" for row in rows)
    if not has_all or any(row.metric == "passed" and not row.met for row in rows):
        sys.exit("something of it did not run, or a test failed")


if __name__ == "__main__":
    main()
