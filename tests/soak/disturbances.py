"""What a soak did to the server and its workers, and when: what excuses a client that was not served."""

from __future__ import annotations

import threading
import time
from dataclasses import dataclass

REMOVED = "removed"
"""The model is not in the file; until it is served again after it came back to it."""


@dataclass
class Disturbance:
    """One thing done to a model or to the server, from its beginning until all is well again."""

    target: str
    what: str
    began: float
    ended: float | None = None


class Disturbances:
    """All of them; safe to use from many threads."""

    def __init__(self) -> None:
        self._lock = threading.Lock()
        self._all: list[Disturbance] = []

    def begin(self, target: str, what: str) -> Disturbance:
        """Note that something is about to be done."""
        disturbance = Disturbance(target, what, time.monotonic())
        with self._lock:
            self._all.append(disturbance)
        return disturbance

    def end(self, disturbance: Disturbance) -> None:
        """Note that all is well again."""
        with self._lock:
            disturbance.ended = time.monotonic()

    def of(self, target: str, began: float, ended: float) -> list[Disturbance]:
        """Those of a target that overlap a stretch of time."""
        with self._lock:
            return [
                one
                for one in self._all
                if one.target == target and one.began <= ended and (one.ended is None or one.ended >= began)
            ]

    def count(self, what: str) -> int:
        """How many of a kind."""
        with self._lock:
            return sum(one.what == what for one in self._all)
