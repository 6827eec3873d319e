"""Conversations that the device forgot come from host memory, and from disk where that has forgotten them too."""

from __future__ import annotations

import os
import signal
from typing import TYPE_CHECKING

import httpx
import pytest
from tests.support import models
from tests.support.server import serve
from tests.support.tiers import BLOCK, SAVED, TOKENS, WHOLE, ask, hold, prompt_of, ready, tiers
from tests.support.witness import until

if TYPE_CHECKING:
    from pathlib import Path


@pytest.fixture
def ash(model_tables: list[dict[str, object]]) -> dict[str, object]:
    return model_tables[0]


def test_conversations_that_exceed_the_device_come_from_host_memory(tmp_path: Path, ash: dict[str, object]) -> None:
    """More KV than the device holds, without any disk; the answers are those of plain greedy decoding."""
    name = str(ash["name"])
    prompts = [prompt_of(number) for number in range(10)]
    right = [models.plain_greedy(ash["source"], prompt, TOKENS) for prompt in prompts]
    # A block is 128 KiB, so these are about 32 MiB; at most 2 contexts of 512 tokens are on the device.
    model = ash | {"max": "40MiB"}
    with serve(tmp_path, models=[model], host_tier="64MiB", host_budget="256MiB", disk_wait="60s") as server:
        server.wait_for(name, "asleep")
        ready(server, name, "host")
        assert "disk" not in tiers(server, name)
        for number, prompt in enumerate(prompts):
            assert ask(server, name, prompt) == (right[number], 0)
            # It is saved from the device's blocks, before others need them.
            hold(server, name, lambda told, upto=number: told["host"]["saved"] >= (upto + 1) * SAVED)
        for number, prompt in enumerate(prompts):
            assert ask(server, name, prompt) == (right[number], WHOLE * BLOCK)
        hold(server, name, lambda told: told["host"]["loaded"] > 0)
        host = tiers(server, name)["host"]
        assert 10 * SAVED * (128 << 10) <= host["bytes"] <= host["bytes_max"] <= 64 << 20

        # A model that slept has nothing on the device, and its conversations go on all the same.
        before = tiers(server, name)["host"]["loaded"]
        assert server.order(name, "sleep").status_code == httpx.codes.OK
        longer = prompts[3] + right[3] + " and then"
        assert ask(server, name, longer)[0] == models.plain_greedy(ash["source"], longer, TOKENS)
        hold(server, name, lambda told: told["host"]["loaded"] >= before + WHOLE)

        (entry,) = [entry for entry in server.state()["tiers"] if entry["tier"] == "host"]
        held = tiers(server, name)["host"]["bytes"] + server.model(name)["bytes"]["host"]
        assert held <= server.model(name)["lease"]["host"] <= entry["budget"], "the tier is within the model's share"
        text = server.http.get("/metrics").text
        assert f'shoal_kv_tier_budget_bytes{{model="{name}",tier="host"}} {host["bytes_max"]}' in text, text
        assert f'shoal_kv_tier_blocks_total{{model="{name}",tier="host",what="loaded"}}' in text, text

        pid = server.workers()[name]
        os.kill(pid, signal.SIGKILL)
        until(lambda: server.workers().get(name) not in (None, pid), 60, "the worker is started again")
        server.wait_for(name, "asleep", "awake", "partly_resident")
        ready(server, name, "host")
        assert ask(server, name, prompts[0]) == (right[0], 0), "host memory went with its worker"


