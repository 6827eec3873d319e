"""How much of a multi-turn trace is found again on the device, in host memory and on disk, against plain LRU.

The trace is seeded: applications with a system prompt each, of unlike popularity; conversations of several turns with
pauses between them; and prompts that are asked once and never again. It runs through the real cache, host tier and disk
tier, on the simulated device with blocks of 16 KiB; nothing is computed, blocks are sealed as if it were. The peer is
the same levels with as many blocks, each forgetting what was used longest ago. The ceiling is a cache without end: what
is missed there was never seen before. Host and disk of the peer have as many blocks as ours had at most.

`python -m benches.tiers_hit_ratio [--quick]`.
"""

from __future__ import annotations

import argparse
import heapq
import itertools
import random
import sys
import tempfile
from collections import OrderedDict
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))

from benches.results import Row, save
from benches.tiers_restore import folder
from shoal import DiskTier, HostTier, TierStack
from shoal.testing import simulated_memory

if TYPE_CHECKING:
    from collections.abc import Iterator

BLOCK = 16
BLOCK_BYTES = 16 << 10
VOCABULARY = 1 << 20
APPLICATIONS, SYSTEM = 12, 24
SEEDS = (1, 2, 3)
WAIT_S = 60.0


@dataclass(frozen=True)
class Size:
    """How long a trace is, and how many blocks each level has."""

    turns: int
    users: int
    device: int
    host: int
    disk: int


WHOLE = Size(turns=4000, users=160, device=800, host=4000, disk=16000)
QUICK = Size(turns=400, users=32, device=200, host=800, disk=3200)


def trace(seed: int, size: Size) -> Iterator[list[int]]:
    """Give prompts in the order they are asked; an answer is a part of the next one."""
    draw = random.Random(seed)  # noqa: S311 - a made-up trace

    def tokens(count: int) -> list[int]:
        return [draw.randrange(1, VOCABULARY) for _ in range(count)]

    systems = [tokens(SYSTEM * BLOCK) for _ in range(APPLICATIONS)]
    weights = [1 / (rank + 1) for rank in range(APPLICATIONS)]
    order = itertools.count()
    waiting: list[tuple[float, int, list[int], int]] = []

    def begin(at: float) -> None:
        (system,) = draw.choices(systems, weights)
        # Four of ten are asked once: documents, tools, curiosity.
        turns = 1 if draw.random() < 0.4 else draw.randint(2, 12)
        start = [*system, *tokens(draw.randint(2, 20 if turns > 1 else 60) * BLOCK)]
        heapq.heappush(waiting, (at, next(order), start, turns))

    for _ in range(size.users):
        begin(draw.expovariate(1 / 30))
    for _ in range(size.turns):
        at, _, prompt, left = heapq.heappop(waiting)
        yield prompt
        if left > 1:
            # A pause of a minute, now and then much longer.
            pause = draw.lognormvariate(4, 1.2)
            more = [*prompt, *tokens(draw.randint(5, 28) * BLOCK)]
            heapq.heappush(waiting, (at + pause, next(order), more, left - 1))
        else:
            begin(at + draw.expovariate(1 / 30))


