"""Run all tests beside one another: those of whole servers, Python's others, and Rust's with the wheel's.

Python's tests mostly wait, so what has to be compiled is compiled beside them and yields to them. Those of whole
servers take twice as long as Python's others, so those of tiers come after the others: two of Python run at any time.

All parts stay in one session, each in a process group of its own: Linux shares the processor among sessions first
(sched_autogroup), and what is nice in a session of its own yields to nobody.
"""

from __future__ import annotations

import os
import signal
import subprocess
import sys
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from types import FrameType

ROOT = Path(__file__).resolve().parent.parent
LOGS = ROOT / ".shoal"


@dataclass(frozen=True)
class Part:
    """Targets that are made one after the other; what they print goes to a file, or to where this prints."""

    name: str
    targets: tuple[str, ...]
    log: str | None = None
    nice: int = 0


PARTS = (
    Part("the tests of whole servers", ("test-servers",)),
    Part("Python's other tests, and those of tiers", ("test-others", "test-tiers"), "others.log"),
    Part("the tests of Rust and of the wheel", ("test-rust", "test-wheel"), "rust.log", nice=10),
)


class EndedError(Exception):
    """Somebody wants this to end."""


def interrupt(number: int, _frame: FrameType | None) -> None:
    raise EndedError(signal.Signals(number).name)


def start(make: str, part: Part, logs: Path) -> subprocess.Popen[bytes]:
    """Start a part in a process group of its own; all its targets are made, also after one that failed."""
    command = ["nice", "-n", str(part.nice), make, "--no-print-directory", "--keep-going", *part.targets]
    if part.log is None:
        return subprocess.Popen(command, process_group=0)
    with (logs / part.log).open("wb") as log:
        return subprocess.Popen(command, stdout=log, stderr=subprocess.STDOUT, process_group=0)


def main(make: str, logs: Path = LOGS, parts: tuple[Part, ...] = PARTS) -> int:
    """Run all parts; the exit status is 1 if one failed, 130 if it was interrupted."""
    for number in (signal.SIGINT, signal.SIGTERM, signal.SIGHUP):
        signal.signal(number, interrupt)
    logs.mkdir(parents=True, exist_ok=True)
    beside = ", ".join(f"{part.name} ({os.path.relpath(logs / part.log)})" for part in parts if part.log)
    print(f"Run beside and printed at the end: {beside}", flush=True)
    running: list[subprocess.Popen[bytes]] = []
    failed = []
    try:
        running.extend(start(make, part, logs) for part in parts)
        for part, process in zip(parts, running, strict=True):
            status = process.wait()
            if part.log is not None:
                print(f"== {part.name}", flush=True)
                sys.stdout.buffer.write((logs / part.log).read_bytes())
                sys.stdout.buffer.flush()
            if status != 0:
                failed.append(part.name)
    except EndedError as error:
        print(f"Ended by {error}", file=sys.stderr)
        return 130
    finally:
        for process in running:
            if process.poll() is None:
                os.killpg(process.pid, signal.SIGTERM)
    for name in failed:
        print(f"FAILED: {name} (see above)")
    return 1 if failed else 0


if __name__ == "__main__":
    sys.exit(main(sys.argv[1]))
