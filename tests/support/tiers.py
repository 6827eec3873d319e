"""Prompts of which tiers keep something, and what tiers say of themselves, for tests that run a whole server."""

from __future__ import annotations

import time
from typing import TYPE_CHECKING, Any

import httpx

if TYPE_CHECKING:
    from collections.abc import Callable

    from tests.support.server import Server

TOKENS = 8
BLOCK = 16
SEEN = "and so the tide goes out, and comes in, and the boats lie on the sand: "


def prompt_of(number: int) -> str:
    """One of several long prompts that begin differently; a byte is a token."""
    return f"{number:03} {SEEN * 6}"[:400]


WHOLE = (len(prompt_of(0)) - 1) // BLOCK
"""Blocks of a prompt that can be found."""
SAVED = (len(prompt_of(0)) + TOKENS - 1) // BLOCK
"""Full blocks of a prompt and its answer."""


def ask(server: Server, name: str, prompt: str) -> tuple[str, int]:
    """Give the answer, and how many tokens of the prompt were found."""
    body = {"model": name, "prompt": prompt, "max_tokens": TOKENS, "temperature": 0}
    answer = server.http.post("/v1/completions", json=body)
    assert answer.status_code == httpx.codes.OK, f"{answer.text}\n{server.logs()}"
    said = answer.json()
    return said["choices"][0]["text"], said["usage"]["prompt_tokens_details"]["cached_tokens"]


def tiers(server: Server, name: str) -> dict[str, dict[str, Any]]:
    """What each tier did for a model, by its newest worker."""
    return {tier["tier"]: tier for tier in server.model(name)["tiers"]}


def hold(server: Server, name: str, condition: Callable[[dict[str, dict[str, Any]]], bool]) -> None:
    """Wait until something holds of a model's tiers; raises with their figures."""
    deadline = time.monotonic() + 90
    while not condition(tiers(server, name)):
        assert time.monotonic() < deadline, f"{tiers(server, name)}\n{server.logs()}"
        time.sleep(0.05)


def ready(server: Server, name: str, *which: str) -> None:
    """Wait until these tiers are in use."""
    hold(server, name, lambda told: all(tier in told and told[tier]["reason"] is None for tier in which))
