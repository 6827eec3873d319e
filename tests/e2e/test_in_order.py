"""Requests are computed while the bytes of a wake are still coming: rightly, whatever happens meanwhile."""

from __future__ import annotations

import json
import random
import socket
import threading
import time
from concurrent.futures import ThreadPoolExecutor
from typing import TYPE_CHECKING

import httpx
from tests.support import models
from tests.support.server import Server, serve
from tests.support.witness import until

if TYPE_CHECKING:
    from pathlib import Path

SLOW = {"SHOAL_SIM_LINK_MIB_PER_S": "4"}  # six seconds for these models
BRISK = {"SHOAL_SIM_LINK_MIB_PER_S": "150"}
PROMPTS = ["def main(", "The quick brown fox", "import os\nimport sys\n\n" * 6, "a"]
TOKENS = 16
BLOCK = 16  # tokens; a token is a byte


def computes_beside_a_wake(server: Server, name: str) -> bool:
    """Whether a request is at the model's worker while the model is still waking."""
    model = server.model(name)
    return bool(model["status"] == "waking" and model["counts"]["requests_active"])


def test_a_request_is_at_its_worker_while_the_bytes_come(
    tmp_path: Path, shelf_models: dict[str, Path], model_tables: list[dict[str, object]]
) -> None:
    """It is sent once the wake has its memory, its answer is exact, and an order to wake is answered at the end."""
    table = model_tables[0] | {"env": SLOW}
    name = str(table["name"])
    expected = models.plain_greedy(shelf_models[name], PROMPTS[1], TOKENS)
    with serve(tmp_path, models=[table], device_budget="64MiB") as server:
        server.wait_for(name, "asleep")
        for prompt in (PROMPTS[1], PROMPTS[1]):
            with ThreadPoolExecutor(2) as clients:
                answer = clients.submit(server.complete, name, prompt, TOKENS)
                until(lambda: computes_beside_a_wake(server, name), 60, "the request goes to the worker early")
                why = " ".join(server.http.get(f"/api/v1/models/{name}/why").json()["now"])
                woken = clients.submit(server.order, name, "wake")
                assert answer.result() == expected
                assert woken.result().status_code == httpx.codes.OK
            assert "waking" not in why or "requests go to its worker already" in why
            assert server.order(name, "sleep").status_code == httpx.codes.OK
        backed, done = server.told("wake_backed"), server.told("wake_done")
        assert len(backed) >= 2
        assert {event["model"] for event in backed} == {name}
        assert all(any(end["id"] > begin["id"] for end in done) for begin in backed)
        assert not server.told("wake_failed")


def test_what_host_memory_has_of_a_prompt_comes_beside_the_bytes(
    tmp_path: Path, shelf_models: dict[str, Path], model_tables: list[dict[str, object]]
) -> None:
    """The request is at the worker while the model wakes, and finds its prompt where the tier keeps it."""
    table = model_tables[0] | {"env": SLOW}
    name, prompt = str(table["name"]), "and so the tide goes out " * 8
    expected = models.plain_greedy(shelf_models[name], prompt, TOKENS)
    whole = (len(prompt) - 1) // BLOCK * BLOCK
    body = {"model": name, "prompt": prompt, "max_tokens": TOKENS, "temperature": 0}

    def tier() -> dict[str, int]:
        return next(tier for tier in server.model(name)["tiers"] if tier["tier"] == "host")

    with serve(
        tmp_path, models=[table], device_budget="64MiB", host_tier="64MiB", host_budget="256MiB", disk_wait="60s"
    ) as server:
        server.wait_for(name, "asleep")
        until(lambda: [tier["tier"] for tier in server.model(name)["tiers"]] == ["host"], 60, "the tier is in use")
        assert server.complete(name, prompt, TOKENS) == expected
        for loads in (1, 2):
            until(lambda: tier()["saved"] * BLOCK >= whole, 60, "it is saved")
            assert server.order(name, "sleep").status_code == httpx.codes.OK
            with ThreadPoolExecutor(1) as clients:
                answer = clients.submit(server.http.post, "/v1/completions", json=body)
                until(lambda: computes_beside_a_wake(server, name), 60, "the request goes to the worker early")
                said = answer.result().json()
            assert said["choices"][0]["text"] == expected
            assert said["usage"]["prompt_tokens_details"]["cached_tokens"] == whole
            until(lambda loads=loads: tier()["loaded"] * BLOCK >= loads * whole, 60, "it is counted")
        assert not server.told("wake_failed")


