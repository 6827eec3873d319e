"""Look at the machine before anything is downloaded or built, and name the exact remedy for what is missing.

Run by the system's own python, which may be old: the standard library only, and nothing newer than Python 3.7 needs.
"""

from __future__ import annotations

import argparse
import json
import os
import platform
import re
import shutil
import subprocess
import sys
from pathlib import Path

ROOT = Path(__file__).resolve().parent.parent
PYTHON_MIN = (3, 11)
RUST_MIN = (1, 95)
GIB = 1 << 30
MEMORY_MIN = 4 * GIB
# Bytes on disk and bytes to download, measured on Debian 12 with Python 3.11.
TORCH_CUDA = (6.2 * GIB, 2594 << 20)
TORCH_OTHER = (1.0 * GIB, 300 << 20)
PACKAGES = (0.6 * GIB, 110 << 20)
BUILD = (1.6 * GIB, 25 << 20)
MODELS = {"chat": (0.5 * GIB, 93_000_000), "documents": (0.2 * GIB, 84_000_000), "code": (0.1 * GIB, 0)}
MODEL_S = {"chat": 40, "documents": 5, "code": 80}
RECIPES = {"chat": 1, "documents": 1, "code": 2}
BUILD_S = 420
INSTALL_S = 90
DOWNLOAD_BYTES_PER_S = 20_000_000


class Findings:
    """What was looked at, and what is wrong with it."""

    def __init__(self) -> None:
        self.problems = []  # type: list[tuple[str, str]]

    def check(self, good: bool, what: str, remedy: str) -> None:
        print("  {} {}".format("ok     " if good else "MISSING", what))
        if not good:
            self.problems.append((what, remedy))


def version_of(command: str) -> tuple[int, ...]:
    """Return a program's version, or () if it cannot be run."""
    try:
        said = subprocess.run([command, "--version"], stdout=subprocess.PIPE, timeout=60, check=False).stdout
    except (OSError, subprocess.TimeoutExpired):
        return ()
    match = re.search(r"(\d+)\.(\d+)(?:\.(\d+))?", said.decode(errors="replace"))
    return tuple(int(part) for part in match.groups() if part) if match else ()


def dotted(version: tuple[int, ...]) -> str:
    return ".".join(str(part) for part in version)


def check_python(findings: Findings) -> None:
    newer = [name for name in ("python3.14", "python3.13", "python3.12", "python3.11") if shutil.which(name)]
    remedy = "sudo apt-get install python3 python3-venv   # Debian 12, Ubuntu 24.04 or newer have Python >= 3.11"
    if newer:
        remedy = f"run `make PYTHON={newer[0]} ...`: that one is new enough"
    findings.check(
        sys.version_info >= PYTHON_MIN,
        f"python {platform.python_version()} (needs >= {dotted(PYTHON_MIN)})",
        remedy,
    )
    try:
        import ensurepip
        import venv

        complete = bool(ensurepip and venv)
    except ImportError:
        complete = False
    findings.check(
        complete, "python's venv module", "sudo apt-get install python{}.{}-venv".format(*sys.version_info[:2])
    )


def check_rust(findings: Findings) -> None:
    rustc, cargo = version_of("rustc"), version_of("cargo")
    if shutil.which("rustup"):
        remedy = "rustup update stable && rustup default stable"
    else:
        remedy = (
            "sudo apt-get install rustup && rustup default stable   # Debian 13, Ubuntu 24.04 or newer;\n"
            "            elsewhere install rustup as https://rustup.rs says. A rustc from apt is too old."
        )
    found = f"rustc {dotted(rustc)}" if rustc else "rustc"
    findings.check(rustc >= RUST_MIN, f"{found} (needs >= {dotted(RUST_MIN)})", remedy)
    if rustc:
        findings.check(bool(cargo), f"cargo {dotted(cargo)}", remedy)
    linker = shutil.which("cc") is not None
    findings.check(linker, "a C linker (cc)", "sudo apt-get install build-essential")


def memory_available() -> int:
    """Return bytes of memory this process may still use: the machine's, or its cgroup's if that is less."""
    available = 1 << 62
    try:
        text = Path("/proc/meminfo").read_text()
        available = int(re.search(r"MemAvailable:\s+(\d+) kB", text).group(1)) * 1024  # type: ignore[union-attr]
        limit = Path("/sys/fs/cgroup/memory.max").read_text().strip()
        used = int(Path("/sys/fs/cgroup/memory.current").read_text())
        if limit.isdigit():
            available = min(available, int(limit) - used)
    except (OSError, AttributeError, ValueError):
        pass
    return available


def models_dir() -> Path:
    base = Path(os.environ.get("XDG_CACHE_HOME", ""))
    return (base if base.is_absolute() else Path.home() / ".cache") / "shoal" / "models"


def existing(path: Path) -> Path:
    while not path.exists():
        path = path.parent
    return path


