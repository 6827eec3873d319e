"""Prefixes that are used again: less is computed, nobody sees it in an answer, and nobody finds what is another's."""

from __future__ import annotations

import asyncio
import functools
import random
import threading

import pytest
from hypothesis import HealthCheck, example, given, settings
from hypothesis import strategies as st

from shoal.testing import simulated_memory
from shoal.worker import engine_causal
from shoal.worker.device import DeviceMemory
from shoal.worker.engine_causal import CausalEngine
from shoal.worker.errors import ApiError
from shoal.worker.kv import PADDING_BLOCKS, KvLayout
from shoal.worker.limits import CausalLimits
from shoal.worker.spec import WorkerSpec

from .conftest import llama
from .plain import PlainMemory
from .test_device_memory import WIDE
from .test_engine_causal import GREEDY, MIXED, alone, engine_of, settled, small, tokens_of
from .test_http import with_worker

MIB = 1 << 20
TOKENS = 20


def computing(engine, monkeypatch):
    """Count the tokens that go through the model."""
    computed = []
    step = engine._compute

    def counting():
        batch = engine._processor.inputs_and_outputs.requests_in_batch
        computed.append(sum(future.query_length for future in batch))
        step()

    monkeypatch.setattr(engine, "_compute", counting)
    return computed


def test_what_was_computed_is_not_computed_again(monkeypatch):
    model, stem = llama(), [7 * i % 251 + 1 for i in range(100)]
    first, second = [*stem, 5, 6], [*stem, 9]
    expected = [alone(model, prompt, TOKENS) for prompt in (first, second, stem)]
    memory = PlainMemory()
    with engine_of(model, memory) as engine:
        computed = computing(engine, monkeypatch)

        async def run():
            assert await tokens_of(engine, first, TOKENS) == expected[0]
            assert sum(computed) == len(first) + TOKENS - 1
            computed.clear()
            generation = engine.submit(second, GREEDY, TOKENS)
            assert [token async for tokens in generation for token in tokens] == expected[1]
            assert generation.cached_tokens == 96
            assert sum(computed) == len(second) - 96 + TOKENS - 1
            # A prompt of whole blocks: its last token is computed, in a block that nobody else reads.
            computed.clear()
            assert await tokens_of(engine, stem[:96], TOKENS) == alone_again(stem[:96])
            assert sum(computed) == 96 - 80 + TOKENS - 1
            # What was answered is found too, when the conversation goes on.
            computed.clear()
            longer = [*second, *expected[1], 3, 1]
            assert await tokens_of(engine, longer, TOKENS) == alone_again(longer)
            assert sum(computed) == len(longer) - 112 + TOKENS - 1

        def alone_again(prompt):
            return alone(llama(), prompt, TOKENS)

        asyncio.run(run())
        assert memory.space.peak < 30


def test_without_prefix_caching_nothing_is_kept(monkeypatch):
    model, prompt = llama(), [3] * 60
    expected = alone(model, prompt, TOKENS)
    memory = PlainMemory()
    with engine_of(model, memory, prefix_caching=False) as engine:
        computed = computing(engine, monkeypatch)

        async def run():
            for _ in range(2):
                assert await tokens_of(engine, prompt, TOKENS) == expected
            assert sum(computed) == 2 * (len(prompt) + TOKENS - 1)
            await settled(lambda: engine.kv_bytes() == (0, 0))

        asyncio.run(run())


def test_tenants_do_not_share(monkeypatch):
    model, prompt = llama(), [2 * i % 255 + 1 for i in range(70)]
    expected = alone(model, prompt, TOKENS)
    with engine_of(model, PlainMemory()) as engine:
        computed = computing(engine, monkeypatch)

        async def ask(salt):
            computed.clear()
            generation = engine.submit(prompt, GREEDY, TOKENS, salt=salt)
            assert [token async for tokens in generation for token in tokens] == expected
            assert sum(computed) == len(prompt) - generation.cached_tokens + TOKENS - 1
            return generation.cached_tokens

        async def run():
            return [await ask(salt) for salt in ("a", "b", "", "a", "b", "")]

        assert asyncio.run(run()) == [0, 0, 0, 64, 64, 64]


