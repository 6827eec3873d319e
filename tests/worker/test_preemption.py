"""A batch whose guard does not come gives its blocks up, is computed again later, and nobody sees it in an answer."""

from __future__ import annotations

import asyncio
import json

import pytest

from shoal.worker import engine_causal
from shoal.worker.kv import PADDING_BLOCKS
from shoal.worker.sampling import Sampling

from .conftest import llama
from .plain import PlainMemory
from .test_engine_causal import GREEDY, alone, engine_of, prompts, settled, tokens_of
from .test_http import with_worker


@pytest.fixture(autouse=True)
def soon(monkeypatch):
    monkeypatch.setattr(engine_causal, "_PREEMPT_S", 0.05)


def counted(engine, monkeypatch):
    """Count the preemptions, and how many requests ran when each came."""
    running: list[int] = []
    preempt = engine._preempt

    def counting():
        running.append(len(engine._processor.scheduler.active_requests))
        preempt()

    monkeypatch.setattr(engine, "_preempt", counting)
    return running


async def preempted(memory, running, number, meanwhile=lambda: None):
    """Wait until the memory has closed by itself and the engine has preempted `number` times in all; open it again."""
    await settled(lambda: memory.closed and len(running) >= number)
    meanwhile()
    await asyncio.sleep(0.1)  # some rounds of a stalled engine
    assert len(running) == number, "being scheduled again is no progress, and no reason to preempt again"
    memory.closed = False


SAMPLINGS = [
    GREEDY,
    Sampling(temperature=0.9, top_p=0.9, seed=5),
    Sampling(temperature=1.2, top_k=40, seed=6, frequency_penalty=0.7),
    Sampling(temperature=0.9, top_p=0.9, seed=7),
    Sampling(temperature=0.0, presence_penalty=1.5, logit_bias={7: 2.0}),
    GREEDY,
]


def test_answers_are_those_of_an_undisturbed_run(monkeypatch):
    model, asked, count = llama(), prompts(31, len(SAMPLINGS)), 60
    greedy = {i: alone(model, asked[i], count) for i, sampling in enumerate(SAMPLINGS) if sampling is GREEDY}
    answers = []
    for disturbed in (False, True):
        memory = PlainMemory()
        with engine_of(model, memory) as engine:
            running = counted(engine, monkeypatch)
            memory.close_at = {9, 10, 25, 40} if disturbed else set()

            async def run(engine=engine, memory=memory, running=running, disturbed=disturbed):
                with memory.held:  # no step before all are there
                    going = [engine.submit(asked[i], s, count) for i, s in enumerate(SAMPLINGS)]
                out: list[list[int]] = [[] for _ in going]

                async def read(i):
                    async for tokens in going[i]:
                        out[i] += tokens

                readers = [asyncio.create_task(read(i)) for i in range(len(going))]
                for number in range(1, 5 if disturbed else 1):
                    await preempted(memory, running, number)
                await asyncio.wait_for(asyncio.gather(*readers), 30)
                await settled(lambda: not memory.space.ids)
                assert [generation.finish_reason for generation in going] == ["length"] * len(going)
                return out

            answers.append(asyncio.run(run()))
            assert running == [len(SAMPLINGS)] * (4 if disturbed else 0)
    assert answers[1] == answers[0]
    assert {i: answers[1][i] for i in greedy} == greedy


def test_it_takes_every_block_and_keeps_the_order(monkeypatch):
    model, asked = llama(), prompts(32, 3)
    expected = [alone(model, prompt, 30) for prompt in asked]
    memory = PlainMemory()
    with engine_of(model, memory) as engine:
        running = counted(engine, monkeypatch)
        seen = []

        def look():
            scheduler = engine._processor.scheduler
            seen.append((len(memory.space.ids), list(scheduler.waiting_requests_order), engine.kv_bytes()[1]))
            memory.blocks_max = PADDING_BLOCKS  # nothing is left for anybody: all of them wait

        async def run():
            memory.close_at = {6}
            first = [asyncio.create_task(tokens_of(engine, prompt, 30)) for prompt in asked]
            original = engine._preempt

            def looking():
                original()
                look()

            monkeypatch.setattr(engine, "_preempt", looking)
            await preempted(memory, running, 1)
            assert not any(task.done() for task in first)
            memory.blocks_max = 1 << 20
            assert await asyncio.wait_for(asyncio.gather(*first), 30) == expected

        asyncio.run(run())
    assert [blocks for blocks, _, _ in seen] == [PADDING_BLOCKS]
    assert seen[0][1] == ["r0", "r1", "r2"]


