"""`shoal simulate` as people call it: the same answer each time, traces, and policies in Python."""

from __future__ import annotations

import json
import subprocess
import sys
from typing import TYPE_CHECKING, Any

import pytest

if TYPE_CHECKING:
    from pathlib import Path

SHELF = """
[server]
device_budget = "20GiB"
[[model]]
name = "chat"
source = "org/chat"
[[model]]
name = "code"
source = "org/code"
"""
SIZES = ("--size", "chat=12GiB", "--size", "code=10GiB", "--overhead", "0B")
TRACE = [{"at_s": 0, "model": "chat"}, {"at_s": 60, "model": "code", "max_tokens": 5}, {"at_s": 120, "model": "chat"}]

OWN = """
from shoal.policy import Plan, builtin

value = builtin("value")


def same(shelf):
    return value(shelf)


def idle(shelf):
    return []


def wild(shelf):
    return Plan(value(shelf).actions * 2)


def raises(shelf):
    raise LookupError("no opinion\\x1b[31m")
"""


@pytest.fixture
def shelf(tmp_path: Path) -> Path:
    (tmp_path / "own.py").write_text(OWN, "utf-8")
    (tmp_path / "trace.ndjson").write_text("".join(json.dumps(line) + "\n" for line in TRACE), "utf-8")
    file = tmp_path / "shelf.toml"
    file.write_text(SHELF, "utf-8")
    return file


def run(*arguments: object, given: str | None = None) -> subprocess.CompletedProcess[str]:
    command = [sys.executable, "-m", "shoal", "simulate", *map(str, arguments)]
    return subprocess.run(command, check=False, capture_output=True, text=True, timeout=120, input=given)


def played(*arguments: object, given: str | None = None) -> dict[str, Any]:
    said = run(*arguments, "--json", given=given)
    assert said.returncode == 0, said.stderr
    document: dict[str, Any] = json.loads(said.stdout)
    return document


def test_the_same_seed_gives_the_same_answer(shelf: Path) -> None:
    once = run(shelf, *SIZES, "--seed", 5, "--minutes", 30, "--why")
    assert once.returncode == 0, once.stderr
    assert once.stdout == run(shelf, *SIZES, "--seed", 5, "--minutes", 30, "--why").stdout
    assert once.stdout != run(shelf, *SIZES, "--seed", 6, "--minutes", 30, "--why").stdout


def test_a_trace_comes_from_a_file_or_a_pipe(shelf: Path) -> None:
    trace = shelf.with_name("trace.ndjson")
    from_file = played(shelf, *SIZES, "--trace", trace)
    from_pipe = played(shelf, *SIZES, "--trace", "-", given=trace.read_text("utf-8"))
    assert from_file["result"] == from_pipe["result"]
    total = from_file["result"]["total"]
    # 12 GiB, 10, and of the 12 the 2 that the other needed.
    assert (total["requests"], total["served"], total["moved_bytes"]) == (3, 3, 24 << 30)
    assert from_file["whole_model_lru"]["total"]["moved_bytes"] == 34 << 30
    assert from_file["ratio"]["moved"] == pytest.approx(34 / 24)


def test_what_is_wrong_is_said_with_a_remedy(shelf: Path) -> None:
    unknown = run(shelf)
    assert (unknown.returncode, unknown.stdout) == (2, "")
    assert "chat (org/chat), code (org/code); say it, as in --size chat=15GiB" in unknown.stderr
    wrong = run(shelf, *SIZES, "--trace", "-", given='{"at_s": 1, "model": "chat"}\n{"at_s": "now", "model": "chat"}\n')
    assert wrong.returncode == 2
    assert '-: line 2: `at_s` must be seconds from 0 to 31622400, not "now"' in wrong.stderr


def test_a_policy_in_python_decides(shelf: Path) -> None:
    ours = played(shelf, *SIZES, "--minutes", 10)
    same = played(shelf, *SIZES, "--minutes", 10, "--policy", "python:own:same")
    assert same["result"].pop("policy") == "python:own:same"
    assert ours["result"].pop("policy") == "value"
    assert same["result"] == ours["result"]
    idle = played(shelf, *SIZES, "--trace", shelf.with_name("trace.ndjson"), "--policy", "python:own:idle")
    assert idle["result"]["total"]["timed_out"] == len(TRACE), "it wakes nobody, and requests lose patience"
    assert idle["whole_model_lru"]["total"]["served"] == len(TRACE)


def test_what_a_policy_in_python_must_not_say_is_not_done(shelf: Path) -> None:
    wild = played(shelf, *SIZES, "--minutes", 10, "--policy", "python:own:wild")["result"]
    assert 0 < wild["plans_refused"] < wild["plans"]
    assert wild["plan_refused_why"]
    assert wild["total"]["served"] == wild["total"]["requests"]


@pytest.mark.parametrize(
    ("policy", "expected"),
    [
        ("own:raises", "python:own:raises: LookupError: no opinion [31m (own.py line 20)"),
        ("own:missing", "has no attribute 'missing'"),
        ("nowhere:plan", "No module named 'nowhere'"),
    ],
)
def test_a_policy_that_cannot_decide_ends_it(shelf: Path, policy: str, expected: str) -> None:
    said = run(shelf, *SIZES, "--policy", f"python:{policy}")
    assert (said.returncode, said.stdout) == (1, "")
    assert expected in said.stderr
