"""The data plane: OpenAI's shapes, streams, stop strings, errors, disconnects. Asked with OpenAI's own client too."""

from __future__ import annotations

import asyncio
import base64
import json
import struct
from contextlib import asynccontextmanager

import aiohttp
import httpx
import openai
import torch

from shoal.worker import loading
from shoal.worker.http import make_app, serve
from shoal.worker.serving import assemble
from shoal.worker.spec import WorkerSpec

from .plain import PlainMemory
from .test_engine_causal import alone, settled


class Worker:
    def __init__(self, assembled, memory, loaded, session, client):
        self.engine, self.memory, self.loaded = assembled.engine, memory, loaded
        self.session, self.client = session, client
        self.tokenizer = loaded.tokenizer

    async def post(self, path, body, **options):
        data = body if isinstance(body, bytes) else json.dumps(body).encode()
        async with self.session.post(f"http://x/v1/{path}", data=data, **options) as answer:
            return answer.status, await answer.json()


@asynccontextmanager
async def working(path, tmp_path, memory=None, start=True, **options):
    """Serve a model; on `memory`, which places its weights, if it is given."""
    spec = WorkerSpec(source=str(path), **({"kv_max_bytes": 2 << 20, "dtype": "float32"} | options))
    loaded = loading.load(loading.inspect(path), spec)
    weights = loaded.files.bytes if memory is None else memory.place(loaded.model, path)
    memory = memory or PlainMemory()
    assembled = assemble("tiny", loaded, memory, spec, weights)
    if start:
        assembled.engine.start()
    socket = tmp_path / "data.sock"
    runner = await serve(make_app(assembled.served), socket)
    transport = httpx.AsyncHTTPTransport(uds=str(socket))
    try:
        async with (
            aiohttp.ClientSession(connector=aiohttp.UnixConnector(str(socket))) as session,
            httpx.AsyncClient(transport=transport) as http,
        ):
            client = openai.AsyncOpenAI(base_url="http://x/v1", api_key="none", http_client=http, max_retries=0)
            yield Worker(assembled, memory, loaded, session, client)
    finally:
        await runner.cleanup()
        await asyncio.to_thread(assembled.engine.stop)


def with_worker(path, tmp_path, act, **options):
    async def run():
        async with working(path, tmp_path, **options) as worker:
            await act(worker)

    asyncio.run(run())


HELLO = [{"role": "user", "content": "hello"}]


def test_chat_is_what_generate_gives(llama_dir, tmp_path):
    async def act(worker):
        answer = await worker.client.chat.completions.create(
            model="tiny", messages=HELLO, temperature=0, max_tokens=24, extra_body={"ignore_eos": True}
        )
        prompt = worker.tokenizer("<user>hello\n<assistant>")["input_ids"]
        tokens = alone(loading.load(worker.loaded.files, WorkerSpec(source="x")).model, prompt, 24)
        expected = worker.tokenizer.decode(tokens, skip_special_tokens=True)
        choice = answer.choices[0]
        assert choice.message.content == expected
        assert (choice.message.role, choice.finish_reason, choice.index) == ("assistant", "length", 0)
        usage = answer.usage
        assert (usage.prompt_tokens, usage.completion_tokens, usage.total_tokens) == (len(prompt), 24, len(prompt) + 24)
        assert answer.object == "chat.completion"
        assert answer.id.startswith("chatcmpl-")

    with_worker(llama_dir, tmp_path, act)


