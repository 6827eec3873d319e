"""Three models in the room of one and a half: exact answers, leases that hold, reasons that can be read."""

from __future__ import annotations

import os
import random
import signal
from concurrent.futures import ThreadPoolExecutor
from typing import TYPE_CHECKING

import pytest
from tests.support import models
from tests.support.server import serve
from tests.support.witness import Witness, until

if TYPE_CHECKING:
    from pathlib import Path

BUDGET_BYTES = 44 << 20
PROMPTS = ["def main(", "The quick brown fox", "import os\nimport sys\n\n" * 6, "a"]
TOKENS = 24


@pytest.fixture(scope="module")
def expected(shelf_models: dict[str, Path]) -> dict[tuple[str, str], str]:
    """What each model says alone, by plain transformers."""
    return {
        (name, prompt): models.plain_greedy(path, prompt, TOKENS)
        for name, path in shelf_models.items()
        for prompt in PROMPTS
    }


def test_every_answer_is_exact_and_every_byte_within_its_lease(
    tmp_path: Path, model_tables: list[dict[str, object]], expected: dict[tuple[str, str], str]
) -> None:
    """Busy models take turns; a witness outside counts what is really held."""
    with serve(tmp_path, models=model_tables, device_budget="44MiB") as server:
        for table in model_tables:
            server.wait_for(str(table["name"]), "asleep", "awake", "partly_resident")
        wanted = list(expected) * 3
        random.Random(7).shuffle(wanted)
        with Witness(server) as witness, ThreadPoolExecutor(6) as clients:
            answers = list(clients.map(lambda pair: server.complete(pair[0], pair[1], TOKENS), wanted))
        for pair, answer in zip(wanted, answers, strict=True):
            assert answer == expected[pair], f"{pair} came out differently under pressure"
        witness.check(BUDGET_BYTES)
        state = server.state()
        for model in state["models"]:
            assert model["counts"]["wakes"] >= 1, model
        assert sum(model["counts"]["evictions"] for model in state["models"]) >= len(model_tables), state


def test_sleep_and_wake_by_hand(tmp_path: Path, model_tables: list[dict[str, object]]) -> None:
    """The verbs do what they say, and partial sleep keeps what was asked for."""
    with serve(tmp_path, models=model_tables[:1], device_budget="64MiB") as server:
        name = str(model_tables[0]["name"])
        server.wait_for(name, "asleep")
        assert server.order(name, "wake").status_code == 200
        awake = server.wait_for(name, "awake")
        before = server.complete(name, "x = ", 8)
        assert server.order(name, "sleep", keep=0.5).status_code == 200
        half = server.wait_for(name, "partly_resident")
        share = half["lease"]["weights"] / awake["lease"]["weights"]
        assert 0.3 < share < 0.7, share
        assert server.complete(name, "x = ", 8) == before
        assert server.order(name, "sleep").status_code == 200
        asleep = server.wait_for(name, "asleep")
        assert asleep["bytes"]["weights_device"] == 0
        assert asleep["lease"]["total"] == 0
        assert server.complete(name, "x = ", 8) == before


def test_a_pinned_model_does_not_yield(tmp_path: Path, model_tables: list[dict[str, object]]) -> None:
    """Two cannot stand beside the pinned one, so they take turns in what is left, and the pinned one stays."""
    with serve(tmp_path, models=model_tables, device_budget="64MiB") as server:
        names = [str(table["name"]) for table in model_tables]
        for name in names:
            server.wait_for(name, "asleep")
        assert server.order(names[0], "pin", pinned=True).status_code == 200
        server.complete(names[0], "a", 4)
        resident = server.model(names[0])["lease"]["weights"]
        for name in names[1:] * 2:
            server.complete(name, "b", 4)
            assert server.model(names[0])["lease"]["weights"] == resident


