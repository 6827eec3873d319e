"""The server's salt on its way into vLLM's requests: one request's never reaches another."""

from __future__ import annotations

import asyncio
from types import SimpleNamespace
from typing import Any

from shoal.vllm import salt


class Processor:
    """Makes requests as vLLM's does."""

    def process_inputs(self, request_id: str, prompt: dict[str, Any], *, priority: int = 0) -> SimpleNamespace:
        return SimpleNamespace(request_id=request_id, cache_salt=prompt.get("cache_salt"), priority=priority)


def answered(requests: list[tuple[str | None, str | None]]) -> list[str | None]:
    """Answer requests at the same time, each with a header and a salt of its own; give what the engine got."""
    engine = SimpleNamespace(input_processor=Processor())
    salt.mark(engine)
    got: dict[str, str | None] = {}

    async def one(number: int, header: str | None, own: str | None) -> None:
        async def app(scope: Any, receive: Any, send: Any) -> None:
            await asyncio.sleep(0)  # the others begin
            prompt = {} if own is None else {"cache_salt": own}

            async def engine_is_given_it() -> None:
                await asyncio.sleep(0)
                request = engine.input_processor.process_inputs(str(number), prompt, priority=3)
                assert request.priority == 3
                got[request.request_id] = request.cache_salt

            # As an answer that streams does: in a task of its own.
            await asyncio.create_task(engine_is_given_it())

        headers = [(b"host", b"shoal")] + ([] if header is None else [(salt.HEADER, header.encode())])
        await salt.CacheSalt(app)({"type": "http", "headers": headers}, None, None)

    async def all_of_them() -> None:
        await asyncio.gather(*(one(number, *request) for number, request in enumerate(requests)))

    asyncio.run(all_of_them())
    return [got[str(number)] for number in range(len(requests))]


def test_each_request_has_the_salt_of_its_key_and_its_own_within() -> None:
    assert answered([("1-alice", None), ("1-bob", None), ("1-alice", "mine"), (None, "mine"), (None, None)]) == [
        "1-alice\0", "1-bob\0", "1-alice\0mine", "mine", None,
    ]  # fmt: skip


def test_what_has_no_headers_passes() -> None:
    seen: list[str] = []

    async def app(scope: Any, receive: Any, send: Any) -> None:
        seen.append(scope["type"])

    asyncio.run(salt.CacheSalt(app)({"type": "lifespan"}, None, None))
    assert seen == ["lifespan"]
