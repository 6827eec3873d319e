"""A policy in Python: what it is given and gives back, and the process that the server asks."""

from __future__ import annotations

import importlib.util
import json
import re
import subprocess
import sys
from dataclasses import fields, replace
from pathlib import Path

import pytest

from shoal.policy import Deny, Evict, Grant, Model, Plan, Request, Restore, Shelf, Wait, builtin

MIB = 1 << 20
ROOT = Path(__file__).resolve().parents[2]
CHAT = Model(id=0, name="chat", weights_total=60 * MIB, weights_held=60 * MIB, up=True, restore_us_per_mib=50)
CODE = Model(id=1, name="code", weights_total=80 * MIB, parked=1, wake_ordered=True, wanting_since_ms=9_000)
ASKED = Request(1, 7, "weights", 80 * MIB, 80 * MIB, asked_ms=9_000, deadline_ms=60_000)
SHELF = Shelf(10_000, 100 * MIB, 2 * MIB, 3_000, models=(CHAT, CODE), requests=(ASKED,))


def test_the_builtin_policies_decide_as_in_the_server() -> None:
    said = builtin("value")(SHELF)
    evict = next(action for action in said.actions if isinstance(action, Evict))
    assert (evict.model, evict.bytes, evict.requester) == (0, 40 * MIB, 1)
    assert evict.reason.startswith("code needs 80 MiB for weights, 40 MiB are free; chat has been idle")
    assert any(isinstance(action, Wait) and action.request == 7 for action in said.actions)
    (whole,) = [action for action in builtin("lru")(SHELF).actions if isinstance(action, Evict)]
    assert whole.bytes == 60 * MIB
    assert builtin("value")(replace(SHELF, budget=200 * MIB)).actions[0] == Grant(
        1, 7, 80 * MIB, "code needs 80 MiB for weights and gets it: 140 MiB were free"
    )
    with pytest.raises(ValueError, match="there is no policy 'fair'; there are value, lru"):
        builtin("fair")


def test_what_others_have_of_the_device_counts_for_a_builtin_policy() -> None:
    crowded = replace(SHELF, budget=60 * MIB, taken=40 * MIB)
    said = builtin("value")(crowded)
    assert [action for action in said.actions if isinstance(action, Deny)] == [], "it may come back"
    assert any(isinstance(action, Wait) and action.request == 7 for action in said.actions)


@pytest.mark.parametrize(("name", "kind"), [("ShelfState", Shelf), ("ModelState", Model), ("PendingRequest", Request)])
def test_what_a_policy_is_given_is_all_that_the_server_decides_from(name: str, kind: type) -> None:
    source = (ROOT / "crates/shoal-core/src/policy/state.rs").read_text("utf-8")
    body = source.partition(f"pub struct {name} {{")[2].partition("\n}\n")[0]
    theirs = set(re.findall(r"^    pub (\w+):", body, re.MULTILINE))
    ours = {field.name for field in fields(kind)} - {"now_ms"}
    assert len(theirs) > 5
    assert ours == theirs


def test_states_and_plans_are_written_as_they_are_read() -> None:
    assert Shelf.read(SHELF.written(), 10_000) == SHELF
    newer = SHELF.written() | {"weather": "fine"}
    newer["models"] = [model | {"mood": "good"} for model in newer["models"]]
    assert Shelf.read(newer, 10_000) == SHELF, "what a newer server says besides is left out"
    assert (SHELF.free, SHELF.model(1).missing, CODE.is_busy, CHAT.held) == (40 * MIB, 80 * MIB, True, 60 * MIB)
    with pytest.raises(KeyError):
        SHELF.model(9)
    actions = [
        Evict(0, 1, "a", 1, cached_last=True),
        Restore(0, "b"),
        Grant(1, 7, 2, "c"),
        Deny(1, 7, "d", never=True),
        Wait(1, 7, "e", 5),
    ]
    plan = Plan(tuple(actions), 12_000)
    assert Plan.read(json.loads(json.dumps(plan.written()))) == plan
    for nonsense in (None, "evict them all", 3, [Evict], [("evict", 0)]):
        with pytest.raises(TypeError, match="the policy gave"):
            Plan.of(nonsense)
    for action in (Evict(0, MIB / 2, "half"), Wait(1, 7, "e", True), Grant(1, 7, float("nan"), "c")):  # type: ignore[arg-type]
        with pytest.raises(TypeError, match=r"the policy gave .* as (bytes|until_ms) of .*; it must be a whole number"):
            Plan.of([action])
    for action in (Evict(0, MIB, "a", cached_last="no"), Deny(1, 7, "d", never=1)):  # type: ignore[arg-type]
        with pytest.raises(
            TypeError, match=r"the policy gave .* as (cached_last|never) of .*; it must be True or False"
        ):
            Plan.of([action])
    with pytest.raises(ValueError, match="the policy gave -3 as bytes of Evict"):
        Plan.of([Evict(0, -3, "less")])
    with pytest.raises(TypeError, match=r"the policy gave 1.5 as again_at_ms"):
        Plan.of(Plan((), 1.5))  # type: ignore[arg-type]


