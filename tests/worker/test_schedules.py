"""Random schedules against a real worker: requests, cancellations, evictions, wakes and shortages, in any order.

The worker is asked as clients ask (HTTP over its Unix socket) and ordered about as the server does (the control
socket); it is one process for all schedules, so each begins where the last one left the memory. Greedy answers in
float32 must be those of plain transformers alone.
"""

from __future__ import annotations

import asyncio
import functools
import json

import aiohttp
import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from shoal.worker import loading
from shoal.worker.spec import WorkerSpec

from .conftest import byte_tokenizer, llama
from .test_device_memory import WIDE
from .test_engine_causal import alone
from .test_main import Process

MIB = 1 << 20
SYSTEM = "You are a shoal of fish that answers in few words. "
PROMPTS = [SYSTEM + end for end in ("", "Who", "Who swims?", "Where is the sea?")] + [2 * SYSTEM, "Who", "x"]
TOKENS = 24
STEPS = st.one_of(
    st.tuples(st.just("ask"), st.integers(0, len(PROMPTS) - 1)),
    st.tuples(st.just("stream"), st.integers(0, len(PROMPTS) - 1)),
    st.tuples(st.just("twice"), st.integers(0, len(PROMPTS) - 1)),
    st.tuples(st.just("cancel"), st.integers(0, 7)),
    st.tuples(st.just("reclaim"), st.sampled_from([1, 2 * MIB, 6 * MIB, 1 << 40])),
    st.tuples(st.just("reclaim_meanwhile"), st.sampled_from([2 * MIB, 1 << 40])),
    st.tuples(st.just("wake"), st.just(0)),
    st.tuples(st.just("squeeze"), st.sampled_from([-4, 0, 2, 4])),
    st.tuples(st.just("relent"), st.just(0)),
    st.tuples(st.just("wait"), st.integers(1, 60)),
)


@pytest.fixture(scope="module")
def model_dir(tmp_path_factory):
    path = tmp_path_factory.mktemp("wide")
    llama(21, **WIDE).save_pretrained(path)
    byte_tokenizer().save_pretrained(path)
    return path


@pytest.fixture(scope="module")
def worker(model_dir, tmp_path_factory):
    process = Process(
        tmp_path_factory.mktemp("w"), model_dir, budget=48 * MIB, kv_max_bytes=64 * MIB, block_tokens=32,
        batch_tokens_max=64, stall_timeout_s=30,
    )  # fmt: skip
    try:
        process.weights = -(-process.ready()["weights_bytes"] // (2 * MIB)) * 2 * MIB
        yield process
    finally:
        process.close()


@pytest.fixture(scope="module")
def expected(model_dir):
    loaded = loading.load(loading.inspect(model_dir), WorkerSpec(source="x", dtype="float32"))

    @functools.cache
    def answer(index):
        prompt = loaded.tokenizer(PROMPTS[index])["input_ids"]
        return loaded.tokenizer.decode(alone(loaded.model, prompt, TOKENS), skip_special_tokens=True)

    return answer


async def ask(session, verb, index):
    body = {"prompt": PROMPTS[index], "temperature": 0, "max_tokens": TOKENS, "ignore_eos": True}
    body |= {"stream": verb == "stream", "n": 2 if verb == "twice" else 1}
    async with session.post("http://x/v1/completions", json=body) as answer:
        assert answer.status == 200, await answer.text()
        if verb != "stream":
            return [choice["text"] for choice in (await answer.json())["choices"]]
        text = ""
        async for line in answer.content:
            if line.startswith(b"data: {"):
                text += json.loads(line[6:])["choices"][0]["text"]
        return [text]


async def play(worker, expected, steps):
    broker = worker.broker
    asked: list[tuple[int, asyncio.Task]] = []
    orders = []
    connector = aiohttp.UnixConnector(str(broker.data_socket), limit=0)
    async with aiohttp.ClientSession(connector=connector) as session:
        for verb, number in steps:
            match verb:
                case "ask" | "stream" | "twice":
                    asked.append((number, asyncio.create_task(ask(session, verb, number))))
                case "cancel" if number < len(asked):
                    asked[number][1].cancel()
                case "reclaim":
                    await asyncio.to_thread(broker.order, "reclaim", bytes=number)
                case "reclaim_meanwhile":
                    orders.append(asyncio.create_task(asyncio.to_thread(broker.order, "reclaim", bytes=number)))
                case "wake":
                    orders.append(asyncio.create_task(asyncio.to_thread(broker.order, "wake", 5.0)))
                case "squeeze":
                    broker.budget = worker.weights + number * MIB
                case "relent":
                    broker.budget = 48 * MIB
                case "wait":
                    await asyncio.sleep(number / 1000)
            await asyncio.sleep(0)
        broker.budget = 48 * MIB
        await asyncio.gather(*orders)
        for index, task in asked:
            try:
                texts = await asyncio.wait_for(task, 40)
            except asyncio.CancelledError:
                assert task.cancelled()
            else:
                assert set(texts) == {expected(index)}, PROMPTS[index]
    # What is left is what prefixes hold (and for a moment what cancelled requests had): it goes when somebody wants it.
    await asyncio.to_thread(broker.wait, lambda b: b.usage["kv_live"] == 0, 15)
    for _ in range(20):
        if not (held := broker.leased["kv"]):
            break
        await asyncio.to_thread(broker.order, "reclaim", bytes=held)
        await asyncio.sleep(0.1)
    assert broker.leased["kv"] == 0


@settings(max_examples=25, deadline=None, suppress_health_check=list(HealthCheck))
@given(st.lists(STEPS, min_size=4, max_size=18))
def test_no_schedule_changes_a_token(worker, expected, steps):
    worker.broker.heard.clear()
    asyncio.run(play(worker, expected, steps))
    assert worker.process.poll() is None, worker.log.read_text()


def test_the_schedules_do_what_they_say(worker, expected):
    """One schedule of everything, and its moves are counted: the random ones are not idle."""
    before = worker.usage() if worker.broker.said("usage") else {"evicted": 0, "onboarded": 0}
    steps = [("stream", 0), ("ask", 1), ("twice", 4), ("wait", 40)] + [("reclaim", 1 << 40), ("wait", 15)] * 4
    steps += [("wake", 0), ("squeeze", 2), ("ask", 2), ("cancel", 1), ("wait", 60), ("relent", 0), ("ask", 3)]
    asyncio.run(play(worker, expected, steps))
    orders = worker.broker.said("order_done")
    assert sum(done["bytes"] > 0 for done in orders) >= 3, orders
    assert worker.usage()["evicted"] - before["evicted"] >= worker.weights
