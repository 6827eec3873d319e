"""The data plane: OpenAI's HTTP API on a Unix socket.

Routes and the shape of answers are here; what a body may say is in :mod:`shoal.worker.parsing`, how tokens come about
in the engines. A handler is cancelled when its client goes away, and takes its request out of the engine.
"""

from __future__ import annotations

import asyncio
import base64
import json
import logging
import struct
import time
import uuid
from collections.abc import AsyncIterator, Awaitable, Callable, Mapping
from contextlib import suppress
from dataclasses import dataclass, replace
from typing import TYPE_CHECKING, Any

from aiohttp import web

from . import chat, logprobs, parsing
from .errors import ApiError, described, shown
from .logprobs import Words
from .parsing import SamplingDefaults
from .stopping import TextStream

if TYPE_CHECKING:
    from pathlib import Path

    from .engine_causal import CausalEngine, Generation
    from .engine_embedding import EmbeddingEngine
    from .parsing import GenerationAsk

logger = logging.getLogger(__name__)

_PROMPTS_MAX = 128
_TEXTS_MAX = 2048
_CACHE_SALT = "X-Shoal-Cache-Salt"  # as the server's gateway says it
_CONNECTIONS_MAX = 1024

Handler = Callable[[web.Request], Awaitable[web.StreamResponse]]


@dataclass(frozen=True)
class Served:
    """One model, ready to answer."""

    name: str
    tokenizer: Any
    vocabulary: int
    created: int
    causal: CausalEngine | None = None
    embedding: EmbeddingEngine | None = None
    defaults: SamplingDefaults = SamplingDefaults()  # noqa: RUF009 - frozen
    body_bytes_max: int = 8 << 20

    @property
    def routes(self) -> list[str]:
        """Paths under /v1/ that this model answers."""
        if self.embedding is not None:
            return ["embeddings"]
        return ["chat/completions", "completions"] if chat.has_template(self.tokenizer) else ["completions"]


@web.middleware
async def _errors_as_json(request: web.Request, handler: Handler) -> web.StreamResponse:
    """Every answer that is not 200 has OpenAI's form."""
    try:
        return await handler(request)
    except ApiError as error:
        return web.json_response(error.body(), status=error.status)
    except web.HTTPRequestEntityTooLarge as error:
        limit = request.app[_SERVED].body_bytes_max
        problem = ApiError(f"the request's body is larger than {limit} bytes", status=413, code="body_too_large")
        return web.json_response(problem.body(), status=error.status)
    except web.HTTPException as error:
        problem = ApiError(
            f"{request.method} {request.path}: {error.reason}", status=error.status, code="no_such_route"
        )
        return web.json_response(problem.body(), status=error.status, headers=_allow(error))
    except Exception as error:
        logger.exception("%s %s failed", request.method, request.path)
        problem = ApiError(f"internal error: {described(error)}", status=500, code="internal_error")
        return web.json_response(problem.body(), status=500)


def _allow(error: web.HTTPException) -> Mapping[str, str]:
    return {"Allow": error.headers["Allow"]} if "Allow" in error.headers else {}


def make_app(served: Served) -> web.Application:
    """Make the application that answers for one model."""
    app = web.Application(middlewares=[_errors_as_json], client_max_size=served.body_bytes_max)
    app[_SERVED] = served
    app.router.add_get("/health", _health)
    app.router.add_get("/v1/models", _models)
    app.router.add_post("/v1/chat/completions", _chat_completions)
    app.router.add_post("/v1/completions", _completions)
    app.router.add_post("/v1/embeddings", _embeddings)
    return app


_SERVED = web.AppKey("served", Served)


async def serve(app: web.Application, socket: Path) -> web.AppRunner:
    """Listen on a Unix socket; a stale file in its place is replaced."""
    runner = web.AppRunner(app, access_log=None, handler_cancellation=True, shutdown_timeout=5.0)
    await runner.setup()
    with suppress(FileNotFoundError):
        socket.unlink()  # noqa: ASYNC240 - a moment, before anybody is served
    await web.UnixSite(runner, str(socket), backlog=_CONNECTIONS_MAX).start()
    return runner


