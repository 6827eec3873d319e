"""Conversations grow, and with them the lease for KV, within a budget that cannot hold all of them."""

from __future__ import annotations

import threading
import time
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass, field
from itertools import pairwise
from pathlib import Path
from typing import Self

import pytest
from tests.support import models
from tests.support.server import Server, serve
from tests.support.witness import Witness, until

MIB = 1 << 20
BUDGET_MIB = 64
CONTEXT = 1536
# A token's KV in float32: keys and values of 8 layers, 2 heads of 64.
TOKEN_BYTES = 2 * 8 * 2 * 64 * 4
TURNS = [200, 600, 1000, 1400]
ANSWER = 16
FIGURES_S = 0.5  # within which a worker has said all that it knows


@pytest.fixture(scope="module")
def talkers(tmp_path_factory: pytest.TempPathFactory) -> dict[str, Path]:
    """Two models of about 24 MiB; one full conversation is 12 MiB of KV more."""
    root = tmp_path_factory.mktemp("talkers")
    return {
        name: models.make_llama(root / name, seed=seed, context=CONTEXT) for seed, name in enumerate(["gull", "tern"])
    }


@dataclass
class Watch:
    """The leases for KV by the server's word, from the start to the end of a block."""

    server: Server
    kv: dict[str, list[int]] = field(default_factory=dict)
    sums: list[int] = field(default_factory=list)
    _end: threading.Event = field(default_factory=threading.Event)

    def __enter__(self) -> Self:
        self._thread = threading.Thread(target=self._run, daemon=True)
        self._thread.start()
        return self

    def __exit__(self, *_: object) -> None:
        self._end.set()
        self._thread.join(30)

    def _run(self) -> None:
        while not self._end.wait(0.05):
            state = self.server.state()
            for model in state["models"]:
                self.kv.setdefault(model["name"], []).append(model["lease"]["kv"])
            self.sums.append(state["device"]["leased"])


def converse(server: Server, model: str, number: int) -> list[tuple[str, str]]:
    """Talk in turns, each with all that was said before; gives every prompt with its answer."""
    said, heard = f"{number}: ", []
    for length in TURNS:
        said += "".join(chr(97 + (number * 7 + at) % 26) for at in range(len(said), length))
        answer = server.complete(model, said, ANSWER)
        heard.append((said, answer))
        said += "".join(char if char.isascii() and char.isprintable() else "?" for char in answer)
    return heard


def test_a_prompt_is_found_again_though_its_model_made_room(tmp_path: Path, talkers: dict[str, Path]) -> None:
    """An idle model gives up weights, which come back sooner than its prompt is computed; both are told."""
    gull, tern = talkers
    tables: list[dict[str, object]] = [
        {"name": name, "source": str(path), "dtype": "float32", "context": CONTEXT} for name, path in talkers.items()
    ]
    prompt = "".join(chr(97 + at * at % 26) for at in range(1000))
    with serve(tmp_path, models=tables, device_budget="46MiB") as server:
        for name in talkers:
            server.wait_for(name, "asleep")
        # What computing a prompt takes is not known from one that is computed while the weights come.
        server.complete(gull, "warm", 4)
        server.complete(gull, "-" * 64, 4)
        first = server.complete(gull, prompt, ANSWER)
        until(lambda: server.model(gull)["bytes"]["kv_live"] == 0, 20, "it is idle by its worker's own word")
        time.sleep(FIGURES_S)
        before = server.model(gull)["lease"]
        server.complete(tern, "a", 4)
        after = server.model(gull)["lease"]
        assert after["weights"] < before["weights"], (before, after)
        assert after["kv"] >= 1000 * TOKEN_BYTES, (before, after)
        reasons = [event["reason"] for event in server.told("evict_started") if event["model"] == gull]
        assert any("its weights are worth least" in why and "go last" in why for why in reasons), reasons
        body = {"model": gull, "prompt": prompt, "max_tokens": ANSWER, "temperature": 0}
        again = server.http.post("/v1/completions", json=body).json()
        assert again["choices"][0]["text"] == first == models.plain_greedy(talkers[gull], prompt, ANSWER)
        assert again["usage"]["prompt_tokens_details"]["cached_tokens"] >= 900, again["usage"]


def test_conversations_grow_within_the_budget(tmp_path: Path, talkers: dict[str, Path]) -> None:
    """Three conversations want 32 MiB of KV beside 25 MiB of weights; the other model's weights make room for them."""
    tables: list[dict[str, object]] = [
        {"name": name, "source": str(path), "dtype": "float32", "context": CONTEXT} for name, path in talkers.items()
    ]
    with serve(tmp_path, models=tables, device_budget=f"{BUDGET_MIB}MiB") as server:
        for name in talkers:
            server.wait_for(name, "asleep")
            server.complete(name, "a", 4)
        talks: dict[str, list[list[tuple[str, str]]]] = {}
        with Witness(server) as witness, Watch(server) as watch, ThreadPoolExecutor(3) as pool:
            for name in [*talkers, next(iter(talkers))]:
                talks[name] = list(pool.map(lambda number, name=name: converse(server, name, number), range(3)))
        most = witness.check(BUDGET_MIB * MIB, at_least=20)
        state = server.state()
    assert max(watch.sums) <= BUDGET_MIB * MIB
    assert most > (BUDGET_MIB - 16) * MIB, f"only {most} bytes were ever mapped: nothing was short"
    for name, leased in watch.kv.items():
        grown = [after for before, after in pairwise(leased) if after > before]
        shrunk = [after for before, after in pairwise(leased) if after < before]
        assert max(leased) >= 2 * TURNS[-1] * TOKEN_BYTES, f"{name} never leased the KV of its conversations: {leased}"
        assert len(grown) >= 3, f"the KV of {name} came at once, not as conversations grew: {leased}"
        assert shrunk, f"the KV of {name} never came back: {leased}"
    for model in state["models"]:
        assert model["counts"]["evictions"] >= 1, model
        assert model["counts"]["leases_granted"] >= 3, model
    for name, path in talkers.items():
        for talk in talks[name]:
            said, answer = talk[-1]
            assert answer == models.plain_greedy(path, said, ANSWER), f"{name} answers otherwise under pressure"
