"""Big wheels, fetched so that an interruption costs no more than what was on its way.

pip keeps the files that it has finished and starts anew the one that it has not, and torch's are up to a gigabyte each.
So pip is asked what it would install (its report has addresses and hashes), the big files among that are fetched here,
into parts that a later run goes on with, and pip is given them whole and checked. Whatever does not work out
here is left to pip, which then says what is wrong.

`scripts/environment.py` runs this file by its path before anything is installed: the standard library only, and nothing
of shoal.
"""

from __future__ import annotations

import hashlib
import json
import os
import re
import ssl
import subprocess
import sys
import tempfile
import time
import urllib.error
import urllib.parse
import urllib.request
from http.client import HTTPException, HTTPResponse
from pathlib import Path
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from collections.abc import Sequence

BIG_BYTES = 16 << 20
"""Smaller files are not worth it: pip fetches them as fast as it would ask for the rest."""
_PIECE_BYTES = 1 << 20
_TIMEOUT_S = 60.0
_PLAN_S_MAX = 600.0
_TRIES = 5
_PIP_MIN = (23, 3)  # those before download all there is in order to say what they would install
_NAME = re.compile(r"[A-Za-z0-9_.+!-]+\.whl")


class _IncompleteError(Exception):
    """A connection ended before the file did; what has come is kept."""


def folder() -> Path:
    """Give where wheels are kept: beside the demo's models, in the user's cache."""
    base = Path(os.environ.get("XDG_CACHE_HOME", ""))
    return (base if base.is_absolute() else Path.home() / ".cache") / "shoal" / "wheels"


def pip_is_old(python: str) -> bool:
    """Tell whether pip would download everything only to say what it is."""
    said = subprocess.run([python, "-m", "pip", "--version"], capture_output=True, text=True, timeout=60, check=True)
    return tuple(int(part) for part in re.findall(r"\d+", said.stdout)[:2]) < _PIP_MIN


def plan(python: str, arguments: Sequence[str]) -> list[tuple[str, str]]:
    """Ask pip which files it would download for ``pip install`` with these arguments.

    Returns
    -------
    list of (str, str)
        Address and SHA-256 of each; empty where pip cannot tell without downloading them.
    """
    pip = [python, "-m", "pip", "--disable-pip-version-check"]
    try:
        if pip_is_old(python):
            return []
        with tempfile.TemporaryDirectory() as scratch:
            report = Path(scratch) / "report.json"
            asked = ["install", "--dry-run", "--quiet", "--use-feature=fast-deps", "--report", str(report), *arguments]
            subprocess.run([*pip, *asked], capture_output=True, timeout=_PLAN_S_MAX, check=True)
            entries = json.loads(report.read_text("utf-8"))["install"]
        infos = [entry["download_info"] for entry in entries]
        found = [(info["url"], info.get("archive_info", {}).get("hashes", {}).get("sha256")) for info in infos]
        return [(url, digest) for url, digest in found if digest and url.startswith(("https://", "http://"))]
    except (OSError, subprocess.SubprocessError, ValueError, KeyError, TypeError):
        return []


def fetch_big(files: Sequence[tuple[str, str]], into: Path, big_bytes: int = BIG_BYTES) -> list[Path]:
    """Fetch the big ones of ``files``; what cannot be had here is left out, and its part kept.

    Parameters
    ----------
    files
        Address and SHA-256 of each.
    into
        The folder for wheels and parts.
    big_bytes
        How long a file has to be at least.
    """
    wheels = []
    for url, sha256 in files:
        name = urllib.parse.unquote(urllib.parse.urlsplit(url).path.rpartition("/")[2])
        if not _NAME.fullmatch(name):
            continue
        into.mkdir(parents=True, exist_ok=True)
        for number in range(_TRIES):
            if number:
                time.sleep(min(2.0**number, 10.0) / 4)
            try:
                wheel = _fetch(url, sha256, into / name, big_bytes)
            except urllib.error.HTTPError:
                break
            except (OSError, HTTPException, _IncompleteError) as error:
                _say(f"{name}: {error}" + ("; going on" if number + 1 < _TRIES else "; left to pip"))
                continue
            if wheel is not None:
                wheels.append(wheel)
            break
    return wheels


def _fetch(url: str, sha256: str, target: Path, big_bytes: int) -> Path | None:
    """Fetch one file, from where its part ends; None where that is not for us to do."""
    if target.is_file() and _sha256(target) == sha256:
        return target
    part = target.with_name(f"{target.name}.{sha256[:16]}.part")
    have = part.stat().st_size if part.is_file() else 0
    request = urllib.request.Request(url, headers={"Range": f"bytes={have}-", "Accept-Encoding": "identity"})  # noqa: S310
    try:
        response: HTTPResponse = urllib.request.urlopen(request, timeout=_TIMEOUT_S, context=_trust())  # noqa: S310
    except urllib.error.HTTPError as error:
        if error.code != 416:  # the part is whole, or more than that
            raise
        error.close()
    else:
        with response:
            match = re.fullmatch(r"bytes (\d+)-\d+/(\d+)", response.headers.get("Content-Range", ""))
            if response.status != 206 or match is None or int(match[1]) != have:
                part.unlink(missing_ok=True)
                return None  # it cannot be gone on with: no better than pip
            total = int(match[2])
            if total < big_bytes:
                return None
            at = f", from {have / 1e6:.0f} MB on" if have else ""
            _say(f"Downloading {target.name} ({total / 1e6:.0f} MB{at})")
            with part.open("ab", buffering=0) as file:
                while piece := response.read(_PIECE_BYTES):
                    file.write(piece)
        if (have := part.stat().st_size) < total:
            raise _IncompleteError(f"the connection ended after {have} of {total} bytes")
    if _sha256(part) != sha256:
        part.unlink()
        raise _IncompleteError("what came does not have the hash that the index names")
    part.replace(target)
    return target


def _trust() -> ssl.SSLContext:
    """Trust whom pip is told to trust."""
    named = (os.environ.get(name) for name in ("PIP_CERT", "REQUESTS_CA_BUNDLE"))
    return ssl.create_default_context(cafile=next((path for path in named if path and Path(path).is_file()), None))


def _sha256(path: Path) -> str:
    digest = hashlib.sha256()
    with path.open("rb") as handle:
        while piece := handle.read(_PIECE_BYTES):
            digest.update(piece)
    return digest.hexdigest()


def _say(text: str) -> None:
    sys.stdout.write(text + "\n")
    sys.stdout.flush()
