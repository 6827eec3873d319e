"""The engines on Shoal's own memory: evictions between and during requests, small budgets, KV back to nothing."""

from __future__ import annotations

import asyncio
import contextlib
import functools
import threading
import time

import pytest
import torch
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from shoal.testing import simulated_memory
from shoal.worker import loading
from shoal.worker.device import DeviceMemory
from shoal.worker.engine_causal import CausalEngine
from shoal.worker.engine_embedding import EmbeddingEngine
from shoal.worker.errors import ApiError, LoadError
from shoal.worker.kv import KvLayout
from shoal.worker.limits import CausalLimits
from shoal.worker.memory import ShortageError
from shoal.worker.sampling import Sampling
from shoal.worker.spec import WorkerSpec

from .conftest import llama
from .test_engine_causal import alone, prompts, settled, tokens_of

MIB = 1 << 20
PROMPTS = prompts(21, 6, longest=60)
TOKENS = 24
WIDE = {"hidden_size": 256, "intermediate_size": 512, "num_hidden_layers": 4, "head_dim": 64}  # a few pages of weights


@functools.cache
def expected(index: int) -> list[int]:
    return alone(llama(21, **WIDE), PROMPTS[index], TOKENS)


@contextlib.contextmanager
def engine_on(mem, directory=None, **options):
    """An engine whose weights and KV lie in regions of `mem`."""
    options = {"kv_max_bytes": 32 * MIB, "batch_tokens_max": 64, "stall_timeout_s": 20.0} | options
    spec = WorkerSpec(source="x", threads=1, **options)
    memory = DeviceMemory(mem)
    model = llama(21, **WIDE)
    if directory is not None:
        model.save_pretrained(directory)
    memory.place(model, directory)
    layout = KvLayout.of(model.config, model.dtype, spec.block_tokens)
    engine = CausalEngine(model, memory, spec, CausalLimits.of(layout, 256, spec))
    engine.start()
    try:
        yield engine
    finally:
        engine.stop()


async def answers(engine, indices):
    return await asyncio.gather(*(tokens_of(engine, PROMPTS[index], TOKENS) for index in indices))


def test_nothing_is_resident_before_and_no_kv_after():
    with simulated_memory("64MiB") as mem, engine_on(mem, prefix_caching=False) as engine:
        assert mem.usage()["weights_device"] == mem.usage()["kv_device"] == 0
        assert mem.usage()["weights_total"] > 4 * MIB

        async def run():
            assert await answers(engine, range(6)) == [expected(i) for i in range(6)]
            assert mem.usage()["weights_device"] > 0
            await settled(lambda: engine.kv_bytes() == (0, 0))
            assert mem.usage()["kv_device"] == 0

        asyncio.run(run())


def test_what_prefixes_hold_stays_until_it_is_wanted():
    with simulated_memory("64MiB") as mem, engine_on(mem) as engine:

        async def run():
            assert await answers(engine, range(6)) == [expected(i) for i in range(6)]
            await settled(lambda: engine.kv_bytes()[1] == mem.usage()["kv_live"] == 0)
            assert engine.kv_bytes()[0] == mem.usage()["kv_device"] > 0
            weights = mem.usage()["weights_device"]
            report = await asyncio.to_thread(mem.reclaim, mem.usage()["kv_device"])
            assert (mem.usage()["kv_device"], report.copied) == (0, 0), "it goes first, and without a copy"
            assert mem.usage()["weights_device"] == weights
            assert await answers(engine, range(6)) == [expected(i) for i in range(6)]

        asyncio.run(run())


def test_the_least_kv_memory_is_what_a_short_request_takes():
    with simulated_memory("64MiB") as mem, engine_on(mem, kv_max_bytes=20 * MIB, block_tokens=64) as engine:
        assert engine.limits.block_bytes == MIB // 4

        async def run():
            generation = engine.submit(PROMPTS[0][:20], Sampling(temperature=0.0), 200)
            await anext(generation)
            assert mem.usage()["kv_device"] == engine.limits.kv_bytes_min == 2 * MIB
            generation.cancel()

        asyncio.run(run())


def test_evictions_between_requests_change_no_token():
    with simulated_memory("64MiB") as mem, engine_on(mem) as engine:

        async def run():
            for index in range(6):
                assert await answers(engine, [index]) == [expected(index)]
                report = await asyncio.to_thread(mem.reclaim, 1 << 40)
                assert report.freed > 0
                assert mem.usage()["weights_device"] == 0

        asyncio.run(run())


def test_evictions_during_requests_change_no_token():
    with simulated_memory("64MiB") as mem, engine_on(mem) as engine:
        stop = threading.Event()
        freed = []

        def evict():
            while not stop.wait(0.01):
                freed.append(mem.reclaim((1 << 40) if len(freed) % 3 == 0 else 2 * MIB).freed)

        thread = threading.Thread(target=evict)
        thread.start()
        try:

            async def run():
                assert await answers(engine, range(6)) == [expected(i) for i in range(6)]

            asyncio.run(run())
        finally:
            stop.set()
            thread.join()
        assert sum(1 for freed_bytes in freed if freed_bytes) >= 3, "it was meant to be evicted again and again"


def test_kv_short_of_memory_preempts_and_stays_exact():
    with simulated_memory("64MiB") as probe, engine_on(probe):
        weights = probe.usage()["weights_total"]
    with simulated_memory(weights + 8 * MIB) as mem, engine_on(mem, block_tokens=64) as engine:

        async def run():
            assert await answers(engine, range(6)) == [expected(i) for i in range(6)]

        asyncio.run(run())


