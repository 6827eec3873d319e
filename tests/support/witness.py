"""Counts the simulated device's memory from outside, trusting neither the server's nor the workers' word."""

from __future__ import annotations

import contextlib
import os
import signal
import threading
import time
from dataclasses import dataclass, field
from pathlib import Path
from typing import TYPE_CHECKING, Self

if TYPE_CHECKING:
    from collections.abc import Callable

    from tests.support.server import Server

MEMFD = "/memfd:shoal-sim-"


def mapped_bytes(pid: int) -> int:
    """Sum the mappings of simulated device memory in one process, from `/proc/PID/smaps`."""
    total = 0
    for line in Path(f"/proc/{pid}/smaps").read_text().splitlines():
        if MEMFD in line:
            start, end = line.split(" ", 1)[0].split("-")
            total += int(end, 16) - int(start, 16)
    return total


def allocated_bytes(pid: int) -> int:
    """Sum what the kernel really allocated for a process's simulated device memory, mapped or not."""
    seen: dict[int, int] = {}
    for entry in Path(f"/proc/{pid}/fd").iterdir():
        try:
            if str(entry.readlink()).startswith(MEMFD):
                status = entry.stat()
                seen[status.st_ino] = status.st_blocks * 512
        except FileNotFoundError:
            continue
    return sum(seen.values())


@dataclass
class Sample:
    """One moment: every worker stopped, its memory counted."""

    mapped: dict[str, int]
    allocated: dict[str, int]
    leased: dict[str, int]


@dataclass
class Witness:
    """Stops the workers many times during traffic, counts, and lets them go on."""

    server: Server
    period_s: float = 0.05
    samples: list[Sample] = field(default_factory=list)
    errors: list[str] = field(default_factory=list)
    _end: threading.Event = field(default_factory=threading.Event)
    _thread: threading.Thread | None = None

    def sample(self) -> Sample | None:
        """Stop all workers, count, continue; None when one of them ended meanwhile.

        A stopped worker can neither map nor give back, so what is read while all are stopped is one consistent moment.
        The leases are asked for while they stand still: the server's ledger cannot change either then, except by
        grants to a worker that has not read them yet, which only makes a lease larger.
        """
        workers = self.server.workers()
        stopped = []
        try:
            for pid in workers.values():
                os.kill(pid, signal.SIGSTOP)
                stopped.append(pid)
            for pid in workers.values():
                wait_stopped(pid)
            leases = {model["name"]: lease_bytes(model) for model in self.server.state()["models"]}
            return Sample(
                {name: mapped_bytes(pid) for name, pid in workers.items()},
                {name: allocated_bytes(pid) for name, pid in workers.items()},
                leases,
            )
        except (ProcessLookupError, FileNotFoundError):
            return None
        finally:
            for pid in stopped:
                send(pid, signal.SIGCONT)

    def __enter__(self) -> Self:
        self._thread = threading.Thread(target=self._run, name="witness", daemon=True)
        self._thread.start()
        return self

    def __exit__(self, *_: object) -> None:
        self._end.set()
        if self._thread is not None:
            self._thread.join(30)

    def _run(self) -> None:
        while not self._end.wait(self.period_s):
            try:
                sample = self.sample()
            except Exception as error:  # noqa: BLE001 - whatever it is, the test shall hear of it
                self.errors.append(repr(error))
                return
            if sample is not None:
                self.samples.append(sample)

    def check(self, budget_bytes: int, *, at_least: int = 5) -> int:
        """Assert I1 in every sample, of what is mapped and of what is allocated; gives the most ever mapped.

        The two differ: memory can be allocated and not mapped (a frame kept), or mapped and not allocated (untouched).
        """
        assert not self.errors, self.errors
        assert len(self.samples) >= at_least, f"only {len(self.samples)} samples were taken"
        peak = 0
        for sample in self.samples:
            for name, mapped in sample.mapped.items():
                assert mapped <= sample.leased[name], f"{name} maps {mapped}, its lease is {sample.leased[name]}"
                assert sample.allocated[name] <= sample.leased[name], f"{name} allocated {sample.allocated[name]}"
            mapped_sum, allocated_sum = sum(sample.mapped.values()), sum(sample.allocated.values())
            assert mapped_sum <= budget_bytes, f"{mapped_sum} bytes are mapped, the budget is {budget_bytes}"
            assert allocated_sum <= budget_bytes, f"{allocated_sum} bytes are held, the budget is {budget_bytes}"
            peak = max(peak, mapped_sum)
        assert peak > 0, "no worker ever held memory: nothing was tested"
        return peak


def lease_bytes(model: dict[str, object]) -> int:
    """A model's lease, all kinds together."""
    lease = model["lease"]
    assert isinstance(lease, dict)
    return int(lease["total"])


def send(pid: int, number: int) -> None:
    """Signal a process that may have gone."""
    with contextlib.suppress(ProcessLookupError):
        os.kill(pid, number)


def wait_stopped(pid: int, timeout_s: float = 5) -> None:
    """Wait until every thread of a process stands still."""
    deadline = time.monotonic() + timeout_s
    while Path(f"/proc/{pid}/stat").read_text().rsplit(")", 1)[1].split()[0] not in "Tt":
        if time.monotonic() > deadline:
            msg = f"process {pid} did not stop"
            raise TimeoutError(msg)
        time.sleep(0.001)


def until(condition: Callable[[], bool], timeout_s: float, what: str) -> None:
    """Wait for a condition; raises saying what did not come true."""
    deadline = time.monotonic() + timeout_s
    while not condition():
        if time.monotonic() > deadline:
            msg = f"not within {timeout_s} s: {what}"
            raise TimeoutError(msg)
        time.sleep(0.02)
