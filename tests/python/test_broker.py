"""A worker's line to the server, against a server that is forty lines of Python."""

from __future__ import annotations

import contextlib
import json
import queue
import socket
import threading
import time
from pathlib import Path
from typing import TYPE_CHECKING, Any

import pytest
from helpers import PAGE, pattern, read, run_python

import shoal

if TYPE_CHECKING:
    from collections.abc import Iterator

CAPACITY = 16 * PAGE
SPEC = {"source": "/models/chat", "context": 2048, "ratio": 0.5, "flags": [True, None, -3], "nested": {"a": "b"}}


class Server:
    """Speaks the server's half of the protocol; grants as long as `room` lasts."""

    def __init__(self, path: Path, room: int) -> None:
        self.path = path
        self.room = room
        self.version = 1
        self.heard: queue.Queue[dict[str, Any]] = queue.Queue()
        self.seen: list[dict[str, Any]] = []
        self.listener = socket.socket(socket.AF_UNIX)
        self.listener.bind(str(path))
        self.listener.listen(1)
        self.connection: socket.socket | None = None
        self.thread = threading.Thread(target=self.run, daemon=True)
        self.thread.start()

    def run(self) -> None:
        try:
            self.connection, _ = self.listener.accept()
        except OSError:
            return
        with self.connection.makefile("r") as lines:
            for line in lines:
                said = json.loads(line)
                self.answer(said)
                self.heard.put(said)

    def answer(self, said: dict[str, Any]) -> None:
        if said["say"] == "hello":
            self.say(
                say="welcome", version=self.version, spec=SPEC, device="sim", device_bytes=CAPACITY,
                host_budget=64 << 20, data_socket=str(self.path.parent / "chat.sock"),
            )  # fmt: skip
        elif said["say"] == "lease_request":
            if said["bytes"] <= self.room:
                self.room -= said["bytes"]
                self.say(say="lease_grant", request=said["request"], kind=said["kind"], bytes=said["bytes"])
            else:
                self.say(say="lease_deny", request=said["request"], reason="the others are busy")
        elif said["say"] == "lease_return":
            self.room += said["bytes"]

    def say(self, **message: Any) -> None:
        assert self.connection is not None
        self.connection.sendall(json.dumps(message).encode() + b"\n")

    def wait_for(self, say: str, timeout_s: float = 60) -> dict[str, Any]:
        end = time.monotonic() + timeout_s
        while True:
            said = self.heard.get(timeout=max(end - time.monotonic(), 0.001))
            if said["say"] == say:
                return said

    def close(self) -> None:
        if self.connection is not None:
            # Closing alone does not wake the thread that reads, as long as the other side lives.
            with contextlib.suppress(OSError):
                self.connection.shutdown(socket.SHUT_RDWR)
            self.connection.close()
        self.listener.close()
        self.thread.join(10)


@pytest.fixture
def server(tmp_path: Path) -> Iterator[Server]:
    made = Server(tmp_path / "control.sock", CAPACITY)
    yield made
    made.close()


def test_welcome_says_what_the_worker_needs(server: Server) -> None:
    client = shoal.BrokerClient.connect(str(server.path), "chat")
    hello = server.wait_for("hello")
    assert hello["model"] == "chat"
    assert hello["version"] == 1
    assert hello["pid"] > 0
    assert client.path == str(server.path)
    assert client.connected
    assert client.welcome["spec"] == SPEC
    assert client.welcome["host_budget"] == 64 << 20
    assert client.welcome["device"] == "sim"
    assert client.welcome["data_socket"].endswith("chat.sock")
    assert not client.shutdown_requested


def test_memory_is_leased_before_it_is_mapped_and_returned_after(server: Server) -> None:
    client = shoal.BrokerClient.connect(str(server.path), "chat")
    mem = shoal.MemoryManager(broker=client)
    region = mem.region("weights", 4 * PAGE)
    data = pattern(4 * PAGE)
    region.stage(0, data)
    region.seal()
    assert server.room == CAPACITY, "staging took a lease"
    with mem.guard():
        assert read(region) == data
    asked = server.wait_for("lease_request")
    assert asked["kind"] == "weights"
    assert asked["reason"]
    assert server.room == CAPACITY - 4 * PAGE
    region.sleep()
    assert server.wait_for("lease_return")["kind"] == "weights"
    assert server.room == CAPACITY


