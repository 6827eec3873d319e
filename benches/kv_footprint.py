"""What memory stays mapped after bursts, over what is live: ours without and with compaction, beside kvcached's pages.

Nothing is timed. The same requests come and go in both: 8 layers of 8 heads of 128 in bfloat16, 512 KiB a block, 1 GiB
of it live in the end. kvcached (`benches/kvcached_peer.py`, driver calls that do nothing) counts the pages in which
blocks lie, what it keeps in reserve left out; it has nothing that moves blocks.
`python -m benches.kv_footprint [--peer FOLDER]`, the folder as kvcached_peer.py has built it.
"""

from __future__ import annotations

import argparse
import random
import time
from pathlib import Path
from typing import TYPE_CHECKING, Any

import shoal
from benches import kvcached_peer
from benches.results import Row, save

if TYPE_CHECKING:
    from shoal import KvCache

MIB, GIB = 1 << 20, 1 << 30
LIVE_BYTES, MAX_BYTES = GIB, 12 * GIB
LAYERS = 8
BLOCK_BYTES = 2 * LAYERS * kvcached_peer.BLOCK_TOKENS * kvcached_peer.TOKEN_BYTES
PEER = "kvcached e8e6406, driver stubbed, pages of 2 MiB"
# What a burst comes to, over what stays of it.
TRACES = {"half of each request leaves": 2, "nine of ten requests leave": 6, "at random": 4}
SEED = 7
# As long as a page of kvcached with all layers side by side.
SHORT = "32 MiB"
TARGET = 1.05


def burst(trace: str, manager: Any) -> int:
    """Have requests of 8 to 256 blocks come and go as a trace says; the blocks that are live then."""
    chance = random.Random(SEED)  # noqa: S311
    wanted = LIVE_BYTES // BLOCK_BYTES
    requests: list[list[int]] = []
    while sum(map(len, requests)) < TRACES[trace] * wanted:
        ids = manager.alloc(chance.randint(8, 256))
        if ids is None:
            raise SystemExit(f"no memory for the burst of {trace!r}")
        requests.append([int(block) for block in ids])
    if trace == "half of each request leaves":
        for ids in requests:
            manager.free(ids[1::2])
            del ids[1::2]
    elif trace == "nine of ten requests leave":
        chance.shuffle(requests)
        while sum(map(len, requests)) > wanted:
            manager.free(requests.pop())
    else:
        every = [block for ids in requests for block in ids]
        chance.shuffle(every)
        manager.free(every[wanted:])
        requests = [every[:wanted]]
    return sum(map(len, requests))


def settled(kv: KvCache) -> float:
    """Wait until nothing is expected any more and no memory is on its way; mapped over live then.

    Demand is forgotten after two seconds. What is on its way out counts as mapped and not as empty, however long a busy
    machine takes for it: so nothing may have changed for six.
    """
    deadline = time.monotonic() + 60
    since, before = time.monotonic(), -1
    while True:
        usage = kv.usage()
        if usage["empty"] or usage["mapped"] != before:
            since, before = time.monotonic(), usage["mapped"]
        if time.monotonic() - since > 6:
            return float(usage["mapped"] / usage["live"])
        if time.monotonic() > deadline:
            raise SystemExit(f"memory is on its way for a minute: {usage}")
        time.sleep(0.2)


def of_kvcached(folder: Path, trace: str) -> float:
    """Give the same of kvcached, in a manager of its own."""
    manager = kvcached_peer.load(folder.resolve(), MAX_BYTES // BLOCK_BYTES, LAYERS)
    live = burst(trace, manager)
    manager.trim()
    return float(manager.get_mapped_memory_size() / (live * BLOCK_BYTES))


def main() -> None:
    """Count all of it, and write the file."""
    parser = argparse.ArgumentParser(description=(__doc__ or "").partition("\n")[0])
    parser.add_argument("--peer", type=Path, help="a folder that kvcached_peer.py has built")
    options = parser.parse_args()
    mem = shoal.MemoryManager("sim", device_budget="16GiB", device_capacity="16GiB", host_budget="64MiB")
    rows = []
    for trace in TRACES:
        peer = of_kvcached(options.peer, trace) if options.peer else None
        for granules, most in (("", "256MiB"), (f", granules of {SHORT} at most", SHORT)):
            kv = mem.kv_cache(
                max_bytes=MAX_BYTES, layers=LAYERS, kv_heads=8, head_dim=128, dtype="bfloat16",
                block_tokens=kvcached_peer.BLOCK_TOKENS, name=trace, patience_s=30, granule_max=most,
            )  # fmt: skip
            assert kv.groups[0].block_bytes == BLOCK_BYTES
            case = f"burst, then {trace}; {burst(trace, kv) * BLOCK_BYTES / GIB:.2f} GiB live{granules}"
            plain = settled(kv)
            moves = kv.compact(apply=True)
            rows += [
                Row(case, "mapped over live", plain, "", "lower", ceiling=1.0),
                Row(case, f"the same, {len(moves)} blocks moved", settled(kv), "", "lower", ceiling=1.0, target=TARGET),
            ]
            rows[-1].met = rows[-1].value <= TARGET
            for row in rows[-2:]:
                row.peer, row.peer_value = (PEER, peer) if peer is not None else (None, None)
            del kv
    save("kv_footprint", rows)


if __name__ == "__main__":
    main()
