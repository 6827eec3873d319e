"""Blocks that move between two steps change no token, memory between them comes back, and what comes is foreseen."""

from __future__ import annotations

import asyncio
import random
import threading
import time

import pytest

from shoal.testing import simulated_memory
from shoal.worker import device, engine_causal
from shoal.worker.device import DeviceMemory
from shoal.worker.engine_causal import CausalEngine
from shoal.worker.kv import PADDING_BLOCKS, KvLayout
from shoal.worker.limits import CausalLimits
from shoal.worker.spec import WorkerSpec

from .conftest import llama
from .plain import PlainMemory
from .test_engine_causal import alone, engine_of, prompts, settled, tokens_of
from .test_prefixes import FAMILIES, PROMPTS, expected, model_of

MIB = 1 << 20
WAIT_S = 60.0


@pytest.mark.parametrize("family", FAMILIES)
def test_blocks_that_move_between_all_steps_change_no_token(family, monkeypatch):
    """Every step finds half of its blocks elsewhere: owned, shared, cached, padding, of full and windowed layers."""
    monkeypatch.setattr(engine_causal, "_COMPACT_S", 0.0)
    monkeypatch.setattr(engine_causal, "_PREEMPT_S", 0.03)
    wanted = [expected(family, index) for index in range(len(PROMPTS))]
    memory = PlainMemory(moves=random.Random(1))
    with engine_of(model_of(family), memory, kv_max_bytes=32 * MIB) as engine:

        async def run(seed):
            draw = random.Random(seed)
            asked = [draw.randrange(len(PROMPTS)) for _ in range(6)]
            tasks = [asyncio.create_task(tokens_of(engine, PROMPTS[index], 20)) for index in asked]
            tasks[0].cancel()
            for index, task in zip(asked[1:], tasks[1:], strict=True):
                assert await asyncio.wait_for(task, WAIT_S) == wanted[index], index
            await settled(lambda: not memory.space.ids, WAIT_S)

        for seed in range(3):
            memory.blocks_max = (1 << 30) if seed != 1 else 24 + PADDING_BLOCKS
            asyncio.run(run(seed))
        assert memory.space.moved > 100
        assert memory.space.found > 0


def engine_in(memory, model, **options):
    options = {"kv_max_bytes": 32 * MIB, "batch_tokens_max": 48, "stall_timeout_s": WAIT_S} | options
    spec = WorkerSpec(source="x", threads=1, **options)
    layout = KvLayout.of(model.config, model.dtype, spec.block_tokens)
    return CausalEngine(model, memory, spec, CausalLimits.of(layout, 256, spec))


def engine_on(mem, model, **options):
    memory = DeviceMemory(mem)
    memory.place(model)
    return engine_in(memory, model, **options), memory._kv


def answers(engine, asked, lengths):
    """All answers of an engine that begins when everything was asked: the batches are the same in every run."""

    async def run():
        pairs = zip(asked, lengths, strict=True)
        tasks = [asyncio.create_task(tokens_of(engine, prompt, length)) for prompt, length in pairs]
        await settled(lambda: engine.counts().waiting == len(asked), WAIT_S)
        engine.start()
        return [await asyncio.wait_for(task, WAIT_S) for task in tasks]

    try:
        return asyncio.run(run())
    finally:
        engine.stop()


@pytest.mark.parametrize("family", FAMILIES)
def test_our_cache_moves_blocks_beside_evictions_and_reclaims(family, monkeypatch):
    monkeypatch.setattr(engine_causal, "_COMPACT_S", 0.0)
    monkeypatch.setattr(device, "_SCATTERED_BYTES_MIN", 1)
    monkeypatch.setattr(device, "_SCATTERED_PART", 1 << 30)
    wanted = [expected(family, index) for index in range(len(PROMPTS))]
    with simulated_memory("96MiB") as mem:
        engine, kv = engine_on(mem, FAMILIES[family](), block_tokens=32, batch_tokens_max=256)
        moved, compact = [], kv.compact

        def counting():
            moves = compact()
            moved.extend(moves)
            return moves

        kv.compact = counting
        engine.start()
        stop = threading.Event()

        def disturb():
            draw = random.Random(2)
            while not stop.wait(0.02):
                mem.reclaim(draw.choice((2 * MIB, 1 << 40)))
                kv.cache.set_limit(draw.choice((12, 20, 32)) * MIB)
            kv.cache.set_limit(32 * MIB)

        thread = threading.Thread(target=disturb)

        async def run(seed):
            draw = random.Random(seed)
            asked = [draw.randrange(len(PROMPTS)) for _ in range(16)]
            lengths = [draw.choice((2, 20)) for _ in asked]
            pairs = zip(asked, lengths, strict=True)
            tasks = [asyncio.create_task(tokens_of(engine, PROMPTS[index], length)) for index, length in pairs]
            for index, length, task in zip(asked, lengths, tasks, strict=True):
                assert await asyncio.wait_for(task, WAIT_S) == wanted[index][:length], index
            await settled(lambda: engine.kv_bytes()[1] == 0, WAIT_S)

        try:
            for seed in range(2):
                asyncio.run(run(seed))
            calm = len(moved)
            thread.start()
            for seed in range(2, 4):
                asyncio.run(run(seed))
        finally:
            stop.set()
            if thread.is_alive():
                thread.join()
            engine.stop()
        kv.cache.check()
        assert calm > 0, "blocks have moved"


