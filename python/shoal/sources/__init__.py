"""From the name of a model to a directory with its files.

``resolve`` is the one call. A source is a directory, a hub id (``org/name`` or ``org/name@revision``), or one of the
demo's own models (``demo:chat``, ``demo:documents``, ``demo:code``). What comes back is always a local directory with
``config.json`` and safetensors files whose headers fit their sizes. Neither torch nor transformers is imported here.
"""

from __future__ import annotations

import os
import re
from pathlib import Path

from shoal.sources.cache import Progress, cache_dir, no_progress
from shoal.sources.directory import check_directory
from shoal.sources.errors import (
    SourceCorruptError,
    SourceError,
    SourceMissingError,
    SourceUnauthorizedError,
    SourceUnreachableError,
    SourceUnsupportedError,
)
from shoal.sources.hub import resolve_hub

__all__ = [
    "Progress",
    "SourceCorruptError",
    "SourceError",
    "SourceMissingError",
    "SourceUnauthorizedError",
    "SourceUnreachableError",
    "SourceUnsupportedError",
    "cache_dir",
    "check_directory",
    "resolve",
]

_PART = r"[A-Za-z0-9][A-Za-z0-9._-]{0,95}"
_HUB_ID = re.compile(rf"({_PART}/{_PART})(?:@([^@\s]+))?")
_PATH_STARTS = ("/", "./", "../", "~")


def resolve(
    source: str,
    revision: str | None = None,
    progress: Progress | None = None,
    *,
    offline: bool | None = None,
) -> Path:
    """Make the files of a model ready and return the directory that holds them.

    Parameters
    ----------
    source
        A directory, a hub id ``org/name[@revision]``, or ``demo:NAME``. A name that is both a directory here and a hub
        id is the directory.
    revision
        A branch, tag or commit of the hub; ``main`` if neither this nor the id says one. A commit never asks the
        hub again once it is in the cache.
    progress
        Called with a phase, bytes done and bytes in all, a few times a second.
    offline
        Take only what is in the cache; by default what ``HF_HUB_OFFLINE`` says.

    Raises
    ------
    SourceError
        With a ``code`` and a sentence that says what would be right; one subclass per reason.

    Notes
    -----
    ``HF_ENDPOINT``, ``HF_TOKEN`` (or the file that ``HF_TOKEN_PATH`` names) and ``HF_HUB_OFFLINE`` are honoured.
    A token is sent only to the hub itself, over TLS or to this machine.
    """
    report = progress or no_progress
    if source.startswith("demo:"):
        return _demo(source)
    path = Path(source).expanduser()
    if source.startswith(_PATH_STARTS) or path.is_dir():
        if revision is not None:
            raise SourceUnsupportedError(source, f"{source} is a directory, so it has no revision {revision!r}")
        return check_directory(path.absolute(), source)
    match = _HUB_ID.fullmatch(source)
    if match is None:
        raise SourceMissingError(
            source, f"{source!r} is neither a directory here nor a hub id of the form org/name or org/name@revision"
        )
    repo, own_revision = match.groups()
    if revision is not None and own_revision is not None and revision != own_revision:
        raise SourceUnsupportedError(
            source, f"{source} names one revision and the configuration another ({revision}); keep one"
        )
    if offline is None:
        offline = os.environ.get("HF_HUB_OFFLINE", "").strip().lower() in ("1", "true", "yes", "on")
    return resolve_hub(repo, revision or own_revision, source, report, offline=offline)


def _demo(source: str) -> Path:
    from shoal.demo.shelf import MODELS, prepared_dir

    name = source.removeprefix("demo:")
    if name not in MODELS:
        raise SourceMissingError(source, f"the demo has no model {name!r}; it has {', '.join(MODELS)}")
    path = prepared_dir(name)
    if not path.is_dir():
        raise SourceMissingError(
            source, f"the demo's model {name!r} is not prepared yet; run `python -m shoal.demo prepare {name}`"
        )
    return check_directory(path, source)