async def _health(request: web.Request) -> web.Response:
    counts = _engine_counts(request.app[_SERVED])
    return web.json_response({"status": "ok", "model": request.app[_SERVED].name, **counts})


def _engine_counts(served: Served) -> dict[str, int]:
    engine = served.causal or served.embedding
    counts = engine.counts() if engine is not None else None
    return {"requests_running": counts.running, "requests_waiting": counts.waiting} if counts else {}


async def _models(request: web.Request) -> web.Response:
    served = request.app[_SERVED]
    entry = {"id": served.name, "object": "model", "created": served.created, "owned_by": "shoal"}
    return web.json_response({"object": "list", "data": [entry]})


async def _body(request: web.Request) -> dict[str, Any]:
    raw = await request.read()
    try:
        body = json.loads(raw)
    except (ValueError, RecursionError) as error:
        raise ApiError(f"We could not parse the JSON body of your request: {error}", code="invalid_json") from error
    if not isinstance(body, dict):
        raise ApiError("the body must be a JSON object", code="invalid_json")
    if b"\\u" in raw:
        try:
            json.dumps(body, ensure_ascii=False).encode()
        except UnicodeEncodeError as error:
            raise ApiError("the body has half of a surrogate pair, which is no text", code="invalid_json") from error
    return body


# ------------------------------------------------------------------------------------------------ chat and completions


@dataclass(frozen=True)
class _Shape:
    """How the pieces of an answer look in one of the two APIs."""

    object: str
    chunk_object: str
    prefix: str
    chat: bool

    def choice(
        self, index: int, text: str, finish_reason: str, logprobs: dict[str, Any] | None = None
    ) -> dict[str, Any]:
        content: dict[str, Any] = (
            {"message": {"role": "assistant", "content": text, "refusal": None}} if self.chat else {"text": text}
        )
        return {"index": index, **content, "logprobs": logprobs, "finish_reason": finish_reason}

    def delta(
        self, index: int, text: str, logprobs: dict[str, Any] | None = None, finish_reason: str | None = None
    ) -> dict[str, Any]:
        content: dict[str, Any] = {"delta": {"content": text} if text else {}} if self.chat else {"text": text}
        return {"index": index, **content, "logprobs": logprobs, "finish_reason": finish_reason}

    def opening(self, index: int) -> dict[str, Any] | None:
        if not self.chat:
            return None
        delta = {"role": "assistant", "content": "", "refusal": None}
        return {"index": index, "delta": delta, "logprobs": None, "finish_reason": None}


_CHAT = _Shape("chat.completion", "chat.completion.chunk", "chatcmpl-", chat=True)
_TEXT = _Shape("text_completion", "text_completion", "cmpl-", chat=False)


@dataclass(frozen=True)
class _Answer:
    """What every piece of one answer repeats."""

    shape: _Shape
    ask: GenerationAsk
    id: str
    created: int

    def frame(self, kind: str, choices: list[dict[str, Any]]) -> dict[str, Any]:
        return {
            "id": self.id,
            "object": kind,
            "created": self.created,
            "model": self.ask.model,
            "system_fingerprint": None,
            "choices": choices,
        }

    def chunk(self, choice: dict[str, Any]) -> dict[str, Any]:
        frame = self.frame(self.shape.chunk_object, [choice])
        return frame | {"usage": None} if self.ask.include_usage else frame


async def _chat_completions(request: web.Request) -> web.StreamResponse:
    served = request.app[_SERVED]
    _causal(served, "chat/completions")
    body = await _body(request)
    ask = parsing.generation_ask(body, served.name, served.defaults, chat=True)
    messages = chat.checked_messages(body.get("messages"))
    extra = body.get("chat_template_kwargs")
    if extra is not None and not isinstance(extra, dict):
        raise parsing.wrong_type("chat_template_kwargs", "an object", extra)
    # Tokenising a long prompt takes a while; other answers go on streaming meanwhile.
    prompt = await asyncio.to_thread(chat.render, served.tokenizer, messages, extra)
    return await _generate(request, _CHAT, ask, [prompt], "messages")


