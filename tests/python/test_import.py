"""Importing the package needs neither torch nor CUDA, and starts nothing."""

from __future__ import annotations

import subprocess
import sys

CHECK = """
import sys

class Refuse:
    def find_spec(self, name, path=None, target=None):
        if name.split(".")[0] in {"torch", "numpy", "cuda", "transformers", "aiohttp"}:
            raise ImportError(f"{name} must not be needed")

sys.meta_path.insert(0, Refuse())
import os
threads_before = set(os.listdir("/proc/self/task"))
files_before = set(os.listdir("/proc/self/fd"))
import shoal
assert set(os.listdir("/proc/self/task")) == threads_before, "a thread was started"
assert set(os.listdir("/proc/self/fd")) == files_before, "a descriptor was opened"
assert "libcuda" not in open("/proc/self/maps").read(), "the driver was loaded"
missing = [name for name in shoal.__all__ if not hasattr(shoal, name)]
assert not missing, missing
assert "asyncio" not in sys.modules
print(shoal.__version__)
"""


def test_import_needs_no_torch_and_starts_nothing() -> None:
    said = subprocess.run([sys.executable, "-I", "-c", CHECK], check=False, capture_output=True, text=True, timeout=60)
    assert said.returncode == 0, said.stderr
    assert said.stdout.strip() == "0.1.0"