def test_a_stream_has_openais_chunks_and_the_same_text(llama_dir, tmp_path):
    ask = {"model": "tiny", "messages": HELLO, "temperature": 0, "max_tokens": 30, "ignore_eos": True}

    async def act(worker):
        _, whole = await worker.post("chat/completions", ask)
        streamed = ask | {"stream": True, "stream_options": {"include_usage": True}}
        async with worker.session.post("http://x/v1/chat/completions", json=streamed) as answer:
            assert answer.status == 200
            assert answer.headers["Content-Type"].startswith("text/event-stream")
            lines = (await answer.text()).split("\n\n")
        assert lines[-2:] == ["data: [DONE]", ""]
        chunks = [json.loads(line.removeprefix("data: ")) for line in lines[:-2]]
        assert {chunk["object"] for chunk in chunks} == {"chat.completion.chunk"}
        assert len({chunk["id"] for chunk in chunks}) == 1
        assert chunks[0]["choices"][0]["delta"]["role"] == "assistant"
        assert chunks[-1]["choices"] == []
        counted = dict(whole["usage"])
        cached = chunks[-1]["usage"].pop("prompt_tokens_details")["cached_tokens"]
        assert cached >= counted.pop("prompt_tokens_details")["cached_tokens"] == 0
        assert chunks[-1]["usage"] == counted
        assert all(chunk["usage"] is None for chunk in chunks[:-1])
        finish = [chunk["choices"][0]["finish_reason"] for chunk in chunks[:-1]]
        assert finish[-1] == "length"
        assert set(finish[:-1]) == {None}
        assert chunks[-2]["choices"][0]["delta"] == {}
        text = "".join(chunk["choices"][0]["delta"].get("content", "") for chunk in chunks[:-1])
        assert text == whole["choices"][0]["message"]["content"]
        assert len(chunks) > 5, "it came in pieces"

    with_worker(llama_dir, tmp_path, act)


def test_openais_client_reads_a_stream(llama_dir, tmp_path):
    async def act(worker):
        stream = await worker.client.chat.completions.create(
            model="tiny", messages=HELLO, temperature=0, max_tokens=8, stream=True
        )
        chunks = [chunk async for chunk in stream]
        assert chunks[-1].choices[0].finish_reason in ("length", "stop")

    with_worker(llama_dir, tmp_path, act)


def test_a_stop_string_ends_the_text_and_is_not_in_it(llama_dir, tmp_path):
    ask = {"model": "tiny", "prompt": "abc", "temperature": 0, "max_tokens": 40, "ignore_eos": True}

    async def act(worker):
        _, whole = await worker.post("completions", ask)
        text = whole["choices"][0]["text"]
        stop = text[10:14]  # every character is a token: it spans four
        first = text.index(stop)
        _, cut = await worker.post("completions", ask | {"stop": [stop, "never there"]})
        assert cut["choices"][0] == {"index": 0, "text": text[:first], "logprobs": None, "finish_reason": "stop"}
        assert cut["usage"]["completion_tokens"] < 40
        async with worker.session.post("http://x/v1/completions", json=ask | {"stop": stop, "stream": True}) as answer:
            events = [line[6:] for line in (await answer.text()).split("\n\n") if line]
        pieces = [json.loads(event)["choices"][0] for event in events[:-1]]
        assert "".join(piece["text"] for piece in pieces) == text[:first]
        assert pieces[-1]["finish_reason"] == "stop"
        await settled(lambda: worker.engine.counts().running == 0)

    with_worker(llama_dir, tmp_path, act)


def test_many_prompts_make_many_choices(llama_dir, tmp_path):
    ask = {"model": "tiny", "temperature": 0, "max_tokens": 6, "ignore_eos": True}

    async def act(worker):
        single = [
            (await worker.post("completions", ask | {"prompt": p}))[1]["choices"][0]["text"] for p in ("one", "two")
        ]
        ids = [worker.tokenizer(p)["input_ids"] for p in ("one", "two")]
        for prompt in (["one", "two"], ids):
            _, both = await worker.post("completions", ask | {"prompt": prompt})
            assert [(choice["index"], choice["text"]) for choice in both["choices"]] == list(enumerate(single))
            usage = {"prompt_tokens": 6, "completion_tokens": 12, "total_tokens": 18}
            assert both["usage"] == usage | {"prompt_tokens_details": {"cached_tokens": 0}}
        stream = await worker.client.completions.create(
            model="tiny",
            prompt=["one", "two"],
            temperature=0,
            max_tokens=6,
            stream=True,
            extra_body={"ignore_eos": True},
        )
        texts = ["", ""]
        async for chunk in stream:
            texts[chunk.choices[0].index] += chunk.choices[0].text
        assert texts == single

    with_worker(llama_dir, tmp_path, act)


def test_a_seed_repeats_and_another_differs(llama_dir, tmp_path):
    ask = {"model": "tiny", "prompt": "abc", "temperature": 1.0, "max_tokens": 24, "ignore_eos": True, "top_p": 0.95}

    async def act(worker):
        async def text(**more):
            status, answer = await worker.post("completions", ask | more)
            assert status == 200
            return answer["choices"][0]["text"]

        one, again, other, free = await asyncio.gather(text(seed=1), text(seed=1), text(seed=2), text())
        assert one == again
        assert len({one, other, free}) == 3
        assert await text(seed=1, top_p=1e-9) == await text(temperature=0)

    with_worker(llama_dir, tmp_path, act)


