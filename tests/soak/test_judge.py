"""The judge of the soak, and what it counts with: a soak that cannot fail shows nothing."""

from __future__ import annotations

import json
import os
import random
import subprocess
import sys
import threading
from dataclasses import replace
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path
from typing import Any

import httpx
import pytest

from tests.soak import watch
from tests.soak.answers import CHAT, EMBED, TEXT, Answer, Case, cases, choose, judge, learn
from tests.soak.clients import Manner, Tally, ask, manner
from tests.soak.disturbances import REMOVED, Disturbances
from tests.soak.shelf_file import EXTRA, ShelfFile

CODE = Case("code", "code", TEXT, {"prompt": "x"})
VECTOR = Case("vector", "documents", EMBED, {"input": "x"})
RIGHT = {0: "one two"}
WHOLE = Answer(10, 12, 200, {0: "one two"}, is_whole=True)
LOST: dict[str, Any] = {"message": "the worker went away", "type": "server_error", "code": "worker_lost"}


def test_a_right_answer_is_right_and_everything_short_of_it_a_fault() -> None:
    quiet = Disturbances()
    assert judge(CODE, RIGHT, WHOLE, quiet).fault is None
    for answer in (
        replace(WHOLE, texts={0: "one too"}),
        replace(WHOLE, texts={0: "one"}),
        replace(WHOLE, texts={0: "one two three"}),
        replace(WHOLE, texts={}),
        replace(WHOLE, texts={0: "one two", 1: "one"}),
        replace(WHOLE, is_whole=False),
        replace(WHOLE, silent=True),
        replace(WHOLE, torn="reset", is_whole=False),
        replace(WHOLE, status=500, error=LOST, is_whole=False),
        replace(WHOLE, status=502, error=LOST, is_whole=False, texts={}),
        replace(WHOLE, status=503, error={}, texts={}),
        replace(WHOLE, status=429, error=LOST | {"code": "too_many_waiting"}, texts={}),
        replace(WHOLE, left=True, texts={0: "two"}),
        replace(WHOLE, error=LOST, texts={0: "two"}),
    ):
        assert judge(CODE, RIGHT, answer, quiet).fault, answer
    assert judge(CODE, RIGHT, replace(WHOLE, left=True, texts={0: "one"}), quiet).fault is None
    full = replace(WHOLE, status=429, error=LOST | {"code": "too_many_waiting"}, texts={}, retry_after="2")
    assert judge(CODE, RIGHT, full, quiet).fault is None
    late = replace(WHOLE, status=504, error=LOST | {"code": "model_wait_timeout"}, texts={})
    assert judge(CODE, RIGHT, late, quiet).fault is None


def test_a_kill_excuses_what_was_under_way_and_never_a_wrong_text(monkeypatch: pytest.MonkeyPatch) -> None:
    during, now = Disturbances(), 0.0
    monkeypatch.setattr("tests.soak.disturbances.time.monotonic", lambda: now)
    now = 11.0
    killed = during.begin("code", "worker killed")
    lost = replace(WHOLE, error=LOST, texts={0: "one"}, is_whole=False, stream=True)
    assert judge(CODE, RIGHT, lost, during).fault is None
    assert judge(CODE, RIGHT, replace(lost, texts={0: "two"}), during).fault
    assert judge(CODE, RIGHT, replace(lost, error=None, torn="reset"), during).fault, "a stream says how it ends"
    assert judge(VECTOR, [[1.0]], lost, during).fault, "another model's worker"
    now = 13.0
    during.end(killed)
    assert judge(CODE, RIGHT, replace(lost, began=14, ended=15), during).fault, "after it all is well again"
    server = during.begin("server", "server killed")
    torn = replace(WHOLE, began=12, ended=13.5, torn="reset", is_whole=False, texts={0: "one"}, stream=True)
    assert judge(CODE, RIGHT, torn, during).fault is None
    assert judge(CODE, RIGHT, replace(torn, texts={0: "two"}), during).fault
    during.end(server)
    assert during.count("worker killed") == 1


def test_vectors_are_compared_by_angle() -> None:
    answer = Answer(0, 1, 200, vectors=[[3.0, 4.0]], is_whole=True)
    quiet = Disturbances()
    assert judge(VECTOR, [[3.0, 4.00001]], answer, quiet).fault is None
    for right in ([[3.0, 4.1]], [[3.0]], [[3.0, 4.0]] * 2):
        assert judge(VECTOR, right, answer, quiet).fault, right


