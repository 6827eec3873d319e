"""Memory of host copies that the server lends: workers use it, and what a killed one leaves serves the next."""

from __future__ import annotations

import os
import signal
import sys
import textwrap
import time
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from pathlib import Path

from tests.support.server import Server, serve

MIB = 1 << 20
STAGED = 160 * MIB

# Stages into a region, says how much of the server's memory it maps and whether its bytes are right, and stays.
WORKER = f"""
    import re, sys, time
    import shoal

    client = shoal.BrokerClient.connect(sys.argv[1], sys.argv[2])
    client.on_disconnect = "exit"
    mem = shoal.MemoryManager(broker=client)
    region = mem.region("weights", {STAGED})
    piece = bytes(range(1, 256)) * 4112  # a little less than a MiB: the rest of each stays zero
    for offset in range(0, {STAGED}, {MIB}):
        region.stage(offset, piece)
    region.seal()
    region.wake()
    right = all(
        bytes(region.buffer(offset, {MIB})) == piece + bytes({MIB} - len(piece)) for offset in range(0, {STAGED}, {MIB})
    )
    lent = 0
    for line in open("/proc/self/maps"):
        if "memfd:shoal-host" in line:
            first, last = re.match(r"([0-9a-f]+)-([0-9a-f]+)", line).groups()
            lent += int(last, 16) - int(first, 16)
    client.loading(f"lent={{lent // {MIB}}} right={{right}}", 1, 1)
    time.sleep(600)
"""


def story(server: Server, pid: int | None) -> tuple[str, int]:
    """Give what the worker that is not `pid` says, and its process id."""
    deadline = time.monotonic() + 90
    while time.monotonic() < deadline:
        model = server.model("lent")
        said, process = model.get("progress") or "", model.get("pid")
        if said.startswith("lent=") and process not in (None, pid):
            return said, process
        time.sleep(0.05)
    raise AssertionError(server.logs())


def test_a_killed_workers_memory_serves_the_next(tmp_path: Path) -> None:
    script = tmp_path / "worker.py"
    script.write_text(textwrap.dedent(WORKER))
    command = [sys.executable, str(script), "{control}", "{model}"]
    model = {"name": "lent", "source": "/none", "engine": "worker", "args": command}
    budgets = {"device_budget": "256MiB", "host_budget": "320MiB"}
    with serve(tmp_path, models=[model], host_memory="shared", **budgets) as server:
        first, pid = story(server, None)
        assert "right=True" in first
        lent = int(first.split()[0].removeprefix("lent="))
        assert 64 <= lent <= 320, first
        os.kill(pid, signal.SIGKILL)
        second, _ = story(server, pid)
        assert "right=True" in second, "what the first one left is not seen"
        assert int(second.split()[0].removeprefix("lent=")) >= 64, second
