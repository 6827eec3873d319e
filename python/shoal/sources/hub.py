"""Models from a hub that speaks the Hugging Face protocol: ask what there is, take what is needed, check every byte.

A revision is first resolved to a commit, and everything after that speaks of the commit, so that a branch that moves
meanwhile cannot mix two versions. Only safetensors weights and the texts a tokenizer needs are taken; nothing that a
program could run. A file is fetched beside its final name, goes on where it stopped, and counts only when its hash is
the one the hub gave.
"""

from __future__ import annotations

import hashlib
import json
import logging
import os
import re
import shutil
import tempfile
import time
import urllib.error
from dataclasses import dataclass
from http.client import IncompleteRead
from pathlib import Path
from typing import TYPE_CHECKING, Any
from urllib.parse import quote

from shoal.sources import transport
from shoal.sources.cache import Progress, cache_dir, locked, make_directory, publish
from shoal.sources.directory import (
    INDEX,
    check_directory,
    choose_weights,
    index_names,
    no_safetensors,
)
from shoal.sources.errors import (
    SourceCorruptError,
    SourceError,
    SourceMissingError,
    SourceUnauthorizedError,
    SourceUnreachableError,
    SourceUnsupportedError,
)

if TYPE_CHECKING:
    from collections.abc import Callable

_LOG = logging.getLogger("shoal.sources")
_COMMIT = re.compile(r"[0-9a-f]{40}")
_TEXT_SUFFIXES = (".json", ".txt", ".model", ".jinja", ".tiktoken")
_TEXT_BYTES_MAX = 64 << 20
_MODULE_CONFIG = re.compile(r"\d+_[A-Za-z]+/config\.json")
_LISTING_BYTES_MAX = 32 << 20
_FAILURES_MAX = 5
_PROGRESS_EVERY_S = 0.2
_READ_BYTES = 1 << 20
_BLOCK_SLACK_BYTES = 64 << 20


@dataclass(frozen=True)
class HubFile:
    """One file of a commit, with the hash it must have."""

    name: str
    size: int
    sha256: str | None
    git_sha1: str | None


@dataclass(frozen=True)
class Listing:
    """What a commit holds."""

    commit: str
    files: dict[str, HubFile]


def resolve_hub(repo: str, revision: str | None, source: str, progress: Progress, *, offline: bool) -> Path:
    """Return the directory that holds ``repo`` at ``revision``, downloading what is missing."""
    wanted = revision or "main"
    root = cache_dir() / "hub" / repo.replace("/", "--")
    if offline or _COMMIT.fullmatch(wanted):
        cached = _cached(root, repo, wanted, source)
        if cached is not None:
            return cached
    if offline:
        raise SourceMissingError(
            source,
            f"{repo} at {wanted} is not in the cache ({root}), and HF_HUB_OFFLINE forbids asking for it; "
            "run once without it, or name a directory",
        )
    hub = Hub(repo, source)
    try:
        listing = hub.listing(wanted)
    except SourceUnreachableError as error:
        cached = _cached(root, repo, wanted, source)
        if cached is None:
            raise
        _LOG.warning("%s; taking what is in the cache: %s", error, cached)
        return cached
    target = root / listing.commit
    if not target.is_dir():
        shared = _hugging_face_snapshot(repo, listing.commit)
        if shared is not None and _holds(shared, listing):
            return check_directory(shared, source)
        with locked(target, source, progress):
            if not target.is_dir():
                _download(hub, listing, target, progress)
    _remember(root, wanted, listing.commit)
    return check_directory(target, source)