async def _completions(request: web.Request) -> web.StreamResponse:
    served = request.app[_SERVED]
    _causal(served, "completions")
    body = await _body(request)
    ask = parsing.generation_ask(body, served.name, served.defaults, chat=False)
    prompts = parsing.one_or_many(body, "prompt", served.vocabulary, _PROMPTS_MAX)
    return await _generate(request, _TEXT, ask, await _tokenized(served.tokenizer, prompts), "prompt")


async def _tokenized(tokenizer: Any, prompts: list[str | list[int]]) -> list[list[int]]:
    def tokens() -> list[list[int]]:
        return [list(tokenizer(p)["input_ids"]) if isinstance(p, str) else p for p in prompts]

    return await asyncio.to_thread(tokens)


def _causal(served: Served, route: str) -> CausalEngine:
    if served.causal is None:
        raise ApiError(f"model {served.name!r} does not answer /v1/{route}, only /v1/embeddings", code="wrong_route")
    return served.causal


def _submit(served: Served, ask: GenerationAsk, prompts: list[list[int]], param: str) -> list[Generation]:
    """Take all prompts in, or none."""
    engine = served.causal
    assert engine is not None
    limits = engine.limits
    over = next((token for token in ask.sampling.logit_bias if token >= served.vocabulary), None)
    if over is not None:
        raise ApiError(f"'logit_bias' names token {over}; the vocabulary has {served.vocabulary}", param="logit_bias")
    if len(prompts) * ask.n > engine.requests_max:
        raise ApiError(
            f"{len(prompts)} prompts with 'n' {ask.n} make {len(prompts) * ask.n} answers, the most at once is "
            f"{engine.requests_max}",
            param="n",
        )
    wanted = []
    for prompt in prompts:
        if not prompt:
            raise ApiError(f"'{param}' has no tokens", param=param, code="empty_prompt")
        wanted.append(limits.check(len(prompt), ask.tokens_max, param))
    generations: list[Generation] = []
    try:
        for prompt, tokens_max in zip(prompts, wanted, strict=True):
            for number in range(ask.n):  # a seed and the next: what one choice draws, it draws alone too
                sampling = replace(ask.sampling, seed=ask.sampling.seed + number)
                generations.append(
                    engine.submit(prompt, sampling, tokens_max, ignore_eos=ask.ignore_eos, salt=ask.cache_salt)
                )
    except BaseException:
        for generation in generations:
            generation.cancel()
        raise
    return generations


async def _generate(
    request: web.Request, shape: _Shape, ask: GenerationAsk, prompts: list[list[int]], param: str
) -> web.StreamResponse:
    served = request.app[_SERVED]
    own = request.headers.get(_CACHE_SALT)
    if own is not None:  # the server keeps its clients apart; what one asks for holds among its own requests
        ask = replace(ask, cache_salt=f"{own}\0{ask.cache_salt}")
    answer = _Answer(shape, ask, shape.prefix + uuid.uuid4().hex, int(time.time()))
    generations = _submit(served, ask, prompts, param)
    writers = [_Writer(served.tokenizer, answer, generation) for generation in generations]
    try:
        if ask.stream:
            return await _streamed(request, answer, prompts, generations, writers)
        choices = []
        for index, (generation, writer) in enumerate(zip(generations, writers, strict=True)):
            pieces = [piece async for piece, _ in _texts(generation, writer)]
            choices.append(shape.choice(index, "".join(pieces), writer.finish_reason, writer.logprobs(last=True)))
        body = answer.frame(shape.object, choices) | {"usage": _usage(prompts, writers)}
        return web.json_response(body)
    finally:
        for generation in generations:
            generation.cancel()


