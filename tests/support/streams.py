"""Clients that read a stream beside what a test does, and whether a process lives."""

from __future__ import annotations

import json
import threading
from pathlib import Path
from typing import TYPE_CHECKING

import httpx

if TYPE_CHECKING:
    from tests.support.server import Server

TOKENS = 200


def alive(pid: int) -> bool:
    """Whether a process runs (a zombie does not)."""
    try:
        return Path(f"/proc/{pid}/stat").read_text().rsplit(")", 1)[1].split()[0] != "Z"
    except FileNotFoundError:
        return False


class Stream:
    """A streamed completion in a thread of its own, and what its client has heard so far."""

    def __init__(self, server: Server, model: str) -> None:
        self.texts: list[str] = []
        self.errors: list[dict[str, object]] = []
        self.status = 0
        self.done = False
        self.torn: Exception | None = None
        self._url = f"{server.url}/v1/completions"
        self._body = {"model": model, "prompt": "abc", "max_tokens": TOKENS, "temperature": 0, "stream": True}
        self._thread = threading.Thread(target=self._run, daemon=True)
        self._thread.start()

    def _run(self) -> None:
        try:
            with httpx.stream("POST", self._url, json=self._body, timeout=120) as answer:
                self.status = answer.status_code
                if self.status != httpx.codes.OK:
                    self.errors.append(json.loads(answer.read())["error"])
                    return
                for line in answer.iter_lines():
                    data = line.removeprefix("data: ")
                    if data == "[DONE]":
                        self.done = True
                    elif data != line:
                        event = json.loads(data)
                        if "error" in event:
                            self.errors.append(event["error"])
                        else:
                            self.texts += [choice["text"] for choice in event["choices"]]
        except (httpx.TransportError, ValueError, KeyError) as error:
            self.torn = error

    def end(self) -> str:
        """Wait for the end, which must be a proper one, and give the text."""
        self._thread.join(120)
        assert not self._thread.is_alive(), "the client never heard the end"
        assert self.torn is None, f"the stream ended without a word: {self.torn!r}"
        assert self.done != bool(self.errors), (self.status, self.done, self.errors)
        return "".join(self.texts)
