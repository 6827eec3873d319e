"""A worker without a model: speaks the control protocol, holds leases as numbers, answers HTTP, misbehaves on request.

Nothing but the standard library. Run by the tests of the shelf as an engine of the kind `worker`:
`python3 fake_worker.py --control SOCKET --model NAME [--weights MIB] [--kv-min MIB] ...`.
"""

from __future__ import annotations

import argparse
import json
import mmap
import os
import signal
import socket
import sys
import threading
import time
from pathlib import Path

MIB = 1 << 20


def arguments() -> argparse.Namespace:
    parser = argparse.ArgumentParser()
    parser.add_argument("--control", required=True)
    parser.add_argument("--model", required=True)
    parser.add_argument("--weights", type=int, default=100, help="MiB of weights")
    parser.add_argument("--kv-min", type=int, default=2, help="MiB of KV for one request")
    parser.add_argument("--overhead", type=int, default=0, help="MiB measured outside regions")
    parser.add_argument("--chunks", type=int, default=1, help="lease requests of one wake")
    parser.add_argument("--wake-ms", type=int, default=5, help="how long the bytes of a wake take")
    parser.add_argument("--start-gate", type=Path, help="loading lasts until this file is there, a minute at most")
    parser.add_argument("--lease-wait-ms", type=int, default=20_000, help="deadline of lease requests")
    parser.add_argument("--short-wakes", type=int, default=0, help="so many wakes bring half, and are answered as done")
    parser.add_argument("--die-in-wake", help="kill itself in the middle of the first wake; a file marks it as done")
    parser.add_argument("--slab", help="borrow memory, leave words in it and die, once; a file marks it as done")
    parser.add_argument("--inside", type=int, default=0, help="requests that wait inside it, as it says")
    parser.add_argument("--ignore-reclaim", action="store_true")
    parser.add_argument("--ignore-shutdown", action="store_true")
    parser.add_argument("--fail", help="say Failed with this code instead of Ready")
    parser.add_argument("--exit", type=int, help="exit with this code at once")
    parser.add_argument("--wrong", help="after Ready, write this line")
    return parser.parse_args()


