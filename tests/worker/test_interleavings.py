"""Exactness whatever happens to the memory, and when: between requests, during them, over and over."""

from __future__ import annotations

import asyncio
import functools

from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from shoal.worker.kv import PADDING_BLOCKS
from shoal.worker.sampling import Sampling

from .conftest import llama
from .plain import PlainMemory
from .test_engine_causal import GREEDY, alone, engine_of, prompts, settled, tokens_of

MODEL = llama()
PROMPTS = prompts(11, 6, longest=50)
TOKENS = 16
STEPS = st.one_of(
    st.tuples(st.just("ask"), st.integers(0, len(PROMPTS) - 1)),
    st.tuples(st.just("cancel"), st.integers(0, 5)),
    st.tuples(st.just("limit"), st.sampled_from([0, 6, 8, 12, 40])),
    st.tuples(st.just("close"), st.just(0)),
    st.tuples(st.just("open"), st.just(0)),
    st.tuples(st.just("wait"), st.integers(1, 30)),
)


@functools.cache
def expected(index: int) -> list[int]:
    return alone(MODEL, PROMPTS[index], TOKENS)


async def play(engine, memory, steps) -> None:
    asked: list[tuple[int, asyncio.Task]] = []
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
            assert await asyncio.wait_for(task, 30) == expected(index)
        except asyncio.CancelledError:
            assert task.cancelled()
    await settled(lambda: not memory.space.ids)


@settings(max_examples=25, deadline=None, suppress_health_check=list(HealthCheck))
@given(st.lists(STEPS, min_size=3, max_size=14))
def test_no_interleaving_changes_a_token(steps):
    for index in range(len(PROMPTS)):
        expected(index)  # before the engine changes the model's attention
    memory = PlainMemory()
    with engine_of(MODEL, memory) as engine:
        asyncio.run(play(engine, memory, steps))


def test_a_seeded_draw_survives_preemption():
    sampling = Sampling(temperature=0.9, top_p=0.9, seed=4)
    answers = []
    for blocks in (1 << 20, 9):
        memory = PlainMemory(blocks_max=blocks + PADDING_BLOCKS)
        with engine_of(MODEL, memory) as engine:

            async def run(engine=engine):
                return await asyncio.gather(*(tokens_of(engine, prompt, 40, sampling) for prompt in PROMPTS))

            answers.append(asyncio.run(run()))
        assert (memory.space.refusals > 0) == (blocks == 9)
    assert answers[0] == answers[1]
    assert GREEDY.is_plain_greedy