def test_a_budget_too_small_for_the_weights_fails_the_request_clearly():
    with simulated_memory("4MiB") as mem, engine_on(mem, stall_timeout_s=0.5) as engine:

        async def run():
            with pytest.raises(ApiError, match="no device memory became free") as caught:
                await tokens_of(engine, PROMPTS[0], 4)
            assert caught.value.code == "out_of_memory"
            assert engine.alive

        asyncio.run(run())


def test_weights_need_no_host_memory_when_their_files_do(tmp_path):
    with simulated_memory("64MiB", host_budget="2MiB") as mem, engine_on(mem, tmp_path) as engine:

        async def run():
            for index in range(3):
                assert await answers(engine, [index]) == [expected(index)]
                await asyncio.to_thread(mem.reclaim, 1 << 40)
                assert mem.usage()["weights_device"] == 0

        asyncio.run(run())


def test_a_host_budget_too_small_is_said():
    with simulated_memory("64MiB", host_budget="2MiB") as mem, pytest.raises(LoadError, match="host budget") as caught:
        DeviceMemory(mem).place(llama(21, **WIDE))
    assert caught.value.code == "host_budget"


def test_a_guard_that_cannot_be_had_is_a_shortage():
    with simulated_memory("4MiB") as mem:
        memory = DeviceMemory(mem)
        model = llama(21, **WIDE)  # it keeps the region
        assert memory.place(model) > 4 * MIB
        with pytest.raises(ShortageError), memory.guard(0.3):
            pass


def test_embeddings_under_evictions_are_the_same(bert_dir):
    loaded = loading.load(loading.inspect(bert_dir), WorkerSpec(source="x"))
    texts = [[2, 5, 6, 3], [2, 7, 8, 9, 10, 3]]
    with simulated_memory("64MiB") as mem:
        memory = DeviceMemory(mem)
        spec = WorkerSpec(source="x")
        with torch.no_grad():
            states = [loaded.model(input_ids=torch.tensor([text])).last_hidden_state[0] for text in texts]
        wanted = [loaded.files.pooling(state) for state in states]
        memory.place(loaded.model, bert_dir)
        engine = EmbeddingEngine(loaded.model, memory, spec, loaded.files.pooling, 16)
        said = []
        engine.on_idle = lambda: said.append(engine.counts().is_idle)

        async def run():
            for _ in range(3):
                for vector, want in zip(await engine.embed(texts), wanted, strict=True):
                    assert torch.equal(vector, want)
                await asyncio.to_thread(mem.reclaim, 1 << 40)
            embed, counted = engine._embed_one, []

            def watched(text, cancelled):
                counted.append(engine.counts().tokens_embedded)
                return embed(text, cancelled)

            engine._embed_one = watched
            await engine.embed(texts)
            assert said == [True] * 4, "that the last request has ended is said at once"
            assert counted == [30, 34], "each text counts once it is done, not with the last of its request"

        try:
            asyncio.run(run())
        finally:
            engine.stop()


STEPS = st.one_of(
    st.tuples(st.just("ask"), st.integers(0, len(PROMPTS) - 1)),
    st.tuples(st.just("cancel"), st.integers(0, 4)),
    st.tuples(st.just("reclaim"), st.sampled_from([1, 2 * MIB, 6 * MIB, 1 << 40])),
    st.tuples(st.just("wait"), st.integers(1, 40)),
)


async def play(engine, mem, steps):
    asked = []
    for verb, number in steps:
        match verb:
            case "ask":
                asked.append((number, asyncio.create_task(tokens_of(engine, PROMPTS[number], TOKENS))))
            case "cancel" if number < len(asked):
                asked[number][1].cancel()
            case "reclaim":
                await asyncio.to_thread(mem.reclaim, number)
            case "wait":
                await asyncio.sleep(number / 1000)
        await asyncio.sleep(0)
    for index, task in asked:
        try:
            assert await asyncio.wait_for(task, 30) == expected(index)
        except asyncio.CancelledError:
            assert task.cancelled()
    await settled(lambda: engine.kv_bytes()[1] == 0)
    await asyncio.to_thread(mem.reclaim, 1 << 40)
    assert engine.kv_bytes() == (0, 0), "nothing is kept but what nobody owns"


@settings(max_examples=15, deadline=None, suppress_health_check=list(HealthCheck))
@given(st.lists(STEPS, min_size=3, max_size=14), st.sampled_from(["64MiB", "24MiB"]))
def test_no_interleaving_changes_a_token(steps, budget):
    with simulated_memory(budget) as mem, engine_on(mem) as engine:
        asyncio.run(play(engine, mem, steps))


def test_a_wait_for_memory_ends_when_there_is_some():
    """One engine waits while another region holds the device; it goes on when the region yields."""
    with simulated_memory("24MiB") as mem, engine_on(mem) as engine:
        other = mem.region("other", "20MiB", kind="workspace")
        other.commit(0, 20 * MIB)

        async def run():
            task = asyncio.create_task(tokens_of(engine, PROMPTS[0], TOKENS))
            await asyncio.sleep(0.5)
            assert not task.done()
            other.decommit(0, 20 * MIB)
            started = time.monotonic()
            assert await task == expected(0)
            assert time.monotonic() - started < 10

        asyncio.run(run())