def test_overhead_is_leased_before_the_device_is_opened(server: Server) -> None:
    client = shoal.BrokerClient.connect(str(server.path), "chat")
    mem = shoal.MemoryManager(broker=client, overhead=3 * PAGE)
    asked = server.wait_for("lease_request")
    assert (asked["kind"], asked["bytes"]) == ("overhead", 3 * PAGE)
    assert server.room == CAPACITY - 3 * PAGE
    assert mem.usage()["overhead_device"] == 3 * PAGE


def test_without_room_for_its_overhead_a_process_opens_nothing(server: Server) -> None:
    server.room = PAGE
    client = shoal.BrokerClient.connect(str(server.path), "chat")
    # Refused before the device is looked at: else it would be the device's error.
    with pytest.raises(shoal.LeaseError, match="context and libraries") as caught:
        shoal.MemoryManager("cuda:0", broker=client, overhead=3 * PAGE)
    assert caught.value.lease == "overhead"


def test_a_refusal_is_an_error_with_its_reason(server: Server) -> None:
    server.room = PAGE
    client = shoal.BrokerClient.connect(str(server.path), "chat")
    mem = shoal.MemoryManager(broker=client)
    region = mem.region("weights", 4 * PAGE)
    region.stage(0, bytes(4 * PAGE))
    region.seal()
    with pytest.raises(shoal.LeaseError) as caught:
        region.wake()
    assert caught.value.reason == "the others are busy"
    assert caught.value.lease == "weights"
    assert caught.value.requested == 4 * PAGE
    kv = shoal.KvBacking(mem.region("kv", 4 * PAGE, kind="kv"), block_bytes=PAGE, blocks=4)
    assert kv.back([0, 1]) is False
    assert kv.back([0])


def test_orders_are_carried_out(server: Server) -> None:
    client = shoal.BrokerClient.connect(str(server.path), "chat")
    mem = shoal.MemoryManager(broker=client)
    region = mem.region("weights", 4 * PAGE)
    data = pattern(4 * PAGE)
    region.stage(0, data)
    region.seal()
    server.wait_for("hello")
    server.say(say="wake", order=1, deadline_ms=10_000, reason="a request")
    done = server.wait_for("order_done")
    assert (done["order"], done["error"]) == (1, None)
    assert region.usage()["device"] == 4 * PAGE
    server.say(say="reclaim", order=2, bytes=1 << 40, deadline_ms=10_000, reason="others")
    done = server.wait_for("order_done")
    assert done["order"] == 2
    assert done["bytes"] == 4 * PAGE
    assert region.usage()["device"] == 0
    with mem.guard():
        assert read(region) == data


BUSY = """
    import sys
    import shoal
    client = shoal.BrokerClient.connect(sys.argv[1], "chat")
    mem = shoal.MemoryManager(broker=client)
    region = mem.region("weights", "8MiB")
    region.stage(0, bytes(8 << 20))
    region.seal()
    region.wake()
    client.loading("holding", 0, 1)
    product = 3 ** 6_000_000  # one call that keeps the GIL for seconds
    client.loading("let go", 1, 1)
"""


def test_a_reclaim_needs_neither_the_gil_nor_the_engine(server: Server) -> None:
    outcome: list[Any] = []
    thread = threading.Thread(target=lambda: outcome.append(run_python(BUSY, str(server.path), timeout_s=60)))
    thread.start()
    assert server.wait_for("loading", 30)["phase"] == "holding"
    server.say(say="reclaim", order=1, bytes=8 << 20, deadline_ms=5000, reason="others")
    done = server.heard.get(timeout=30)
    while done["say"] not in {"order_done", "loading"}:
        done = server.heard.get(timeout=30)
    thread.join(60)
    assert done["say"] == "order_done", "the order waited for the interpreter"
    assert done["bytes"] == 8 << 20
    assert outcome[0].returncode == 0, outcome[0].stderr


