"""Processes die without warning; memory comes back and nobody else notices."""

from __future__ import annotations

import os
import random
import signal
import threading
import time
from pathlib import Path

import httpx
from tests.support.server import serve
from tests.support.witness import send, until


def alive(pid: int) -> bool:
    """Whether a process runs (a zombie does not)."""
    try:
        return Path(f"/proc/{pid}/stat").read_text().rsplit(")", 1)[1].split()[0] != "Z"
    except FileNotFoundError:
        return False


def test_a_worker_killed_in_a_stream_or_a_wake(tmp_path: Path, model_tables: list[dict[str, object]]) -> None:
    """Ten kills at random moments: clients hear an answer or a clear error, the other model goes on, memory returns."""
    moments = random.Random(3)
    with serve(tmp_path, models=model_tables[:2], device_budget="44MiB") as server:
        victim, other = (str(table["name"]) for table in model_tables[:2])
        for name in (victim, other):
            server.wait_for(name, "asleep")
        right = {name: server.complete(name, "abc", 32) for name in (victim, other)}
        for _ in range(6):
            server.wait_for(victim, "asleep", "awake", "partly_resident")
            server.order(victim, "sleep")
            outcome: list[httpx.Response | Exception] = []

            def ask(outcome: list[httpx.Response | Exception] = outcome) -> None:
                body = {"model": victim, "prompt": "abc", "max_tokens": 32, "temperature": 0}
                try:
                    outcome.append(httpx.post(f"{server.url}/v1/completions", json=body, timeout=120))
                except httpx.TransportError as error:
                    outcome.append(error)

            client = threading.Thread(target=ask)
            client.start()
            time.sleep(moments.uniform(0, 0.4))
            send(server.workers().get(victim, 0) or 0, signal.SIGKILL) if server.workers().get(victim) else None
            assert server.complete(other, "abc", 32) == right[other]
            client.join(120)
            assert len(outcome) == 1, "the client never heard anything"
            answer = outcome[0]
            assert isinstance(answer, httpx.Response), f"the connection broke without an answer: {answer!r}"
            if answer.status_code == httpx.codes.OK:
                assert answer.json()["choices"][0]["text"] == right[victim]
            else:
                assert answer.status_code in {502, 503}, answer.text
                assert answer.json()["error"]["message"], answer.text
        server.wait_for(victim, "asleep", "awake", "partly_resident")
        assert server.complete(victim, "abc", 32) == right[victim]
        for name in (victim, other):
            server.order(name, "sleep")
        assert all(model["lease"]["total"] == 0 for model in server.state()["models"])


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
