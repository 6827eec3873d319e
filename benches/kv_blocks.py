"""What KV blocks cost from Python: taking and giving back, and finding again.

The ceiling of a pair of calls is the same pair on an empty buffer or list, in the same run: what Python and the
buffer protocol cost by themselves. Of finding again and evicting it is as many blocks taken and given back as a list.
The peer is kvcached with driver calls that do nothing (`benches/kvcached_peer.py`), in the same run where a folder
with it is given. Of finding again and evicting there are two (`benches/prefix_peers.py`): vLLM's block pool, where it
is said what vLLM can be imported from, and kvcached's in its place, where both are there. All are the best of several
rounds' means: what others do on the machine meanwhile is not theirs. Part-filled are 400 granules with one block of 64
in use, or (mixed) with 0 to 63, at places by chance; what is scattered has no neighbours. In how many words of 64 as
many blocks lie is the ceiling of what they cost more (docs/decisions/0015).
`python -m benches.kv_blocks [--quick] [--peer FOLDER] [--vllm PATHS]`.
"""

from __future__ import annotations

import argparse
import itertools
import json
import os
import subprocess
import sys
import threading
import time
from dataclasses import replace
from pathlib import Path
from typing import TYPE_CHECKING

import numpy as np

import shoal
from benches import kvcached_peer
from benches.results import ROOT, Row, of_best, over, save

if TYPE_CHECKING:
    from collections.abc import Callable

    from shoal import KvCache

MIB = 1 << 20
PEER = "kvcached e8e6406, driver stubbed, lists"
TARGET_16_S = 0.6e-6
TARGET_BULK_S = 10e-9
# A tenth is what one measures twice.
TARGET_SAME = 1.1
TURNS = 8
THREADS = 8
# 64 blocks of 32 KiB in each granule of 2 MiB.
PER_GRANULE = 64
STATES = ("fresh", "part-filled", "mixed", "scattered")


def cache(mem: shoal.MemoryManager, granules: int, **words: object) -> KvCache:
    """Make a cache whose granules are all of 2 MiB."""
    shape = {"layers": 1, "kv_heads": 4, "head_dim": 128, "dtype": "bfloat16", "block_tokens": 16}
    given: dict = {"max_bytes": granules * 2 * MIB, "granule_max": 2 * MIB, "patience_s": 30, **shape, **words}
    return mem.kv_cache(**given)


def mapped(kv: KvCache, blocks: int) -> None:
    """Have so many blocks mapped and free."""
    ids = kv.alloc(blocks)
    assert ids is not None
    kv.free(ids)


def words(state: str, count: int) -> int:
    """Count the words of 64 blocks in which so many free ones lie (docs/decisions/0015)."""
    return kvcached_peer.words(STATES.index(state), count)


def fragment(kv: KvCache, state: str) -> list[int]:
    """Leave 400 granules as a state says; the blocks that are in use."""
    ways = {"part-filled": kvcached_peer.fragment, "mixed": kvcached_peer.mix, "scattered": kvcached_peer.scatter}
    return ways[state](kv) if state in ways else []


def timed(act: Callable[[int], None], seconds: float, rounds: int = 200) -> list[float]:
    """Seconds of one call of `act`, several times; `act(n)` does it n times."""
    n = 1
    while True:
        start = time.perf_counter()
        act(n)
        taken = time.perf_counter() - start
        if taken > seconds / 100:
            break
        n *= 2
    n = max(1, int(n * seconds / rounds / max(taken, 1e-9)))
    samples = []
    for _ in range(rounds):
        start = time.perf_counter()
        act(n)
        samples.append((time.perf_counter() - start) / n)
    return samples


def buffers(kv: KvCache, count: int) -> Callable[[int], None]:
    """Alloc and free of `count` through a buffer."""
    ids = np.zeros(count, np.int64)
    alloc, free = kv.alloc_into, kv.free_from

    def act(n: int) -> None:
        for _ in range(n):
            alloc(ids)
            free(ids)

    act(1)
    return act


def lists(kv: KvCache, count: int) -> Callable[[int], None]:
    """Alloc and free of `count` as lists."""
    alloc, free = kv.alloc, kv.free

    def act(n: int) -> None:
        for _ in range(n):
            free(alloc(count))  # type: ignore[arg-type]

    act(1)
    return act


