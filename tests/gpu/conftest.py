"""What the GPU's Python tests share: they run where there is a GPU, and are never passed over where one is required."""

from __future__ import annotations

import os
import subprocess
import sys
import textwrap
from typing import TYPE_CHECKING

import pytest

from shoal.memory import machine

if TYPE_CHECKING:
    from collections.abc import Callable

    from shoal import MemoryManager

IS_REQUIRED = bool(os.environ.get("SHOAL_REQUIRE_GPU"))


def pytest_collection_modifyitems(items: list[pytest.Item]) -> None:
    if machine.has_nvidia_device() or IS_REQUIRED:
        return
    for item in items:
        if "tests/gpu" in item.path.as_posix():
            item.add_marker(pytest.mark.skip(reason="there is no NVIDIA device here"))


@pytest.fixture
def mem() -> MemoryManager:
    from shoal import MemoryManager

    return MemoryManager("cuda:0", device_budget="4GiB", host_budget="4GiB")


@pytest.fixture
def run_python() -> Callable[..., subprocess.CompletedProcess[str]]:
    """Run code in a process of its own."""

    def run(code: str, *arguments: str, timeout_s: float = 120) -> subprocess.CompletedProcess[str]:
        return subprocess.run(
            [sys.executable, "-X", "faulthandler", "-c", textwrap.dedent(code), *arguments],
            check=False, capture_output=True, text=True, timeout=timeout_s,
        )  # fmt: skip

    return run
