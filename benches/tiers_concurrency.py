"""How many conversations are held with a first token within a second: without tiers, with host memory, with a disk too.

A small Llama in the worker's own engine on the simulated device, no HTTP. Conversations of one length take turns in a
random order, two at a time; each turn goes on with what was asked before and a few words more. There are twice as many
from one look to the next, until the slowest of a hundred first tokens takes longer than a second: that is what users
wait where a conversation has to be computed again. The ceiling is what the bytes of the levels hold, had each of them
only what the faster ones lack. Before that, one request at a time, what each move adds: the first token of the same
turn with its KV on the device, in host memory, on disk, and nowhere.

`$SHOAL_DISK` names a directory on the disk to measure. `python -m benches.tiers_concurrency [--quick]`; quick is
shorter, allows a quarter of a second, and writes nothing.
"""

from __future__ import annotations

import argparse
import asyncio
import contextlib
import os
import sys
import time
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING

os.environ["HF_HUB_OFFLINE"] = "1"
sys.path.insert(0, str(Path(__file__).resolve().parents[1]))

import torch

from benches.prefix_first_token import VOCABULARY, first_token, model
from benches.results import Row, of_samples, save
from benches.tiers_restore import folder
from benches.turns import WORDS, Turns
from shoal.testing import simulated_memory
from shoal.worker.device import DeviceMemory
from shoal.worker.engine_causal import CausalEngine
from shoal.worker.kv import KvLayout
from shoal.worker.limits import CausalLimits
from shoal.worker.spec import DiskShare, WorkerSpec

if TYPE_CHECKING:
    from collections.abc import Iterator

MIB = 1 << 20
BLOCK_TOKENS = 16
WAIT_S = 60.0
TIERS = ("no tier", "host", "host and disk")


@dataclass(frozen=True)
class Size:
    """What is asked of how much memory."""

    tokens: int
    allowed_s: float
    device: int
    host: int
    disk: int
    most: int
    rounds: int
    samples: int


WHOLE = Size(
    tokens=4096, allowed_s=1.0, device=160 * MIB, host=640 * MIB, disk=2048 * MIB, most=64, rounds=2, samples=7
)
QUICK = Size(tokens=768, allowed_s=0.25, device=40 * MIB, host=96 * MIB, disk=256 * MIB, most=16, rounds=1, samples=3)


class Talks(Turns):
    """Conversations with one engine."""

    def __init__(self, engine: CausalEngine, memory: DeviceMemory, size: Size) -> None:
        super().__init__(size.tokens, VOCABULARY, "1")
        self.engine, self.memory, self.size = engine, memory, size

    async def ask(self, prompt: list[int]) -> tuple[float, int]:
        """Ask for a token."""
        return await first_token(self.engine, prompt)

    def saved(self) -> None:
        """Wait until what was computed is kept below, where there is a tier."""
        kv = self.memory._kv
        tier = None if kv is None or kv.below is None else kv.below._tier
        if tier is not None and not tier.flush(WAIT_S):
            raise RuntimeError(f"it was not saved in time: {self.memory.tiers()}")

    async def held(self) -> tuple[int, list[tuple[int, float, float, int]]]:
        """Look with twice as many each time; how many were held, and what was seen."""
        seen, held, count = [], 0, 2
        while count <= self.size.most:
            p99, median, samples = await self.slowest(count, self.size.rounds)
            seen.append((count, p99, median, samples))
            print(f"  {count} conversations: p99 {p99:.3f} s, median {median:.3f} s", flush=True)
            if p99 > self.size.allowed_s:
                break
            held, count = count, 2 * count
        return held, seen