def test_a_failing_step_leaves_no_prefix_behind(monkeypatch):
    model, prompt = llama(), [9, 8] * 30
    expected = alone(model, prompt, 6)
    memory = PlainMemory()
    with engine_of(model, memory) as engine:
        step = engine._compute

        def broken():
            step()
            raise RuntimeError("the device fell over")

        async def run():
            with monkeypatch.context() as patch:
                patch.setattr(engine, "_compute", broken)
                with pytest.raises(ApiError, match="the device fell over"):
                    await tokens_of(engine, prompt, 6)
            await settled(lambda: engine.kv_bytes() == (0, 0))
            assert await tokens_of(engine, prompt, 6) == expected
            assert memory.space.found == 0

        asyncio.run(run())


def test_many_at_once_hold_one_copy():
    model, stem = llama(), [3 * i % 250 + 1 for i in range(128)]
    asked = [[*stem, i] for i in range(8)]
    expected = [alone(model, prompt, TOKENS) for prompt in asked]
    memory = PlainMemory()
    with engine_of(model, memory, batch_tokens_max=4096) as engine:

        async def run():
            with memory.held:  # all of them are in the first batch, and compute the same
                tasks = [asyncio.create_task(tokens_of(engine, prompt, TOKENS)) for prompt in asked]
                await settled(lambda: engine.counts().running + engine.counts().waiting == len(asked))
            assert await asyncio.gather(*tasks) == expected
            assert memory.space.evicted == 0
            await settled(lambda: not memory.space.ids)
            assert len(memory.space.cached) <= 8 + len(asked), "one stem, and the block at each end"

        asyncio.run(run())


def test_the_answer_says_how_much_was_cached(llama_dir, tmp_path):
    async def act(worker):
        ask = {"prompt": "the sea is wide and fish swim in shoals", "max_tokens": 4, "temperature": 0}
        told = []
        for more in ({}, {}, {"cache_salt": "mine"}, {"cache_salt": "mine", "n": 2}):
            status, answer = await worker.post("completions", ask | more)
            assert status == 200, answer
            usage = answer["usage"]
            assert usage["prompt_tokens"] == 39
            told.append(usage["prompt_tokens_details"]["cached_tokens"])
        body = {"messages": [{"role": "user", "content": "the sea is wide and fish swim"}], "max_tokens": 3}
        body |= {"stream": True, "stream_options": {"include_usage": True}}
        for cached in (0, 32):
            async with worker.session.post("http://x/v1/chat/completions", json=body) as answer:
                assert f'"prompt_tokens_details":{{"cached_tokens":{cached}}}' in await answer.text()
        status, answer = await worker.post("completions", ask | {"cache_salt": 7})
        assert (status, answer["error"]["param"]) == (400, "cache_salt")
        assert told == [0, 32, 0, 32]
        # The server's word comes before the client's.
        told.clear()
        for salt, more in (("alice", {}), ("alice", {}), ("bob", {}), ("alice", {"cache_salt": "mine"}), ("bob", {})):
            headers = {"X-Shoal-Cache-Salt": salt}
            async with worker.session.post("http://x/v1/completions", json=ask | more, headers=headers) as response:
                answer = await response.json()
            told.append(answer["usage"]["prompt_tokens_details"]["cached_tokens"])
        assert told == [0, 32, 0, 0, 32]

    with_worker(llama_dir, tmp_path, act)


# --------------------------------------------------------------------------- whatever happens to the memory meanwhile

