"""A server's side of the control socket, small enough to be read: it grants leases up to a budget and gives orders."""

from __future__ import annotations

import contextlib
import itertools
import json
import socket
import threading
import time
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from pathlib import Path


class FakeBroker:
    def __init__(
        self, directory: Path, spec: dict, budget: int, device_bytes: int | None = None, host=256 << 20
    ) -> None:
        self.path = directory / "control.sock"
        self.data_socket = directory / "data.sock"
        self.budget = budget
        self.leased = {"weights": 0, "kv": 0, "overhead": 0}
        self.peak = 0
        self.heard: list[dict] = []
        self._changed = threading.Condition()
        self._orders = itertools.count(1)
        self._peer: socket.socket | None = None
        self._welcome = {
            "say": "welcome", "version": 1, "spec": spec, "device": "sim", "device_bytes": device_bytes or budget,
            "host_budget": host, "data_socket": str(self.data_socket),
        }  # fmt: skip
        self.usage = {"kv_live": 0, "kv_device": 0}
        self._listener = socket.socket(socket.AF_UNIX)
        self._listener.bind(str(self.path))
        self._listener.listen(1)
        threading.Thread(target=self._run, daemon=True).start()

    def _run(self) -> None:
        try:
            self._peer, _ = self._listener.accept()
            for line in self._peer.makefile("r", encoding="utf-8"):
                said = json.loads(line)
                with self._changed:
                    self.heard.append(said)
                    self._answer(said)
                    self._changed.notify_all()
        except OSError:
            return

    def _answer(self, said: dict) -> None:
        match said["say"]:
            case "hello":
                self.say(self._welcome)
            case "lease_request":
                free = self.budget - sum(self.leased.values())
                if free >= max(1, said["bytes_min"]):
                    granted = min(free, said["bytes"])
                    self.leased[said["kind"]] += granted
                    self.peak = max(self.peak, sum(self.leased.values()))
                    answer = {"say": "lease_grant", "kind": said["kind"], "bytes": granted}
                else:
                    answer = {"say": "lease_deny", "reason": f"{free} bytes are free"}
                self.say(answer | {"request": said["request"]})
            case "usage":
                self.usage = said["usage"]
            case "lease_return":
                self.leased[said["kind"]] -= said["bytes"]

    def say(self, message: dict) -> None:
        assert self._peer is not None
        self._peer.sendall(json.dumps(message).encode() + b"\n")

    def wait(self, condition, timeout_s: float = 60.0):
        """The first true value of `condition(self)`."""
        deadline = time.monotonic() + timeout_s
        with self._changed:
            while not (value := condition(self)):
                left = deadline - time.monotonic()
                assert left > 0, f"not in time; last heard: {self.heard[-5:]}"
                self._changed.wait(min(left, 0.2))
            return value

    def said(self, what: str) -> list[dict]:
        return [said for said in self.heard if said["say"] == what]

    def order(self, say: str, timeout_s: float = 20.0, **fields) -> dict:
        number = next(self._orders)
        self.say({"say": say, "order": number, "deadline_ms": int(timeout_s * 1000), "reason": "a test"} | fields)
        return self.wait(lambda _: next((d for d in self.said("order_done") if d["order"] == number), None), timeout_s)

    def close(self) -> None:
        if self._peer is not None:
            with contextlib.suppress(OSError):  # it may have gone first
                self._peer.shutdown(socket.SHUT_RDWR)
            self._peer.close()
        self._listener.close()
