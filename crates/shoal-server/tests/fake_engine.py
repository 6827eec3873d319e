"""A program that speaks OpenAI's API as far as a test needs, and misbehaves on request. Only `--torch` needs a library.

`python3 fake_engine.py --port PORT | --socket PATH [--start-ms N] [--gate FILE] [--mib N] ...`; GET /health is 200 once
it is ready, and a POST is answered with what came.
"""

from __future__ import annotations

import argparse
import os
import signal
import socketserver
import subprocess
import sys
import threading
import time
from http.server import BaseHTTPRequestHandler
from pathlib import Path
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from torch import Tensor


def arguments() -> argparse.Namespace:
    parser = argparse.ArgumentParser()
    parser.add_argument("--port", type=int)
    parser.add_argument("--socket")
    parser.add_argument("--start-ms", type=int, default=0, help="how long until it is ready")
    parser.add_argument("--gate", type=Path, help="answer only once this file is there")
    parser.add_argument("--mib", type=int, default=0, help="MiB of memory that it takes")
    parser.add_argument("--torch", help="the device of torch on which it takes them, such as cuda:0; without, RAM")
    parser.add_argument("--lets-go", type=Path, help="give that memory back once this file is there")
    parser.add_argument("--exit", type=int, help="say why and exit with this status at once")
    parser.add_argument("--ignore-term", action="store_true")
    parser.add_argument("--child", help="start a process that ignores SIGTERM, and write its number to this file")
    parser.add_argument("--child-mib", type=int, default=0, help="MiB that it takes, so that its end takes time")
    return parser.parse_args()


OPTIONS = arguments()
READY_AT = time.monotonic() + OPTIONS.start_ms / 1000


class Handler(BaseHTTPRequestHandler):
    protocol_version = "HTTP/1.1"

    def address_string(self) -> str:
        return "somebody"

    def log_message(self, *_: object) -> None:
        pass

    def do_GET(self) -> None:
        self.answer(200 if time.monotonic() >= READY_AT else 503, b"{}")

    def do_POST(self) -> None:
        body = self.rfile.read(int(self.headers["Content-Length"]))
        if self.path == "/v1/die":
            print("asked to die", flush=True)
            os.kill(os.getpid(), signal.SIGKILL)
        while OPTIONS.gate and not OPTIONS.gate.exists():
            time.sleep(0.01)
        self.answer(200, body)

    def answer(self, status: int, body: bytes) -> None:
        self.send_response(status)
        self.send_header("Content-Type", "application/json")
        self.send_header("Content-Length", str(len(body)))
        self.end_headers()
        self.wfile.write(body)


class Quiet(socketserver.ThreadingMixIn):
    """Says nothing of those who only looked whether it answers and hung up: tests look for its last words."""

    daemon_threads = True

    def handle_error(self, *_: object) -> None:
        pass


class Tcp(Quiet, socketserver.TCPServer):
    allow_reuse_address = True


class Unix(Quiet, socketserver.UnixStreamServer):
    pass


def start_child(mib: int) -> subprocess.Popen[bytes]:
    if not mib:
        script = "trap '' TERM; while :; do sleep 0.1; done"
        return subprocess.Popen(["/bin/sh", "-c", script])
    script = f"import time; held = b'x' * ({mib} << 20); print(flush=True); time.sleep(600)"
    child = subprocess.Popen([sys.executable, "-c", script], stdout=subprocess.PIPE)
    assert child.stdout is not None
    child.stdout.readline()
    return child


def take(size: int) -> bytes | Tensor:
    if OPTIONS.torch is None:
        return b"x" * size
    import torch

    return torch.ones(size, dtype=torch.uint8, device=OPTIONS.torch)


def main() -> int:
    if OPTIONS.exit is not None:
        print(f"no weights at {OPTIONS.port or OPTIONS.socket}", file=sys.stderr, flush=True)
        return int(OPTIONS.exit)
    taken = [take(OPTIONS.mib << 20)]
    if OPTIONS.child:
        child = start_child(OPTIONS.child_mib)
        Path(OPTIONS.child).write_text(str(child.pid))
    server = Unix(OPTIONS.socket, Handler) if OPTIONS.socket else Tcp(("127.0.0.1", OPTIONS.port), Handler)

    def end(*_: object) -> None:
        if not OPTIONS.ignore_term:
            threading.Thread(target=server.shutdown).start()

    signal.signal(signal.SIGTERM, end)
    print(f"{os.environ.get('GREETING', 'listening')} with {len(taken[0])} bytes", flush=True)

    def let_go(file: Path) -> None:
        while not file.exists():
            time.sleep(0.01)
        taken.clear()

    if OPTIONS.lets_go:
        threading.Thread(target=let_go, args=(OPTIONS.lets_go,), daemon=True).start()
    server.serve_forever()
    return 0


if __name__ == "__main__":
    sys.exit(main())