def is_prepared(name: str) -> bool:
    for manifest in models_dir().glob(f"demo/{name}-{RECIPES[name]}/shoal-demo.json"):
        try:
            sizes = json.loads(manifest.read_text())["files"]
            if all((manifest.parent / file).stat().st_size == size for file, size in sizes.items()):
                return True
        except (OSError, ValueError, KeyError):
            continue
    return False


def folder_with_torch() -> str | None:
    """Return the folder of wheels, among those that pip was told of, that has a torch to offer."""
    for place in os.environ.get("PIP_FIND_LINKS", "").split():
        if list(Path(place).glob("torch-*.whl")):
            return place
    return None


def check_torch_index(findings: Findings) -> None:
    place = os.environ.get("SHOAL_TORCH_INDEX")
    if place:
        findings.check(
            "://" in place or Path(place).is_dir(),
            f"SHOAL_TORCH_INDEX ({place})",
            "it is neither a folder nor an address: name a folder with torch's wheels, or an index such as\n"
            "            https://download.pytorch.org/whl/cpu",
        )


def pending(purpose: str) -> list[tuple[str, float, int, int]]:
    """Return what is still to do: a label, bytes on disk, bytes to download, seconds of work."""
    todo = []  # type: list[tuple[str, float, int, int]]
    venv = ROOT / ".venv"
    if not list(venv.glob("lib/python3*/site-packages/torch/version.py")):
        index = os.environ.get("SHOAL_TORCH_INDEX") or folder_with_torch()
        disk, download = TORCH_OTHER if index else TORCH_CUDA
        label = f"torch, from {index}" if index else "torch with its CUDA libraries"
        todo.append((label, disk, download, INSTALL_S))
    if not (venv / ".environment").exists():
        todo.append(("other Python packages", PACKAGES[0], PACKAGES[1], 30))
    target = Path(os.environ.get("CARGO_TARGET_DIR", str(ROOT / "target")))
    if not (target / "release").is_dir():
        todo.append(("Rust crates, and building them", BUILD[0], BUILD[1], BUILD_S))
    if purpose in ("demo", "serve"):
        for name, (disk, download) in MODELS.items():
            if not is_prepared(name):
                label = f"the {name} model" + ("" if download else " (trained here, nothing to download)")
                todo.append((label, disk, download, MODEL_S[name]))
    return todo


def check_room(findings: Findings, todo: list[tuple[str, float, int, int]]) -> None:
    needed = sum(disk for _, disk, _, _ in todo) + 0.5 * GIB
    places = {existing(ROOT): "here"}
    cache = existing(models_dir())
    if cache.stat().st_dev != ROOT.stat().st_dev:
        places[cache] = "in the cache"
    for place, word in places.items():
        free = shutil.disk_usage(str(place)).free
        findings.check(
            free >= needed,
            f"disk: {free / GIB:.1f} GiB free {word} (needs {needed / GIB:.1f})",
            f"make room in {place}, or clone to a larger disk; with SHOAL_TORCH_INDEX set to an index\n"
            "            that has CPU builds of torch, 5 GiB less are needed",
        )
    memory = memory_available()
    findings.check(
        memory >= MEMORY_MIN,
        f"memory: {memory / GIB:.1f} GiB available (needs {MEMORY_MIN / GIB:.0f})",
        "close other programs, or give this machine (or its container) more memory",
    )


def main() -> int:
    """Check and report; the exit status is 1 if something is missing."""
    parser = argparse.ArgumentParser(description="Check what this machine has.")
    parser.add_argument("purpose", choices=("demo", "serve", "test"))
    purpose = parser.parse_args().purpose
    findings = Findings()
    print(f"Checking this machine for `make {purpose}`:")
    findings.check(sys.platform == "linux", f"Linux on {platform.machine()}", "Shoal runs on Linux only")
    check_python(findings)
    check_rust(findings)
    check_torch_index(findings)
    todo = pending(purpose)
    check_room(findings, todo)
    if findings.problems:
        print("\nWhat to do:")
        for what, remedy in findings.problems:
            print(f"  {what}\n      ->    {remedy}")
        return 1
    if not todo:
        print("Everything is here already; nothing will be downloaded.")
        return 0
    print("\nTo do, once:")
    for label, _, download, _ in todo:
        print("  {:<52} {}".format(label, f"{download / 1e6:>5.0f} MB" if download else ""))
    download = sum(entry[2] for entry in todo)
    minutes = (download / DOWNLOAD_BYTES_PER_S + sum(entry[3] for entry in todo)) / 60
    print("  {:<52} {:>5.0f} MB".format("in all", download / 1e6))
    print(f"About {minutes:.0f} minutes on two cores at 20 MB/s. An interrupted run goes on where it stopped,")
    print("also within a big file if its server can send the rest alone; training begins anew.")
    if any(label.startswith("torch with") for label, *_ in todo):
        print("(SHOAL_TORCH_INDEX=URL takes torch from another index, for instance one with small CPU builds.)")
    print(flush=True)
    return 0


if __name__ == "__main__":
    sys.exit(main())