def test_a_host_budget_smaller_than_the_weights(tmp_path: Path, model_tables: list[dict[str, object]]) -> None:
    """What finds no room in host memory is read again from the file it came from, and is as exact."""
    with serve(tmp_path, models=model_tables[:2], device_budget="44MiB", host_budget="16MiB") as server:
        names = [str(table["name"]) for table in model_tables[:2]]
        for name in names:
            server.wait_for(name, "asleep")
            until(
                lambda name=name: server.model(name)["bytes"]["source_only"] > 0, 5, f"{name} says where its bytes are"
            )
            asleep = server.model(name)["bytes"]
            assert 0 < asleep["host"] <= 8 << 20, asleep
            assert asleep["source_only"] > asleep["host"], asleep
        first = {name: server.complete(name, "x = ", 8) for name in names}
        assert first == {name: server.complete(name, "x = ", 8) for name in names}
        state = server.state()
        assert sum(model["bytes"]["host"] for model in state["models"]) <= 16 << 20


def test_a_model_that_sleeps_in_host_memory_has_all_of_it_there(
    tmp_path: Path, model_tables: list[dict[str, object]]
) -> None:
    """In a budget that is too short for all, the one with `sleep = "host"` lacks nothing; others share the rest."""
    kept, *others = (str(table["name"]) for table in model_tables)
    tables = [{**table, "sleep": "host"} if table["name"] == kept else table for table in model_tables]
    with serve(tmp_path, models=tables, device_budget="64MiB", host_budget="60MiB") as server:
        before = {}
        for name in (kept, *others):
            server.wait_for(name, "asleep")
            before[name] = server.complete(name, "x = ", 8)
        for name in (kept, *others):
            if server.model(name)["bytes"]["weights_device"]:
                assert server.order(name, "sleep").status_code == 200
            server.wait_for(name, "asleep")
        until(lambda: any(server.model(name)["bytes"]["source_only"] > 0 for name in others), 5, "the others lack some")
        asleep = server.model(kept)["bytes"]
        assert asleep["source_only"] == 0, asleep
        assert asleep["host"] >= asleep["weights_total"] > 0, asleep
        assert sum(model["bytes"]["host"] for model in server.state()["models"]) <= 60 << 20
        for name in (kept, *others):
            assert server.complete(name, "x = ", 8) == before[name]


def test_host_memory_goes_where_the_weights_are(tmp_path: Path) -> None:
    """A large model beside small ones has its weights in host memory, in a budget whose third is too small for them."""
    made = {"big": models.make_llama(tmp_path / "big", seed=0, hidden=512)}
    made |= {name: models.make_llama(tmp_path / name, seed=1, layers=1, hidden=64) for name in ("small", "tiny")}
    tables: list[dict[str, object]] = [
        {"name": name, "source": str(path), "dtype": "float32", "context": 512} for name, path in made.items()
    ]
    weights = (made["big"] / "model.safetensors").stat().st_size
    with serve(tmp_path, models=tables, device_budget="256MiB", host_budget=weights + (64 << 20)) as server:
        for name in made:
            server.wait_for(name, "asleep")
        # Weights are copied there in the background, and a worker's figures come a moment after.
        until(lambda: all(model["bytes"]["host"] for model in server.state()["models"]), 30, "all say what they hold")
        until(lambda: server.model("big")["bytes"]["host"] >= weights, 30, "all of its weights are there")
        state = server.state()
        assert weights > (weights + (64 << 20)) // 3, "an even split would do: nothing is tested"
        assert [model["bytes"]["source_only"] for model in state["models"]] == [0, 0, 0], state["models"]
        shares = {model["name"]: model["lease"]["host"] for model in state["models"]}
        assert sum(shares.values()) <= weights + (64 << 20), shares
        for model in state["models"]:
            assert 0 < model["bytes"]["host"] <= shares[model["name"]], model
        answer = server.complete("big", "x = ", 8)
        assert server.order("big", "sleep").status_code == 200
        assert server.complete("big", "x = ", 8) == answer
        # A worker that is started again gets as much as the one before.
        os.kill(server.workers()["big"], signal.SIGKILL)
        until(lambda: server.model("big")["starts"] == 2, 30, "another worker starts")
        server.wait_for("big", "asleep")
        assert server.model("big")["lease"]["host"] >= weights
        assert server.complete("big", "x = ", 8) == answer