@pytest.mark.parametrize("victim", [0, 2])
def test_one_cancelled_while_preempted_is_gone_and_the_others_go_on(monkeypatch, victim):
    model, asked = llama(), prompts(33, 3)
    expected = [alone(model, prompt, 40) for prompt in asked]
    memory = PlainMemory()
    with engine_of(model, memory) as engine:
        running = counted(engine, monkeypatch)

        async def run():
            memory.close_at = {8}
            tasks = [asyncio.create_task(tokens_of(engine, prompt, 40)) for prompt in asked]
            await preempted(memory, running, 1, tasks[victim].cancel)
            for i, task in enumerate(tasks):
                if i == victim:
                    with pytest.raises(asyncio.CancelledError):
                        await task
                else:
                    assert await asyncio.wait_for(task, 30) == expected[i]
            await settled(lambda: not memory.space.ids)
            assert engine.counts().running == engine.counts().waiting == 0
            assert not engine._processor.scheduler.waiting_requests

        asyncio.run(run())


def test_the_last_token_is_the_last_although_preempted_before_it(monkeypatch):
    model, prompt = llama(), [5, 6, 7]
    expected = alone(model, prompt, 2)
    memory = PlainMemory()
    with engine_of(model, memory) as engine:
        running = counted(engine, monkeypatch)

        async def run():
            memory.close_at = {1}
            task = asyncio.create_task(tokens_of(engine, prompt, 2))
            await preempted(memory, running, 1)
            assert await asyncio.wait_for(task, 20) == expected

        asyncio.run(run())


ASK = {"prompt": "the sea is wide", "max_tokens": 80, "ignore_eos": True, "stream": True}


def test_streams_with_stop_strings_and_seeds_are_the_same_text(llama_dir, tmp_path, monkeypatch):
    async def stream(worker, ask, got):
        async with worker.session.post("http://x/v1/completions", json=ask) as answer:
            assert answer.status == 200
            async for line in answer.content:
                if line.startswith(b"data: {"):
                    choice = json.loads(line[6:])["choices"][0]
                    got.append(choice["text"])
                    if choice["finish_reason"]:
                        return "".join(got), choice["finish_reason"]
        raise AssertionError("the stream had no end")

    async def act(worker):
        async def all_of(asks):
            pieces = [[] for _ in asks]
            tasks = [asyncio.create_task(stream(worker, a, p)) for a, p in zip(asks, pieces, strict=True)]
            return pieces, tasks

        _, plain = await all_of([ASK | {"temperature": 0}])
        text, _ = await plain[0]
        stop = text[50:53]
        asks = [
            ASK | {"temperature": 0},
            ASK | {"temperature": 0, "stop": [stop, "not there"]},
            ASK | {"temperature": 0.9, "seed": 11},
            ASK | {"temperature": 0.9, "seed": 12, "top_p": 0.9},
            ASK | {"temperature": 0, "max_tokens": 200},  # whose client goes away
        ]
        _, calm = await all_of(asks[:4])
        undisturbed = await asyncio.gather(*calm)
        assert undisturbed[1] == (text[: text.index(stop)], "stop")
        running = counted(worker.engine, monkeypatch)
        first = worker.memory.guards + 12
        worker.memory.close_at = {first, first + 20}
        with worker.memory.held:  # no step before all are there
            _, tasks = await all_of(asks)
            await settled(lambda: sum((worker.engine.counts().running, worker.engine.counts().waiting)) == len(asks))
        await preempted(worker.memory, running, 1, tasks[4].cancel)
        await preempted(worker.memory, running, 2)
        assert await asyncio.wait_for(asyncio.gather(*tasks[:4]), 30) == undisturbed
        assert running == [5, 4]
        await settled(lambda: worker.engine.counts().running == 0 and not worker.memory.space.ids)

    with_worker(llama_dir, tmp_path, act)