class Hub:
    """One model on one hub, with the token there is for it."""

    def __init__(self, repo: str, source: str) -> None:
        self.repo = repo
        self.source = source
        self.endpoint = (os.environ.get("HF_ENDPOINT") or "https://huggingface.co").rstrip("/")
        if not self.endpoint.startswith(("https://", "http://")):
            raise SourceUnsupportedError(
                source, f"HF_ENDPOINT is {self.endpoint!r}; it must begin with https:// or http://"
            )
        self._token = _token()
        self._token_withheld = self._token is not None and not transport.is_private_channel(self.endpoint)

    def listing(self, revision: str) -> Listing:
        """Ask which commit ``revision`` is and what it holds."""
        url = f"{self.endpoint}/api/models/{quote(self.repo)}/revision/{quote(revision, safe='')}?blobs=true"
        failures = 0
        while True:
            try:
                with transport.get(url, self._headers()) as response:
                    return _parse_listing(response.read(_LISTING_BYTES_MAX), url, self.source)
            except urllib.error.HTTPError as error:
                failures = self._failed(error, failures, f"{self.repo} at {revision}")
            except transport.NETWORK_ERRORS as error:
                failures = self._failed(error, failures, f"{self.repo} at {revision}")

    def fetch(self, file: HubFile, commit: str, target: Path, report: Callable[[int], None]) -> None:
        """Bring ``file`` to ``target``; whatever of it is there already is not fetched again."""
        part = target.with_name(target.name + ".part")
        make_directory(target.parent, self.source)
        for attempt in range(2):
            self._fetch_bytes(file, commit, part, report)
            if _matches(part, file):
                part.rename(target)
                return
            part.unlink()
            if attempt == 0:
                _LOG.warning("%s of %s arrived with another hash than the hub gave; once more", file.name, self.repo)
        raise SourceCorruptError(
            self.source, f"{file.name} of {self.repo} twice arrived with another hash than the hub gave"
        )

    def _fetch_bytes(self, file: HubFile, commit: str, part: Path, report: Callable[[int], None]) -> None:
        url = f"{self.endpoint}/{quote(self.repo)}/resolve/{commit}/{quote(file.name)}"
        failures = 0
        part.touch()
        while (have := part.stat().st_size) != file.size:
            if have > file.size:
                part.write_bytes(b"")
                continue
            try:
                self._append(url, part, have, file.size, report)
            except urllib.error.HTTPError as error:
                if error.code == 416:
                    part.write_bytes(b"")
                failures = self._failed(error, failures, file.name)
            except transport.NETWORK_ERRORS as error:
                if part.stat().st_size > have:
                    failures = 0
                failures = self._failed(error, failures, file.name)

    def _append(self, url: str, part: Path, have: int, size: int, report: Callable[[int], None]) -> None:
        headers = self._headers() | {"Accept-Encoding": "identity"}
        if have:
            headers["Range"] = f"bytes={have}-"
        with transport.get(url, headers) as response:
            # A server that does not know ranges answers 200 with everything.
            start = have if response.status == 206 else 0
            with part.open("r+b") as out:
                out.truncate(start)
                out.seek(start)
                while start < size and (piece := response.read(min(_READ_BYTES, size - start))):
                    out.write(piece)
                    start += len(piece)
                    report(start)
        if start < size:
            raise IncompleteRead(b"", size - start)

    def _failed(self, error: Exception, failures: int, what: str) -> int:
        """Wait before another try and return the count of failures, or raise what the failure means."""
        pause_s = min(0.25 * 2**failures, 8.0)
        if isinstance(error, urllib.error.HTTPError):
            with error:
                if error.code not in (408, 416, 429) and error.code < 500:
                    raise self._refused(error, what) from error
                after = error.headers.get("Retry-After", "")
                if after.isdigit():
                    pause_s = min(float(after), 30.0)
        reason = getattr(error, "reason", None) or error
        if failures + 1 >= _FAILURES_MAX:
            raise SourceUnreachableError(
                self.source,
                f"{self.endpoint} did not give {what} in {_FAILURES_MAX} tries ({reason}); "
                "what has arrived is kept, so a later run goes on from there",
            ) from error
        time.sleep(pause_s)
        return failures + 1

    def _refused(self, error: urllib.error.HTTPError, what: str) -> SourceError:
        kind = error.headers.get("X-Error-Code", "")
        page = f"{self.endpoint}/{self.repo}"
        if kind == "RevisionNotFound":
            return SourceMissingError(self.source, f"{self.repo} has no such revision: {what.rpartition(' at ')[2]}")
        if kind == "GatedRepo" or error.code == 403:
            return SourceUnauthorizedError(
                self.source, f"{self.repo} is gated: ask for access at {page}, then set HF_TOKEN to your token"
            )
        if error.code == 401:
            if self._token_withheld:
                hint = f"the token was not sent, because {self.endpoint} is neither https nor this machine"
            elif self._token:
                hint = "the token in use may not read it, or has expired"
            else:
                hint = "if it is private, set HF_TOKEN"
            return SourceUnauthorizedError(self.source, f"{page} does not exist or is not for everyone: {hint}")
        if error.code == 404:
            return SourceMissingError(self.source, f"{self.endpoint} has no {what}")
        return SourceUnreachableError(self.source, f"{self.endpoint} answered {error.code} for {what}")

    def _headers(self) -> dict[str, str]:
        headers = {"User-Agent": "shoal"}
        if self._token and not self._token_withheld:
            headers["Authorization"] = f"Bearer {self._token}"
        return headers