def names(prompt: list[int]) -> list[int]:
    """Give a name for each full block of a prompt, which says all that comes before it."""
    name, found = 0, list[int]()
    for at in range(0, len(prompt) // BLOCK * BLOCK, BLOCK):
        name = hash((name, *prompt[at : at + BLOCK]))
        found.append(name)
    return found


class Lru:
    """One level that forgets what was used longest ago."""

    def __init__(self, blocks: int) -> None:
        self.blocks, self.kept = blocks, OrderedDict[int, None]()

    def use(self, name: int) -> bool:
        """Whether it is there; if so, it was used just now."""
        if name not in self.kept:
            return False
        self.kept.move_to_end(name)
        return True

    def put(self, name: int) -> None:
        """Keep it, and make room."""
        self.kept[name] = None
        self.kept.move_to_end(name)
        while len(self.kept) > self.blocks:
            self.kept.popitem(last=False)


def plain(seed: int, size: Size, levels: list[int]) -> tuple[float, float]:
    """Give the part of blocks that levels of plain LRU find in a row, and the part that a cache without end would."""
    tiers, seen = [Lru(blocks) for blocks in levels], set[int]()
    asked = found = known = 0
    for prompt in trace(seed, size):
        wanted = names(prompt)
        asked += len(wanted)
        hits = 0
        for name in wanted:
            # All levels: used is used, wherever it is found first.
            uses = [tier.use(name) for tier in tiers]
            if not any(uses):
                break
            hits += 1
        found += hits
        known += sum(1 for _ in itertools.takewhile(seen.__contains__, wanted))
        # From the end on, as the better engines do it, so that the beginning, which more prompts have, goes last.
        for name in reversed(wanted):
            seen.add(name)
            for tier in tiers:
                tier.put(name)
    return found / asked, known / asked


def ours(seed: int, size: Size, tier: str, where: Path) -> tuple[float, int, int]:
    """Give the part of blocks that the real levels find in a row, and the most blocks that host and disk had."""
    host = HostTier(size.host * (BLOCK_BYTES + 8192)) if "host" in tier else None
    with tempfile.TemporaryDirectory(dir=where) as made:
        disk = DiskTier([(made, size.disk * BLOCK_BYTES * 5 // 4)]) if "disk" in tier else None
        with simulated_memory(size.device * BLOCK_BYTES + (32 << 20), host_budget="64MiB") as mem:
            kv = mem.kv_cache(layers=1, kv_heads=1, head_dim=256, dtype="float16", max_bytes=size.device * BLOCK_BYTES)
            stack = TierStack([one for one in (host, disk) if one is not None])
            below = kv.attach_store(stack, {"model": "a"}, load_s=WAIT_S) if host or disk else None
            group, asked, found, in_host, on_disk = kv.groups[0], 0, 0, 0, 0
            for prompt in trace(seed, size):
                full = len(prompt) // BLOCK
                hits, ids = kv.match(prompt)
                if below is not None:
                    below.save(prompt[:hits])
                    ids += below.load(prompt, ids)
                asked, found = asked + full, found + len(ids)
                first = len(ids)
                more = group.alloc(full - first)
                if more is None:
                    raise RuntimeError(f"no blocks: {kv.usage()}")
                ids += more
                kv.seal(prompt, ids)
                if below is not None:
                    below.save(prompt, first=first)
                    # So that the result is the same in every run: a tier has all before the next one asks.
                    if not below.flush(WAIT_S):
                        raise RuntimeError("it was not saved in time")
                group.free(ids)
                if host is not None:
                    in_host = max(in_host, host.usage()["blocks"])
                if disk is not None:
                    on_disk = max(on_disk, sum(place["blocks"] for place in disk.places()))
            del below, stack, kv
        if disk is not None:
            disk.close(WAIT_S)
    return found / asked, in_host, on_disk


def measure(size: Size, where: Path) -> list[Row]:
    """Measure every stack of levels on every seed."""
    rows = []
    for tier in ("device", "device, host", "device, host, disk"):
        found, peers, ceilings = [], [], []
        for seed in SEEDS if size is WHOLE else SEEDS[:1]:
            ratio, *below = ours(seed, size, tier, where)
            levels = [size.device, *(blocks for blocks in below if blocks)]
            peer, ceiling = plain(seed, size, levels)
            found.append(ratio)
            peers.append(peer)
            ceilings.append(ceiling)
        mean = sum(found) / len(found)
        row = Row(tier, "blocks found", mean, "ratio", "higher", samples=len(found), spread=(min(found), max(found)))
        row.ceiling, row.peer = sum(ceilings) / len(ceilings), "plain LRU"
        row.peer_value = sum(peers) / len(peers)
        rows.append(row)
        print(row.line(), flush=True)
    return rows


def main() -> None:
    """Run it."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--quick", action="store_true", help="shorter, and nothing is written")
    options = parser.parse_args()
    with folder() as where:
        rows = measure(QUICK if options.quick else WHOLE, where)
    if not options.quick:
        save("tiers_hit_ratio", rows)


if __name__ == "__main__":
    main()
