"""A real server whose policy is a function of Python, also one that hangs, raises, dies or plans nonsense."""

from __future__ import annotations

import time
from pathlib import Path
from typing import TYPE_CHECKING, Any

import pytest
from tests.support import models
from tests.support.server import Server, serve

if TYPE_CHECKING:
    from collections.abc import Callable, Iterator

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


def is_ours(server: Server, name: str) -> bool:
    """Whether the function decided the newest eviction of a model."""
    return any(reason.startswith("ours: ") for reason in reasons(server, name)[-1:])


def why(server: Server, name: str) -> list[str]:
    return list(server.http.get(f"/api/v1/models/{name}/why").json()["now"])


def use_until(server: Server, names: list[str], condition: Callable[[], bool]) -> None:
    """Use the models in turn until something holds: a busy machine may keep the function from answering in time."""
    deadline = time.monotonic() + 180
    while True:
        use(server, names)
        if condition():
            return
        assert time.monotonic() < deadline, (sharing(server), server.logs())


def until_it_decides(server: Server, names: list[str]) -> None:
    """Use the models in turn until the function decides."""
    use_until(server, names, lambda: sharing(server)["instead"] is None)


def test_a_function_decides_and_another_watches(tmp_path: Path, model_tables: list[dict[str, Any]]) -> None:
    modes(tmp_path, "good")
    names = [str(table["name"]) for table in model_tables[:2]]
    settings = {"policy": "python:modes.plan", "shadow": "python:modes:nothing", "policy_wait": "2s", "quantum": "50ms"}
    with serve(tmp_path, models=model_tables[:2], device_budget=ROOM, **settings) as server:
        for name in names:
            server.wait_for(name, "asleep")
        use_until(server, names, lambda: is_ours(server, names[0]))
        assert sharing(server)["policy"] == "python:modes:plan"
        decides = "Who yields to whom is decided by python:modes:plan."
        use_until(server, names, lambda: decides in why(server, names[0]))
        use_until(server, names, lambda: sharing(server)["shadow"]["differing"] > 0)
        shadow = sharing(server)["shadow"]
        assert shadow["policy"] == "python:modes:nothing"
        assert "would have taken nothing instead of" in shadow["last"]
        log = tmp_path / "state/shoal/logs/decisions.ndjson"
        use_until(server, names, lambda: '"policy":"python:modes:plan"' in log.read_text())
        # Another one, while the server runs.
        server.config.write_text(server.config.read_text().replace("python:modes.plan", "lru"))
        assert server.http.post("/api/v1/reload", json={}).status_code == 200
        use(server, names)
        assert (sharing(server)["policy"], sharing(server)["instead"]) == ("lru", None)


@pytest.fixture(scope="module")
def deciding(tmp_path_factory: pytest.TempPathFactory, shelf_models: dict[str, Path]) -> Iterator[Server]:
    """A server that asks the function in each of its modes, one after the other."""
    home = tmp_path_factory.mktemp("deciding")
    modes(home, "good")
    settings = {"policy": "python:modes:plan", "policy_wait": "300ms", "quantum": "50ms"}
    with serve(home, models=models.tables(shelf_models)[:2], device_budget=ROOM, **settings) as server:
        for name in list(shelf_models)[:2]:
            server.wait_for(name, "asleep")
        yield server


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
    deciding: Server, shelf_models: dict[str, Path], mode: str, says: str
) -> None:
    server, names = deciding, list(shelf_models)[:2]
    modes(server.home, "good")
    log = server.home / "serve.log"
    before = log.stat().st_size
    until_it_decides(server, names)
    modes(server.home, mode)
    use_until(server, names, lambda: says in log.read_bytes()[before:].decode())
    not_now = "is to be decided by python:modes:plan, but "
    use_until(server, names, lambda: any(not_now in sentence for sentence in why(server, names[0])))
    use_until(server, names, lambda: not is_ours(server, names[0]))
    (told,) = [sentence for sentence in why(server, names[0]) if "python:modes:plan" in sentence]
    assert told.endswith("; value decides in its place."), told
    # And when it comes round, it decides again: also where its process had to be ended and started anew.
    modes(server.home, "good")
    use_until(server, names, lambda: sharing(server)["instead"] is None and is_ours(server, names[0]))


def test_a_reload_reads_the_function_anew_where_its_file_has_changed(
    tmp_path: Path, model_tables: list[dict[str, Any]]
) -> None:
    modes(tmp_path, "good")
    names = [str(table["name"]) for table in model_tables[:2]]
    settings = {"policy": "python:modes:plan", "policy_wait": "2s", "quantum": "50ms"}
    with serve(tmp_path, models=model_tables[:2], device_budget=ROOM, **settings) as server:
        for name in names:
            server.wait_for(name, "asleep")
        use_until(server, names, lambda: is_ours(server, names[0]))
        assert server.http.post("/api/v1/reload", json={}).json()["policies"] == [], "nothing has changed"
        code = tmp_path / "modes.py"
        code.write_text(code.read_text().replace("ours: {action", "mine: {action"))
        use(server, names)
        assert server.http.post("/api/v1/reload", json={}).json()["policies"] == ["python:modes:plan"]
        use_until(server, names, lambda: reasons(server, names[0])[-1].startswith("mine: "))


def test_a_function_that_is_not_there_costs_nothing(tmp_path: Path, model_tables: list[dict[str, Any]]) -> None:
    names = [str(table["name"]) for table in model_tables[:2]]
    with serve(tmp_path, models=model_tables[:2], device_budget=ROOM, policy="python:nobody:plan") as server:
        for name in names:
            server.wait_for(name, "asleep")
        says = "ModuleNotFoundError: No module named 'nobody'"
        use_until(server, names, lambda: says in str(sharing(server)["instead"]))
