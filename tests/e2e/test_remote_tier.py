"""What one server computed another finds on a remote that both have; what is slow or away costs little, and says so."""

from __future__ import annotations

import time
from concurrent.futures import ThreadPoolExecutor
from typing import TYPE_CHECKING, Any

import pytest
from tests.support import models, streams
from tests.support.redis import redis
from tests.support.server import serve
from tests.support.streams import Stream
from tests.support.tiers import BLOCK, SAVED, TOKENS, WHOLE, ask, hold, prompt_of, ready, tiers
from tests.support.witness import until

if TYPE_CHECKING:
    from pathlib import Path


@pytest.fixture
def ash(model_tables: list[dict[str, object]]) -> dict[str, object]:
    return model_tables[0]


def settings(tmp_path: Path, address: str) -> dict[str, Any]:
    key, login = tmp_path / "key", tmp_path / "login"
    key.write_text("07" * 32)
    key.chmod(0o600)
    login.write_text(":a secret\n")
    files = {"tier_remote_key_file": str(key), "tier_remote_login_file": str(login)}
    return {"tier_remote": address, "disk_wait": "60s", "host_budget": "256MiB", **files}


def test_two_servers_share_what_they_compute(tmp_path: Path, ash: dict[str, object]) -> None:
    name, prompt = str(ash["name"]), prompt_of(0)
    right = models.plain_greedy(ash["source"], prompt, TOKENS)
    with redis() as fake:
        words = settings(tmp_path, fake.address)
        one, other = tmp_path / "one", tmp_path / "other"
        one.mkdir()
        other.mkdir()
        with serve(one, models=[ash], host_tier="off", **words) as server:
            server.wait_for(name, "asleep")
            ready(server, name, "remote")
            assert ask(server, name, prompt) == (right, 0)
            hold(server, name, lambda told: told["remote"]["saved"] >= SAVED)
        # It has nothing of the first one's but the remote.
        with serve(other, models=[ash], host_tier="64MiB", **words) as server:
            server.wait_for(name, "asleep")
            ready(server, name, "host", "remote")
            assert ask(server, name, prompt) == (right, WHOLE * BLOCK)
            hold(server, name, lambda told: told["remote"]["loaded"] == WHOLE)
            hold(server, name, lambda told: told["host"]["promoted"] == WHOLE)
            text = server.http.get("/metrics").text
            assert f'shoal_kv_tier_blocks_total{{model="{name}",tier="remote",what="loaded"}}' in text, text
            assert "a secret" not in server.logs()

            fake.is_away = True
            fake.objects.clear()
            for number in (1, 2):
                new = prompt_of(number)
                assert ask(server, name, new) == (models.plain_greedy(ash["source"], new, TOKENS), 0)
            assert server.order(name, "sleep").is_success
            assert ask(server, name, prompt) == (right, WHOLE * BLOCK), "memory has it"


def test_a_slow_remote_holds_up_nobody_but_whom_it_reads_for(tmp_path: Path, ash: dict[str, object]) -> None:
    name, prompt = str(ash["name"]), prompt_of(0)
    right = models.plain_greedy(ash["source"], prompt, TOKENS)
    with redis() as fake, ThreadPoolExecutor(1) as beside:
        words = settings(tmp_path, fake.address) | {"host_tier": "off"}
        for home in ("one", "other"):
            (tmp_path / home).mkdir()
        with serve(tmp_path / "one", models=[ash], **words) as server:
            server.wait_for(name, "asleep")
            ready(server, name, "remote")
            assert ask(server, name, prompt) == (right, 0)
            hold(server, name, lambda told: told["remote"]["saved"] >= SAVED)
        with serve(tmp_path / "other", models=[ash], **words) as server:
            server.wait_for(name, "asleep")
            ready(server, name, "remote")
            stream = Stream(server, name)
            until(lambda: len(stream.texts) > 3, 60, "it talks")
            fake.read_s = 0.5
            answer = beside.submit(ask, server, name, prompt)
            until(lambda: "GET" in fake.asked or answer.done(), 60, "the remote is asked")
            heard = len(stream.texts)
            until(lambda: bool(fake.reads), 60, "the first block is read")
            heard = len(stream.texts) - heard
            assert not answer.done()
            assert heard >= 5, f"{heard} tokens in half a second\n{server.logs()}"
            fake.read_s = 0
            assert answer.result(60) == (right, WHOLE * BLOCK)
            assert stream.end() == models.plain_greedy(ash["source"], "abc", streams.TOKENS)
            assert tiers(server, name)["remote"]["late"] == 0


def test_a_remote_that_is_never_there_is_told_and_costs_nothing_else(tmp_path: Path, ash: dict[str, object]) -> None:
    name = str(ash["name"])
    with redis() as fake:
        words = settings(tmp_path, fake.address)
    with serve(tmp_path, models=[ash], **words | {"disk_wait": "1s"}) as server:
        server.wait_for(name, "asleep")
        ready(server, name, "host")
        reason = None
        for number in range(200):
            prompt = prompt_of(number)
            said, found = ask(server, name, prompt)
            assert found == 0
            if number < 3:
                assert said == models.plain_greedy(ash["source"], prompt, TOKENS)
            # It is tried again from time to time, and then set aside for longer.
            if reason := tiers(server, name)["remote"]["reason"]:
                break
            time.sleep(0.1)
        assert reason is not None
        assert "refused" in reason, reason
        assert server.order(name, "sleep").is_success
        assert ask(server, name, prompt_of(0))[1] > 0, "host memory is used as before"
        assert tiers(server, name)["remote"]["loaded"] == 0
