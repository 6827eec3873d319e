"""Counters of one worker, and the thread that tells them to the server while they change."""

from __future__ import annotations

import threading
from dataclasses import dataclass
from typing import TYPE_CHECKING, Generic, TypeVar

if TYPE_CHECKING:
    from collections.abc import Callable


@dataclass(frozen=True)
class Counts:
    """Requests at one moment; tokens that were generated and that became vectors since the start; what KV costs.

    Attributes
    ----------
    kv_back_us_per_mib
        What bringing a MiB of a cached prefix back takes, or computing it again (microseconds); 0 while nobody knows.
    kv_found_milli
        What part of all that is cached one use of the model finds again, in thousandths; 0 where nobody knows.
    """

    running: int = 0
    waiting: int = 0
    tokens_out: int = 0
    tokens_embedded: int = 0
    kv_back_us_per_mib: int = 0
    kv_found_milli: int = 0

    @property
    def is_idle(self) -> bool:
        """Whether there is no request."""
        return self.running == self.waiting == 0


_LEAST_S = 0.02  # between two reports, however often somebody says so

T = TypeVar("T")


def no_one_asks() -> None:
    """Do nothing: nobody wants to hear that an engine is idle."""


class Reporter(Generic[T]):
    """Tells figures, at most a few times a second and sooner where somebody says so, and only while they change.

    Parameters
    ----------
    read
        Where they come from; called on the reporter's thread.
    send
        Told each new value.
    interval_s
        Time between two reports.
    """

    def __init__(self, read: Callable[[], T], send: Callable[[T], None], interval_s: float = 0.25) -> None:
        self._read = read
        self._send = send
        self._interval_s = interval_s
        self._stop = threading.Event()
        self._hurry = threading.Event()
        self._thread = threading.Thread(target=self._run, name="usage", daemon=True)

    def start(self) -> None:
        """Begin to report."""
        self._thread.start()

    def hurry(self) -> None:
        """Report now rather than at the end of the interval; from any thread, and it waits for nothing."""
        self._hurry.set()

    def stop(self) -> None:
        """Report a last time and end."""
        self._stop.set()
        self._hurry.set()
        self._thread.join(timeout=2.0)

    def _run(self) -> None:
        told: T | None = None
        last = False
        while True:
            counts = self._read()
            if counts != told:
                self._send(counts)
                told = counts
            if last:
                return
            least_s = min(_LEAST_S, self._interval_s)
            last = self._stop.wait(least_s)
            self._hurry.wait(self._interval_s - least_s)
            self._hurry.clear()
            last = last or self._stop.is_set()
