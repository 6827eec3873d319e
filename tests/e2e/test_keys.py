"""Two clients of one model, each with a key: neither keeps the other waiting, nor finds what the other has cached."""

from __future__ import annotations

import threading
import time
from pathlib import Path
from typing import Any

import httpx
from tests.support.server import Server, serve

ALICE, BOB = "0123456789abcdef-alice", "0123456789abcdef-bob"
HERD = 24


def ask(server: Server, key: str, model: str, prompt: str, tokens: int) -> httpx.Response:
    body = {"model": model, "prompt": prompt, "max_tokens": tokens, "temperature": 0, "ignore_eos": True}
    headers = {"Authorization": f"Bearer {key}"}
    return httpx.post(f"{server.url}/v1/completions", json=body, headers=headers, timeout=120)


def figures(server: Server) -> dict[str, tuple[int, int]]:
    """Active and waiting requests of each key."""
    return {key["key"]: (key["active"], key["parked"]) for model in server.state()["models"] for key in model["keys"]}


def keys_in(home: Path) -> str:
    """Give a file with both keys."""
    file = home / "keys"
    file.write_text(f"# two clients\nalice {ALICE}\nbob {BOB}\n")
    file.chmod(0o600)
    return str(file)


def test_a_herd_of_one_key_does_not_keep_the_other_waiting(tmp_path: Path, model_tables: list[dict[str, Any]]) -> None:
    name, settings = str(model_tables[0]["name"]), {"api_key_file": keys_in(tmp_path), "parked_max": 32}
    tables = [model_tables[0] | {"parallel_max": 2}]
    with serve(tmp_path, models=tables, device_budget="256MiB", **settings) as server:
        server.http.headers["Authorization"] = f"Bearer {ALICE}"
        server.wait_for(name, "asleep")
        ended: list[httpx.Response] = []
        refused: list[httpx.Response] = []

        def one() -> None:
            answer = ask(server, ALICE, name, "the sea is wide", 64)
            (ended if answer.status_code == httpx.codes.OK else refused).append(answer)

        herd = [threading.Thread(target=one) for _ in range(HERD)]
        for thread in herd:
            thread.start()
        deadline = time.monotonic() + 60
        while figures(server).get("alice", (0, 0))[0] + len(refused) == 0:
            assert time.monotonic() < deadline, server.logs()
            time.sleep(0.01)
        before = len(ended)
        assert ask(server, BOB, name, "fish swim in shoals", 4).status_code == httpx.codes.OK
        assert len(ended) - before <= HERD // 2, "it waited for a place and its own answer, not for the herd"
        figure = server.http.get("/metrics").text
        assert 'shoal_key_requests_total{key="bob",status="200"} 1' in figure
        for thread in herd:
            thread.join(120)
        assert len(ended) + len(refused) == HERD
        for answer in refused:  # half of the queue is hers
            assert answer.status_code == httpx.codes.TOO_MANY_REQUESTS, answer.text
            assert answer.json()["error"]["code"] == "too_many_waiting_of_key"
            assert answer.headers["retry-after"]
        for text in (server.http.get("/api/v1/state").text, figure, server.logs(lines=10_000)):
            assert ALICE not in text
            assert BOB not in text


def test_prefixes_are_shared_between_keys_unless_they_are_to_be_separate(
    tmp_path: Path, model_tables: list[dict[str, Any]]
) -> None:
    name, prompt = str(model_tables[0]["name"]), "the sea is wide and fish swim in shoals"
    for separate, expected in ((False, [0, 32, 32]), (True, [0, 0, 32])):
        home = tmp_path / str(separate)
        home.mkdir()
        settings: dict[str, Any] = {"api_key_file": keys_in(home), "separate_keys": separate}
        with serve(home, models=model_tables[:1], device_budget="256MiB", **settings) as server:
            server.http.headers["Authorization"] = f"Bearer {ALICE}"
            server.wait_for(name, "asleep")
            answers = [ask(server, key, name, prompt, 4) for key in (ALICE, BOB, ALICE)]
            found = [answer.json()["usage"]["prompt_tokens_details"]["cached_tokens"] for answer in answers]
            assert found == expected, server.logs()
