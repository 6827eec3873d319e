"""Processes die without warning; memory comes back and nobody else notices."""

from __future__ import annotations

import json
import os
import random
import signal
import threading
import time
from pathlib import Path
from typing import TYPE_CHECKING

import httpx
import pytest
from tests.support.server import serve
from tests.support.witness import until

if TYPE_CHECKING:
    from tests.support.server import Server

TOKENS = 200
KILLS = 5


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


@pytest.mark.parametrize("moment", ["stream", "wake"])
def test_a_worker_killed(tmp_path: Path, model_tables: list[dict[str, object]], moment: str) -> None:
    """Five kills each: the client hears an answer or a clear error, the other stream goes on, memory returns."""
    moments = random.Random(3)
    kills = 0
    with serve(tmp_path, models=model_tables[:2], device_budget="64MiB") as server:
        victim, other = (str(table["name"]) for table in model_tables[:2])
        for name in (victim, other):
            server.wait_for(name, "asleep")
        right = {name: server.complete(name, "abc", TOKENS) for name in (victim, other)}
        for _ in range(KILLS):
            server.wait_for(victim, "asleep", "awake", "partly_resident")
            assert server.order(victim, "sleep").status_code == httpx.codes.OK
            pid = server.workers()[victim]
            beside = Stream(server, other)
            until(lambda beside=beside: bool(beside.texts), 60, "the other model's stream begins")
            if moment == "wake":  # held still until the wake is under way
                os.kill(pid, signal.SIGSTOP)
            client = Stream(server, victim)
            if moment == "wake":
                until(lambda: server.model(victim)["status"] == "waking", 30, "the wake begins")
                os.kill(pid, signal.SIGCONT)
                time.sleep(moments.uniform(0, 0.003))
            else:
                heard = moments.randint(1, 20)
                until(lambda client=client, heard=heard: len(client.texts) >= heard, 60, "the stream goes on")
            os.kill(pid, signal.SIGKILL)
            kills += 1
            text = client.end()
            assert beside.end() == right[other], "the other model's stream suffered"
            if moment == "stream":
                assert client.errors, "the worker was killed in mid-stream, and the client was told all is well"
                assert right[victim].startswith(text)
            elif not client.errors:
                assert text == right[victim], "asked again, and answered otherwise"
            for error in client.errors:
                assert error["message"], error
                assert error["code"], error
            if client.status != httpx.codes.OK:
                assert client.status in {502, 503}, client.errors
            assert not alive(pid)
        server.wait_for(victim, "asleep", "awake", "partly_resident")
        assert server.complete(victim, "abc", TOKENS) == right[victim]
        for name in (victim, other):
            server.order(name, "sleep")
        assert all(model["lease"]["total"] == 0 for model in server.state()["models"])
    assert kills == KILLS


def test_no_worker_survives_the_server(tmp_path: Path, model_tables: list[dict[str, object]]) -> None:
    """The server is killed with SIGKILL: within seconds no worker holds memory, and a new one starts cleanly."""
    with serve(tmp_path, models=model_tables[:2], device_budget="64MiB") as server:
        for table in model_tables[:2]:
            server.wait_for(str(table["name"]), "asleep")
        server.complete(str(model_tables[0]["name"]), "a", 4)
        pids = list(server.workers().values())
        assert len(pids) == 2
        os.kill(server.process.pid, signal.SIGKILL)
        until(lambda: not any(alive(pid) for pid in pids), 10, "workers end after their server")
    with serve(tmp_path, models=model_tables[:1], device_budget="64MiB") as server:
        server.wait_for(str(model_tables[0]["name"]), "asleep")
        assert server.complete(str(model_tables[0]["name"]), "a", 4)


def test_stopping_leaves_nothing(tmp_path: Path, model_tables: list[dict[str, object]]) -> None:
    """Ctrl-C ends the server with status 0, its workers and its sockets."""
    with serve(tmp_path, models=model_tables[:1], device_budget="64MiB") as server:
        server.wait_for(str(model_tables[0]["name"]), "asleep")
        pids = list(server.workers().values())
        assert server.stop() == 0
        assert not any(alive(pid) for pid in pids)
        assert not list(server.runtime_dir.glob("*.sock"))
