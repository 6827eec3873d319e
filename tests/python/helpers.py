"""What several tests need."""

from __future__ import annotations

import random
import subprocess
import sys
import textwrap
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from shoal import Region

PAGE = 2 << 20


def pattern(nbytes: int, seed: int = 7) -> bytes:
    """Bytes that no shift or swap of themselves equals."""
    return random.Random(seed).randbytes(nbytes)


def read(region: Region, offset: int = 0, nbytes: int | None = None) -> bytes:
    """Copy bytes out of a region; under a guard."""
    return bytes(memoryview(region.buffer(offset, nbytes)))


def run_python(code: str, *arguments: str, timeout_s: float = 120) -> subprocess.CompletedProcess[str]:
    """Run code in a process of its own."""
    return subprocess.run(
        [sys.executable, "-c", textwrap.dedent(code), *arguments],
        check=False,
        capture_output=True,
        text=True,
        timeout=timeout_s,
    )