def blocks(seconds: float, peer: dict[tuple[str, int], float]) -> list[Row]:
    """Time alloc and free, fresh and fragmented in turn, so that what else the machine does meets all."""
    mem = shoal.MemoryManager("sim", device_budget="8GiB", device_capacity="8GiB", host_budget="64MiB")
    # What is free stays mapped meanwhile: this is about blocks, not about mapping.
    kvs = {state: cache(mem, 1000, spare_max="2GiB", name=state) for state in STATES}
    held = {state: fragment(kv, state) for state, kv in kvs.items()}
    rows: dict[str, list[Row]] = {state: [] for state in kvs}
    ratios = []
    for kv in kvs.values():
        mapped(kv, 4096)
    nothing = {kind: in_turn(kvs, kind, 0, seconds) for kind in KINDS}
    for count in (1, 16, 256, 4096):
        for kv in kvs.values():
            kv.hint(4096)
        for kind, said in KINDS.items():
            samples = in_turn(kvs, kind, count, seconds)
            for state, taken in samples.items():
                row = of_best(f"{state}: {count} {said}", "alloc and free", taken)
                row.ceiling, row.peer_value = min(nothing[kind][state]), peer.get((state, count))
                row.peer = PEER if row.peer_value else None
                if kind is buffers and count >= 16:
                    row.target = TARGET_16_S if count == 16 else TARGET_BULK_S * count
                    row.met = row.value <= row.target
                rows[state].append(row)
            if kind is buffers:
                for state in STATES[1:]:
                    row = over(f"{count} {said}", f"{state} over fresh", samples[state], samples["fresh"], TARGET_SAME)
                    row.ceiling = words(state, count) / words("fresh", count)
                    ratios.append(row)
    for state, kv in kvs.items():
        kv.free(held[state])
        kv.check()
    return [*itertools.chain(*rows.values()), *ratios]


KINDS = {buffers: "through a buffer", lists: "as a list"}


