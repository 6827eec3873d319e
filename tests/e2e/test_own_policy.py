"""A real server whose policy is a function of Python, also one that hangs, raises, dies or plans nonsense."""

from __future__ import annotations

import time
from pathlib import Path
from typing import Any

import pytest
from tests.support.server import Server, serve

MODES = """
import os, time
from dataclasses import replace
from pathlib import Path
from shoal.policy import Evict, Plan, Shelf, builtin

value = builtin("value")

def plan(shelf: Shelf) -> Plan:
    mode = Path(__file__).with_name("mode").read_text()
    if mode == "raise":
        raise RuntimeError("not today")
    if mode == "nonsense":
        return "evict them all"
    if mode == "hang":
        time.sleep(3600)
    if mode == "die":
        os._exit(3)
    if mode == "greedy":
        return [Evict(model.id, model.held + 1, "all of it and more") for model in shelf.models]
    said = value(shelf)
    return Plan([replace(action, reason=f"ours: {action.reason}") for action in said.actions], said.again_at_ms)

def nothing(shelf: Shelf) -> list[object]:
    return []
"""
ROOM = "40MiB"  # for one model


def modes(home: Path, mode: str) -> None:
    (home / "modes.py").write_text(MODES)
    (home / "mode").write_text(mode)


def use(server: Server, names: list[str], rounds: int = 1) -> None:
    for _ in range(rounds):
        for name in names:
            assert len(server.complete(name, "the sea", 4, ignore_eos=True)) > 0


def sharing(server: Server) -> dict[str, Any]:
    return dict(server.state()["sharing"])


def reasons(server: Server, name: str) -> list[str]:
    answer = server.http.get(f"/api/v1/models/{name}/why?last=200").json()
    return [event["reason"] for event in answer["decisions"] if event["kind"] == "evict_started"]


def until_it_decides(server: Server, names: list[str]) -> None:
    """Use the models in turn until the function decides."""
    deadline = time.monotonic() + 60
    while True:
        use(server, names)
        if sharing(server)["instead"] is None:
            return
        assert time.monotonic() < deadline, (sharing(server), server.logs())


def test_a_function_decides_and_another_watches(tmp_path: Path, model_tables: list[dict[str, Any]]) -> None:
    modes(tmp_path, "good")
    names = [str(table["name"]) for table in model_tables[:2]]
    settings = {"policy": "python:modes.plan", "shadow": "python:modes:nothing", "policy_wait": "2s", "quantum": "50ms"}
    with serve(tmp_path, models=model_tables[:2], device_budget=ROOM, **settings) as server:
        for name in names:
            server.wait_for(name, "asleep")
        until_it_decides(server, names)
        use(server, names, rounds=2)
        said = sharing(server)
        assert (said["policy"], said["instead"]) == ("python:modes:plan", None)
        newest = reasons(server, names[0])[-1]
        assert newest.startswith("ours: "), newest
        why = server.http.get(f"/api/v1/models/{names[0]}/why").json()["now"]
        assert "Who yields to whom is decided by python:modes:plan." in why
        shadow = said["shadow"]
        assert shadow["policy"] == "python:modes:nothing"
        assert shadow["differing"] > 0, shadow
        assert "would have taken nothing instead of" in shadow["last"]
        log = (tmp_path / "state/shoal/logs/decisions.ndjson").read_text()
        assert '"policy":"python:modes:plan"' in log
        # Another one, while the server runs.
        server.config.write_text(server.config.read_text().replace("python:modes.plan", "lru"))
        assert server.http.post("/api/v1/reload", json={}).status_code == 200
        use(server, names)
        assert (sharing(server)["policy"], sharing(server)["instead"]) == ("lru", None)


@pytest.mark.parametrize(
    ("mode", "says"),
    [
        ("raise", "it raised RuntimeError: not today (modes.py line 12)"),
        ("nonsense", "it raised TypeError: the policy gave 'evict them all'"),
        ("hang", "it did not answer within 300 ms"),
        ("die", "its process ended (exit status: 3)"),
        ("greedy", "it planned what must not be done: "),
    ],
)
def test_value_decides_where_the_function_does_not(
    tmp_path: Path, model_tables: list[dict[str, Any]], mode: str, says: str
) -> None:
    modes(tmp_path, "good")
    names = [str(table["name"]) for table in model_tables[:2]]
    settings = {"policy": "python:modes:plan", "policy_wait": "300ms", "quantum": "50ms"}
    with serve(tmp_path, models=model_tables[:2], device_budget=ROOM, **settings) as server:
        for name in names:
            server.wait_for(name, "asleep")
        until_it_decides(server, names)
        modes(tmp_path, mode)
        use(server, names, rounds=2)
        events = server.http.get("/api/v1/models/" + names[0] + "/why").json()["now"]
        told = [sentence for sentence in events if "is to be decided by python:modes:plan, but " in sentence]
        assert told, events
        assert "; value decides in its place." in told[0]
        log = (tmp_path / "serve.log").read_text()
        assert says in log, (says, told, log[-3000:])
        assert not reasons(server, names[0])[-1].startswith("ours: ")
        # And when it comes round, it decides again: also where its process had to be ended and started anew.
        modes(tmp_path, "good")
        until_it_decides(server, names)
        use(server, names)
        assert reasons(server, names[0])[-1].startswith("ours: ")


def test_a_function_that_is_not_there_costs_nothing(tmp_path: Path, model_tables: list[dict[str, Any]]) -> None:
    names = [str(table["name"]) for table in model_tables[:2]]
    with serve(tmp_path, models=model_tables[:2], device_budget=ROOM, policy="python:nobody:plan") as server:
        for name in names:
            server.wait_for(name, "asleep")
        deadline = time.monotonic() + 60
        while "ModuleNotFoundError: No module named 'nobody'" not in str(sharing(server)["instead"]):
            use(server, names)
            assert time.monotonic() < deadline, (sharing(server), server.logs())
