"""Hold `_native.pyi` against the module it describes, with mypy's stubtest."""

from __future__ import annotations

import subprocess
import sys
from pathlib import Path

ROOT = Path(__file__).resolve().parent.parent
ALLOWLIST = ROOT / "python" / "shoal" / "_native.stubtest-allowlist"


def main() -> int:
    """Run stubtest; the exit status is its own."""
    command = [sys.executable, "-m", "mypy.stubtest", "shoal._native", "--mypy-config-file", "pyproject.toml"]
    if ALLOWLIST.is_file():
        command += ["--allowlist", str(ALLOWLIST), "--ignore-unused-allowlist"]
    return subprocess.run(command, check=False, cwd=ROOT).returncode


if __name__ == "__main__":
    sys.exit(main())
