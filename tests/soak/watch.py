"""What processes hold during a soak, and what is left after it."""

from __future__ import annotations

import os
import statistics
import threading
import time
from collections import defaultdict
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING

from tests.support.streams import alive

if TYPE_CHECKING:
    from collections.abc import Callable

MIB = 1 << 20
PERIOD_S = 2.0
WARM_UP_S, LIFE_S_MIN = 60.0, 120.0
"""What is compared is what comes after the first minute, if that is two minutes or more: loading is no growth."""


@dataclass(frozen=True)
class Figures:
    """What a process holds at a moment."""

    at: float
    private_bytes: int
    """Anonymous memory: not what is mapped of the device and of host copies."""
    files: int
    threads: int


def figures(pid: int) -> Figures | None:
    """Read them; None where the process is gone."""
    try:
        status = dict(
            line.split(":", 1) for line in Path(f"/proc/{pid}/status").read_text().splitlines() if ":" in line
        )
        files = len(os.listdir(f"/proc/{pid}/fd"))
        return Figures(time.monotonic(), int(status["RssAnon"].split()[0]) * 1024, files, int(status["Threads"]))
    except (OSError, KeyError, ValueError):
        return None


@dataclass(frozen=True)
class Growth:
    """The first and the last tenth of one process's life, each by its median."""

    who: str
    seconds: float
    first: Figures
    last: Figures

    def faults(self, bytes_max: int, files_max: int, threads_max: int) -> list[str]:
        """What grew by more than it may."""
        grown = [
            ("private bytes", self.first.private_bytes, self.last.private_bytes, bytes_max),
            ("open files", self.first.files, self.last.files, files_max),
            ("threads", self.first.threads, self.last.threads, threads_max),
        ]
        return [
            f"{self.who}: {what} grew from {first} to {last} in {self.seconds:.0f} s"
            for what, first, last, slack in grown
            if last - first > slack
        ]


class Watch:
    """Reads the figures of the server and of its workers every few seconds, each life apart."""

    def __init__(self, pids: Callable[[], dict[str, int]]) -> None:
        self._pids = pids
        self._lives: dict[tuple[str, int], list[Figures]] = defaultdict(list)
        self._end = threading.Event()
        self._thread = threading.Thread(target=self._run, daemon=True)

    def start(self) -> None:
        """Begin."""
        self._thread.start()

    def stop(self) -> None:
        """End."""
        self._end.set()
        self._thread.join(30)

    def _run(self) -> None:
        while not self._end.wait(PERIOD_S):
            for who, pid in self._pids().items():
                if (now := figures(pid)) is not None:
                    self._lives[who, pid].append(now)

    def growths(self) -> list[Growth]:
        """One for each of the longest lives, of the server and of each model's workers."""
        longest: dict[str, list[Figures]] = {}
        for (who, _), whole in list(self._lives.items()):
            life = [one for one in whole if one.at - whole[0].at >= WARM_UP_S]
            if len(life) > len(longest.get(who, [])):
                longest[who] = life
        return [
            growth(who, life)
            for who, life in longest.items()
            if len(life) >= 20 and life[-1].at - life[0].at >= LIFE_S_MIN
        ]


def growth(who: str, life: list[Figures]) -> Growth:
    """Compare the first tenth of a life with its last."""
    tenth = max(1, len(life) // 10)
    return Growth(who, life[-1].at - life[0].at, _median(life[:tenth]), _median(life[-tenth:]))


def _median(some: list[Figures]) -> Figures:
    return Figures(
        some[-1].at,
        int(statistics.median(one.private_bytes for one in some)),
        int(statistics.median(one.files for one in some)),
        int(statistics.median(one.threads for one in some)),
    )


def processes_of(home: Path) -> dict[int, str]:
    """Every process that was started for this home, by its environment; whoever its parent is by now."""
    mark = f"XDG_RUNTIME_DIR={home / 'run'}".encode()
    found = {}
    for entry in Path("/proc").iterdir():
        if not entry.name.isdigit() or int(entry.name) == os.getpid():
            continue
        try:
            if mark in (entry / "environ").read_bytes().split(b"\0") and alive(int(entry.name)):
                found[int(entry.name)] = (entry / "cmdline").read_bytes().replace(b"\0", b" ").decode()
        except OSError:
            continue
    return found


# What a server that ended in order leaves: its lock, the simulated device's book, and in the state directory the logs.
RUNTIME_LEFT = {"server.lock", "sim-0.ledger"}


def files_left(home: Path) -> list[str]:
    """Files that should not be there once the server has ended."""
    left = [path for path in (home / "run" / "shoal").iterdir() if path.name not in RUNTIME_LEFT]
    # torch's own compiler makes its cache's directory when it is imported.
    left += [path for path in (home / "tmp").iterdir() if not path.name.startswith("torchinductor_")]
    for path in (home / "state").rglob("*"):
        is_log = path.parent.name == "logs" and (
            path.suffix in {".log", ".ndjson"}
            or path.name.endswith((".log.1", ".ndjson.1"))
            or path.name in {"template.out", "template.out.1"}
        )
        if path.is_file() and not is_log:
            left.append(path)
    return [str(path.relative_to(home)) for path in left]


def shared_memory() -> set[str]:
    """Names in `/dev/shm`."""
    shm = Path("/dev/shm")
    return {path.name for path in shm.iterdir()} if shm.is_dir() else set()
