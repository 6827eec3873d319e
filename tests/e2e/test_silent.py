"""A worker that holds memory and says nothing, for real: its process is stopped, or its interpreter hangs."""

from __future__ import annotations

import os
import signal
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

from tests.support.server import Server, serve
from tests.support.streams import TOKENS, Stream, alive
from tests.support.witness import until, wait_stopped

PROMPT = "abc"
LONG_S = 120
# The thread holds the interpreter's lock while it sleeps in C: no line of Python runs any more, other threads do.
HANGS = """
import ctypes, os, pathlib, threading, time

def hang():
    mark = pathlib.Path(os.environ["HANG_AT"])
    while not mark.exists():
        time.sleep(0.02)
    mark.rename(mark.with_name("hung"))
    ctypes.PyDLL(None).sleep(3600)

if "HANG_AT" in os.environ:
    threading.Thread(target=hang, daemon=True).start()
"""


def kinds(server: Server, name: str) -> list[str]:
    """What befell a model's worker, in order."""
    told = [event for kind in ("worker_silent", "worker_hung", "worker_exited") for event in server.told(kind)]
    return [str(event["kind"]) for event in sorted(told, key=lambda event: event["id"]) if event["model"] == name]


def is_back(server: Server, pid: int) -> None:
    """Nothing of a process is left, and what it had leased is seen free."""
    until(lambda: not alive(pid), LONG_S, "its process is gone")
    until(lambda: server.state()["device"]["returning"] == 0, LONG_S, "its memory is back")


def test_a_stopped_worker_is_ended_and_its_requests_are_answered(
    tmp_path: Path, model_tables: list[dict[str, Any]]
) -> None:
    held, other = (str(table["name"]) for table in model_tables[:2])
    with serve(tmp_path, models=model_tables[:2], device_budget="96MiB", silent_s_max=12) as server:
        for name in (held, other):
            server.wait_for(name, "asleep")
        right = {name: server.complete(name, PROMPT, TOKENS) for name in (held, other)}
        stream = Stream(server, held)
        until(lambda: len(stream.texts) > 3, LONG_S, "the stream goes on")
        pid = server.workers()[held]
        os.kill(pid, signal.SIGSTOP)
        wait_stopped(pid)
        with ThreadPoolExecutor(1) as clients:
            answer = clients.submit(server.complete, held, PROMPT, TOKENS)
            until(lambda: server.model(held)["silent_ms"] is not None, LONG_S, "it is told that it is silent")
            leased = server.model(held)["lease"]["total"]
            assert leased > 0, "what it holds counts as held"
            assert server.complete(other, PROMPT, TOKENS) == right[other], "others are served meanwhile"
            is_back(server, pid)
            assert answer.result(LONG_S) == right[held], "nothing had come of it, so another worker answers it"
        text = stream.end()
        assert right[held].startswith(text)
        (error,) = stream.errors
        assert error["code"] == "worker_lost"
        assert "it has answered nothing for" in str(error["message"]), error
        assert kinds(server, held)[-3:] == ["worker_silent", "worker_hung", "worker_exited"]
        assert "worker_hung" not in kinds(server, other), "a slow one is none that hangs"
        assert server.model(held)["silent_ms"] is None
        state = server.state()
        assert state["device"]["leased"] == sum(model["lease"]["total"] for model in state["models"]), state


def test_a_worker_whose_engine_hangs_is_ended_too(tmp_path: Path, model_tables: list[dict[str, Any]]) -> None:
    """It answers that it lives; nothing comes of the request that it has."""
    (tmp_path / "sitecustomize.py").write_text(HANGS)
    mark = tmp_path / "hang"
    paths = os.pathsep.join(filter(None, [str(tmp_path), os.environ.get("PYTHONPATH")]))
    table = {**model_tables[0], "env": {"PYTHONPATH": paths, "HANG_AT": str(mark)}}
    name = str(table["name"])
    with serve(tmp_path, models=[table], device_budget="64MiB", silent_s_max=60, stuck_s_max=15) as server:
        server.wait_for(name, "asleep")
        right = server.complete(name, PROMPT, TOKENS)
        pid = server.workers()[name]
        stream = Stream(server, name)
        until(lambda: len(stream.texts) > 3, LONG_S, "the stream goes on")
        mark.touch()
        until(mark.with_name("hung").exists, LONG_S, "it hangs")
        is_back(server, pid)
        stream.end()
        (error,) = stream.errors
        assert error["code"] == "worker_lost"
        assert "it has 1 request, and nothing came of it for" in str(error["message"]), error
        assert kinds(server, name)[-2:] == ["worker_hung", "worker_exited"], "its process answered all the time"
        assert server.complete(name, PROMPT, TOKENS) == right, "the next one serves"