def test_which_way_is_faster_is_measured_and_told(tmp_path: Path, ash: dict[str, object]) -> None:
    """Whatever is decided, answers are the same; why it was decided is to be read."""
    name = str(ash["name"])
    prompts = [prompt_of(number) for number in range(4)]
    right = [models.plain_greedy(ash["source"], prompt, TOKENS) for prompt in prompts]
    # `tier_load` is what it is where nobody says anything.
    settings = {"host_tier": "64MiB", "host_budget": "256MiB", "disk_wait": "60s", "tier_load": None}
    with serve(tmp_path, models=[ash], tier_idle=1, **settings) as server:
        server.wait_for(name, "asleep")
        ready(server, name, "host")
        for _ in range(2):
            for number, prompt in enumerate(prompts):
                assert ask(server, name, prompt)[0] == right[number]
            hold(server, name, lambda told: told["host"]["saved"] >= len(prompts) * SAVED)
            assert server.order(name, "sleep").status_code == httpx.codes.OK
        hold(server, name, lambda told: told["host"]["loaded"] + told["host"]["recomputed"] > 0)
        hold(server, name, lambda told: told["host"]["choice"] is not None)
        said = server.http.get(f"/api/v1/models/{name}/why").json()["now"]
        assert any(sentence.startswith("Of the last prompt of which a tier had KV: ") for sentence in said), said
        assert ask(server, name, prompts[0])[0] == right[0]
        # What nobody asks for leaves the device by itself.
        hold(server, name, lambda told: told["host"]["demoted"] > 0)


def test_what_host_memory_forgets_is_on_disk(tmp_path: Path, ash: dict[str, object]) -> None:
    """More KV than the device and the host tier hold, and a worker that is killed."""
    name = str(ash["name"])
    prompts = [prompt_of(number) for number in range(12)]
    right = [models.plain_greedy(ash["source"], prompt, TOKENS) for prompt in prompts]
    disk: list[dict[str, object]] = [{"path": str(tmp_path / "disk"), "bytes": "256MiB"}]
    settings = {"host_tier": "16MiB", "host_budget": "256MiB", "disk": disk, "disk_wait": "60s"}
    with serve(tmp_path, models=[ash | {"max": "40MiB"}], **settings) as server:
        server.wait_for(name, "asleep")
        ready(server, name, "host", "disk")
        for number, prompt in enumerate(prompts):
            assert ask(server, name, prompt) == (right[number], 0)
            hold(server, name, lambda told, upto=number: told["disk"]["saved"] >= (upto + 1) * SAVED)
        assert tiers(server, name)["host"]["evicted"] > 0, "it is too small for all of them"
        for number, prompt in enumerate(prompts):
            assert ask(server, name, prompt) == (right[number], WHOLE * BLOCK)
        hold(server, name, lambda told: told["disk"]["loaded"] > 0 and told["host"]["promoted"] > 0)
        # The last one is in memory by now, and not on the device after a sleep.
        before = tiers(server, name)
        assert server.order(name, "sleep").status_code == httpx.codes.OK
        assert ask(server, name, prompts[-1]) == (right[-1], WHOLE * BLOCK)
        hold(server, name, lambda told: told["host"]["loaded"] > before["host"]["loaded"])

        pid = server.workers()[name]
        os.kill(pid, signal.SIGKILL)
        until(lambda: server.workers().get(name) not in (None, pid), 60, "the worker is started again")
        server.wait_for(name, "asleep", "awake", "partly_resident")
        ready(server, name, "host", "disk")
        assert ask(server, name, prompts[5]) == (right[5], WHOLE * BLOCK), "only the host's part is lost"
        hold(server, name, lambda told: told["disk"]["loaded"] == WHOLE and told["host"]["promoted"] == WHOLE)


def test_where_there_is_no_room_for_it_there_is_none(tmp_path: Path, ash: dict[str, object]) -> None:
    name = str(ash["name"])
    right = models.plain_greedy(ash["source"], prompt_of(0), TOKENS)
    for settings in ({"host_tier": "off"}, {"host_budget": "48MiB"}):
        home = tmp_path / settings.get("host_tier", "small")
        home.mkdir()
        with serve(home, models=[ash], **settings) as server:
            server.wait_for(name, "asleep")
            assert ask(server, name, prompt_of(0)) == (right, 0)
            assert tiers(server, name) == {}