class _Writer(TextStream):
    """The text of one choice, and what is told of its tokens."""

    def __init__(self, tokenizer: Any, answer: _Answer, generation: Generation) -> None:
        super().__init__(tokenizer, answer.ask.stops)
        self._words = Words(tokenizer)
        self._chat = answer.shape.chat
        self._generation = generation
        self._told = 0

    @property
    def finish_reason(self) -> str:
        return "stop" if self.stopped else self._generation.finish_reason or "length"

    @property
    def cached(self) -> int:
        return self._generation.cached_tokens

    def news(self, *, last: bool = False) -> dict[str, Any] | None:
        """As `logprobs`, but None where there is nothing new to tell."""
        before = self._told
        told = self.logprobs(last=last)
        return told if self._told > before else None

    def logprobs(self, *, last: bool = False) -> dict[str, Any] | None:
        """Tell of the tokens whose text was given out since the last time; the one that ended the answer is none."""
        if self._generation.told is None:
            return None
        end = self.shown
        if last and not self.stopped:
            end = self.tokens - (self._generation.finish_reason == "stop")
        first, self._told = self._told, max(end, self._told)
        entries = self._generation.logprobs[first:end]
        if self._chat:
            return logprobs.chat_form(self._words, entries)
        return logprobs.text_form(self._words, entries, self.starts[first:end])


async def _texts(generation: Generation, writer: TextStream) -> AsyncIterator[tuple[str, bool]]:
    """Pieces of text as they become certain; True with the last."""
    async for tokens in generation:
        piece = writer.feed(tokens)
        if writer.stopped:
            generation.cancel()
            yield piece, True
            return
        if piece:
            yield piece, False
    yield writer.finish(), True


def _usage(prompts: list[list[int]], writers: list[_Writer]) -> dict[str, Any]:
    prompt, completion = sum(map(len, prompts)), sum(writer.tokens for writer in writers)
    each = len(writers) // len(prompts)  # choices: a prompt counts once, with what none of its choices computed
    cached = sum(min(writer.cached for writer in writers[at : at + each]) for at in range(0, len(writers), each))
    return {
        "prompt_tokens": prompt,
        "completion_tokens": completion,
        "total_tokens": prompt + completion,
        "prompt_tokens_details": {"cached_tokens": cached},
    }


async def _streamed(
    request: web.Request,
    answer: _Answer,
    prompts: list[list[int]],
    generations: list[Generation],
    writers: list[_Writer],
) -> web.StreamResponse:
    """Server-sent events: an opening for each choice, pieces, a finish reason each, usage if asked for, [DONE]."""
    first = await _first_event(generations[0])  # an error before the first token is a plain HTTP error
    headers = {
        "Content-Type": "text/event-stream; charset=utf-8",
        "Cache-Control": "no-cache",
        "X-Accel-Buffering": "no",
    }
    response = web.StreamResponse(headers=headers)
    await response.prepare(request)
    shape = answer.shape
    try:
        for index in range(len(generations)):
            opening = shape.opening(index)
            if opening is not None:
                await _event(response, answer.chunk(opening))
        async for index, piece, told, last in _merged(generations, writers, first):
            writer = writers[index]
            if piece:
                await _event(response, answer.chunk(shape.delta(index, piece, told)))
            if last:
                rest = writer.news(last=True)
                await _event(response, answer.chunk(shape.delta(index, "", rest, writer.finish_reason)))
        if answer.ask.include_usage:
            frame = answer.frame(shape.chunk_object, [])
            await _event(response, frame | {"usage": _usage(prompts, writers)})
    except ApiError as error:  # the status line is gone; OpenAI's clients raise on an event with an error
        await _event(response, error.body())
    await response.write(b"data: [DONE]\n\n")
    await response.write_eof()
    return response


async def _first_event(generation: Generation) -> list[int]:
    try:
        return await anext(generation)
    except StopAsyncIteration:
        return []


async def _prepended(first: list[int], generation: Generation) -> AsyncIterator[list[int]]:
    if first:
        yield first
    async for tokens in generation:
        yield tokens