def test_a_client_that_goes_away_frees_its_blocks(llama_dir, tmp_path):
    async def act(worker):
        for stream in (True, False):
            ask = {"model": "tiny", "messages": HELLO, "max_tokens": 200, "stream": stream, "ignore_eos": True}
            task = asyncio.create_task(worker.post("chat/completions", ask))
            await settled(lambda: worker.engine.counts().running == 1)
            task.cancel()
            await settled(lambda: worker.engine.counts().running == 0 and not worker.memory.space.ids)

    with_worker(llama_dir, tmp_path, act, batch_tokens_max=32)


def message(**fields):
    return {"messages": [HELLO[0] | fields]}


CHAT, TEXT = "chat/completions", "completions"
BAD = [
    (CHAT, b"{", 400, "invalid_json", "could not parse"),
    (CHAT, b"[1]", 400, "invalid_json", "must be a JSON object"),
    (CHAT, b'{"messages": [{"role": "user", "content": "\\ud800"}]}', 400, "invalid_json", "surrogate"),
    (CHAT, b"[" * 50_000, 400, "invalid_json", "could not parse"),
    (CHAT, {}, 400, "missing_required_parameter", "'messages' is missing"),
    (CHAT, {"messages": "hi"}, 400, "invalid_type", "must be a list"),
    (CHAT, {"messages": []}, 400, None, "at least one message"),
    (CHAT, {"messages": ["hi"]}, 400, "invalid_type", "'messages.0' must be an object"),
    (CHAT, {"messages": [{"role": "boss", "content": "x"}]}, 400, None, "'messages.0.role' is \"boss\""),
    (CHAT, {"messages": [{"content": "x"}]}, 400, None, "'messages.0.role' is null; it must be one of"),
    (CHAT, {"messages": [{"role": "user", "content": [3]}]}, 400, None, "a part that is no object: 3"),
    (CHAT, {"messages": [{"role": "user", "content": [{}]}]}, 400, "unsupported_content", "a part of type null"),
    (CHAT, {"messages": [{"role": "user", "content": 3}]}, 400, None, "'messages.0.content' must be"),
    (
        CHAT,
        {"messages": [{"role": "user", "content": [{"type": "image_url"}]}]},
        400,
        "unsupported_content",
        "text only",
    ),
    (CHAT, {"messages": [{"role": "tool", "content": "x"}]}, 400, None, "no tools here"),
    (CHAT, {"messages": HELLO, "n": 0}, 400, None, "'n' is 0, it must lie between 1 and 128"),
    (CHAT, {"messages": HELLO, "logprobs": 3}, 400, "invalid_type", "'logprobs' must be true or false"),
    (CHAT, {"messages": HELLO, "top_logprobs": 3}, 400, None, "only allowed when 'logprobs' is true"),
    (CHAT, {"messages": HELLO, "logprobs": True, "top_logprobs": 21}, 400, None, "between 0 and 20"),
    (TEXT, {"prompt": "a", "logprobs": 6}, 400, None, "between 0 and 5"),
    (TEXT, {"prompt": "a", "top_logprobs": 1}, 400, "unknown_parameter", "top_logprobs"),
    (TEXT, {"prompt": ["a"] * 100, "n": 3, "max_tokens": 1}, 400, None, "make 300 answers, the most at once is 256"),
    (CHAT, message(name=3), 400, "invalid_type", "'messages.0.name' must be a string"),
    (CHAT, message(role="system", name="Ann"), 400, "unsupported_parameter", "no use of it for system messages"),
    (
        CHAT,
        message(reasoning_content="hm"),
        400,
        "unsupported_parameter",
        "messages.0.reasoning_content' has no effect",
    ),
    (CHAT, message(role="assistant", tool_calls=[{"id": "a"}]), 400, "unsupported_parameter", "tool_calls"),
    (CHAT, message(images=["x"]), 400, "unknown_parameter", "messages.0.images"),
    (CHAT, message(content=[{"type": "text", "text": "a", "colour": 1}]), 400, "unknown_parameter", "content.colour"),
    (
        CHAT,
        {"messages": HELLO, "chat_template_kwargs": {"chat_template": "x"}},
        400,
        "unsupported_parameter",
        "not for a client",
    ),
    (CHAT, {"messages": HELLO, "tools": [{"type": "function"}]}, 400, "unsupported_parameter", "no functions"),
    (
        CHAT,
        {"messages": HELLO, "response_format": {"type": "json_object"}},
        400,
        "unsupported_parameter",
        "'response_f",
    ),
    (CHAT, {"messages": HELLO, "temprature": 1}, 400, "unknown_parameter", "temprature"),
    (CHAT, {"messages": HELLO, "temperature": 3}, 400, None, "between 0 and 2"),
    (CHAT, {"messages": HELLO, "temperature": "hot"}, 400, "invalid_type", "must be a number, not a string"),
    (CHAT, b'{"messages": [], "temperature": NaN}', 400, None, "between 0 and 2"),
    (CHAT, {"messages": HELLO, "top_p": 10**400}, 400, None, "between 0 and 1"),
    (CHAT, {"messages": HELLO, "max_tokens": 0}, 400, None, "between 1 and"),
    (CHAT, {"messages": HELLO, "max_tokens": True}, 400, "invalid_type", "a whole number, not a boolean"),
    (
        CHAT,
        {"messages": HELLO, "max_tokens": 1000},
        400,
        "context_length_exceeded",
        "is 256 tokens.*1000 in the completion",
    ),
    (CHAT, {"messages": [{"role": "user", "content": "x" * 400}]}, 400, "context_length_exceeded", "418 in the prompt"),
    (CHAT, {"messages": HELLO, "stop": ["a", 3]}, 400, "invalid_type", "'stop' must be"),
    (CHAT, {"messages": HELLO, "stop": [""]}, 400, None, "empty string"),
    (CHAT, {"messages": HELLO, "stream": "yes"}, 400, "invalid_type", "true or false"),
    (CHAT, {"messages": HELLO, "stream_options": {}}, 400, None, "only allowed when 'stream'"),
    (CHAT, {"messages": HELLO, "logit_bias": {"9999": 1}}, 400, None, "names token 9999"),
    (CHAT, {"messages": HELLO, "model": 4}, 400, "invalid_type", "'model' must be a string"),
    (TEXT, {}, 400, "missing_required_parameter", "'prompt' is missing"),
    (TEXT, {"prompt": ""}, 400, "empty_prompt", "no tokens"),
    (TEXT, {"prompt": [999]}, 400, None, "the vocabulary has 257"),
    (TEXT, {"prompt": [-1]}, 400, None, "token id -1"),
    (TEXT, {"prompt": ["a", [1]]}, 400, "invalid_type", "all of one kind"),
    (TEXT, {"prompt": {"a": 1}}, 400, "invalid_type", "not an object"),
    (TEXT, {"prompt": "a", "echo": True}, 400, "unsupported_parameter", "'echo'"),
    (TEXT, {"prompt": "a", "best_of": 4}, 400, "unsupported_parameter", "'best_of'"),
    ("embeddings", {"input": "a"}, 400, "wrong_route", "makes no embeddings"),
    ("nothing", {}, 404, "no_such_route", "/v1/nothing"),
    (CHAT, b" " * (1 << 16) + b"{}", 413, "body_too_large", "larger than 65536 bytes"),
]


