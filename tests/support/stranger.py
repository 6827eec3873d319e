"""Somebody else's process that takes memory of the device, outside of any lease."""

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


# By torch, as somebody's notebook would.
_TAKE_ON_GPU = """
import sys, torch
held = []
for line in sys.stdin:
    held.append(torch.empty(int(line), dtype=torch.uint8, device=sys.argv[1]))
    torch.cuda.synchronize()
    print("taken", flush=True)
"""


class Stranger:
    """A process of nobody the server knows."""

    def __init__(self, code: str, *arguments: str) -> None:
        command = [sys.executable, "-c", code, *arguments]
        self.process = subprocess.Popen(command, stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True)

    @classmethod
    def simulated(cls, runtime_dir: Path, capacity: int) -> Stranger:
        """Run one on the simulated device of a runtime directory."""
        return cls(_TAKE, str(capacity), str(runtime_dir))

    @classmethod
    def on_gpu(cls, device: str) -> Stranger:
        """Run one on a GPU, such as ``"cuda:0"``."""
        return cls(_TAKE_ON_GPU, device)

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
        self.process.communicate(timeout=20)


@contextmanager
def stranger(server: Server, capacity: int) -> Iterator[Stranger]:
    """Run one beside a server whose device has `capacity` bytes."""
    one = Stranger.simulated(server.runtime_dir, capacity)
    try:
        yield one
    finally:
        one.leave()
