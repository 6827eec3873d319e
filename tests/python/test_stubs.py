"""The hand-written stub says what the native module has, and what is public says what it does."""

from __future__ import annotations

import os
import subprocess
import sys
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parents[2]


def test_the_stub_is_true() -> None:
    pytest.importorskip("mypy")
    said = subprocess.run(
        [sys.executable, str(ROOT / "scripts" / "check_stubs.py")],
        check=False, capture_output=True, text=True, timeout=300, env={**os.environ, "MYPYPATH": str(ROOT / "python")},
    )  # fmt: skip
    assert said.returncode == 0, said.stdout + said.stderr


def test_what_is_public_is_documented() -> None:
    import inspect

    import shoal
    from shoal import errors, kv, memory, testing

    missing = []
    for module in (shoal, errors, kv, memory, testing):
        for name in module.__all__:
            thing = getattr(module, name)
            if not inspect.isclass(thing) and not inspect.isfunction(thing):
                continue
            if thing.__module__ == "shoal._native":
                continue
            if not inspect.getdoc(thing):
                missing.append(name)
            for key, member in vars(thing).items() if inspect.isclass(thing) else ():
                if key.startswith("_") or not inspect.isfunction(member):
                    continue
                doc = inspect.getdoc(member) or ""
                if "Raises\n------" not in doc:
                    missing.append(f"{name}.{key} says not what it raises")
    assert not missing, missing