class Worker:
    def __init__(self, options: argparse.Namespace) -> None:
        self.options = options
        self.total = options.weights * MIB
        self.held = 0
        self.requests = 0
        self.answers: dict[int, dict] = {}
        self.changed = threading.Condition()
        self.writing = threading.Lock()
        self.control = socket.socket(socket.AF_UNIX)
        self.control.connect(options.control)
        self.lines = self.control.makefile("rb")

    def say(self, **message: object) -> None:
        with self.writing:
            self.control.sendall(json.dumps(message).encode() + b"\n")

    def run(self) -> None:
        options = self.options
        self.say(say="hello", version=1, model=options.model, pid=os.getpid(), answers_pings=True)
        welcome = json.loads(self.lines.readline())
        assert welcome["say"] == "welcome", welcome
        print("welcome", json.dumps(welcome), flush=True)
        self.say(say="loading", phase="reading", done=0, total=self.total)
        deadline = time.monotonic() + 60
        while options.start_gate and not options.start_gate.exists():
            assert time.monotonic() < deadline, "nobody opened the gate"
            time.sleep(0.01)
        if options.slab:
            self.borrow(welcome["lends_slabs"], Path(options.slab))
        if options.fail:
            self.say(say="failed", code=options.fail, message=f"no such thing ({options.fail})")
            time.sleep(0.05)
            sys.exit(3)
        threading.Thread(target=self.serve, args=(welcome["data_socket"],), daemon=True).start()
        while not Path(welcome["data_socket"]).exists():
            time.sleep(0.001)
        capabilities = {
            "routes": ["chat/completions"],
            "context_tokens": 128,
            "weights_bytes": self.total,
            "kv_block_bytes": MIB,
            "kv_bytes_min": options.kv_min * MIB,
            "kv_block_tokens": 16,
            "dtype": "float32",
        }
        self.say(say="ready", capabilities=capabilities)
        self.usage()
        if options.wrong:
            self.say_raw(options.wrong)
        for line in self.lines:
            self.obey(json.loads(line))
        # The server is gone, and so are we.
        os._exit(0)

    def borrow(self, lends: bool, mark: Path) -> None:
        """Say as progress what is in the memory that was lent."""

        def ask(number: int, nbytes: int) -> tuple[dict, list[int]]:
            self.say(say="slab_request", request=number, bytes=nbytes)
            line, files, _, _ = socket.recv_fds(self.control, 65536, 4)
            return json.loads(line), files

        assert lends
        denied, files = ask(1, 1 << 40)
        assert (denied["say"], denied["request"], files) == ("slab_deny", 1, []), denied
        granted, files = ask(2, 4 * MIB)
        assert (granted["say"], granted["bytes"], len(files)) == ("slab_grant", 4 * MIB, 1), granted
        with mmap.mmap(files[0], 4 * MIB) as memory:
            found = memory[:5].rstrip(b"\0").decode()
            self.say(say="loading", phase=f"zeroed={granted['is_zeroed']} found={found!r}", done=0, total=1)
            memory[:5] = b"words"
        if not mark.exists():
            mark.touch()
            ask(3, 1 << 40)  # answered once all that was said before was heard
            os.kill(os.getpid(), signal.SIGKILL)
        self.say(say="slab_return", slab=granted["slab"])

    def say_raw(self, line: str) -> None:
        with self.writing:
            self.control.sendall(line.encode() + b"\n")

    def obey(self, message: dict) -> None:
        match message["say"]:
            case "lease_grant" | "lease_deny":
                with self.changed:
                    self.answers[message["request"]] = message
                    self.changed.notify_all()
            case "wake":
                threading.Thread(target=self.wake, args=(message,), daemon=True).start()
            case "reclaim":
                if not self.options.ignore_reclaim:
                    self.reclaim(message)
            case "ping":
                self.say(say="pong", ping=message["ping"])
            case "shutdown":
                if not self.options.ignore_shutdown:
                    os._exit(0)

    def lease(self, amount: int) -> dict:
        with self.changed:
            self.requests += 1
            number = self.requests
        wait_ms = self.options.lease_wait_ms
        self.say(
            say="lease_request", request=number, kind="weights", bytes=amount, bytes_min=amount,
            deadline_ms=wait_ms, reason="its weights",
        )  # fmt: skip
        with self.changed:
            self.changed.wait_for(lambda: number in self.answers, timeout=wait_ms / 1_000 + 5)
            return self.answers.pop(number, {"say": "lease_deny", "reason": "no answer"})

    def wake(self, order: dict) -> None:
        began = time.monotonic()
        brought = 0
        error = None
        wanted = self.total
        if self.options.short_wakes:
            self.options.short_wakes -= 1
            wanted //= 2
        while self.held < wanted:
            step = min(self.total - self.held, -(-self.total // self.options.chunks))
            answer = self.lease(step)
            if answer["say"] == "lease_deny":
                error = answer["reason"]
                break
            self.held += answer["bytes"]
            mark = self.options.die_in_wake
            if mark and not Path(mark).exists():
                Path(mark).touch()
                os.kill(os.getpid(), signal.SIGKILL)
            time.sleep(self.options.wake_ms / self.options.chunks / 1_000)
            brought += answer["bytes"]
        self.usage()
        self.say(
            say="order_done", order=order["order"], bytes=brought, copied=brought,
            duration_us=int((time.monotonic() - began) * 1e6), error=error,
        )  # fmt: skip

    def reclaim(self, order: dict) -> None:
        freed = min(self.held, order["bytes"])
        self.held -= freed
        if freed:
            self.say(say="lease_return", kind="weights", bytes=freed)
        self.say(say="order_done", order=order["order"], bytes=freed, copied=0, duration_us=10, error=None)
        self.usage()

    def usage(self) -> None:
        usage = dict.fromkeys(
            ("kv_device", "kv_live", "host", "source_only", "requests_running", "requests_waiting", "tokens_out",
             "onboarded", "evicted"), 0,
        )  # fmt: skip
        usage |= {"weights_device": self.held, "weights_total": self.total}
        usage["overhead_device"] = self.options.overhead * MIB
        usage["requests_waiting"] = self.options.inside
        self.say(say="usage", usage=usage)

    def serve(self, path: str) -> None:
        listener = socket.socket(socket.AF_UNIX)
        listener.bind(path)
        listener.listen(64)
        while True:
            client, _ = listener.accept()
            client.recv(65536)
            body = json.dumps({"model": self.options.model, "whole": self.held == self.total}).encode()
            head = b"HTTP/1.1 200 OK\r\ncontent-type: application/json\r\ncontent-length: %d\r\n\r\n" % len(body)
            client.sendall(head + body)
            client.close()


def main() -> None:
    options = arguments()
    if options.exit is not None:
        print("leaving at once", flush=True)
        sys.exit(options.exit)
    if options.ignore_shutdown:
        signal.signal(signal.SIGTERM, signal.SIG_IGN)
    Worker(options).run()


if __name__ == "__main__":
    main()