def test_what_a_worker_says(server: Server) -> None:
    client = shoal.BrokerClient.connect(str(server.path), "chat")
    mem = shoal.MemoryManager(broker=client)
    region = mem.region("weights", PAGE)
    region.stage(0, bytes(PAGE))
    region.seal()
    client.loading("reading", 5, 10)
    said = server.wait_for("loading")
    assert (said["phase"], said["done"], said["total"]) == ("reading", 5, 10)
    capabilities = {
        "routes": ["chat/completions"], "context_tokens": 2048, "weights_bytes": PAGE, "kv_block_bytes": 10,
        "kv_bytes_min": 20, "kv_block_tokens": 16, "dtype": "float32",
    }  # fmt: skip
    client.ready(capabilities)
    assert server.wait_for("ready")["capabilities"] == capabilities
    with pytest.raises(ValueError, match="capabilities"):
        client.ready({"routes": "all of them"})
    client.usage(
        requests_running=1,
        requests_waiting=2,
        tokens_out=3,
        tokens_embedded=4,
        kv_back_us_per_mib=340,
        kv_found_milli=70,
    )
    # Figures are sent by themselves too, so these need not be the first.
    while (usage := server.wait_for("usage")["usage"])["requests_running"] == 0:
        pass
    assert (usage["requests_running"], usage["requests_waiting"], usage["tokens_out"]) == (1, 2, 3)
    assert (usage["tokens_embedded"], usage["kv_back_us_per_mib"], usage["kv_found_milli"]) == (4, 340, 70)
    assert usage["weights_total"] == PAGE
    client.failed("internal", "a sentence")
    assert server.wait_for("failed")["code"] == "internal"


def test_shutdown_is_waited_for_without_the_gil(server: Server) -> None:
    client = shoal.BrokerClient.connect(str(server.path), "chat")
    mem = shoal.MemoryManager(broker=client)
    server.wait_for("hello")
    assert client.wait_shutdown(0.05) is None
    threading.Timer(0.1, lambda: server.say(say="shutdown", deadline_ms=60_000, reason="the end")).start()
    order = client.wait_shutdown(30)
    assert order is not None
    assert order["reason"] == "the end"
    assert 30_000 < order["deadline_ms"] <= 60_000
    assert client.shutdown_requested
    assert client.wait_shutdown(0) is not None
    del mem


def test_a_closed_socket_is_noticed(server: Server) -> None:
    client = shoal.BrokerClient.connect(str(server.path), "chat")
    client.on_disconnect = "ignore"
    mem = shoal.MemoryManager(broker=client)
    region = mem.region("weights", PAGE)
    region.stage(0, bytes(PAGE))
    region.seal()
    server.wait_for("hello")
    server.connection.shutdown(socket.SHUT_RDWR)
    end = time.monotonic() + 10
    while client.connected and time.monotonic() < end:
        time.sleep(0.01)
    assert not client.connected
    with pytest.raises(shoal.Error):
        region.wake(timeout_s=5)
    with pytest.raises(ValueError, match="on_disconnect"):
        client.on_disconnect = "panic"  # type: ignore[assignment]


WORKER = """
    import sys, time
    import shoal
    client = shoal.BrokerClient.connect(sys.argv[1], "chat")
    assert client.on_disconnect == "ignore"
    client.on_disconnect = "exit"
    mem = shoal.MemoryManager(broker=client)
    while True:  # holds the GIL most of the time
        time.sleep(0)
"""


def test_a_worker_does_not_outlive_its_server(server: Server) -> None:
    outcome: list[Any] = []
    thread = threading.Thread(target=lambda: outcome.append(run_python(WORKER, str(server.path), timeout_s=60)))
    thread.start()
    server.wait_for("hello", 30)
    time.sleep(0.3)
    server.connection.shutdown(socket.SHUT_RDWR)
    thread.join(30)
    assert not thread.is_alive()
    assert outcome[0].returncode != 0


def test_no_server_and_another_version(tmp_path: Path, server: Server) -> None:
    with pytest.raises(shoal.BrokerError) as caught:
        shoal.BrokerClient.connect(str(tmp_path / "nobody.sock"), "chat")
    assert caught.value.path == str(tmp_path / "nobody.sock")
    server.version = 99
    with pytest.raises(shoal.BrokerError, match="99"):
        shoal.BrokerClient.connect(str(server.path), "chat")
