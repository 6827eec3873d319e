"""The command line as Python starts it: the server's own, with its exit status."""

from __future__ import annotations

import subprocess
import sys

import pytest

import shoal


def run(*arguments: str) -> subprocess.CompletedProcess[str]:
    return subprocess.run(
        [sys.executable, "-m", "shoal", *arguments], check=False, capture_output=True, text=True, timeout=60
    )


def test_version() -> None:
    said = run("--version")
    assert said.returncode == 0
    assert said.stdout == f"shoal {shoal.__version__}\n"


def test_an_unknown_command_is_the_callers_mistake() -> None:
    said = run("swim")
    assert said.returncode == 2
    assert "swim" in said.stderr


def test_arguments_are_strings() -> None:
    with pytest.raises(TypeError):
        shoal.main(["shoal", 7])  # type: ignore[list-item]
