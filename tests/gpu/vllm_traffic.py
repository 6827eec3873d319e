"""Clients of several models: bursts that overlap, and all models busy at once. What each request saw, by the clock.

The bursts are those of kvcached's `bench_latency_benefit`: each model in turn rises from nothing to a peak, and falls
to one request a second, while the next one rises.
"""

from __future__ import annotations

import asyncio
import json
import random
import statistics
import time
import zlib
from dataclasses import dataclass
from typing import TYPE_CHECKING

import aiohttp
from benches.results import Row, percentile

if TYPE_CHECKING:
    from collections.abc import Callable, Coroutine

TIMEOUT_S = 180.0
LETTERS = "abcdefghij klmnop"


@dataclass
class Seen:
    """One request.

    Attributes
    ----------
    model : str
        Whose.
    status : int
        HTTP's; 0 where the connection or the stream broke.
    first_s, total_s : float
        Until the first text and the end, in seconds from when it was due.
    tokens : int
        Tokens of the answer.
    """

    model: str
    status: int
    first_s: float
    total_s: float
    tokens: int


def prompt_of(length: int, seed: int) -> str:
    """Give so many symbols, each one token, that no other seed has."""
    chance = random.Random(seed)
    return "".join(chance.choice(LETTERS) for _ in range(length))


async def ask(
    http: aiohttp.ClientSession, url: str, model: str, prompt: str, tokens: int, *, due: float | None = None
) -> Seen:
    """Complete one prompt, streamed. The time a client waits for its own turn counts, where `due` is said."""
    begun = time.monotonic() if due is None else due
    body = {
        "model": model, "prompt": prompt, "max_tokens": tokens, "temperature": 0, "stream": True, "ignore_eos": True,
        "stream_options": {"include_usage": True},
    }  # fmt: skip
    first, made, status = 0.0, 0, 0
    try:
        async with http.post(f"{url}/v1/completions", json=body) as answer:
            if answer.status != 200:
                await answer.read()
                return Seen(model, answer.status, 0.0, time.monotonic() - begun, 0)
            async for line in answer.content:
                if not line.startswith(b"data: {"):
                    continue
                first = first or time.monotonic() - begun
                # Only what may say it is parsed: a client of thousands of tokens a second has little time for each.
                if b'"usage":{' in line.replace(b" ", b"")[:4000]:
                    made = json.loads(line[6:])["usage"]["completion_tokens"]
            status = 200 if made == tokens else 0
    except (aiohttp.ClientError, TimeoutError, OSError, ValueError, KeyError):
        status = 0
    return Seen(model, status, first, time.monotonic() - begun, made)


def ramps(names: list[str], peak: float, rise_s: float, seed: int = 0) -> list[tuple[float, str]]:
    """Say when requests come, and for whom.

    Parameters
    ----------
    names
        Models. Each begins as the one before it begins to fall.
    peak
        Requests a second at the top.
    rise_s
        Seconds up, and as many down.
    seed
        Of the times between arrivals, which are exponential.

    Returns
    -------
    list of (float, str)
        Seconds from the beginning, ascending.
    """
    chance = random.Random(seed)
    last = rise_s * (len(names) + 1)
    found: list[tuple[float, str]] = []

    def rate(at: float) -> float:
        if at < rise_s:
            return peak * at / rise_s
        return max(peak * (2 - at / rise_s), 1.0)

    for number, name in enumerate(names):
        at, start = 0.0, number * rise_s
        while True:
            # Thinning: arrivals at the peak's rate, each kept by its own moment's share of it.
            at += chance.expovariate(peak)
            if start + at >= last:
                break
            if chance.random() < rate(at) / peak:
                found.append((start + at, name))
    return sorted(found)


def burst(urls: dict[str, str], plan: list[tuple[float, str]], prompt: int, tokens: int) -> list[Seen]:
    """Send each request when it is due, however the others fare."""

    async def all_of_them(http: aiohttp.ClientSession) -> list[Seen]:
        begun = time.monotonic()

        async def one(number: int, at: float, name: str) -> Seen:
            await asyncio.sleep(max(begun + at - time.monotonic(), 0))
            return await ask(http, urls[name], name, prompt_of(prompt, number), tokens, due=begun + at)

        return list(await asyncio.gather(*(one(number, *which) for number, which in enumerate(plan))))

    return _run(all_of_them)


def all_active(urls: dict[str, str], clients: int, seconds: float, prompt: int, tokens: int) -> list[Seen]:
    """Keep so many clients of each model busy for so long, each with one request at a time."""

    async def all_of_them(http: aiohttp.ClientSession) -> list[Seen]:
        end = time.monotonic() + seconds
        seen: list[Seen] = []

        async def client(name: str, number: int) -> None:
            turn = 0
            while time.monotonic() < end:
                text = prompt_of(prompt, zlib.crc32(f"{name} {number} {turn}".encode()))
                seen.append(await ask(http, urls[name], name, text, tokens))
                turn += 1

        await asyncio.gather(*(client(name, number) for name in urls for number in range(clients)))
        return seen

    return _run(all_of_them)


def _run(work: Callable[[aiohttp.ClientSession], Coroutine[None, None, list[Seen]]]) -> list[Seen]:
    async def inside() -> list[Seen]:
        timeout = aiohttp.ClientTimeout(total=TIMEOUT_S)
        async with aiohttp.ClientSession(timeout=timeout, connector=aiohttp.TCPConnector(limit=0)) as http:
            return await work(http)

    return asyncio.run(inside())


def rows_of(case: str, seen: list[Seen], seconds: float) -> list[Row]:
    """Turn what was seen into rows: first tokens, time a token, throughput, and what was not answered whole."""
    good = [one for one in seen if one.status == 200]
    first = [one.first_s for one in good] or [float("inf")]
    each = [(one.total_s - one.first_s) / (one.tokens - 1) for one in good if one.tokens > 1] or [float("inf")]
    return [
        Row(case, "first token mean", statistics.fmean(first), "s", "lower", samples=len(good)),
        Row(case, "first token p50", percentile(first, 0.5), "s", "lower", samples=len(good)),
        Row(case, "first token p99", percentile(first, 0.99), "s", "lower", samples=len(good)),
        Row(case, "time a token p50", percentile(each, 0.5) * 1e3, "ms", "lower", samples=len(good)),
        Row(case, "tokens a second", sum(one.tokens for one in good) / seconds, "tokens/s", "higher",
            samples=len(good)),
        Row(case, "not answered whole", len(seen) - len(good), "requests", "lower", samples=len(seen)),
    ]  # fmt: skip
