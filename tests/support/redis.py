"""A Redis in this process, as far as a remote tier speaks to one: over a real socket, away or slow as it is told."""

from __future__ import annotations

import socketserver
import threading
import time
from contextlib import contextmanager
from typing import TYPE_CHECKING, BinaryIO

if TYPE_CHECKING:
    from collections.abc import Iterator


class FakeRedis(socketserver.ThreadingTCPServer):
    """Keeps what it is given, for whoever knows the password."""

    allow_reuse_address = True
    daemon_threads = True

    def __init__(self, password: str) -> None:
        super().__init__(("127.0.0.1", 0), _Client)
        self.password = password
        self.objects: dict[bytes, bytes] = {}
        self.asked: list[str] = []
        self.is_away = False
        self.read_s = 0.0  # how long each read takes
        self.reads: list[tuple[float, float]] = []  # when each began and ended, as `time.monotonic` says

    @property
    def address(self) -> str:
        """Where it is."""
        return f"redis://127.0.0.1:{self.server_address[1]}"


class _Client(socketserver.StreamRequestHandler):
    server: FakeRedis

    def handle(self) -> None:
        """Answer one connection."""
        has_login = False
        while not self.server.is_away and (words := _command(self.rfile)):
            verb, *rest = words
            self.server.asked.append(verb.decode())
            if self.server.is_away:
                return
            if verb == b"AUTH":
                has_login = rest[-1].decode() == self.server.password
                self.wfile.write(b"+OK\r\n" if has_login else b"-WRONGPASS no\r\n")
            elif not has_login:
                self.wfile.write(b"-NOAUTH Authentication required.\r\n")
            else:
                self.wfile.write(self._answer(verb, rest))

    def _answer(self, verb: bytes, words: list[bytes]) -> bytes:
        objects = self.server.objects
        match verb, words:
            case b"SET", [name, content]:
                objects[name] = content
                return b"+OK\r\n"
            case b"GET", [name] if name in objects:
                begun = time.monotonic()
                time.sleep(self.server.read_s)
                self.server.reads.append((begun, time.monotonic()))
                return b"$%d\r\n%s\r\n" % (len(objects[name]), objects[name])
            case b"GET", [_]:
                return b"$-1\r\n"
            case b"EXISTS", [name]:
                return b":%d\r\n" % (name in objects)
            case b"DEL", [name]:
                return b":%d\r\n" % (objects.pop(name, None) is not None)
        return b"-ERR unknown command\r\n"


def _command(file: BinaryIO) -> list[bytes]:
    """Read one; empty at the end."""
    line = file.readline()
    if not line.startswith(b"*"):
        return []
    words = []
    for _ in range(int(line[1:])):
        length = int(file.readline()[1:])
        words.append(file.read(length))
        file.read(2)
    return words


@contextmanager
def redis(password: str = "a secret") -> Iterator[FakeRedis]:
    """Run one until the block ends."""
    with FakeRedis(password) as server:
        thread = threading.Thread(target=server.serve_forever, args=(0.05,), daemon=True)
        thread.start()
        try:
            yield server
        finally:
            server.is_away = True
            server.shutdown()
            thread.join(10)