@contextlib.contextmanager
def talks(size: Size, tier: str, where: Path) -> Iterator[Talks]:
    """Make an engine with these levels."""
    context = size.tokens + 64
    with simulated_memory(size.device + 256 * MIB, host_budget="512MiB") as mem:
        spec = WorkerSpec(source="x", kv_max_bytes=size.device)
        torch.set_num_threads(spec.threads)
        memory, llama = DeviceMemory(mem), model(context)
        memory.place(llama)
        layout = KvLayout.of(llama.config, llama.dtype, spec.block_tokens)
        engine = CausalEngine(llama, memory, spec, CausalLimits.of(layout, context, spec))
        disks = [DiskShare(str(where / tier), size.disk, 1 << 50)] if "disk" in tier else []
        memory.keep_below(size.host if "host" in tier else 0, disks, lambda: {"model": "small"}, WAIT_S, chooses=True)
        deadline = time.monotonic() + WAIT_S
        while any(told["reason"] for told in memory.tiers()) and time.monotonic() < deadline:
            time.sleep(0.01)
        engine.start()
        try:
            yield Talks(engine, memory, size)
        finally:
            engine.stop()
            memory.close()


def conversations(size: Size, where: Path) -> list[Row]:
    """Count what each stack of levels holds."""
    rows: list[Row] = []
    for tier in TIERS:
        print(tier, flush=True)
        with talks(size, tier, where) as talk:
            held, seen = asyncio.run(talk.held())
            kv = talk.memory._kv
            assert kv is not None
            each = kv.cache.groups[0].block_bytes * (size.tokens // BLOCK_TOKENS)
        room = size.device + (size.host if "host" in tier else 0) + (size.disk if "disk" in tier else 0)
        row = Row(tier, f"conversations, p99 <= {size.allowed_s:g} s", held, "count", "higher")
        row.ceiling = room // each
        if rows:
            row.peer, row.peer_value = "no tier", rows[0].value
        rows.append(row)
        for count, p99, median, samples in seen:
            rows.append(Row(f"{tier}, {count} conversations", "first token, p99", p99, "s", "lower", samples=samples))
            rows[-1].peer, rows[-1].peer_value = "their median", median
    return rows


def moves(size: Size, where: Path) -> list[Row]:
    """Measure what each move adds to a first token, one request at a time."""
    seconds: dict[str, list[float]] = {}

    async def measure(talk: Talks, name: str) -> None:
        kv = talk.memory._kv
        assert kv is not None
        for number in range(size.samples + 1):
            talk.prompts.clear()
            await talk.more(1)
            cases = [("nowhere", 0), ("on the device", size.tokens - WORDS)] if name == "device" else []
            for case, wanted in cases or [(f"in {name}", size.tokens - WORDS)]:
                if case != "on the device":
                    kv.forget_all()
                    if case == "nowhere":
                        talk.prompts = [talk.words(size.tokens)]
                taken, found = await talk.turn(0)
                if found != wanted:
                    raise RuntimeError(f"{case}: {found} tokens were found, not {wanted}")
                if case == "nowhere":
                    talk.prompts.clear()
                    await talk.more(1)
                if number:  # the first round warms up
                    seconds.setdefault(case, []).append(taken)

    for name, tier in (("device", "no tier"), ("host", "host"), ("disk", "disk")):
        with talks(size, tier, where) as talk:
            if talk.memory._kv is not None and talk.memory._kv.below is not None:
                # What is measured is the move, whether it is worth it or not.
                talk.memory._kv.below.computed = lambda *_: None  # type: ignore[method-assign]
            asyncio.run(measure(talk, name))
    at_once = of_samples("", "", seconds["on the device"], "s", "lower").value
    computed = of_samples("", "", seconds["nowhere"], "s", "lower").value
    rows = []
    for case, times in seconds.items():
        row = of_samples(f"{size.tokens} tokens, KV {case}", "first token", times, "s", "lower")
        row.ceiling, row.peer, row.peer_value = at_once, "computing them", computed
        rows.append(row)
        print(row.line(), flush=True)
    for case in ("in host", "in disk"):
        added = of_samples("", "", seconds[case], "s", "lower").value - at_once
        rows.append(Row(f"{size.tokens} tokens, KV {case}", "added by the move", added, "s", "lower"))
        print(rows[-1].line(), flush=True)
    return rows


def main() -> None:
    """Run it."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--quick", action="store_true", help="shorter, and nothing is written")
    options = parser.parse_args()
    size = QUICK if options.quick else WHOLE
    with folder() as where:
        rows = moves(size, where) + conversations(size, where)
    if not options.quick:
        save("tiers_concurrency", rows)


if __name__ == "__main__":
    main()