async def _merged(
    generations: list[Generation], writers: list[_Writer], first: list[int]
) -> AsyncIterator[tuple[int, str, dict[str, Any] | None, bool]]:
    """Give the pieces of all choices, in the order in which they come."""
    queue: asyncio.Queue[tuple[int, str, dict[str, Any] | None, bool] | BaseException] = asyncio.Queue(maxsize=64)

    async def pump(index: int) -> None:
        try:
            source: Any = generations[index]
            if index == 0:
                source = _Resumed(generations[0], _prepended(first, generations[0]))
            async for piece, last in _texts(source, writers[index]):
                await queue.put((index, piece, writers[index].news() if piece else None, last))
        except Exception as error:  # noqa: BLE001 - it is raised where the answer is written
            await queue.put(error)

    tasks = [asyncio.create_task(pump(index)) for index in range(len(generations))]
    try:
        ended = 0
        while ended < len(tasks):
            item = await queue.get()
            if isinstance(item, BaseException):
                raise item
            ended += item[3]
            yield item
    finally:
        for task in tasks:
            task.cancel()
        await asyncio.gather(*tasks, return_exceptions=True)


class _Resumed:
    """A generation whose first tokens were read already."""

    def __init__(self, generation: Generation, tokens: AsyncIterator[list[int]]) -> None:
        self._tokens = tokens
        self.cancel = generation.cancel

    def __aiter__(self) -> AsyncIterator[list[int]]:
        return self._tokens


async def _event(response: web.StreamResponse, value: dict[str, Any]) -> None:
    await response.write(b"data: " + json.dumps(value, separators=(",", ":"), ensure_ascii=False).encode() + b"\n\n")


# -------------------------------------------------------------------------------------------------------- embeddings

_EMBEDDING_FIELDS = frozenset({"model", "input", "encoding_format", "dimensions", "user"})


async def _embeddings(request: web.Request) -> web.Response:
    served = request.app[_SERVED]
    engine = served.embedding
    if engine is None:
        raise ApiError(
            f"model {served.name!r} makes no embeddings: it answers {', '.join(served.routes)}", code="wrong_route"
        )
    body = await _body(request)
    for name, value in body.items():
        if name not in _EMBEDDING_FIELDS and value is not None:
            raise ApiError(f"Unrecognized request argument supplied: {name}", param=name, code="unknown_parameter")
    dimensions = parsing.integer(body, "dimensions", engine.dimensions, 1, 1 << 31)
    if dimensions != engine.dimensions:
        raise ApiError(
            f"'dimensions' is {dimensions}; this model's vectors have {engine.dimensions} and are not cut",
            param="dimensions",
            code="unsupported_value",
        )
    encoding = parsing.text(body, "encoding_format", "float")
    if encoding not in ("float", "base64"):
        wrong = f"'encoding_format' is {shown(encoding)}; it must be 'float' or 'base64'"
        raise ApiError(wrong, param="encoding_format")
    inputs = parsing.one_or_many(body, "input", served.vocabulary, _TEXTS_MAX)
    for index, value in enumerate(inputs):
        if not value:  # also where the tokenizer would make special tokens of nothing
            where = f"'input' {index}" if isinstance(body["input"], list) and len(inputs) > 1 else "'input'"
            raise ApiError(f"{where} is empty: there is nothing to embed", param="input", code="empty_input")
    texts = await _tokenized(served.tokenizer, inputs)
    for index, text in enumerate(texts):
        if not text:
            raise ApiError(f"'input' {index} has no tokens", param="input", code="empty_input")
        if len(text) > engine.context_tokens:
            raise ApiError(
                f"This model's maximum context length is {engine.context_tokens} tokens. However, input {index} has "
                f"{len(text)} tokens; it is not cut. Please reduce its length.",
                param="input",
                code="context_length_exceeded",
            )
    vectors = await engine.embed(texts)
    encode = _as_base64 if encoding == "base64" else _as_floats
    data = [
        {"object": "embedding", "index": index, "embedding": encode(vector.tolist())}
        for index, vector in enumerate(vectors)
    ]
    tokens = sum(map(len, texts))
    usage = {"prompt_tokens": tokens, "total_tokens": tokens}
    model = parsing.text(body, "model", served.name)
    return web.json_response({"object": "list", "data": data, "model": model, "usage": usage})


def _as_floats(vector: list[float]) -> list[float]:
    return vector


def _as_base64(vector: list[float]) -> str:
    return base64.b64encode(struct.pack(f"<{len(vector)}f", *vector)).decode("ascii")