def test_what_is_wrong_is_said(llama_dir, tmp_path):
    import re

    async def act(worker):
        for path, body, status, code, message in BAD:
            got, answer = await worker.post(path, body)
            error = answer["error"]
            where = f"{path} {str(body)[:80]}: {got} {error}"
            assert got == status, where
            assert error["code"] == code, where
            assert re.search(message, error["message"]), where
            assert set(error) == {"message", "type", "param", "code"}
        async with worker.session.get("http://x/v1/chat/completions") as answer:
            assert answer.status == 405
        status, _ = await worker.post("chat/completions", {"messages": HELLO, "max_tokens": 2, "n": 1, "tools": None})
        assert status == 200
        assert worker.memory.space.peak < 40

    with_worker(llama_dir, tmp_path, act, body_bytes_max=1 << 16)


def test_health_and_models(llama_dir, tmp_path):
    async def act(worker):
        async with worker.session.get("http://x/health") as answer:
            assert await answer.json() == {
                "status": "ok", "model": "tiny", "requests_running": 0, "requests_waiting": 0,
            }  # fmt: skip
        assert [model.id async for model in await worker.client.models.list()] == ["tiny"]

    with_worker(llama_dir, tmp_path, act)


# -------------------------------------------------------------------------------------------------------- embeddings

