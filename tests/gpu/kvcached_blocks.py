"""What blocks cost on a GPU, kvcached beside ours: 1 to 4096 at once, fresh, part-filled and scattered; eight threads.

Run by `tests/gpu/run.sh kv_peer_blocks`, with a checkout of kvcached (see kvcached_build.py). Blocks are smaller than
in kvcached_peer.py, so that 400 part-filled pages fit: 2 layers of 8 heads of 128 in bfloat16, 64 blocks on each page
of kvcached and in each granule of ours. Part-filled are 400 pages with one block in use, or with 0 to 63 at places by
chance; what is scattered has no free neighbours. In how many words of 64 as many blocks lie is what they cost more at
least (docs/decisions/0015). A figure is the best of some rounds' means, its spread that of all rounds.
Each library is measured in a process of its own: ``python -m tests.gpu.kvcached_blocks --measure ours --device cpu``
tries it without a GPU.
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
from pathlib import Path
from typing import Any

import numpy as np
from benches import kvcached_peer as stubbed
from benches.results import ROOT, Row, of_best, over, save_gpu
from tests.gpu import kvcached_build

NAMES = {"kvcached": "kvcached", "face": "shoal.compat.kvcached", "ours": "mem.kv_cache"}
THREADS, THREAD_ROUNDS = 8, 5
# How long calls through buffers are timed, all numbers and caches together.
BUFFERS_S = 8.0
TARGET_16_S, TARGET_BLOCK_S, TARGET_SAME = 0.6e-6, 10e-9, 1.1
FRESH, PART_FILLED, MIXED, SCATTERED = stubbed.STATES
PER_PAGE = stubbed.PER_PAGE
BLOCK_BYTES = 2 * stubbed.LAYERS * stubbed.BLOCK_TOKENS * stubbed.TOKEN_BYTES
# So that what is free stays mapped in all of them: blocks are what is measured, not memory.
KEPT_BYTES = (stubbed.PART_FILLED * PER_PAGE + 2 * 4096) * BLOCK_BYTES


def seconds_of(made: Any) -> dict[str, list[float]]:
    """Seconds of alloc and free as lists in each round, by case."""
    # The rate of all threads, as seconds of a pair.
    threads = threads_s(made, 16)
    figures = {case: [us * 1e-6 for us in rounds] for case, rounds in stubbed.measure(made).items()}
    return figures | {f"16 blocks, {THREADS} threads": threads}


def threads_s(made: Any, blocks: int) -> list[float]:
    """Seconds of a pair of calls while so many threads make them, over all of these; a few times."""
    return [1 / stubbed.threads_rate(made, blocks, THREADS, 0.4) for _ in range(THREAD_ROUNDS)]


def of_kvcached(which: str, device: str) -> dict[str, list[float]]:
    """Measure kvcached, or what stands for it here."""
    os.environ["KVCACHED_MAX_RESERVED_PAGES"] = str(KEPT_BYTES // (PER_PAGE * BLOCK_BYTES))
    os.environ["KVCACHED_IPC_NAME"] = f"shoal_peer_{os.getpid()}"
    os.environ.setdefault("KVCACHED_LOG_LEVEL", "ERROR")
    vmm_ops: Any = importlib.import_module(f"{NAMES[which]}.vmm_ops")
    module: Any = importlib.import_module(f"{NAMES[which]}.kv_cache_manager")
    if device == "cpu" and which == "face":
        vmm_ops.MemoryManager = functools.partial(vmm_ops.MemoryManager, device_capacity="20GiB")
    vmm_ops.init_kvcached(device, 0, True)
    shape = stubbed.BLOCKS, stubbed.BLOCK_TOKENS, stubbed.TOKEN_BYTES, stubbed.LAYERS
    vmm_ops.create_kv_tensors(2 * shape[0] * shape[1] * shape[2], 2, device, stubbed.LAYERS)
    made = module.KVCacheManager(*shape)
    made._wait_post_init()
    return seconds_of(made)


def of_ours(device: str) -> dict[str, list[float]]:
    """Measure `mem.kv_cache`, as lists and through buffers."""
    import shoal

    sizes: dict[str, Any] = {"device_capacity": "20GiB"} if device == "cpu" else {}
    mem = shoal.MemoryManager("sim" if device == "cpu" else device, device_budget="20GiB", host_budget="1GiB", **sizes)

    def cache(name: str) -> Any:
        kv = mem.kv_cache(
            max_bytes=KEPT_BYTES, layers=stubbed.LAYERS, kv_heads=8, head_dim=128, block_tokens=stubbed.BLOCK_TOKENS,
            granule_max=PER_PAGE * BLOCK_BYTES, patience_s=30, spare_max=KEPT_BYTES, name=name,
        )  # fmt: skip
        assert kv.groups[0].block_bytes == BLOCK_BYTES
        kv.free(kv.alloc(4096))
        return kv

    lists = cache("lists")
    # The same calls by as many threads, for no block: what Python and its lock cost alone.
    figures = {f"nothing, {THREADS} threads": threads_s(lists, 0)}
    figures |= seconds_of(lists)
    kvs = {state: cache(f"buffers{state}") for state in stubbed.STATES}
    buffers = _Buffers(kvs[FRESH])
    figures[f"nothing, {THREADS} threads, through a buffer"] = threads_s(buffers, 0)
    threads = threads_s(buffers, 16)
    stubbed.fragment(kvs[PART_FILLED])
    stubbed.mix(kvs[MIXED])
    stubbed.scatter(kvs[SCATTERED])
    for (count, state), seconds in _buffers(kvs).items():
        if count:
            figures[f"{count} blocks{state}, through a buffer"] = seconds
        elif state == FRESH:
            figures["nothing, through a buffer"] = seconds
    figures[f"16 blocks, {THREADS} threads, through a buffer"] = threads
    return figures


class _Buffers:
    """The calls of the other, through a buffer a thread."""

    def __init__(self, kv: Any) -> None:
        self._kv = kv

    def alloc(self, count: int) -> np.ndarray:
        ids = np.empty(count, np.int64)
        if self._kv.alloc_into(ids) != count:
            raise SystemExit(f"{count} blocks could not be had")
        return ids

    def free(self, ids: np.ndarray) -> None:
        self._kv.free_from(ids)


def _buffers(kvs: dict[str, Any]) -> dict[tuple[int, str], list[float]]:
    """Seconds of the two calls by number of blocks and state, each through one buffer, as engines have it.

    Numbers and caches take turns in short rounds, no block at all among them: what else the core does meets all alike.
    """
    batches = [(np.zeros(count, np.int64), rounds) for count, rounds in ((0, 400), *stubbed.BATCHES)]
    taken: dict[tuple[int, str], list[float]] = {(len(ids), state): [] for ids, _ in batches for state in kvs}
    for kv in kvs.values():
        kv.hint(max(len(ids) for ids, _ in batches))
    over = time.monotonic() + BUFFERS_S
    while time.monotonic() < over:
        for ids, rounds in batches:
            for state, kv in kvs.items():
                alloc, free = kv.alloc_into, kv.free_from
                start = time.perf_counter()
                for _ in range(rounds):
                    alloc(ids)
                    free(ids)
                taken[len(ids), state].append((time.perf_counter() - start) / rounds)
    return taken


def measured(which: str, built: Path, device: str) -> dict[str, list[float]]:
    """Measure one library in a process of its own."""
    paths = [str(ROOT), str(ROOT / "python"), *([str(built)] if which == "kvcached" else [])]
    command = [sys.executable, "-m", "tests.gpu.kvcached_blocks", "--measure", which, "--device", device]
    environment = os.environ | {"PYTHONPATH": os.pathsep.join([*paths, os.environ.get("PYTHONPATH", "")])}
    said = subprocess.run(command, env=environment, capture_output=True, text=True, timeout=120, check=False)
    if said.returncode != 0:
        print(f"FAILED  blocks of {NAMES[which]}\n{said.stdout[-2000:]}\n{said.stderr[-3000:]}", flush=True)
        return {}
    figures: dict[str, list[float]] = json.loads(said.stdout.splitlines()[-1])
    return figures


def compared(built: Path, device: str) -> list[Row]:
    """Measure all of them, ours against kvcached."""
    figures = {which: measured(which, built, device) for which in NAMES}
    return rows_of(figures)


def rows_of(figures: dict[str, dict[str, list[float]]]) -> list[Row]:
    """Make the rows: ours beside the peer's lists, and the same calls for no block as the ceiling."""
    rows, peer = [], figures["kvcached"]
    for which in ("face", "ours"):
        empties = {case: min(seconds) for case, seconds in figures[which].items() if case.startswith("nothing")}
        empty = empties.get("nothing, through a buffer")
        for case, seconds in figures[which].items():
            if case in empties:
                continue
            plain, _, is_buffer = case.partition(", through")
            row = of_best(f"{case}: {NAMES[which]}", "alloc and free", seconds)
            if plain in peer:
                row.peer, row.peer_value = "kvcached, lists", min(peer[plain])
            if "threads" in case:
                row.ceiling = empties.get(case.replace("16 blocks", "nothing"))
            elif is_buffer:
                count = int(case.split()[0])
                row.ceiling = empty
                if count in (16, 256, 4096):
                    row.target = TARGET_16_S if count == 16 else TARGET_BLOCK_S * count
                    row.met = row.value <= row.target
            rows.append(row)
    ours = figures["ours"]
    for state in (PART_FILLED, MIXED, SCATTERED):
        for count in (16, 256, 4096):
            fresh, other = (ours.get(f"{count} blocks{one}, through a buffer") for one in (FRESH, state))
            if fresh and other:
                case = f"{count} blocks{state}, through a buffer: {NAMES['ours']}"
                row = over(case, "over fresh", other, fresh, TARGET_SAME)
                row.ceiling = words(state, count) / words(FRESH, count)
                rows.append(row)
    return rows


def words(state: str, count: int) -> int:
    """Count the words of 64 blocks in which so many free ones lie."""
    return stubbed.words(stubbed.STATES.index(state), count)


def main() -> None:
    """Build, measure all of them and write the file; or measure one library and print its figures."""
    parser = argparse.ArgumentParser(description=__doc__.partition("\n")[0])
    parser.add_argument("--measure", choices=NAMES)
    parser.add_argument("--device", default="cuda:0", help="or cpu: the simulated device")
    options = parser.parse_args()
    if options.measure is None:
        with tempfile.TemporaryDirectory(prefix="shoal-kvcached-") as folder:
            kvcached_build.built(kvcached_build.checkout(), Path(folder))
            rows = compared(Path(folder).resolve(), options.device)
        save_gpu(Path(os.environ["SHOAL_RESULT"]), rows)
        if not all(row.peer or row.metric == "over fresh" for row in rows):
            sys.exit("something of it did not run")
        return
    figures = of_ours(options.device) if options.measure == "ours" else of_kvcached(options.measure, options.device)
    print(json.dumps(figures), flush=True)
    if options.measure == "kvcached":
        # It aborts where it takes its memory down as Python ends; what was measured is out.
        os._exit(0)


if __name__ == "__main__":
    main()
