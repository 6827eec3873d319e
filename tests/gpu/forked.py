"""Workers forked on a GPU, and workers started by themselves: what a start takes, and the same answers.

Run by `tests/gpu/run.sh forked`. A start is timed from the death of the worker before it until the model is ready
again; each arm has a server of its own.
"""

from __future__ import annotations

import os
import signal
import sys
import tempfile
import time
from pathlib import Path

from tests.gpu.shelf import DEVICE, ON_GPU, SIZE, TORCH_DEVICE, Report, fall_asleep, used_bytes
from tests.support import models
from tests.support.server import serve
from tests.support.witness import until

NAMES = ["ash", "birch", "cedar"]
PROMPT, TOKENS = "def main(", 24
SLACK = 64 << 20
STARTS = 4
READY = ("asleep", "awake", "partly_resident")
BUDGET = 3 * (832 << 20) + (2 << 30) if ON_GPU else 300 << 20


def main() -> int:
    """Run both arms; the exit status says whether all held."""
    report = Report()
    with tempfile.TemporaryDirectory(prefix="forked-") as directory:
        root = Path(directory)
        paths = {name: models.make_llama(root / name, seed=seed, **SIZE) for seed, name in enumerate(NAMES)}
        right = {name: models.plain_greedy(paths[name], PROMPT, TOKENS, TORCH_DEVICE) for name in NAMES}
        if ON_GPU:
            import torch

            torch.cuda.empty_cache()
        before = used_bytes()
        tables: list[dict[str, object]] = [
            {"name": name, "source": str(path), "dtype": "float32", "context": 512} for name, path in paths.items()
        ]
        for forks in (False, True):
            home = root / str(forks)
            home.mkdir()
            arm = "forked" if forks else "by itself"
            report.check(f"{arm}: to its end", lambda: lives(report, home, tables, right, forks=forks))  # noqa: B023 - called here
            report.check(
                f"{arm}: nothing is left on the GPU",
                lambda: until(lambda: used_bytes() <= before + SLACK, 20, "the GPU has its memory back"),
            )
            report.save()
    return 1 if report.failed else 0


def lives(report: Report, home: Path, tables: list[dict[str, object]], right: dict[str, str], *, forks: bool) -> None:
    """One server: its workers answer, end, and start again."""
    arm = "forked" if forks else "by itself"
    began = time.monotonic()
    with serve(home, models=tables, device=DEVICE, device_budget=BUDGET, fork_workers=forks) as server:
        for name in NAMES:
            server.wait_for(name, *READY, timeout_s=100)
        report.figure(f"three workers {arm}, from the server's start", "ready", [time.monotonic() - began], "s")
        pids = server.workers()
        template = parent(pids[NAMES[0]])
        print(server.logs(200), flush=True)
        assert (template != server.process.pid) is forks, f"forked: {forks}"
        ready, processor, private = [], [], []
        name = NAMES[0]
        for _ in range(STARTS):
            pid = server.workers()[name]
            os.kill(pid, signal.SIGKILL)
            killed = time.monotonic()
            until(lambda pid=pid: server.workers().get(name, pid) != pid, 60, "the server hears of its end")
            server.wait_for(name, *READY, timeout_s=100)
            ready.append(time.monotonic() - killed)
            now = server.workers()[name]
            assert (parent(now) != server.process.pid) is forks
            processor.append(processor_s(now))
            private.append(private_mib(now))
            assert server.complete(name, PROMPT, TOKENS) == right[name]
        report.figure(f"a worker {arm} after the one before was killed", "ready", ready, "s")
        report.figure(f"a worker {arm}, until it is ready", "processor time", processor, "s")
        report.figure(f"a worker {arm}, ready", "memory of its own", private, "MiB")
        for name in NAMES:
            assert server.complete(name, PROMPT, TOKENS) == right[name], name
            fall_asleep(server, name)
            assert server.complete(name, PROMPT, TOKENS) == right[name], f"{name} after a sleep"
        if forks:
            held = [str(one.readlink()) for one in Path(f"/proc/{template}/fd").iterdir()]
            assert not [path for path in held if "nvidia" in path], held
            report.figure("what workers are forked from", "memory", [resident_mib(template)], "MiB")
            pids = server.workers()
            os.kill(template, signal.SIGKILL)
            until(lambda: not Path(f"/proc/{template}").exists(), 30, "the server waits for it")
            for name in NAMES:
                assert server.complete(name, PROMPT, TOKENS) == right[name], f"{name} after its template's end"
            assert server.workers() == pids


def parent(pid: int) -> int:
    return int(Path(f"/proc/{pid}/stat").read_text().rpartition(")")[2].split()[1])


def processor_s(pid: int) -> float:
    user, system = Path(f"/proc/{pid}/stat").read_text().rpartition(")")[2].split()[11:13]
    return (int(user) + int(system)) / os.sysconf("SC_CLK_TCK")


def private_mib(pid: int) -> float:
    """Pages that no other process has."""
    lines = Path(f"/proc/{pid}/smaps_rollup").read_text().splitlines()
    return sum(int(line.split()[1]) for line in lines if line.startswith("Private_")) / 1024


def resident_mib(pid: int) -> float:
    return int(Path(f"/proc/{pid}/statm").read_text().split()[1]) * os.sysconf("SC_PAGE_SIZE") / (1 << 20)


if __name__ == "__main__":
    sys.exit(main())
