"""The worker as the server sees it: a process with a control socket, on the simulated device."""

from __future__ import annotations

import asyncio
import json
import re
import signal
import subprocess
import sys
import time

import aiohttp
import pytest

from shoal.worker import loading
from shoal.worker.spec import WorkerSpec

from .broker import FakeBroker
from .test_engine_causal import alone

MIB = 1 << 20


class Process:
    def __init__(self, directory, source, *, budget=64 * MIB, host=256 * MIB, **spec):
        spec = {"source": str(source), "dtype": "float32", "threads": 1} | spec
        self.broker = FakeBroker(directory, spec, budget, host=host)
        self.log = directory / "worker.log"
        with self.log.open("wb") as log:
            self.process = subprocess.Popen(
                [sys.executable, "-m", "shoal.worker", "--control", str(self.broker.path), "--model", "tiny"],
                stdout=log, stderr=log,
            )  # fmt: skip

    def ready(self):
        broker = self.broker
        said = broker.wait(lambda b: b.said("ready") or b.said("failed") or self.process.poll() is not None)
        assert broker.said("ready"), self.log.read_text()
        return said[0]["capabilities"]

    def post(self, path, body, timeout_s=60):
        async def ask():
            connector = aiohttp.UnixConnector(str(self.broker.data_socket))
            async with aiohttp.ClientSession(connector=connector) as session:
                timeout = aiohttp.ClientTimeout(total=timeout_s)
                async with session.post(f"http://x/v1/{path}", json=body, timeout=timeout) as answer:
                    return answer.status, await answer.json()

        return asyncio.run(ask())

    def usage(self):
        return self.broker.said("usage")[-1]["usage"]

    def close(self):
        self.broker.close()
        try:
            self.process.wait(60)
        finally:
            self.process.kill()


@pytest.fixture
def start(tmp_path):
    processes = []

    def begin(source, **options):
        process = Process(tmp_path, source, **options)
        processes.append(process)
        return process

    yield begin
    for process in processes:
        process.close()


ASK = {"prompt": "def swim(", "temperature": 0, "max_tokens": 24, "ignore_eos": True}


def text_of(answer):
    status, body = answer
    assert status == 200, body
    return body["choices"][0]["text"]


@pytest.fixture(scope="module")
def expected(llama_dir):
    loaded = loading.load(loading.inspect(llama_dir), WorkerSpec(source="x", dtype="float32"))
    prompt = loaded.tokenizer(ASK["prompt"])["input_ids"]
    return loaded.tokenizer.decode(alone(loaded.model, prompt, 24), skip_special_tokens=True)


@pytest.mark.parametrize("is_caching", [False, True])
def test_it_takes_no_device_memory_before_a_request_and_owns_no_kv_after(llama_dir, start, expected, is_caching):
    worker = start(llama_dir, prefix_caching=is_caching)
    capabilities = worker.ready()
    assert capabilities["routes"] == ["chat/completions", "completions"]
    assert capabilities["context_tokens"] == 256
    assert capabilities["weights_bytes"] > 0
    assert capabilities["kv_bytes_min"] == 2 * MIB, "all blocks of so small a model lie in one page"
    assert worker.broker.leased["weights"] == worker.broker.leased["kv"] == 0
    assert {said["phase"] for said in worker.broker.said("loading")} >= {"reading", "placing"}
    assert text_of(worker.post("completions", ASK)) == expected
    assert worker.broker.leased["weights"] >= capabilities["weights_bytes"]
    assert worker.broker.leased["kv"] in (0, 2 * MIB)
    worker.broker.wait(lambda b: b.said("usage")[-1]["usage"]["tokens_out"] == 24, 60)
    worker.broker.wait(lambda b: b.said("usage")[-1]["usage"]["kv_live"] == 0, 60)
    if is_caching:
        assert worker.broker.leased["kv"] == worker.usage()["kv_device"] == worker.usage()["kv_cached"] == 2 * MIB
        assert worker.broker.order("reclaim", bytes=1)["copied"] == 0, "what a prefix holds goes before weights do"
    worker.broker.wait(lambda b: b.leased["kv"] == 0, 60)
    worker.broker.wait(lambda b: b.said("usage")[-1]["usage"]["kv_device"] == 0, 60)
    assert worker.broker.peak <= worker.broker.budget


def test_it_says_what_prompts_cost_once_it_has_computed_some(llama_dir, start):
    worker = start(llama_dir)
    worker.ready()
    worker.broker.wait(lambda b: b.said("usage"))
    assert worker.usage()["kv_back_us_per_mib"] == 0
    for letter in "ab":  # of the first the weights may still be coming
        text_of(worker.post("completions", ASK | {"prompt": letter * 100, "max_tokens": 2}))
    worker.broker.wait(lambda b: b.said("usage")[-1]["usage"]["kv_back_us_per_mib"] > 0, 60)