def answers(directory: Path, code: str, *questions: object, name: str = "mine:plan") -> list[dict[str, object]]:
    """Start the process as the server does, ask it, and give its lines."""
    (directory / "mine.py").write_text(code)
    asked = "".join(json.dumps(question) + "\n" for question in questions)
    done = subprocess.run(
        [sys.executable, "-m", "shoal.policy", name, "--path", str(directory)],
        input=asked, capture_output=True, text=True, timeout=300, check=False,
    )  # fmt: skip
    return [json.loads(line) for line in done.stdout.splitlines()]


def test_the_process_answers_each_question_with_a_plan_or_why_there_is_none(tmp_path: Path) -> None:
    code = """
import sys
from shoal.policy import Wait
def plan(shelf):
    print("what is printed is no answer")
    if shelf.now_ms == 1:
        raise RuntimeError("not\\ntoday")
    if shelf.now_ms == 2:
        return None
    if shelf.now_ms == 3:
        return [Wait(1, 7, "because", {1, 2})]
    return [Wait(asked.model, asked.request, "patience") for asked in shelf.requests]
"""
    asked = [{"question": 40 + now, "now_ms": now, "state": SHELF.written()} for now in (1, 2, 3, 4)]
    ready, *said = answers(tmp_path, code, *asked)
    assert ready == {"files": [str(tmp_path / "mine.py")]}
    assert [answer["question"] for answer in said] == [41, 42, 43, 44]
    assert said[0]["error"] == "RuntimeError: not today (mine.py line 7)"
    assert str(said[1]["error"]).startswith("TypeError: the policy gave None; it must give a list of actions")
    assert str(said[2]["error"]).startswith("TypeError: ")
    waits = {"do": "wait", "model": 1, "request": 7, "until_ms": 0, "reason": "patience"}
    assert said[3] == {"question": 44, "plan": {"actions": [waits], "again_at_ms": None}}


def test_its_code_is_its_module_its_package_and_what_lies_beside_the_configuration(tmp_path: Path) -> None:
    (tmp_path / "helper.py").write_text("")
    (tmp_path / "package").mkdir()
    for name in ("__init__", "own"):
        (tmp_path / "package" / f"{name}.py").write_text("")
    (tmp_path / "package" / "rules.py").write_text("import json, helper\nfrom package import own\ndef plan(shelf): ...")
    (ready,) = answers(tmp_path, "", name="package.rules:plan")
    first, *others = ready["files"]  # type: ignore[misc]
    assert first == str(tmp_path / "package/rules.py")
    assert sorted(others) == [str(tmp_path / name) for name in ("helper.py", "package/__init__.py", "package/own.py")]


@pytest.mark.parametrize(
    ("code", "name", "says"),
    [
        ("def plan(:", "mine:plan", "SyntaxError"),
        ("import nothing_of_that_name", "mine:plan", "ModuleNotFoundError"),
        ("", "mine:plan", "AttributeError"),
        ("plan = 3", "mine:plan", "mine:plan is a int, not a function"),
        ("async def plan(shelf): ...", "mine:plan", "is asynchronous"),
        ("class Mine:\n  def plan(shelf): ...", "mine:Mine.other", "AttributeError"),
    ],
)
def test_what_cannot_be_asked_says_why_at_once(tmp_path: Path, code: str, name: str, says: str) -> None:
    (said,) = answers(tmp_path, code, name=name)
    assert says in str(said["error"])


def test_the_example_spares_the_models_of_the_day(capsys: pytest.CaptureFixture[str]) -> None:
    spec = importlib.util.spec_from_file_location("policy_example", ROOT / "examples/policy.py")
    assert spec is not None
    assert spec.loader is not None
    example = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(example)
    by_day, by_night = example.plan(SHELF, 12), example.plan(SHELF, 23)
    assert [action.reason for action in by_day.actions] == ["chat stays on the device by day"]
    assert by_night == builtin("value")(SHELF)
    example.main()
    assert "12 h: wait: chat stays" in capsys.readouterr().out