def test_wrong_requests_must_be_refused_as_they_should_be() -> None:
    quiet = Disturbances()
    bad = next(case for case in cases() if case.refusal == (404, "model_not_found"))
    gone = {"message": "no such model", "type": "invalid_request_error", "code": "model_not_found"}
    assert judge(bad, None, Answer(0, 1, 404, error=gone), quiet).fault is None
    assert judge(bad, None, Answer(0, 1, 400, error=gone), quiet).fault
    assert judge(bad, None, replace(WHOLE, texts={}), quiet).fault
    assert judge(CODE, RIGHT, Answer(0, 1, 404, error=gone), quiet).fault, "a model that is there"


def test_the_floor_is_taken_of_those_to_whom_a_right_answer_was_to_be_had(monkeypatch: pytest.MonkeyPatch) -> None:
    during, now = Disturbances(), 11.0
    monkeypatch.setattr("tests.soak.disturbances.time.monotonic", lambda: now)
    code = {"message": "no such model", "type": "invalid_request_error", "code": "model_not_found"}
    gone = replace(WHOLE, status=404, error=code, texts={}, is_whole=False)
    away = replace(gone, status=503, error=LOST | {"code": "model_unavailable"})
    full = replace(gone, status=429, error=LOST | {"code": "too_many_waiting"}, retry_after="2")
    late = replace(gone, status=504, error=LOST | {"code": "model_wait_timeout"})
    extra, bad = replace(CODE, model=EXTRA), next(case for case in cases() if case.name == "no such model")
    during.begin(EXTRA, "worker killed")
    during.begin("server", "server killed")
    tally = Tally()

    def add(case: Case, answer: Answer) -> int:
        before = tally.owed
        verdict = judge(case, RIGHT, answer, during)
        assert verdict.fault is None, verdict
        tally.add(case, Manner(), answer, verdict)
        return tally.owed - before

    # A model that is in the file is owed, whatever was killed; so is who was let wait for too long, or had no place.
    for answer in (WHOLE, gone, away, full, late):
        assert add(extra, answer) == 1
    assert (tally.outcomes["right"], tally.owed) == (1, 5)
    assert tally.too_few(0.2) is None
    assert tally.too_few(0.21) == "only 1 of 5 were answered"
    # Once the soak has taken it off, that there is none is the right answer, and no other refusal is.
    removed = during.begin(EXTRA, REMOVED)
    assert [add(extra, answer) for answer in (gone, away, full, late)] == [0, 1, 1, 1]
    assert add(CODE, gone) == 1, "another model was taken off"
    now = 20.0
    during.end(removed)
    assert add(extra, replace(gone, began=21, ended=22)) == 1, "it is there again"
    # What has to be refused, and those who went away.
    assert [add(bad, gone), add(bad, away)] == [0, 1]
    assert add(CODE, replace(WHOLE, left=True)) == 0
    assert add(CODE, replace(WHOLE, torn="reset", is_whole=False)) == 0
    assert tally.owed == 11
    assert sum(tally.outcomes.values()) == 15


def test_what_a_batch_may_decide_is_left_out() -> None:
    def answers(likely: float, text: str = "a") -> Any:
        top = [{"logprob": -0.1}, {"logprob": likely}]
        told = {"content": [{"top_logprobs": top}]}
        return {"choices": [{"index": 0, "message": {"content": text}, "logprobs": told}]}

    case = Case("chat", "chat", CHAT, {"messages": []})
    assert learn(lambda *_: answers(-3.0), case) == {0: "a"}
    assert learn(lambda *_: answers(-0.1002), case) is None
    texts = iter("ab")
    with pytest.raises(ValueError, match="with nobody beside"):
        learn(lambda *_: answers(-3.0, next(texts)), case)


def test_the_same_seed_asks_the_same() -> None:
    def drawn(seed: int) -> list[tuple[str, Manner]]:
        dice = random.Random(f"{seed} client 0")
        every = cases()
        return [((case := choose(dice, every)).name, manner(dice, case)) for _ in range(300)]

    assert drawn(5) == drawn(5)
    assert drawn(5) != drawn(6)
    names = {name for name, _ in drawn(5)}
    assert {"no such model", "vectors in base64"} <= names or len(names) > 30


class Saying(BaseHTTPRequestHandler):
    """Answers every POST with what the test wants said, then closes."""

    body = b""
    kind = "application/json"
    status = 200
    length: int | None = None

    def do_POST(self) -> None:
        self.rfile.read(int(self.headers["content-length"]))
        self.send_response(self.status)
        self.send_header("content-type", self.kind)
        if self.length is not None:
            self.send_header("content-length", str(self.length))
        self.end_headers()
        self.wfile.write(self.body)

    def log_message(self, *_: object) -> None:
        """Nothing."""


