"""A small client of the server's own interface (`/api/v1`): the state, and the events as they happen."""

from __future__ import annotations

import json
import threading
import time
import urllib.error
import urllib.request
from contextlib import suppress
from http.client import HTTPException
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from collections.abc import Callable

Event = dict[str, Any]
_CALL_S_MAX = 15.0
_QUIET_S_MAX = 60.0
_RECONNECT_S = 0.3
_KEPT_EVENTS_MAX = 20_000


class Management:
    """Asks one server."""

    def __init__(self, address: str) -> None:
        self.address = address

    def is_healthy(self) -> bool:
        """Tell whether the server answers at all."""
        try:
            with self._open("/healthz", _CALL_S_MAX) as response:
                return bool(response.status == 200)
        except (OSError, HTTPException):
            return False

    def state(self) -> dict[str, Any]:
        """Return everything the server knows, at this moment."""
        with self._open("/api/v1/state", _CALL_S_MAX) as response:
            answer: dict[str, Any] = json.load(response)
        return answer

    def events(self, after: int, seen: Callable[[Event], None], stop: threading.Event) -> None:
        """Call ``seen`` with every event after ``after``; return when the stream ends or ``stop`` is set."""
        request = urllib.request.Request(  # noqa: S310 - the address is the demo's own server
            self.address + "/api/v1/events", headers={"Accept": "text/event-stream", "Last-Event-ID": str(after)}
        )
        data: list[str] = []
        with urllib.request.urlopen(request, timeout=_QUIET_S_MAX) as response:  # noqa: S310
            for raw in response:
                line = raw.decode("utf-8").rstrip("\r\n")
                if line.startswith("data:"):
                    data.append(line[5:].removeprefix(" "))
                elif not line and data:
                    # Besides events there is one notice, that the oldest are no longer kept; it has no id.
                    event = json.loads("\n".join(data))
                    if "id" in event:
                        seen(event)
                    data.clear()
                if stop.is_set():
                    return

    def _open(self, path: str, timeout_s: float) -> Any:
        return urllib.request.urlopen(self.address + path, timeout=timeout_s)  # noqa: S310


class EventLog:
    """Every event since the server began, gathered by a thread of its own; a lost stream is taken up again."""

    def __init__(self, management: Management, show: Callable[[Event], None]) -> None:
        self._management = management
        self._show = show
        self._stop = threading.Event()
        self._lock = threading.Lock()
        self._events: list[Event] = []
        self._thread = threading.Thread(target=self._run, name="demo-events", daemon=True)
        self._thread.start()

    def all(self) -> list[Event]:
        """Return what has happened so far."""
        with self._lock:
            return list(self._events)

    def settle(self, last_id: int, wait_s_max: float = 5.0) -> None:
        """Wait until the event ``last_id`` has arrived."""
        deadline = time.monotonic() + wait_s_max
        while self._last_id() < last_id and time.monotonic() < deadline:
            time.sleep(0.05)

    def close(self) -> None:
        """Stop gathering."""
        self._stop.set()

    def _last_id(self) -> int:
        with self._lock:
            return int(self._events[-1]["id"]) if self._events else 0

    def _run(self) -> None:
        while not self._stop.is_set():
            # A stream that breaks off is taken up where it was.
            with suppress(OSError, HTTPException, ValueError):
                self._management.events(self._last_id(), self._seen, self._stop)
            self._stop.wait(_RECONNECT_S)

    def _seen(self, event: Event) -> None:
        with self._lock:
            known = bool(self._events) and event["id"] <= self._events[-1]["id"]
            if known or len(self._events) >= _KEPT_EVENTS_MAX:
                return
            self._events.append(event)
        self._show(event)