FAMILIES = {
    "Llama": lambda: llama(21, **WIDE),
    "Qwen3": lambda: small("Qwen3", hidden_size=128, head_dim=64),
    "Gemma3": lambda: small("Gemma3", **(MIXED | {"hidden_size": 128, "head_dim": 64})),
    "Mistral": lambda: small("Mistral", hidden_size=128, head_dim=64, sliding_window=40),
}
STEMS = [[random.Random(seed).randrange(1, 257) for _ in range(length)] for seed, length in enumerate((120, 70, 33))]
PROMPTS = [
    [*stem[:keep], *(random.Random(100 * at + keep).randrange(1, 257) for _ in range(end))]
    for at, stem in enumerate(STEMS)
    for keep, end in ((len(stem), 1), (len(stem), 9), (len(stem) // 2, 20), (32, 0))
]


@functools.cache
def model_of(family):
    return FAMILIES[family]()


@functools.cache
def expected(family, index):
    return alone(FAMILIES[family](), PROMPTS[index], TOKENS)


STEPS = st.one_of(
    st.tuples(st.just("ask"), st.integers(0, len(PROMPTS) - 1)),
    st.tuples(st.just("ask"), st.integers(0, 3)),
    st.tuples(st.just("cancel"), st.integers(0, 5)),
    st.tuples(st.just("limit"), st.sampled_from([0, 12, 16, 24, 40])),
    st.tuples(st.just("close"), st.just(0)),
    st.tuples(st.just("open"), st.just(0)),
    st.tuples(st.just("wait"), st.integers(1, 60)),
)


async def play(engine, memory, family, steps):
    asked = []
    for verb, number in steps:
        match verb:
            case "ask":
                asked.append((number, asyncio.create_task(tokens_of(engine, PROMPTS[number], TOKENS))))
            case "cancel" if number < len(asked):
                asked[number][1].cancel()
            case "limit":
                memory.blocks_max = number + PADDING_BLOCKS
            case "close" | "open":
                memory.closed = verb == "close"
            case "wait":
                await asyncio.sleep(number / 1000)
        await asyncio.sleep(0)
    memory.closed, memory.blocks_max = False, 1 << 30
    for index, task in asked:
        try:
            assert await asyncio.wait_for(task, 30) == expected(family, index), (family, index)
        except asyncio.CancelledError:
            assert task.cancelled()
    await settled(lambda: not memory.space.ids)


@pytest.mark.parametrize("family", FAMILIES)
def test_no_interleaving_changes_a_token(family, monkeypatch):
    monkeypatch.setattr(engine_causal, "_PREEMPT_S", 0.03)
    found = evicted = 0

    @settings(max_examples=12, deadline=None, suppress_health_check=list(HealthCheck))
    @given(st.lists(STEPS, min_size=6, max_size=20))
    @example([("limit", 16), *(("ask", index) for index in range(len(PROMPTS))), *[("wait", 60)] * 20])  # it must evict
    def check(steps):
        nonlocal found, evicted
        memory = PlainMemory()
        with engine_of(model_of(family), memory, kv_max_bytes=16 * MIB) as engine:
            asyncio.run(play(engine, memory, family, steps))
        found, evicted = found + memory.space.found, evicted + memory.space.evicted

    for index in range(len(PROMPTS)):
        expected(family, index)
    check()
    assert found > 0
    assert evicted > 0


@pytest.mark.parametrize("family", FAMILIES)
def test_growth_shrink_eviction_sharing_and_preemption_on_our_memory(family, monkeypatch):
    """A device too small for all, a limit that moves, reclaims of parts and of everything, and prompts that share."""
    monkeypatch.setattr(engine_causal, "_PREEMPT_S", 0.02)
    monkeypatch.setattr(engine_causal, "_GUARD_S", 1.0)
    for index in range(len(PROMPTS)):
        expected(family, index)
    model = FAMILIES[family]()
    with simulated_memory("64MiB") as probe:
        weights = DeviceMemory(probe).place(FAMILIES[family]())
    preempted = []
    with simulated_memory(weights + 8 * MIB) as mem:
        memory = DeviceMemory(mem)
        spec = WorkerSpec(
            source="x", threads=1, kv_max_bytes=32 * MIB, batch_tokens_max=48, stall_timeout_s=90.0, block_tokens=16
        )
        memory.place(model)
        layout = KvLayout.of(model.config, model.dtype, spec.block_tokens)
        engine = CausalEngine(model, memory, spec, CausalLimits.of(layout, 256, spec))
        cache, computed = memory._kv.cache, computing(engine, monkeypatch)
        stop, quiet, batches, lost = threading.Event(), threading.Lock(), [], []
        blocker = mem.region("other", 8 * MIB, kind="workspace")
        prepare, preempt = engine._prepare, engine._preempt

        def prepare_and_lose():
            """Two batches that are prepared lose their memory, to somebody who keeps it until they give up."""
            is_prepared = prepare()
            batches.extend([1] * is_prepared)
            due = len(batches) > 5 and len(preempted) < 2
            # A batch gives up once in a stall.
            if is_prepared and due and not lost and not engine._preempted and quiet.acquire(timeout=5):
                try:
                    mem.reclaim(1 << 40)
                    blocker.commit(0, 8 * MIB)
                    lost.append(1)
                except shoal_errors():
                    quiet.release()
            return is_prepared

        def preempt_and_get():
            preempted.append(1)
            preempt()
            if lost:
                lost.clear()
                blocker.decommit(0, 8 * MIB)
                quiet.release()

        monkeypatch.setattr(engine, "_prepare", prepare_and_lose)
        monkeypatch.setattr(engine, "_preempt", preempt_and_get)
        engine.start()

        def disturb():
            draw = random.Random(1)
            while not stop.wait(0.01):
                if quiet.acquire(timeout=0.1):
                    disturb_once(draw)
                    quiet.release()
            cache.set_limit(32 * MIB)

        def disturb_once(draw):
            match draw.choice(("reclaim", "all", "limit", "block")):
                case "reclaim":
                    mem.reclaim(2 * MIB)
                case "all":
                    mem.reclaim(1 << 40)
                case "limit":
                    cache.set_limit(draw.choice((4, 6, 8, 32)) * MIB)
                case "block":  # somebody else has the memory for a moment
                    try:
                        blocker.commit(0, 8 * MIB)
                    except shoal_errors():
                        return
                    stop.wait(0.05)
                    blocker.decommit(0, 8 * MIB)

        thread = threading.Thread(target=disturb)
        thread.start()

        async def run():
            draw = random.Random(2)
            for _ in range(6):
                chosen = [draw.randrange(len(PROMPTS)) for _ in range(8)]
                tasks = [asyncio.create_task(tokens_of(engine, PROMPTS[index], TOKENS)) for index in chosen]
                for index, task in zip(chosen, tasks, strict=True):
                    assert await asyncio.wait_for(task, 120) == expected(family, index), index
            await settled(lambda: engine.kv_bytes()[1] == 0, 30.0)

        try:
            asyncio.run(run())
        finally:
            stop.set()
            thread.join()
            engine.stop()
        cache.check()
        assert mem.usage()["evicted"] > weights
        stats = cache.prefix_stats()
        assert stats["stored"] > 0
        if layout.is_uniform:  # of the others so little is cached that it may lie beside what is owned, and stay
            assert stats["removed"] > 0
    assert computed
    assert preempted, f"none of {len(batches)} batches gave its blocks up"


def shoal_errors():
    import shoal

    return (shoal.OutOfMemoryError, shoal.LeaseError, shoal.DeadlineError)


def test_a_prompt_is_brought_nearer_from_its_submission_to_its_turn():
    model, prompt = llama(), [5] * 40
    expected = alone(model, prompt, TOKENS)
    memory = PlainMemory()
    with engine_of(model, memory) as engine:

        async def run():
            memory.closed = True
            first = engine.submit(prompt, GREEDY, TOKENS, salt="a")
            assert [(one.tokens, one.salt) for one in memory.ahead] == [(tuple(prompt[:-1]), "a")]
            await settled(lambda: memory.ahead[0].cancelled)
            # The first one's batch waits for its guard, so this one's turn does not come.
            second = engine.submit([6] * 40, GREEDY, TOKENS)
            second.cancel()
            assert memory.ahead[1].cancelled
            memory.closed = False
            assert [token async for tokens in first for token in tokens] == expected

        asyncio.run(run())
    with engine_of(llama(), memory, prefix_caching=False) as engine:
        before = len(memory.ahead)
        asyncio.run(tokens_of(engine, prompt, TOKENS))
        assert len(memory.ahead) == before, "nothing is found again, so nothing is looked for"
