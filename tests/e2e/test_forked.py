"""Workers are forked from a template; whatever becomes of it, they are what workers started by themselves are."""

from __future__ import annotations

import os
import signal
import time
from pathlib import Path

import httpx
import pytest
from tests.support.server import Server, serve
from tests.support.streams import alive
from tests.support.witness import until

AWAKE = ("asleep", "awake", "partly_resident")


def parent(pid: int) -> int:
    return int(Path(f"/proc/{pid}/stat").read_text().rpartition(")")[2].split()[1])


def ready(server: Server) -> dict[str, int]:
    for model in server.state()["models"]:
        server.wait_for(model["name"], *AWAKE)
    return server.workers()


def next_worker(server: Server, name: str, number: int) -> int:
    """Kill a worker and give the next one's process id."""
    pid = server.workers()[name]
    os.kill(pid, number)
    until(lambda: server.workers().get(name, pid) != pid, 60, "the server hears of its end")
    server.wait_for(name, *AWAKE)
    return server.workers()[name]


def children(pid: int) -> list[int]:
    """All processes whose parent this is, zombies included."""
    found = []
    for entry in Path("/proc").iterdir():
        if entry.name.isdigit():
            try:
                if parent(int(entry.name)) == pid:
                    found.append(int(entry.name))
            except OSError:
                continue
    return sorted(found)


def test_workers_are_forked_and_nothing_is_left(tmp_path: Path, model_tables: list[dict[str, object]]) -> None:
    tables = [model_tables[0], model_tables[1], model_tables[2] | {"env": {"A_WORD": "said"}}]
    with serve(tmp_path, models=tables, device_budget="200MiB") as server:
        workers = ready(server)
        forked = [workers[str(table["name"])] for table in tables[:2]]
        alone = workers[str(tables[2]["name"])]
        template = parent(forked[0])
        assert [parent(pid) for pid in forked] == [template, template]
        assert parent(alone) == server.process.pid, "nobody shares its environment"
        assert Path(f"/proc/{template}/comm").read_text() == "shoal-template\n"
        assert children(server.process.pid) == sorted([template, alone])
        assert "workers are forked from a process that has imported what they need" in server.logs(400)
        name = str(tables[0]["name"])
        log = next(tmp_path.glob(f"state/**/{name}.log"))
        assert f"forked from process {template}, which has imported what workers need" in log.read_text()
        text = server.complete(name, "abc", 8)
        again = next_worker(server, name, signal.SIGKILL)
        assert parent(again) == template
        assert server.complete(name, "abc", 8) == text
        exits = [event["status"] for event in server.told("worker_exited")]
        assert len(exits) == 1
        assert exits[0].startswith("was ended by signal 9 after"), exits
        assert children(template) == sorted([again, forked[1]]), "what was left of the one before was waited for"
        server.process.send_signal(signal.SIGINT)
        assert server.process.wait(60) == 0
        assert not [pid for pid in (template, again, alone, *forked) if Path(f"/proc/{pid}").exists()]


def test_a_template_that_is_killed(tmp_path: Path, model_tables: list[dict[str, object]]) -> None:
    with serve(tmp_path, models=model_tables[:2], device_budget="200MiB") as server:
        workers = ready(server)
        names = list(workers)
        template = parent(workers[names[0]])
        texts = {name: server.complete(name, "abc", 8) for name in names}
        os.kill(template, signal.SIGKILL)
        until(lambda: not Path(f"/proc/{template}").exists(), 30, "the server waits for it")
        assert {name: server.complete(name, "abc", 8) for name in names} == texts
        assert server.workers() == workers
        assert parent(next_worker(server, names[0], signal.SIGKILL)) == server.process.pid
        assert server.complete(names[0], "abc", 8) == texts[names[0]]


@pytest.mark.parametrize("orphan_s_max", [0, 60])
def test_a_server_that_is_killed_leaves_no_template(
    tmp_path: Path, model_tables: list[dict[str, object]], orphan_s_max: int
) -> None:
    with serve(tmp_path, models=model_tables[:2], device_budget="200MiB", orphan_s_max=orphan_s_max) as server:
        workers = ready(server)
        template = parent(next(iter(workers.values())))
        server.kill()
        until(lambda: not alive(template), 30, "it outlived its server")
        if orphan_s_max == 0:
            until(lambda: not any(map(alive, workers.values())), 30, "a worker outlived its server")
            server.start_again()
            assert not set(ready(server).values()) & set(workers.values())
        else:
            server.start_again()
            assert ready(server) == workers, "they went on"
            name = next(iter(workers))
            assert parent(next_worker(server, name, signal.SIGKILL)) not in {template, server.process.pid}, "forked"
        for name in workers:
            assert server.order(name, "sleep").status_code == httpx.codes.OK


def test_a_worker_that_starts_ends_with_a_server_that_is_killed(
    tmp_path: Path, model_tables: list[dict[str, object]]
) -> None:
    """Killed while its template imports, and at any moment after it forked: nothing is left that was not welcomed."""
    for after_s in (None, 0.0, 0.02, 0.1, 0.4, 1.5):
        home = tmp_path / str(after_s)
        home.mkdir()
        with serve(home, models=model_tables[:2], device_budget="200MiB", orphan_s_max=0) as server:
            mark = f"XDG_RUNTIME_DIR={home / 'run'}".encode()
            if after_s is None:
                until(lambda server=server: templates_of(server), 30, "a template starts")
            else:
                until(lambda server=server: any(map(children, templates_of(server))), 120, "it forks")
                time.sleep(after_s)
            assert pids_of(mark)
            server.kill()
            until(lambda mark=mark: not [pid for pid in pids_of(mark) if alive(pid)], 30, "a process is left")


def templates_of(server: Server) -> list[int]:
    """Those that run, which say what they are before they import."""
    started = children(server.process.pid)
    return [pid for pid in started if b"shoal.worker.template" in (Path(f"/proc/{pid}/cmdline").read_bytes())]


def pids_of(mark: bytes) -> list[int]:
    found = []
    for entry in Path("/proc").iterdir():
        if entry.name.isdigit() and int(entry.name) != os.getpid():
            try:
                if mark in (entry / "environ").read_bytes().split(b"\0"):
                    found.append(int(entry.name))
            except OSError:
                continue
    return found
