"""The server dies with SIGKILL; its workers go on under the next one, with what they hold."""

from __future__ import annotations

import json
import os
import signal
import subprocess
import time
from contextlib import suppress
from pathlib import Path
from typing import TYPE_CHECKING, Any

import pytest
from tests.support.server import serve as serve_by
from tests.support.server import write_config
from tests.support.streams import TOKENS, Stream, alive
from tests.support.witness import until

if TYPE_CHECKING:
    from contextlib import AbstractContextManager

    from tests.support.server import Server

BUDGET = "64MiB"


def serve(home: Path, **settings: Any) -> AbstractContextManager[Server]:
    """Serve on 64 MiB of the simulated device."""
    return serve_by(home, device_budget=BUDGET, **settings)


def leased(server: Server) -> dict[str, int]:
    """What each model's worker holds, by the ledger; the sum must be the ledger's own."""
    state = server.state()
    leases = {model["name"]: model["lease"]["total"] for model in state["models"]}
    assert sum(leases.values()) == state["device"]["leased"]
    return leases


def adopted(server: Server) -> list[dict[str, Any]]:
    """The workers that this server took on, as its events tell it."""
    events: list[dict[str, Any]] = []
    with server.http.stream("GET", "/api/v1/events?since=0") as answer:
        for line in answer.iter_lines():
            if line.startswith("data: "):
                events.append(json.loads(line.removeprefix("data: ")))
                if events[-1]["id"] >= server.state()["last_event_id"]:
                    break
    return [event for event in events if event["kind"] == "worker_adopted"]


def said_all(server: Server, name: str) -> bool:
    """Whether a worker's figures are as new as its lease."""
    model = server.model(name)
    return bool(model["bytes"]["weights_device"] == model["lease"]["weights"])


def began(model: dict[str, Any]) -> bool:
    """Whether a model's worker loads, or has loaded."""
    return bool(model["progress"]) or model["status"] == "asleep"


def names_of(tables: list[dict[str, object]]) -> list[str]:
    return [str(table["name"]) for table in tables]


def test_workers_go_on_under_the_next_server(tmp_path: Path, model_tables: list[dict[str, object]]) -> None:
    """Awake, partly resident and asleep: the same processes, the same bytes, the right answers, twice over."""
    tables = model_tables[:3]
    awake, partly, asleep = names_of(tables)
    with serve(tmp_path, models=tables) as server:
        for name in (awake, partly, asleep):
            server.wait_for(name, "asleep")
        right = {name: server.complete(name, "abc", 20) for name in (asleep, partly, awake)}
        server.order(asleep, "sleep")
        server.order(partly, "wake")
        server.order(partly, "sleep", keep=0.5)
        server.order(awake, "wake")
        until(lambda: all(said_all(server, name) for name in right), 60, "the workers' figures are new")
        before = {name: server.model(name) for name in right}
        assert [before[name]["status"] for name in (awake, partly, asleep)] == ["awake", "partly_resident", "asleep"]
        pids = server.workers()
        for round_ in range(2):
            server.kill()
            assert all(alive(pid) for pid in pids.values())
            server.start_again()
            for name in right:
                server.wait_for(name, before[name]["status"], timeout_s=120)
            assert server.workers() == pids, "the same processes"
            assert len(adopted(server)) == 3
            for name in right:
                now = server.model(name)
                assert now["bytes"]["weights_device"] == before[name]["bytes"]["weights_device"], (round_, name)
                assert now["lease"]["weights"] == before[name]["lease"]["weights"], (round_, name)
                assert now["starts"] == 1, "it was not started again"
                assert now["lease"]["host"] == before[name]["lease"]["host"]
            leases = leased(server)
            # KV that no request uses may go at any time.
            assert all(leases[name] <= before[name]["lease"]["total"] for name in right)
            assert server.model(awake)["counts"]["wakes"] == 0, "nothing was brought back"
        for name, text in right.items():
            assert server.complete(name, "abc", 20) == text, name
        why = server.http.get(f"/api/v1/models/{asleep}/why?last=100").json()
        assert any("of the server before goes on" in event["text"] for event in why["decisions"]), why
        assert server.stop() == 0
        assert not any(alive(pid) for pid in pids.values()), "Ctrl-C ends adopted workers as well"
        left = {path.name for path in server.runtime_dir.iterdir()}
        assert not {name for name in left if name.endswith(".sock") or name.startswith("journal")}, left


