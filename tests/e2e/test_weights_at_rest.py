"""A model's weights at rest: the first start stores them, the next ones and wakes from the source read them there."""

from __future__ import annotations

import re
import subprocess
import sys
from typing import TYPE_CHECKING, Any

import httpx
import pytest
from tests.support import models
from tests.support.server import environment, serve
from tests.support.witness import until

if TYPE_CHECKING:
    from pathlib import Path

    from tests.support.server import Server

TOKENS = 12
MIB = 1 << 20


def stored(home: Path) -> list[Path]:
    """Models in the store."""
    folder = home / "disk/weights/models"
    return [path for path in folder.iterdir() if not path.suffix] if folder.is_dir() else []


@pytest.mark.parametrize("host_budget", ["256MiB", "64MiB"])
def test_the_next_server_starts_models_from_the_store(tmp_path: Path, host_budget: str) -> None:
    made = models.make_llama(tmp_path / "big", seed=0, hidden=512)
    weights = made / "model.safetensors"
    assert weights.stat().st_size > 64 * MIB, "not all of it fits into the smaller budget"
    right = models.plain_greedy(made, "abc", TOKENS)
    table: dict[str, object] = {"name": "big", "source": str(made), "dtype": "float32", "context": 512}
    disk = [{"path": str(tmp_path / "disk"), "bytes": "256MiB", "weights": "1GiB"}]
    with serve(tmp_path, models=[table], disk=disk, host_budget=host_budget, device_budget="256MiB") as server:
        server.wait_for("big", "asleep")
        assert server.complete("big", "abc", TOKENS) == right
        until(lambda: len(stored(tmp_path)) == 1, 60, "the weights are stored")
        until(lambda: "weights stored in" in server.logs(100_000), 30, "the worker says so")
        assert "weights read from" not in server.logs(100_000)
        until(lambda: at_rest(server, "big")["state"] == "stored", 30, "the server says so too")

        assert server.stop() == 0
        server.http = httpx.Client(base_url=server.url, timeout=120)
        server.start_again()
        server.wait_for("big", "asleep")
        assert server.logs(100_000).count("weights read from") == 1
        until(lambda: at_rest(server, "big").get("looked_at_ms", 0) > 0, 30, "the store was looked at")
        state = server.state()
        (store,) = (model["weights_at_rest"] for model in state["models"])
        assert (store["state"], store["reason"], store["models"]) == ("read", None, 1)
        assert store["path"] == str(tmp_path / "disk/weights")
        assert weights.stat().st_size < store["bytes"] < store["bytes_max"] == 1 << 30
        of_all = state["weights_store"]
        assert {name: store[name] for name in of_all} == of_all
        (disk,) = [tier for tier in server.state()["tiers"] if tier["tier"] == "disk"]
        assert (disk["used"] >= store["bytes"], disk["budget"]) == (True, (1 << 30) + 256 * MIB)
        text = server.http.get("/metrics").text
        assert 'shoal_weights_at_rest{model="big",state="read"} 1' in text, text
        assert f'shoal_weights_store_bytes{{path="{store["path"]}"}} {store["bytes"]}' in text, text
        line = rf"^weights at rest in {store['path']}: \S+ MiB of 1 GiB, of 1 model(, .* in common)?; big read$"
        assert re.search(line, ps(server), re.MULTILINE), ps(server)
        # Another file in the place of the model's own: whatever is read of it is not right.
        data = bytearray(weights.read_bytes())
        data[len(data) // 8 :] = bytes(len(data) - len(data) // 8)
        with weights.open("r+b") as file:
            file.write(data)
        for _ in range(2):
            assert server.complete("big", "abc", TOKENS) == right, "woken from the store, or memory filled from it"
            assert server.order("big", "sleep").status_code == httpx.codes.OK


def at_rest(server: Server, name: str) -> dict[str, Any]:
    """Give what a model's worker says of its weights at rest."""
    return server.model(name)["weights_at_rest"] or {"state": "no word yet"}


def ps(server: Server) -> str:
    """Give what the command prints."""
    said = subprocess.run(
        [sys.executable, "-m", "shoal", "ps", "--server", server.url],
        env=environment(server.home), check=True, capture_output=True, text=True, timeout=30,
    )  # fmt: skip
    return said.stdout


def until_stored(server: Server, times: int) -> None:
    until(lambda: server.logs(100_000).count("weights stored in") == times, 60, "they are stored")


def flip(pack: Path) -> None:
    data = bytearray(pack.read_bytes())
    data[len(data) // 2] ^= 1
    pack.write_bytes(data)


def test_a_server_whose_store_is_damaged_answers_as_it_did_and_stores_anew(tmp_path: Path) -> None:
    made = models.make_llama(tmp_path / "small", seed=0, hidden=128)
    right = models.plain_greedy(made, "abc", TOKENS)
    table: dict[str, object] = {"name": "small", "source": str(made), "dtype": "float32", "context": 512}
    disk = [{"path": str(tmp_path / "disk"), "bytes": "256MiB", "weights": "1GiB"}]
    with serve(tmp_path, models=[table], disk=disk, host_budget="256MiB", device_budget="256MiB") as server:
        server.wait_for("small", "asleep")
        for number, harm in enumerate((flip, lambda pack: pack.unlink(), None)):
            until_stored(server, number + 1)
            assert server.complete("small", "abc", TOKENS) == right
            assert server.stop() == 0
            if harm is not None:
                (pack,) = (path for path in (tmp_path / "disk/weights/packs").iterdir() if not path.suffix)
                harm(pack)
            server.http = httpx.Client(base_url=server.url, timeout=120)
            server.start_again()
            server.wait_for("small", "asleep")
            assert server.complete("small", "abc", TOKENS) == right
            assert server.logs(100_000).count("weights read from") == (harm is None)
