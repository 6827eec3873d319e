"""What a worker says to people is in words."""

from __future__ import annotations

from shoal.worker import __main__ as worker_main
from shoal.worker import errors


def test_errors_and_values_are_shown_in_words() -> None:
    assert errors.described(ValueError("first\nsecond")) == "ValueError: first"
    assert errors.described(TimeoutError()) == "TimeoutError"
    assert (errors.shown(None), errors.shown(True), errors.shown("a")) == ("null", "true", '"a"')
    assert len(errors.shown("x" * 1000)) == 80
    words = worker_main._in_words(
        {"routes": ["embeddings"], "context_tokens": 16, "weights_bytes": 9, "dtype": "float32", "kv_block_bytes": 0}
    )
    assert words == "answers /v1/embeddings; up to 16 tokens; 9 bytes of weights in float32"


def test_progress_is_told_a_few_times_a_second(monkeypatch) -> None:
    now = [0.0]
    monkeypatch.setattr(worker_main.time, "monotonic", lambda: now[0])
    told: list[tuple[str, int, int]] = []
    tell = worker_main._Telling(lambda *said: told.append(said))
    for done in range(1001):
        now[0] += 0.001
        tell("placing", done, 1000)
    tell("reading", 0, 5)
    assert [said[:2] for said in told] == [("placing", 0), ("placing", 500), ("placing", 1000), ("reading", 0)]