def test_orders_between_requests_change_no_token(llama_dir, start, expected):
    worker = start(llama_dir)
    worker.ready()
    for _ in range(3):
        assert text_of(worker.post("completions", ASK)) == expected
        done = worker.broker.order("reclaim", bytes=1 << 40)
        assert done["bytes"] > 0
        assert done["error"] is None
        worker.broker.wait(lambda b: sum(b.leased.values()) - b.leased["overhead"] == 0, 60)
    assert worker.broker.order("wake")["bytes"] > 0
    assert text_of(worker.post("completions", ASK)) == expected


def test_orders_during_requests_change_no_token(llama_dir, start):
    worker = start(llama_dir)
    worker.ready()
    long = ASK | {"max_tokens": 200}
    calm = text_of(worker.post("completions", long))

    async def ask(session):
        async with session.post("http://x/v1/completions", json=long) as answer:
            return text_of((answer.status, await answer.json()))

    async def run():
        async with aiohttp.ClientSession(connector=aiohttp.UnixConnector(str(worker.broker.data_socket))) as session:
            tasks = [asyncio.create_task(ask(session)) for _ in range(3)]
            orders = 0
            while not all(task.done() for task in tasks):
                await asyncio.to_thread(worker.broker.order, "reclaim", bytes=(1 << 40) if orders % 2 else 2 * MIB)
                orders += 1
            return orders, [await task for task in tasks]

    orders, texts = asyncio.run(run())
    assert orders >= 3
    assert texts == [calm] * 3


def test_embeddings_survive_orders(bert_dir, start):
    worker = start(bert_dir)
    assert worker.ready()["routes"] == ["embeddings"]
    before = worker.post("embeddings", {"input": "fish swim in shoals"})
    assert before[0] == 200
    assert worker.broker.order("reclaim", bytes=1 << 40)["bytes"] > 0
    assert worker.post("embeddings", {"input": "fish swim in shoals"}) == before
    tokens = 2 * before[1]["usage"]["prompt_tokens"]
    worker.broker.wait(lambda b: b.said("usage")[-1]["usage"]["tokens_embedded"] == tokens, 60)
    worker.process.send_signal(signal.SIGTERM)
    assert worker.process.wait(60) == 0
    assert "requests still running" not in worker.log.read_text(), "what it has made is no request"


def test_a_model_that_cannot_be_served_says_why_and_ends(tmp_path, start):
    worker = start(tmp_path / "nowhere")
    failed = worker.broker.wait(lambda b: b.said("failed"))[0]
    assert failed["code"] == "model_missing"
    assert "nowhere" in failed["message"]
    assert worker.process.wait(60) == 1


def test_a_specification_that_is_wrong_says_why(llama_dir, start):
    worker = start(llama_dir, dtype="int3")
    failed = worker.broker.wait(lambda b: b.said("failed"))[0]
    assert "dtype: 'int3' is not one of" in failed["message"]


@pytest.mark.parametrize(
    ("module", "body", "said"),
    [
        ("aiohttp", "raise ModuleNotFoundError(name='aiohttp')", "aiohttp is not installed"),
        ("jinja2", "import markupsafe_not_there", "markupsafe_not_there, which \\w+ needs, is not installed"),
        ("transformers", "raise ImportError('torch is too old')", r"cannot be imported \(torch is too old\)"),
    ],
)  # fmt: skip
def test_a_missing_package_is_named_with_its_remedy_and_no_restart(  # noqa: PLR0917 - a table's columns
    llama_dir, start, tmp_path, monkeypatch, module, body, said
):
    shadow = tmp_path / "shadow"
    shadow.mkdir()
    (shadow / f"{module}.py").write_text(f"{body}\n")
    monkeypatch.setenv("PYTHONPATH", str(shadow))
    worker = start(llama_dir)
    failed = worker.broker.wait(lambda b: b.said("failed"))[0]
    assert failed["code"] == "engine", "only 'internal' is started again"
    assert re.search(said, failed["message"])
    assert "pip install 'shoal[serve]'" in failed["message"]
    assert worker.process.wait(60) == 1


def test_it_ends_when_the_server_is_gone(llama_dir, start):
    worker = start(llama_dir)
    worker.ready()
    worker.broker.close()
    worker.process.wait(60)


@pytest.mark.parametrize("how", ["sigterm", "shutdown"])
def test_it_ends_gracefully(llama_dir, start, how):
    worker = start(llama_dir)
    worker.ready()

    async def run():
        async with aiohttp.ClientSession(connector=aiohttp.UnixConnector(str(worker.broker.data_socket))) as session:
            ask = ASK | {"max_tokens": 150, "stream": True}
            async with session.post("http://x/v1/completions", json=ask) as answer:
                await answer.content.readline()
                if how == "sigterm":
                    worker.process.send_signal(signal.SIGTERM)
                else:
                    worker.broker.say({"say": "shutdown", "deadline_ms": 60_000, "reason": "a test"})
                return (await answer.text()).strip().split("\n\n")

    events = asyncio.run(run())
    assert events[-1] == "data: [DONE]"
    assert json.loads(events[-2][6:])["choices"][0]["finish_reason"] == "length"
    started = time.monotonic()
    assert worker.process.wait(60) == 0
    assert time.monotonic() - started < 30, "it waited for its deadline"