def test_a_client_that_leaves_while_its_layers_wait_holds_nobody_up(
    tmp_path: Path, shelf_models: dict[str, Path], model_tables: list[dict[str, object]]
) -> None:
    """The next request is answered as ever, and the model can be put to sleep."""
    table = model_tables[0] | {"env": SLOW}
    name = str(table["name"])
    expected = models.plain_greedy(shelf_models[name], PROMPTS[0], TOKENS)
    with serve(tmp_path, models=[table], device_budget="64MiB") as server:
        server.wait_for(name, "asleep")
        body = json.dumps({"model": name, "prompt": PROMPTS[3], "max_tokens": 400, "temperature": 0}).encode()
        lines = ["POST /v1/completions HTTP/1.1", "Host: 127.0.0.1", "Content-Type: application/json"]
        head = "\r\n".join([*lines, f"Content-Length: {len(body)}", "", ""]).encode()
        with socket.create_connection(("127.0.0.1", server.port)) as client:
            client.sendall(head + body)
            until(lambda: computes_beside_a_wake(server, name), 60, "it is at the worker")
        until(lambda: not server.model(name)["counts"]["requests_active"], 60, "it is over")
        assert server.complete(name, PROMPTS[0], TOKENS) == expected
        assert server.order(name, "sleep").status_code == httpx.codes.OK
        server.wait_for(name, "asleep")


def test_random_sleeps_and_wakes_change_no_answer(
    tmp_path: Path, shelf_models: dict[str, Path], model_tables: list[dict[str, object]]
) -> None:
    """Two models in the room of one and a half, put to sleep at any moment of a wake, in part or whole."""
    tables = [table | {"env": BRISK} for table in model_tables[:2]]
    names = [str(table["name"]) for table in tables]
    expected = {(name, p): models.plain_greedy(shelf_models[name], p, TOKENS) for name in names for p in PROMPTS}
    dice = random.Random(11)
    wanted = list(expected) * 3
    dice.shuffle(wanted)
    ended = threading.Event()
    with serve(tmp_path, models=tables, device_budget="44MiB") as server:
        for name in names:
            server.wait_for(name, "asleep", "awake", "partly_resident")

        def disturb() -> None:
            with httpx.Client(base_url=server.url, timeout=120) as client:
                while not ended.is_set():
                    name, verb = dice.choice(names), dice.choice(["sleep", "sleep", "wake"])
                    body = {"keep": dice.choice([0, 0.3, 0.7])} if verb == "sleep" else {"wait_s": 5}
                    # Refused where another order is in its way, which is right.
                    client.post(f"/api/v1/models/{name}/{verb}", json=body)
                    time.sleep(dice.uniform(0, 0.2))

        hand = threading.Thread(target=disturb)
        hand.start()
        try:
            with ThreadPoolExecutor(4) as clients:
                answers = list(clients.map(lambda pair: server.complete(*pair, TOKENS), wanted))
        finally:
            ended.set()
            hand.join()
        for pair, answer in zip(wanted, answers, strict=True):
            assert answer == expected[pair], f"{pair} came out differently"
        assert server.told("wake_backed"), "no request met a wake: nothing was tested"
        for name in names:
            server.order(name, "sleep")
            until(lambda name=name: server.model(name)["lease"]["total"] == 0, 60, "all came back")
