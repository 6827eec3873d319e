"""A streaming client that keeps the times at which tokens came."""

from __future__ import annotations

import json
import time
from collections.abc import Iterator
from dataclasses import dataclass

import httpx


@dataclass
class Timed:
    """One answered request."""

    status: int
    first_s: float
    total_s: float
    tokens: int
    text: str


def lines(answer: httpx.Response) -> Iterator[str]:
    """Split a stream at newlines and nowhere else."""
    rest = b""
    for part in answer.iter_bytes():
        *whole, rest = (rest + part).split(b"\n")
        for line in whole:
            yield line.decode().rstrip("\r")


def stream(client: httpx.Client, url: str, model: str, prompt: str, tokens: int, *, salt: str | None = None) -> Timed:
    """Complete one prompt greedily, streamed; a refusal is a result too (its status says so).

    With a `salt` that is new each time nothing of the prompt is found in the prefix cache.
    """
    body = {
        "model": model,
        "prompt": prompt,
        "max_tokens": tokens,
        "temperature": 0,
        "stream": True,
        "stream_options": {"include_usage": True},
    }
    if salt is not None:
        body["cache_salt"] = salt
    start = time.perf_counter()
    first, count, text = 0.0, 0, ""
    with client.stream("POST", url, json=body) as answer:
        if answer.status_code != httpx.codes.OK:
            answer.read()
            return Timed(answer.status_code, 0.0, time.perf_counter() - start, 0, answer.text)
        # Not iter_lines: it also splits at separators that may stand inside a JSON string.
        for line in lines(answer):
            if not line.startswith("data: ") or line == "data: [DONE]":
                continue
            chunk = json.loads(line[6:])
            if "error" in chunk:
                return Timed(503, 0.0, time.perf_counter() - start, 0, str(chunk["error"]))
            if chunk["choices"] and chunk["choices"][0]["text"]:
                first = first or time.perf_counter() - start
                text += chunk["choices"][0]["text"]
            if chunk.get("usage"):
                count = chunk["usage"]["completion_tokens"]
    return Timed(200, first, time.perf_counter() - start, count, text)