@pytest.mark.parametrize("moment", ["stream", "wake", "loading"])
def test_a_server_killed_in_the_middle(tmp_path: Path, model_tables: list[dict[str, object]], moment: str) -> None:
    """While a stream runs, a wake is under way or a model loads: the client is lost, the worker is not."""
    tables = model_tables[:2]
    victim, other = names_of(tables)
    with serve(tmp_path, models=tables) as server:
        if moment == "loading":
            until(lambda: began(server.model(victim)), 60, "it loads")
            # One that was not welcome yet ends with its server.
            pids = {victim: server.workers()[victim]}
            right = {}
        else:
            for name in (victim, other):
                server.wait_for(name, "asleep")
            right = {name: server.complete(name, "abc", TOKENS) for name in (other, victim)}
            pids = server.workers()
        if moment == "stream":
            client = Stream(server, victim)
            until(lambda: len(client.texts) > 5, 60, "the stream goes on")
        elif moment == "wake":
            server.order(victim, "sleep")
            os.kill(pids[victim], signal.SIGSTOP)
            client = Stream(server, victim)
            until(lambda: server.model(victim)["status"] == "waking", 30, "the wake begins")
        server.kill()
        if moment == "wake":
            os.kill(pids[victim], signal.SIGCONT)
        server.start_again()
        for name in (victim, other):
            server.wait_for(name, "asleep", "awake", "partly_resident", timeout_s=60)
        assert server.workers().items() >= pids.items()
        texts = {name: server.complete(name, "abc", TOKENS) for name in (victim, other)}
        assert not right or texts == right
        for name in (victim, other):
            server.order(name, "sleep")
        assert set(leased(server).values()) == {0}, "nothing is held that nobody knows of"


def test_one_that_died_meanwhile_and_one_that_does_not_answer(
    tmp_path: Path, model_tables: list[dict[str, object]]
) -> None:
    """The first is started again at once, the second once waited for and ended; a reused number is left alone."""
    tables = model_tables[:2]
    dead, silent = names_of(tables)
    with serve(tmp_path, models=tables, orphan_s_max=60) as server:
        for name in (dead, silent):
            server.wait_for(name, "asleep")
        right = {name: server.complete(name, "abc", 20) for name in (silent, dead)}
        pids = server.workers()
        server.kill()
        os.kill(pids[dead], signal.SIGKILL)
        os.kill(pids[silent], signal.SIGSTOP)
        until(lambda: not alive(pids[dead]), 10, "it dies")
        stranger = _take_number(pids[dead])
        try:
            server.start_again()
            early = server.state()
            assert early["device"]["leased"] == 0
            for name in (dead, silent):
                server.wait_for(name, "asleep", timeout_s=90)
            now = server.workers()
            assert now[dead] != pids[dead]
            assert now[silent] != pids[silent]
            assert not alive(pids[silent]), "it was ended"
            assert stranger.poll() is None, "somebody else's process was touched"
            for name, text in right.items():
                assert server.complete(name, "abc", 20) == text
        finally:
            stranger.kill()
            stranger.wait()


def _take_number(pid: int) -> subprocess.Popen[bytes]:
    """Somebody else's process, with the number that a dead one had, where the kernel lets us choose."""
    for _ in range(50):
        with suppress(OSError):
            Path("/proc/sys/kernel/ns_last_pid").write_text(str(pid - 1))
        process = subprocess.Popen(["sleep", "1000"])
        if process.pid == pid or Path(f"/proc/{pid}").exists():
            return process
        process.kill()
        process.wait()
    return subprocess.Popen(["sleep", "1000"])


def test_what_was_configured_otherwise_is_started_anew(tmp_path: Path, model_tables: list[dict[str, object]]) -> None:
    """Between two servers: one model changed in a limit, one in its context, one gone. Only the first goes on."""
    tables = model_tables[:3]
    kept, changed, gone = names_of(tables)
    with serve(tmp_path, models=tables) as server:
        for name in (kept, changed, gone):
            server.wait_for(name, "asleep")
        right = server.complete(kept, "abc", 20)
        pids = server.workers()
        server.kill()
        settings = {"listen": f"127.0.0.1:{server.port}", "device": "sim", "device_budget": BUDGET}
        write_config(tmp_path, settings, [tables[1] | {"context": 256}, tables[0] | {"priority": 3, "pin": True}])
        server.start_again()
        server.wait_for(changed, "asleep", timeout_s=60)
        server.wait_for(kept, "asleep", "awake", timeout_s=60)
        now = server.workers()
        assert set(now) == {kept, changed}
        assert now[kept] == pids[kept]
        assert now[changed] != pids[changed]
        assert not alive(pids[gone])
        assert not alive(pids[changed])
        assert server.complete(kept, "abc", 20) == right
        assert server.model(changed)["capabilities"]["context_tokens"] == 256
        assert server.model(kept)["priority"] == 3


def test_a_server_killed_again_and_again(tmp_path: Path, model_tables: list[dict[str, object]]) -> None:
    """Servers that live for moments only, also while they take workers on: the ledger is right in the end."""
    tables = model_tables[:2]
    with serve(tmp_path, models=tables) as server:
        for name in names_of(tables):
            server.wait_for(name, "asleep")
        right = {name: server.complete(name, "abc", 20) for name in names_of(tables)}
        pids = server.workers()
        for moment in (0.0, 0.02, 0.05, 0.1, 0.2, 0.4):
            server.kill()
            server.start_again()
            time.sleep(moment)
        for name in names_of(tables):
            server.wait_for(name, "asleep", "awake", "partly_resident", timeout_s=120)
        assert server.workers() == pids
        for name, text in right.items():
            assert server.complete(name, "abc", 20) == text
            server.order(name, "sleep")
        assert set(leased(server).values()) == {0}
