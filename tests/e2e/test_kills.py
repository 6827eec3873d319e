"""Processes die without warning; memory comes back and nobody else notices."""

from __future__ import annotations

import os
import random
import signal
import time
from pathlib import Path

import httpx
import pytest
from tests.support.server import Server, serve
from tests.support.streams import TOKENS, Stream, alive
from tests.support.witness import until

KILLS = 5


@pytest.mark.parametrize("moment", ["stream", "wake", "bytes"])
def test_a_worker_killed(tmp_path: Path, model_tables: list[dict[str, object]], moment: str) -> None:
    """Five kills each: the client hears an answer or a clear error, the other stream goes on, memory returns."""
    moments = random.Random(3)
    kills = 0
    tables = model_tables[:2]
    if moment == "bytes":  # a wake takes three seconds, and computes meanwhile
        tables[0] = tables[0] | {"env": {"SHOAL_SIM_LINK_MIB_PER_S": "8"}}
    with serve(tmp_path, models=tables, device_budget="64MiB") as server:
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
            elif moment == "bytes":
                until(lambda: is_coming(server, victim), 60, "its bytes come, and a request is at it")
                time.sleep(moments.uniform(0, 0.5))
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
            # Its connections close before it is gone.
            until(lambda pid=pid: not alive(pid), 10, "it is gone")
            # Until the server hears of its end, the model still looks as it did, and an order would reach nobody.
            until(lambda pid=pid: server.workers().get(victim) != pid, 30, "the server hears of its end")
        server.wait_for(victim, "asleep", "awake", "partly_resident")
        assert server.complete(victim, "abc", TOKENS) == right[victim]
        for name in (victim, other):
            server.order(name, "sleep")
        assert all(model["lease"]["total"] == 0 for model in server.state()["models"])
    assert kills == KILLS


def is_coming(server: Server, name: str) -> bool:
    model = server.model(name)
    return bool(model["status"] == "waking" and model["counts"]["requests_active"])


@pytest.mark.parametrize("wait_s", [0, 8])
def test_no_worker_waits_for_ever(tmp_path: Path, model_tables: list[dict[str, object]], wait_s: int) -> None:
    """The server is killed and no other comes: no worker holds memory for longer than it was told to wait."""
    with serve(tmp_path, models=model_tables[:2], device_budget="64MiB", orphan_s_max=wait_s) as server:
        for table in model_tables[:2]:
            server.wait_for(str(table["name"]), "asleep")
        server.complete(str(model_tables[0]["name"]), "a", 4)
        pids = list(server.workers().values())
        assert len(pids) == 2
        server.kill()
        if wait_s:
            time.sleep(1)
            assert all(alive(pid) for pid in pids), "they wait"
        until(lambda: not any(alive(pid) for pid in pids), wait_s + 30, "workers end after their server")
        assert not list(server.runtime_dir.glob("worker-*.sock")) or not wait_s, "they end in order"
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