def test_memory_between_few_blocks_comes_back_while_they_are_used(monkeypatch):
    """Many requests end and leave a few scattered: their blocks come together, and the rest of the memory goes."""
    monkeypatch.setattr(engine_causal, "_COMPACT_S", 0.0)
    monkeypatch.setattr(device, "_SCATTERED_BYTES_MIN", 1)
    model, asked = llama(5, num_hidden_layers=4, hidden_size=256, num_key_value_heads=4), prompts(9, 12, longest=60)
    wanted = [alone(model, prompt, 120 if at % 6 == 0 else 4) for at, prompt in enumerate(asked)]
    with simulated_memory("128MiB") as mem:
        # 128 KiB a block, sixteen a granule.
        engine, kv = engine_on(
            mem, model, kv_max_bytes=64 * MIB, batch_tokens_max=1024, block_tokens=16, prefix_caching=False
        )
        peak, least, few = [0], [1 << 60], [0]
        step = engine._compute

        def watching():
            step()
            usage = kv.cache.usage()
            peak[0] = max(peak[0], usage["mapped"] - usage["empty"])
            if engine.counts().running == 2:
                few[0] += 1
                least[0] = min(least[0], usage["mapped"] - usage["empty"] - usage["live"])

        engine._compute = watching
        assert answers(engine, asked, [len(answer) for answer in wanted]) == wanted
        assert few[0] > 10, "two were left alone for a while"
        assert peak[0] >= 6 * MIB, "many held much"
        assert least[0] < 2 * MIB, "what the two have lies together, in one granule more than filled at most"


def test_the_hint_is_what_the_next_step_takes():
    model, asked = llama(3), prompts(4, 5, longest=40)
    wanted = [alone(model, prompt, 30) for prompt in asked]
    memory = PlainMemory()
    engine = engine_in(memory, model, batch_tokens_max=40)
    space, taken, steps = memory.space, [], []
    alloc, step = space.alloc, engine._compute

    def taking(count):
        taken.append(count)
        return alloc(count)

    def stepping():
        # What this step took, and what was said of it while the one before was computed.
        steps.append((sum(taken), space.hints[-1] if space.hints else None))
        taken.clear()
        step()

    space.alloc, engine._compute = taking, stepping
    assert answers(engine, asked, [30] * len(asked)) == wanted
    assert len(steps) >= 30
    assert steps[0][1] is None
    assert all(took == said for took, said in steps[1:]), steps
    assert sum(took for took, _ in steps[1:]) > 5


def test_what_the_next_step_takes_gets_memory_while_this_one_is_computed():
    wide = {"hidden_size": 128, "num_attention_heads": 4, "num_key_value_heads": 4, "head_dim": 256}
    model, asked = llama(21, **wide, num_hidden_layers=4), prompts(4, 4, longest=60)
    wanted = [alone(model, prompt, 40) for prompt in asked]
    with simulated_memory("192MiB") as mem:
        # 32 KiB a token: a block is a granule.
        options = {"kv_max_bytes": 96 * MIB, "batch_tokens_max": 256, "block_tokens": 64, "prefix_caching": False}
        engine, kv = engine_on(mem, model, **options)
        ahead, step = [], engine._compute

        def waiting():
            before = kv.cache.usage()["mapped"]
            step()
            # Only the cache's thread maps in here. It has all the time that it needs, so that this is no race.
            deadline = time.monotonic() + WAIT_S
            while True:
                usage = kv.cache.usage()
                group = usage["groups"][0]
                if group["free_mapped_blocks"] >= min(kv._hinted, group["spare_target_blocks"]):
                    break
                assert time.monotonic() < deadline, f"{kv._hinted} blocks were hinted, {usage}"
                time.sleep(0.005)
            ahead.append(usage["mapped"] - before)

        engine._compute = waiting
        assert answers(engine, asked, [40] * len(asked)) == wanted
        assert max(ahead) > 0
