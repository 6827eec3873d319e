"""Unpacks what `tests/gpu/pack_vllm.sh` packed into a folder for `PYTHONPATH`.

    python3 -m tests.gpu.vllm_site SITE PACK...

Of `vllm_more.tar.xz` only what cannot be imported yet: a second copy of what this Python has would hide the first.
"""

from __future__ import annotations

import importlib.util
import shutil
import sys
import tarfile
import tempfile
from pathlib import Path

APART = "vllm_more"


def modules(package: Path) -> set[str]:
    """Name what an unpacked wheel lets one import."""
    found = set()
    for entry in package.iterdir():
        if entry.is_dir() and not entry.name.endswith((".dist-info", ".data", ".libs")):
            found.add(entry.name)
        elif entry.suffix in {".py", ".so"}:
            found.add(entry.name.split(".")[0])
    return found


def add_missing(site: Path, unpacked: Path) -> list[str]:
    """Copy the packages into `site` that have something which nobody can import yet; gives their names."""
    added = []
    for package in sorted(unpacked.iterdir()):
        if any(importlib.util.find_spec(name) is None for name in modules(package)):
            shutil.copytree(package, site, dirs_exist_ok=True)
            added.append(package.name)
    return added


def main(site: Path, packs: list[Path]) -> None:
    """Unpack all packs."""
    site.mkdir(parents=True, exist_ok=True)
    # The folder of the packages apart must not be where modules are looked for: each would be found there.
    sys.path.insert(0, str(site))
    for pack in sorted(packs, key=lambda pack: pack.name.startswith(APART)):
        with tarfile.open(pack) as archive:
            if not pack.name.startswith(APART):
                archive.extractall(site, filter="data")
                continue
            with tempfile.TemporaryDirectory() as folder:
                archive.extractall(folder, filter="data")
                print("added:", *add_missing(site, Path(folder)))


if __name__ == "__main__":
    if len(sys.argv) < 3:
        sys.exit("usage: python3 -m tests.gpu.vllm_site SITE PACK...")
    main(Path(sys.argv[1]), [Path(pack) for pack in sys.argv[2:]])
