"""Somebody else's process that takes memory of the simulated device, outside of any lease."""

from __future__ import annotations

import subprocess
import sys
from contextlib import contextmanager
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from collections.abc import Iterator
    from pathlib import Path

    from .server import Server

_TAKE = """
import sys
from shoal import MemoryManager

size, where = int(sys.argv[1]), sys.argv[2]
mem = MemoryManager("sim", device_capacity=size, device_budget=size, host_budget="16MiB", runtime_dir=where)
regions = []
for line in sys.stdin:
    region = mem.region("its own", int(line), kind="kv")
    region.commit(0, int(line))
    regions.append(region)
    print("taken", flush=True)
"""


class Stranger:
    """A process of nobody the server knows."""

    def __init__(self, runtime_dir: Path, capacity: int) -> None:
        command = [sys.executable, "-c", _TAKE, str(capacity), str(runtime_dir)]
        self.process = subprocess.Popen(command, stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True)

    def take(self, nbytes: int) -> None:
        """Take so many bytes more, for good."""
        assert self.process.stdin is not None
        assert self.process.stdout is not None
        self.process.stdin.write(f"{nbytes}\n")
        self.process.stdin.flush()
        assert self.process.stdout.readline() == "taken\n", "the device had no memory for it"

    def leave(self) -> None:
        """End it, and its memory with it."""
        self.process.kill()
        self.process.communicate(timeout=10)


@contextmanager
def stranger(server: Server, capacity: int) -> Iterator[Stranger]:
    """Run one beside a server whose device has `capacity` bytes."""
    one = Stranger(server.runtime_dir, capacity)
    try:
        yield one
    finally:
        one.leave()