def heard(how: Manner, body: str, kind: str, **more: Any) -> Answer:
    handler = type("Handler", (Saying,), {"body": body.encode(), "kind": kind, **more})
    server = ThreadingHTTPServer(("127.0.0.1", 0), handler)
    thread = threading.Thread(target=server.serve_forever)
    thread.start()
    try:
        with httpx.Client() as client:
            return ask(client, f"http://127.0.0.1:{server.server_port}", CODE, how)
    finally:
        server.shutdown()
        server.server_close()
        thread.join()


def test_what_a_client_notes_is_what_was_said() -> None:
    def event(text: str) -> str:
        return f"data: {json.dumps({'choices': [{'index': 0, 'text': text}]})}\n\n"

    stream = "text/event-stream; charset=utf-8"
    said = ": waiting for code\n\n" + event("one ") + event("two")
    whole = heard(Manner(stream=True), said + "data: [DONE]\n\n", stream)
    assert (whole.texts, whole.is_whole, whole.error, whole.torn) == (RIGHT, True, None, None)
    assert not heard(Manner(stream=True), said, stream).is_whole, "it ended without a word"
    lost = heard(Manner(stream=True), said + f"data: {json.dumps({'error': LOST})}\n\n", stream)
    assert (lost.error, lost.is_whole, lost.texts) == (LOST, False, RIGHT)
    gone = heard(Manner(stream=True, leave_pieces=0), said, stream)
    assert gone.left
    assert gone.texts == {0: "one "}
    plain = json.dumps({"choices": [{"index": 0, "text": "one two"}]})
    assert heard(Manner(), plain, "application/json").texts == RIGHT
    cut = heard(Manner(), plain, "application/json", length=len(plain) + 5)
    assert cut.torn
    assert not cut.is_whole
    refused = heard(Manner(), json.dumps({"error": LOST}), "application/json", status=503)
    assert (refused.status, refused.error) == (503, LOST)


def test_growth_is_seen_and_steadiness_is_none() -> None:
    life = [watch.Figures(float(at), 10_000_000 + at % 3, 20, 4) for at in range(100)]
    assert not watch.growth("server", life).faults(1 << 20, 2, 0)
    more = [replace(one, private_bytes=one.private_bytes + int(one.at) * 50_000, files=int(one.at)) for one in life]
    grown = watch.growth("server", more).faults(1 << 20, 2, 0)
    assert len(grown) == 2, grown
    mine = watch.figures(os.getpid())
    assert mine is not None
    assert mine.private_bytes > 1 << 20
    assert mine.threads >= 1


def test_processes_and_files_that_are_left_are_found(tmp_path: Path) -> None:
    for name in ("run/shoal", "state/shoal/logs", "tmp"):
        (tmp_path / name).mkdir(parents=True)
    for name in (
        "run/shoal/server.lock",
        "run/shoal/sim-0.ledger",
        "state/shoal/logs/chat.log.1",
        "state/shoal/logs/template.out",
    ):
        (tmp_path / name).write_text("")
    assert watch.files_left(tmp_path) == []
    left = ["run/shoal/journal", "state/shoal/logs/other.out", "state/shoal/template.out", "state/shoal/y", "tmp/x"]
    for name in left:
        (tmp_path / name).write_text("")
    assert sorted(watch.files_left(tmp_path)) == left
    env = {**os.environ, "XDG_RUNTIME_DIR": str(tmp_path / "run")}
    with subprocess.Popen([sys.executable, "-c", "input()"], env=env, stdin=subprocess.PIPE) as process:
        assert process.pid in watch.processes_of(tmp_path)
        process.communicate()
    assert watch.processes_of(tmp_path) == {}


def test_the_file_is_one_that_a_server_takes_after_any_change(tmp_path: Path) -> None:
    file = ShelfFile(tmp_path / "shoal.toml", 8000)
    dice = random.Random(3)
    command = [sys.executable, "-m", "shoal", "serve", "--check", str(file.path)]
    said = [file.change(dice) for _ in range(60)]
    assert any(EXTRA in one for one in said)
    assert any("context" in one for one in said)
    file.models[EXTRA] |= {"source": str(tmp_path)}
    ran = subprocess.run(command, capture_output=True, text=True, check=False)
    assert "unknown key" not in ran.stdout + ran.stderr, ran
    file.write(wrong="nonsense = 1")
    ran = subprocess.run(command, capture_output=True, text=True, check=False)
    assert "nonsense" in ran.stdout + ran.stderr, ran