TEXTS = ["the sea is wide", "fish swim in shoals and the sea is wide", "fish"]


def plain_vectors(loaded, texts):
    vectors = []
    for text in texts:
        batch = loaded.tokenizer([text], return_tensors="pt")
        with torch.no_grad():
            states = loaded.model(
                input_ids=batch["input_ids"], attention_mask=batch["attention_mask"]
            ).last_hidden_state
        mask = batch["attention_mask"].unsqueeze(-1)
        mean = (states * mask).sum(1) / mask.sum(1)
        vectors.append(torch.nn.functional.normalize(mean, dim=1)[0])
    return vectors


def test_embeddings_are_plain_transformers(bert_dir, tmp_path):
    async def act(worker):
        expected = plain_vectors(worker.loaded, TEXTS)
        answer = await worker.client.embeddings.create(model="tiny", input=TEXTS, encoding_format="float")
        assert [entry.index for entry in answer.data] == [0, 1, 2]
        for entry, vector in zip(answer.data, expected, strict=True):
            torch.testing.assert_close(torch.tensor(entry.embedding), vector, rtol=1e-6, atol=1e-6)
        tokens = sum(len(worker.tokenizer(text)["input_ids"]) for text in TEXTS)
        assert (answer.usage.prompt_tokens, answer.usage.total_tokens) == (tokens, tokens)
        _, one = await worker.post("embeddings", {"input": TEXTS[1]})
        assert one["data"][0]["embedding"] == answer.data[1].embedding, "a text's neighbours make no difference"
        own = {"input": TEXTS[1], "encoding_format": "base64", "dimensions": len(answer.data[1].embedding)}
        _, coded = await worker.post("embeddings", own)
        raw = base64.b64decode(coded["data"][0]["embedding"])
        assert list(struct.unpack(f"<{len(raw) // 4}f", raw)) == answer.data[1].embedding
        ids = worker.tokenizer(TEXTS[1])["input_ids"]
        for form in (ids, [ids]):
            _, by_ids = await worker.post("embeddings", {"input": form})
            assert by_ids["data"][0]["embedding"] == answer.data[1].embedding

    with_worker(bert_dir, tmp_path, act)


def test_what_is_wrong_with_embeddings_is_said(bert_dir, tmp_path):
    async def act(worker):
        for body, code in [
            ({}, "missing_required_parameter"),
            ({"input": []}, None),
            ({"input": [1.5]}, "invalid_type"),
            ({"input": "the " * 20}, "context_length_exceeded"),
            ({"input": "sea", "dimensions": 4}, "unsupported_value"),
            ({"input": "sea", "dimensions": "all"}, "invalid_type"),
            ({"input": ""}, "empty_input"),
            ({"input": ["sea", ""]}, "empty_input"),
            ({"input": [[5], []]}, "empty_input"),
            ({"input": [[]]}, "empty_input"),
            ({"input": "sea", "encoding_format": "hex"}, None),
            ({"input": "sea", "colour": 1}, "unknown_parameter"),
        ]:
            status, answer = await worker.post("embeddings", body)
            assert (status, answer["error"]["code"]) == (400, code), (body, answer)
        status, answer = await worker.post("chat/completions", {"messages": HELLO})
        assert (status, answer["error"]["code"]) == (400, "wrong_route")
        status, answer = await worker.post("embeddings", {"input": "the " * 20})
        assert "16 tokens" in answer["error"]["message"]
        assert "22 tokens" in answer["error"]["message"]

    with_worker(bert_dir, tmp_path, act)


def test_embeddings_wait_for_memory_and_then_say_so(bert_dir, tmp_path):
    async def act(worker):
        worker.memory.closed = True
        task = asyncio.create_task(worker.post("embeddings", {"input": "sea"}))
        await asyncio.sleep(0.2)
        assert not task.done()
        worker.memory.closed = False
        assert (await task)[0] == 200
        worker.memory.closed = True
        status, answer = await worker.post("embeddings", {"input": "sea"})
        assert (status, answer["error"]["code"]) == (503, "out_of_memory")
        await settled(lambda: worker.engine.counts().running == 0)

    with_worker(bert_dir, tmp_path, act, stall_timeout_s=5)
