"""Build the wheel that users get, install it where nothing else is, and use it there.

The clean environment has no torch and no network, so this is also the proof that importing Shoal needs neither.
"""

from __future__ import annotations

import shutil
import subprocess
import sys
import zipfile
from pathlib import Path
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from collections.abc import Callable

ROOT = Path(__file__).resolve().parent.parent
DIST = ROOT / "dist"
CLEAN = ROOT / ".shoal" / "wheel-venv"
PYTHON = CLEAN / "bin" / "python"
SIZE_MAX = 40 << 20

ROUND_TRIP = """
import sys, shoal
assert "torch" not in sys.modules
memory = shoal.MemoryManager(device="sim", device_budget="8MiB", host_budget="16MiB")
first = memory.region("first", 6 << 20, kind="weights", backing="keep")
second = memory.region("second", 6 << 20, kind="weights", backing="keep")
text = bytes(range(256)) * ((6 << 20) // 256)
for region in (first, second):
    region.stage(0, text if region is first else text[::-1])
    region.seal()
address = first.address
first.wake()
first.sleep()
second.wake()
assert bytes(second.buffer(0, 6 << 20)) == text[::-1]
second.sleep()
first.wake()
assert first.address == address and bytes(first.buffer(0, 6 << 20)) == text
print("two regions of 6 MiB took turns in 8 MiB")
"""


def main() -> int:
    """Build, install, try; the exit status is 1 if anything failed."""
    steps: list[tuple[str, Callable[[], None]]] = [
        ("the wheel is a manylinux wheel with one library", check_contents),
        ("it installs without network", install),
        ("it imports without torch", lambda: ask("-c", "import shoal, sys; assert 'torch' not in sys.modules")),
        ("shoal --version", lambda: run(str(CLEAN / "bin" / "shoal"), "--version")),
        ("python -m shoal --version", lambda: ask("-m", "shoal", "--version")),
        ("memory of a simulated device", lambda: ask("-c", ROUND_TRIP)),
    ]
    shutil.rmtree(DIST, ignore_errors=True)
    run("maturin", "build", "--release", "--locked", "--quiet", "--out", str(DIST))
    failed = 0
    for name, step in steps:
        try:
            step()
        except (AssertionError, subprocess.CalledProcessError) as error:
            failed += 1
            print(f"FAILED {name}: {error}")
        else:
            print(f"ok     {name}")
    print(f"{len(steps) - failed} passed, {failed} failed", flush=True)
    return 1 if failed else 0


def wheel() -> Path:
    """Return the one wheel there is."""
    wheels = list(DIST.glob("*.whl"))
    assert len(wheels) == 1, f"{len(wheels)} wheels in {DIST}"
    return wheels[0]


def check_contents() -> None:
    """Check the wheel's tag, its members and its size."""
    path = wheel()
    assert "-abi3-manylinux_" in path.name, f"{path.name} is not an abi3 manylinux wheel"
    with zipfile.ZipFile(path) as archive:
        names = archive.namelist()
    libraries = [name for name in names if name.endswith(".so")]
    assert libraries == ["shoal/_native.abi3.so"], libraries
    for needed in ("shoal/py.typed", "shoal/_native.pyi", "shoal/worker/__main__.py", "shoal/demo/__main__.py"):
        assert needed in names, f"{needed} is not in the wheel"
    assert not [name for name in names if "tests" in name or "__pycache__" in name]
    assert path.stat().st_size < SIZE_MAX, f"{path.name} has grown to {path.stat().st_size >> 20} MiB"
    print(f"       {path.name}, {path.stat().st_size / 1e6:.1f} MB")


def install() -> None:
    """Install the wheel into a new environment."""
    run(sys.executable, "-m", "venv", "--clear", str(CLEAN))
    ask("-m", "pip", "install", "--quiet", "--disable-pip-version-check", "--no-index", str(wheel()))


def ask(*arguments: str) -> None:
    """Run the clean environment's Python, outside the repository so that nothing of it is imported by accident."""
    run(str(PYTHON), "-I", *arguments, cwd=CLEAN)


def run(*command: str, cwd: Path = ROOT) -> None:
    """Run a command; raise if it fails."""
    subprocess.run(command, check=True, cwd=cwd, timeout=1800)


if __name__ == "__main__":
    sys.exit(main())
