"""The configuration is read again under a running server, by command and by signal."""

from __future__ import annotations

import signal
import subprocess
import sys
from typing import TYPE_CHECKING

from tests.support.server import Server, environment, serve, write_config
from tests.support.streams import TOKENS, Stream
from tests.support.witness import until

if TYPE_CHECKING:
    from pathlib import Path

BUDGET = "64MiB"


def reload(server: Server) -> subprocess.CompletedProcess[str]:
    """Run `shoal reload` as a user would."""
    command = [sys.executable, "-m", "shoal", "reload"]
    return subprocess.run(
        command, env=environment(server.home), capture_output=True, text=True, timeout=60, check=False
    )


def test_models_come_go_and_change_beside_a_stream(tmp_path: Path, model_tables: list[dict[str, object]]) -> None:
    ash, birch, cedar = (str(table["name"]) for table in model_tables[:3])
    with serve(tmp_path, models=model_tables[:2], device_budget=BUDGET) as server:
        settings: dict[str, object] = {
            "listen": f"127.0.0.1:{server.port}", "device": "sim", "device_budget": BUDGET, "tier_load": "always",
        }  # fmt: skip
        for name in (ash, birch):
            server.wait_for(name, "asleep")
        right = server.complete(ash, "abc", TOKENS)
        pids = server.workers()
        stream = Stream(server, ash)
        until(lambda: bool(stream.texts), 60, "the stream begins")

        write_config(tmp_path, settings, [model_tables[0] | {"prioritee": 1}])
        refused = reload(server)
        assert refused.returncode == 1
        assert "unknown key `prioritee`" in refused.stderr, refused
        assert server.workers() == pids

        write_config(tmp_path, settings, [model_tables[2], model_tables[0] | {"priority": 4}])
        taken = reload(server)
        assert taken.returncode == 0, taken
        assert taken.stdout == f"configuration read again (added: {cedar}; removed: {birch}; changed: {ash})\n"
        server.wait_for(cedar, "asleep")
        assert server.model(ash)["priority"] == 4
        assert server.workers()[ash] == pids[ash]
        assert stream.end() == right, "the stream beside it suffered"
        answer = server.http.post("/v1/completions", json={"model": birch, "prompt": "a", "max_tokens": 1})
        assert (answer.status_code, answer.json()["error"]["code"]) == (404, "model_not_found")
        assert server.complete(cedar, "abc", 4)

        write_config(tmp_path, settings, [model_tables[0] | {"priority": 4, "context": 128}])
        server.process.send_signal(signal.SIGHUP)
        until(lambda: [model["name"] for model in server.state()["models"]] == [ash], 30, "one is left")
        server.wait_for(ash, "asleep", timeout_s=60)
        assert server.model(ash)["capabilities"]["context_tokens"] == 128
        assert right.startswith(server.complete(ash, "abc", 20))
        assert server.stop() == 0
