"""How many conversations of an 8B's shape are held with a first token within a second, by tiers.

Run by `tests/gpu/run.sh tiers_concurrency`. The same engine as in `tiers_restore`, no HTTP. Conversations of 16k tokens
(2 GiB of KV each; computing two of them takes more than a second) take turns in a random order, two at a time; each
turn goes on with what was asked before and 32 tokens more. There are more of them from one look to the next, until the
99th percentile of first tokens (of so few the slowest) is longer than a second. The ceiling is what the bytes of the
levels hold, had each of them only what the faster ones lack. What is loaded and what is computed is decided by what
both took, as `tier_load = "fastest"` does. Before that, one request at a time, what each move adds, worth it or not:
the same turn with its KV on the device, in host memory, on disk, and nowhere. $SHOAL_TIERS_DEVICE=sim makes a small dry
run; $SHOAL_DISK names a directory on the disk to use.
"""

from __future__ import annotations

import asyncio
import os
import sys
import tempfile
import time
from pathlib import Path
from typing import Self

from benches.results import Row, of_samples
from benches.tiers_restore import free_bytes
from benches.turns import WORDS, Turns
from tests.gpu.tiers_blocks import GIB, MIB, ON_GPU, WAIT_S, device_memory, link_bytes_per_s
from tests.gpu.tiers_restore import VOCABULARY, Bench

from shoal.worker.sampling import Sampling
from shoal.worker.spec import DiskShare

TOKENS = 16 << 10 if ON_GPU else 128
LOOKS = (2, 4, 8, 12, 16, 24) if ON_GPU else (2, 4, 8)
HOST = 24 * GIB if ON_GPU else 8 * MIB
DISK = 24 * GIB if ON_GPU else 16 * MIB
ALLOWED_S = 1.0
END_S = 330.0  # no further look begins after that: it would not end in time
TIERS = ("no tier", "host", "host and disk")


class Talks(Turns):
    """Conversations with the engine of a bench, under one stack of tiers."""

    def __init__(self, bench: Bench, tier: str, *, chooses: bool) -> None:
        super().__init__(TOKENS, VOCABULARY, tier)
        self.bench, self.tier, self.chooses = bench, tier, chooses

    def __enter__(self) -> Self:
        host = HOST if "host" in self.tier else 0
        disks = [DiskShare(str(self.bench.where / self.tier), DISK, 1 << 50)] if "disk" in self.tier else []
        self.bench.kv.forget_all()
        self.bench.memory.keep_below(host, disks, lambda: {"model": "8b"}, WAIT_S, chooses=self.chooses)
        deadline = time.monotonic() + WAIT_S
        while any(told["reason"] for told in self.bench.memory.tiers()):
            if time.monotonic() > deadline:
                raise RuntimeError(f"a tier does not open: {self.bench.told()}")
            time.sleep(0.01)
        return self

    def __exit__(self, *_: object) -> None:
        self.bench.kv.forget_all()
        self.bench.memory.close()
        self.bench.kv.below = None

    def saved(self) -> None:
        """Wait until what was computed is kept below, where there is a tier."""
        below = self.bench.kv.below
        if below is not None and below._tier is not None and not below._tier.flush(WAIT_S):
            raise RuntimeError(f"it was not saved in time: {self.bench.told()}")

    async def ask(self, prompt: list[int]) -> tuple[float, int]:
        """Ask for one token; its seconds, and how much of the prompt was found."""
        begun = time.perf_counter()
        generation = self.bench.engine.submit(prompt, Sampling(temperature=0.0), 1, salt=self.tier)
        async for _ in generation:
            return time.perf_counter() - begun, generation.cached_tokens
        raise RuntimeError("there was no token")


async def held(talk: Talks, rows: list[Row]) -> int:
    """Look with more each time; how many were held."""
    most = 0
    for count in LOOKS:
        if time.monotonic() - talk.bench.begun > END_S:
            talk.bench.say(f"{talk.tier}: {count} and more are left out: no time")
            break
        # Twice where they are few.
        p99, median, samples = await talk.slowest(count, 2 if count <= 8 else 1)
        row = Row(f"{talk.tier}, {count} conversations", "first token, p99", p99, "s", "lower", samples=samples)
        row.peer, row.peer_value = "their median", median
        rows.append(row)
        talk.bench.say(row.line())
        if p99 > ALLOWED_S:
            break
        most = count
    return most


async def moved(talk: Talks, case: str, samples: int) -> Row:
    """Measure the first token of a turn whose KV is in one place, one request at a time."""
    await talk.more(1)
    times = []
    for number in range(samples + 1):
        if case != "on the device":
            talk.bench.kv.forget_all()
        if case == "nowhere":
            talk.prompts = [talk.words(TOKENS)]
        taken, found = await talk.turn(0)
        if found != (0 if case == "nowhere" else TOKENS - WORDS):
            raise RuntimeError(f"{case}: {found} tokens were found: {talk.bench.told()}")
        if number:  # the first one warms up
            times.append(taken)
    return of_samples(f"{TOKENS} tokens, KV {case}", "first token", times, "s", "lower")


def moves(bench: Bench, has_disk: bool) -> list[Row]:
    """Measure what each move adds to a first token."""
    rows = []
    for case, tier in (("nowhere", "no tier"), ("on the device", "no tier"), ("in host", "host"), ("on disk", "disk")):
        if tier == "disk" and not has_disk:
            continue
        # What is measured is the move, whether it is worth it or not.
        with Talks(bench, tier, chooses=False) as talk:
            rows.append(asyncio.run(moved(talk, case, 3)))
            bench.say(rows[-1].line())
    at_once = rows[1].value
    for row in rows[2:]:
        row.peer, row.peer_value = "computing them", rows[0].value
    added = [Row(row.case, "added by the move", row.value - at_once, "s", "lower") for row in rows[2:]]
    return rows + added


def conversations(bench: Bench, has_disk: bool) -> None:
    """Count what each stack of levels holds; adds to the bench's rows, and writes them as it goes."""
    device, each = bench.kv.cache.region.bytes, TOKENS * bench.token_bytes
    without: float | None = None
    for tier in TIERS if has_disk else TIERS[:2]:
        looks: list[Row] = []
        with Talks(bench, tier, chooses=True) as talk:
            most = asyncio.run(held(talk, looks))
        room = device + (HOST if "host" in tier else 0) + (DISK if "disk" in tier else 0)
        row = Row(tier, f"conversations, p99 <= {ALLOWED_S:g} s", most, "count", "higher")
        row.ceiling = room // each
        if without is not None:
            row.peer, row.peer_value = "no tier", without
        else:
            without = most
        bench.rows += [row, *looks]
        bench.say(row.line())
        bench.save()


def main() -> int:
    """Measure."""
    begun = time.monotonic()
    base = Path(os.environ.get("SHOAL_DISK") or tempfile.gettempdir())
    has_disk = free_bytes(base)[1] > 2 * DISK + 4 * GIB
    link = link_bytes_per_s(up=True)
    with (
        tempfile.TemporaryDirectory(prefix="tiers-concurrency-", dir=base) as made,
        device_memory(30 * GIB if ON_GPU else 256 * MIB) as mem,
    ):
        bench = Bench(mem, Path(made), begun, link)
        if not has_disk:
            bench.say("the disk is left out: too little is free")
        try:
            bench.rows += moves(bench, has_disk)
            bench.save()
            conversations(bench, has_disk)
        finally:
            bench.save()
            print("\n".join(row.line() for row in bench.rows))
            bench.engine.stop()
            bench.memory.close()
    return 0


if __name__ == "__main__":
    sys.exit(main())