def _download(hub: Hub, listing: Listing, target: Path, progress: Progress) -> None:
    partial = target.with_name(target.name + ".partial")
    make_directory(partial, hub.source)
    files = [file for file in listing.files.values() if _is_text(file)]
    names = list(listing.files)
    if INDEX in listing.files:
        index_path = partial / INDEX
        if not index_path.is_file():
            hub.fetch(listing.files[INDEX], listing.commit, index_path, lambda _done: None)
        weights = index_names(json.loads(index_path.read_bytes()), f"{INDEX} of {hub.repo}", hub.source)
        if missing := [name for name in weights if name not in listing.files]:
            raise SourceCorruptError(
                hub.source, f"{INDEX} of {hub.repo} names {missing[0]}, which the hub does not have"
            )
    else:
        weights = choose_weights([name for name in names if "/" not in name])
    if not weights:
        raise no_safetensors(hub.source, f"{hub.endpoint}/{hub.repo}", names)
    files += [listing.files[name] for name in weights]
    total = sum(file.size for file in files)
    done = 0
    last = 0.0

    def report(of_file: int) -> None:
        nonlocal last
        if (now := time.monotonic()) - last >= _PROGRESS_EVERY_S:
            last = now
            progress("downloading", done + of_file, total)

    _check_space(partial, total, hub)
    for file in files:
        path = partial / file.name
        if not (path.is_file() and path.stat().st_size == file.size):
            hub.fetch(file, listing.commit, path, report)
        done += file.size
    progress("downloading", total, total)
    # What an earlier run left that this one did not ask for.
    wanted = {file.name for file in files}
    for path in partial.rglob("*"):
        if path.is_file() and str(path.relative_to(partial)) not in wanted:
            path.unlink()
    check_directory(partial, hub.source)
    publish(partial, target)


def _check_space(partial: Path, total: int, hub: Hub) -> None:
    have = sum(path.stat().st_size for path in partial.rglob("*") if path.is_file())
    need = max(total - have, 0) + _BLOCK_SLACK_BYTES
    free = shutil.disk_usage(partial).free
    if free < need:
        raise SourceError(
            hub.source,
            f"{hub.repo} needs {need >> 20} MiB more in {partial.parent}, where {free >> 20} MiB are free; "
            "make room, or set XDG_CACHE_HOME to another disk",
        )


def _is_text(file: HubFile) -> bool:
    """Tell whether a file is configuration or vocabulary: data that a tokenizer or a config reads, never code."""
    if _MODULE_CONFIG.fullmatch(file.name):
        return True
    if "/" in file.name:
        return file.name.startswith("additional_chat_templates/") and file.name.endswith(".jinja")
    if file.name.endswith(".index.json") and file.name != INDEX:
        return False
    return file.size <= _TEXT_BYTES_MAX and (file.name.endswith(_TEXT_SUFFIXES) or file.name.startswith("LICENSE"))


