"""A program of anybody's behind the server: started when it is asked for, passed what came, gone with the server."""

from __future__ import annotations

import os
import signal
import sys
from pathlib import Path

import httpx
from tests.support.server import serve
from tests.support.witness import until, wait_stopped

ENGINE = Path(__file__).resolve().parents[2] / "crates/shoal-server/tests/fake_engine.py"
BODY = b'{ "model" : "llama",\t"messages": [],  "made_up": 1.50 }'


def alive(pid: int) -> bool:
    """Whether a process runs (a zombie does not)."""
    try:
        return Path(f"/proc/{pid}/stat").read_text().rsplit(")", 1)[1].split()[0] != "Z"
    except FileNotFoundError:
        return False


def table(**more: object) -> dict[str, object]:
    """One `[[model]]`."""
    args = [str(ENGINE), "--port", "{port}"]
    return {
        "name": "llama",
        "engine": "command",
        "command": sys.executable,
        "args": args,
        "device_bytes": "64MiB",
    } | more


def test_it_is_started_for_a_request_and_shares_with_others(
    tmp_path: Path, model_tables: list[dict[str, object]]
) -> None:
    """The body arrives byte for byte; a worker of ours and the program take turns in memory that holds one of them."""
    other = str(model_tables[0]["name"])
    with serve(tmp_path, models=[table(), model_tables[0]], device_budget="80MiB") as server:
        server.wait_for(other, "asleep")
        assert server.model("llama")["pid"] is None
        for _ in range(2):
            answer = server.http.post(
                "/v1/chat/completions", content=BODY, headers={"Content-Type": "application/json"}
            )
            assert (answer.status_code, answer.content) == (200, BODY)
            assert answer.headers["x-shoal-was-asleep"] == "true"
            pid = server.model("llama")["pid"]
            assert alive(pid)
            assert server.complete(other, "x = ", 4)
            llama = server.model("llama")
            assert (llama["status"], llama["pid"], llama["lease"]["total"]) == ("asleep", None, 0), llama
            assert not alive(pid)
        assert server.model("llama")["starts"] == 2
        assert server.model("llama")["is_elastic"] is False


def test_it_does_not_survive_the_server(tmp_path: Path) -> None:
    """The server is killed with SIGKILL; a program that knows nothing of it is gone within seconds."""
    with serve(tmp_path, models=[table()], device_budget="80MiB") as server:
        answer = server.http.post("/v1/completions", content=BODY, headers={"Content-Type": "application/json"})
        assert answer.status_code == httpx.codes.OK
        pid = server.model("llama")["pid"]
        assert alive(pid)
        os.kill(server.process.pid, signal.SIGKILL)
        until(lambda: not alive(pid), 10, "the program ends after its server")


def test_one_that_hangs_is_ended_and_the_next_one_answers(tmp_path: Path) -> None:
    """Its process is stopped with a request in it; nothing has come of that, so the next program gets it."""
    ask = {"content": BODY, "headers": {"Content-Type": "application/json"}}
    with serve(tmp_path, models=[table(stop_s_max=2)], device_budget="80MiB", stuck_s_max=15) as server:
        assert server.http.post("/v1/completions", **ask).status_code == httpx.codes.OK
        pid = server.model("llama")["pid"]
        os.kill(pid, signal.SIGSTOP)
        wait_stopped(pid)
        answer = server.http.post("/v1/completions", timeout=240, **ask)
        assert (answer.status_code, answer.content) == (200, BODY), server.logs()
        assert not alive(pid)
        first, *_ = server.told("worker_hung")
        assert (first["model"], first["pid"]) == ("llama", pid)
        assert "it has 1 request, and nothing came of it for" in first["reason"], first
        assert server.model("llama")["pid"] != pid
        assert server.model("llama")["error"] is None
