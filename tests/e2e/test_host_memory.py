"""Memory of host copies that the server lends: workers use it, and what a killed one leaves serves the next."""

from __future__ import annotations

import os
import re
import signal
import sys
import textwrap
import time
from pathlib import Path

from tests.support import models
from tests.support.server import Server, serve
from tests.support.streams import alive
from tests.support.witness import until

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


def lent_files(pid: int) -> set[int]:
    """The server's memory files that a process holds open (the server), by their inode numbers."""
    found = set()
    for entry in Path(f"/proc/{pid}/fd").iterdir():
        try:
            if str(entry.readlink()).startswith("/memfd:shoal-host"):
                found.add(entry.stat().st_ino)
        except FileNotFoundError:
            continue
    return found


def lent_mappings(pid: int) -> dict[int, int]:
    """How much of which of them a process maps (a worker), in bytes."""
    found: dict[int, int] = {}
    for line in Path(f"/proc/{pid}/maps").read_text().splitlines():
        if match := re.match(r"(\w+)-(\w+) \S+ \S+ \S+ (\d+) +/memfd:shoal-host", line):
            first, last, inode = int(match[1], 16), int(match[2], 16), int(match[3])
            found[inode] = found.get(inode, 0) + last - first
    return found


def test_weights_in_the_servers_memory_outlive_the_server(tmp_path: Path) -> None:
    """A killed server's slabs go to the next with their worker, which wakes from them, and then to its next worker."""
    made = models.make_llama(tmp_path / "big", seed=0, hidden=512)
    weights = (made / "model.safetensors").stat().st_size
    assert weights > 64 * MIB, "smaller ones need no slab of the server"
    table = {"name": "big", "source": str(made), "dtype": "float32", "context": 512}
    settings = {"device_budget": "256MiB", "host_budget": weights + 128 * MIB, "host_memory": "shared"}
    with serve(tmp_path, models=[table], **settings) as server:
        server.wait_for("big", "asleep")
        right = server.complete("big", "abc", 20)
        assert server.order("big", "sleep").status_code == 200
        before = server.model("big")
        worker, held = before["pid"], lent_mappings(before["pid"])
        assert sum(held.values()) >= 64 * MIB, "the host copies do not lie in the server's memory: nothing is tested"
        assert held.keys() <= lent_files(server.process.pid)
        for _ in range(2):
            server.kill()
            assert alive(worker)
            server.start_again()
            server.wait_for("big", "asleep", timeout_s=30)
            now = server.model("big")
            assert now["pid"] == worker
            assert lent_mappings(worker) == held, "the same memory, mapped as before"
            # By descriptor: the next server is its owner from now on.
            until(lambda: held.keys() <= lent_files(server.process.pid), 10, "the next server has the slabs")
            assert now["lease"]["host"] == before["lease"]["host"]
            assert now["bytes"]["host"] >= weights
            assert server.complete("big", "abc", 20) == right, "woken from what the killed server had lent"
            assert server.order("big", "sleep").status_code == 200
        # Now the worker dies: what it had of a server before serves the next one, which finds it touched.
        os.kill(worker, signal.SIGKILL)
        until(lambda: server.model("big")["pid"] not in {None, worker}, 60, "another worker starts")
        server.wait_for("big", "asleep")
        kept = lent_mappings(server.model("big")["pid"])
        assert set(kept) & set(held), "memory that is there is not made again"
        # What of it the next one has no use for is given back: the server keeps no more than it lends.
        until(lambda: lent_files(server.process.pid) == set(kept), 10, "the rest goes")
        assert sum(kept.values()) <= weights + 128 * MIB
        assert server.complete("big", "abc", 20) == right