def _parse_listing(body: bytes, url: str, source: str) -> Listing:
    try:
        answer: Any = json.loads(body)
        commit = answer["sha"]
        files = {}
        for entry in answer["siblings"]:
            name, lfs = entry["rfilename"], entry.get("lfs") or {}
            if name.startswith(("/", ".")) or ".." in name.split("/") or "\\" in name:
                continue
            size = lfs.get("size", entry.get("size"))
            if isinstance(size, int) and size >= 0:
                files[name] = HubFile(name, size, lfs.get("sha256"), None if lfs else entry.get("blobId"))
        if not _COMMIT.fullmatch(commit):
            raise ValueError(f"{commit!r} is not a commit")
    except (ValueError, KeyError, TypeError, AttributeError) as error:
        raise SourceUnreachableError(
            source, f"{url} answered something that is not a model listing: {error}"
        ) from error
    return Listing(commit, files)


def _matches(path: Path, file: HubFile) -> bool:
    # Large files go by the hash of their bytes, small ones by git's hash, which the hub gives for them.
    if file.sha256 is None and file.git_sha1 is None:
        return path.stat().st_size == file.size
    digest = hashlib.sha256() if file.sha256 else hashlib.sha1(b"blob %d\0" % file.size, usedforsecurity=False)
    with path.open("rb") as handle:
        while piece := handle.read(_READ_BYTES):
            digest.update(piece)
    return digest.hexdigest() == (file.sha256 or file.git_sha1)


def _token() -> str | None:
    if token := os.environ.get("HF_TOKEN", "").strip():
        return token
    path = os.environ.get("HF_TOKEN_PATH") or str(_hugging_face_home() / "token")
    try:
        return Path(path).read_text("utf-8").strip() or None
    except OSError:
        return None


def _hugging_face_home() -> Path:
    if home := os.environ.get("HF_HOME"):
        return Path(home).expanduser()
    return Path(os.environ.get("XDG_CACHE_HOME") or Path.home() / ".cache") / "huggingface"


def _hugging_face_snapshot(repo: str, revision: str) -> Path | None:
    """Return where other programs of this user have put that very model, if they have."""
    cache = os.environ.get("HF_HUB_CACHE") or str(_hugging_face_home() / "hub")
    root = Path(cache).expanduser() / ("models--" + repo.replace("/", "--"))
    if not _COMMIT.fullmatch(revision):
        try:
            revision = (root / "refs" / revision).read_text("utf-8").strip()
        except (OSError, ValueError):
            return None
    snapshot = root / "snapshots" / revision
    return snapshot if snapshot.is_dir() else None


def _holds(directory: Path, listing: Listing) -> bool:
    """Tell whether ``directory`` has every file we would take, at its full size."""
    try:
        weights = choose_weights([name for name in listing.files if "/" not in name])
        if INDEX in listing.files:
            weights = index_names(json.loads((directory / INDEX).read_bytes()), INDEX, "")
        needed = [file for file in listing.files.values() if _is_text(file)]
        needed += [listing.files[name] for name in weights]
        return bool(weights) and all((directory / file.name).stat().st_size == file.size for file in needed)
    except (OSError, ValueError, KeyError, SourceError):
        return False


def _reference(root: Path, revision: str) -> Path:
    return root / "refs" / quote(revision, safe="")


def _remember(root: Path, revision: str, commit: str) -> None:
    if revision == commit:
        return
    path = _reference(root, revision)
    make_directory(path.parent, str(root))
    with tempfile.NamedTemporaryFile("w", dir=path.parent, delete=False, encoding="utf-8") as temporary:
        temporary.write(commit)
    Path(temporary.name).rename(path)


def _cached(root: Path, repo: str, revision: str, source: str) -> Path | None:
    commit = revision
    if not _COMMIT.fullmatch(revision):
        try:
            commit = _reference(root, revision).read_text("utf-8").strip()
        except OSError:
            commit = ""
    if commit and (root / commit).is_dir():
        return check_directory(root / commit, source)
    shared = _hugging_face_snapshot(repo, revision)
    try:
        return check_directory(shared, source) if shared is not None else None
    except SourceError:
        # Someone else's half-finished download is no copy.
        return None