def in_turn(kvs: dict[str, KvCache], kind: Callable, count: int, seconds: float) -> dict[str, list[float]]:
    """Time one kind of calls in each cache, a few rounds of one and then of the next."""
    samples: dict[str, list[float]] = {state: [] for state in kvs}
    for _ in range(TURNS):
        for state, kv in kvs.items():
            samples[state] += timed(kind(kv, count), seconds / TURNS, 200 // TURNS)
    return samples


def peer_seconds(folder: Path | None, seconds: float) -> tuple[dict[tuple[str, int], float], float | None]:
    """Measure kvcached, if there is one: seconds of pairs, and pairs a second of eight threads."""
    if folder is None:
        return {}, None
    manager = kvcached_peer.load(folder.resolve())
    rate = kvcached_peer.threads_rate(manager, 16, THREADS, seconds * 5)
    peer = kvcached_peer.measure(manager)
    states = zip(STATES, kvcached_peer.STATES, strict=True)
    cases = itertools.product(states, (count for count, _ in kvcached_peer.BATCHES))
    return {(state, count): min(peer[f"{count} blocks{said}"]) * 1e-6 for (state, said), count in cases}, rate


def threads(seconds: float, peer: float | None, count: int = THREADS) -> list[Row]:
    """Eight threads of Python at once, 16 blocks a pair of calls."""
    mem = shoal.MemoryManager("sim", device_budget="1GiB", device_capacity="1GiB", host_budget="64MiB")
    kv = cache(mem, 100, spare_max="200MiB")
    mapped(kv, 16 * count * 4)
    alone = 1 / min(timed(buffers(kv, 16), seconds))
    done = [0] * count
    over = threading.Event()

    def run(me: int) -> None:
        act = buffers(kv, 16)
        while not over.is_set():
            act(1000)
            done[me] += 1000

    started = [threading.Thread(target=run, args=(me,)) for me in range(count)]
    start = time.perf_counter()
    for thread in started:
        thread.start()
    time.sleep(seconds * 5)
    over.set()
    for thread in started:
        thread.join()
    rate = sum(done) / (time.perf_counter() - start)
    row = Row(f"{count} threads: 16 through a buffer", "pairs a second, all threads", rate, "1/s", "higher")
    row.ceiling, row.peer_value, row.peer = alone, peer, PEER if peer else None
    listed = Row(
        f"{count} threads: 16 as a list",
        row.metric,
        kvcached_peer.threads_rate(kv, 16, count, seconds * 5),
        "1/s",
        "higher",
    )
    listed.ceiling, listed.peer_value, listed.peer = 1 / min(timed(lists(kv, 16), seconds)), peer, row.peer
    return [row, listed]


def prefix_peers(seconds: float, blocks: int, vllm: str | None, folder: Path | None) -> dict[str, dict[str, float]]:
    """Measure other libraries' pools of that many blocks, each in a process of its own: seconds by case, by name."""
    found = {}
    for which in ("vllm", "kvcached") if vllm else ():
        if which == "kvcached" and folder is None:
            continue
        command = [sys.executable, "-m", "benches.prefix_peers", which, str(blocks), str(seconds)]
        command += ["--kvcached", str(folder.resolve())] if folder else []
        paths = [str(ROOT), vllm or "", os.environ.get("PYTHONPATH", "")]
        environment = os.environ | {"PYTHONPATH": os.pathsep.join(filter(None, paths))}
        said = subprocess.run(command, env=environment, capture_output=True, text=True, timeout=600, check=False)
        if said.returncode != 0:
            raise SystemExit(f"{which} could not be measured:\n{said.stderr[-3000:]}")
        told = json.loads(said.stdout.splitlines()[-1])
        pool = f"vLLM {told['version']}'s block pool"
        found[pool if which == "vllm" else f"kvcached e8e6406's pool in {pool}, driver stubbed"] = told["figures"]
    return found


def beside(rows: dict[str, Row], peers: dict[str, dict[str, float]]) -> list[Row]:
    """Give each row once for each peer, or once alone."""
    told = []
    for case, row in rows.items():
        named = [(name, figures[case]) for name, figures in peers.items() if case in figures]
        for place, (name, figure) in enumerate(named):
            metric = row.metric if place == 0 else f"{row.metric}, beside {name.split()[0]}"
            told.append(replace(row, metric=metric, peer=name, peer_value=figure))
        if not named:
            told.append(row)
    return told


GRANULES = 2000


def prefixes(seconds: float, peers: dict[str, dict[str, float]]) -> list[Row]:
    """Match and seal 4096 tokens; take blocks that have to be evicted, with 128,000 cached."""
    rows = {}
    mem = shoal.MemoryManager("sim", device_budget="8GiB", device_capacity="8GiB", host_budget="64MiB")
    kv = cache(mem, GRANULES)
    # Lists, as engines have them, and as the peers are given them.
    tokens = list(range(4096))
    keys = [index.to_bytes(32, "big") for index in range(256)]
    ids, other = kv.alloc(256), kv.alloc(256)
    assert ids is not None
    assert other is not None
    kv.seal(tokens, ids)
    kv.seal_keys(keys, other)

    def match(n: int) -> None:
        for _ in range(n):
            _, found = kv.match(tokens)
            kv.free(found)

    def match_keys(n: int) -> None:
        for _ in range(n):
            _, found = kv.match_keys(keys)
            kv.free(found)

    # The ceiling: the same blocks taken and given back as a list, without looking for anything.
    plain = min(timed(lists(kv, 256), seconds))
    rows["match"] = of_best("4096 tokens, 256 blocks", "match and free", timed(match, seconds))
    rows["match by keys"] = of_best("256 keys of 32 bytes", "match and free", timed(match_keys, seconds))

    def seal_again(n: int) -> None:
        for _ in range(n):
            kv.seal(tokens, ids)

    rows["seal"] = of_best("4096 tokens, 256 blocks that are sealed already", "seal", timed(seal_again, seconds))
    kv.free(ids)
    kv.free(other)
    sequence, evicting, keeping = 0, 0.0, 0.0

    def commit(n: int, *, by_keys: bool = False) -> None:
        nonlocal sequence, evicting, keeping
        for _ in range(n):
            sequence += 1
            first = 4096 * sequence
            content: list = [index.to_bytes(32, "big") for index in range(first, first + 256)]
            content = content if by_keys else [token + first for token in tokens]
            start = time.perf_counter()
            own = kv.alloc(256)
            taken = time.perf_counter()
            assert own is not None
            if by_keys:
                kv.seal_keys(content, own)
            else:
                kv.seal(content, own)
            kv.free(own)
            evicting += taken - start
            keeping += time.perf_counter() - start

    def shares(by_keys: bool) -> tuple[list[float], list[float]]:
        """Seconds of taking blocks, and of all of it, without making tokens."""
        nonlocal evicting, keeping
        taking, whole = [], []
        for _ in range(40):
            evicting = keeping = 0.0
            commit(10, by_keys=by_keys)
            taking.append(evicting / 10)
            whole.append(keeping / 10)
        return taking, whole

    # Until everything is cached.
    commit(GRANULES * PER_GRANULE // 256 + 1)
    cached = kv.usage()["groups"][0]["cached_blocks"]
    assert cached >= 100_000, cached
    case = f"{cached} blocks cached, each of 256 new ones evicts one"
    taking, whole = shares(by_keys=False)
    rows["commit"] = of_best(f"4096 tokens, {case}", "alloc, seal and free", whole)
    rows["alloc"] = of_best(f"4096 tokens, {case}", "alloc", taking)
    commit(GRANULES * PER_GRANULE // 256 + 1, by_keys=True)
    rows["commit by keys"] = of_best(f"256 keys of 32 bytes, {case}", "alloc, seal and free", shares(by_keys=True)[1])
    for name in ("match", "match by keys", "commit", "alloc", "commit by keys"):
        rows[name].ceiling = plain
    kv.check()
    return beside(rows, peers)


def main() -> None:
    """Run all of it."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--quick", action="store_true", help="shorter, and nothing is written")
    parser.add_argument("--peer", type=Path, help="a folder that kvcached_peer.py has built")
    parser.add_argument("--vllm", help="a path, or several joined by a colon, that vLLM can be imported from")
    options = parser.parse_args()
    # Rounds of a few milliseconds: some of them fall between what others do on the machine.
    seconds = 0.2 if options.quick else 1.0
    peer, peer_rate = peer_seconds(options.peer, seconds)
    rows = [
        *blocks(seconds, peer),
        *threads(seconds, peer_rate),
        *prefixes(seconds, prefix_peers(seconds, GRANULES * PER_GRANULE, options.vllm, options.peer)),
    ]
    if options.quick:
        for row in rows:
            print(row.line())
    else:
        save("kv_blocks", rows)


if __name__ == "__main__":
    main()
