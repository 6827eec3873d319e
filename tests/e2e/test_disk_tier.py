"""Conversations survive on disk: the forgetting of the device, the death of the worker and of the server.

A bad disk costs nothing but computing again.
"""

from __future__ import annotations

import json
import os
import signal
import subprocess
import sys
import time
from typing import TYPE_CHECKING, Any

import httpx
import pytest
from tests.support import models
from tests.support.server import environment, serve, write_config
from tests.support.witness import until

if TYPE_CHECKING:
    from collections.abc import Callable
    from contextlib import AbstractContextManager
    from pathlib import Path

    from tests.support.server import Server

PROMPT = "a long talk about the sea, and what swims in it, and how it is told: " * 4
TOKENS = 12


def ask(server: Server, name: str, prompt: str = PROMPT) -> tuple[str, int]:
    """Give the answer, and how many tokens of the prompt were found."""
    body = {"model": name, "prompt": prompt, "max_tokens": TOKENS, "temperature": 0}
    answer = server.http.post("/v1/completions", json=body)
    assert answer.status_code == httpx.codes.OK, f"{answer.text}\n{server.logs()}"
    said = answer.json()
    return said["choices"][0]["text"], said["usage"]["prompt_tokens_details"]["cached_tokens"]


def serve_on(home: Path, model: dict[str, object], disk: list[dict[str, object]]) -> AbstractContextManager[Server]:
    """Serve with the disk alone, and with a patience for it that a loaded machine never needs."""
    return serve(home, models=[model], disk=disk, disk_wait="60s", host_tier="off")


def tier(server: Server, name: str) -> dict[str, Any]:
    """What the disk tier did for a model, by its newest worker."""
    tiers = server.model(name)["tiers"]
    return dict(tiers[0]) if tiers else {"places": [], "reason": "no word yet"}


def hold(server: Server, name: str, condition: Callable[[dict[str, Any]], bool], timeout_s: float = 90) -> None:
    """Wait until something holds of a model's disk tier; raises with its figures."""
    deadline = time.monotonic() + timeout_s
    while not condition(tier(server, name)):
        assert time.monotonic() < deadline, f"{tier(server, name)}\n{server.logs()}"
        time.sleep(0.05)


def opened(server: Server, name: str) -> None:
    """Wait until the worker has its directory."""
    hold(server, name, lambda tier: tier["reason"] is None)


def saved(server: Server, name: str, blocks: int) -> None:
    """Wait until so many blocks are kept."""
    hold(server, name, lambda tier: tier["saved"] >= blocks)


def begun_again(server: Server, name: str, pid: int) -> None:
    """Wait until another worker than `pid` serves the model, with its directory."""
    until(lambda: server.workers().get(name) not in (None, pid), 60, "the worker is started again")
    server.wait_for(name, "asleep", "awake", "partly_resident")
    opened(server, name)


@pytest.fixture
def ash(model_tables: list[dict[str, object]]) -> dict[str, object]:
    return model_tables[0]


def blocks_of(prompt: str) -> int:
    """Full blocks of a prompt and its answer; a byte is a token."""
    return (len(prompt) + TOKENS - 1) // 16


def test_a_conversation_outlives_worker_and_server(tmp_path: Path, ash: dict[str, object]) -> None:
    disk: list[dict[str, object]] = [{"path": str(tmp_path / "disk"), "bytes": "256MiB"}]
    right = models.plain_greedy(ash["source"], PROMPT, TOKENS)
    with serve_on(tmp_path, ash, disk) as server:
        name = str(ash["name"])
        server.wait_for(name, "asleep")
        opened(server, name)
        assert ask(server, name) == (right, 0)
        saved(server, name, blocks_of(PROMPT))
        whole = (len(PROMPT) - 1) // 16 * 16

        pid = server.workers()[name]
        os.kill(pid, signal.SIGKILL)
        begun_again(server, name, pid)
        assert ask(server, name) == (right, whole), "the next worker has it from disk"
        hold(server, name, lambda tier: tier["loaded"] == whole // 16)
        assert ask(server, name) == (right, whole), "and this one from the device"
        longer = PROMPT + right + " and then"
        assert ask(server, name, longer)[0] == models.plain_greedy(ash["source"], longer, TOKENS)
        text = server.http.get("/metrics").text
        assert f'shoal_kv_tier_blocks_total{{model="{name}",tier="disk",what="loaded"}} {whole // 16}' in text, text
        state = server.state()
        (used,) = [entry["used"] for entry in state["tiers"] if entry["tier"] == "disk"]
        assert used > 0, "the disk's bytes are shown"

        assert server.stop() == 0
        server.http = httpx.Client(base_url=server.url, timeout=120)
        server.start_again()
        server.wait_for(name, "asleep")
        opened(server, name)
        assert ask(server, name) == (right, whole), "the next server has it too"

        server.kill()
        server.start_again()
        server.wait_for(name, "asleep", "awake", "partly_resident")
        opened(server, name)
        assert ask(server, name) == (right, whole), "the worker went on, or another one has it from disk"


def test_what_is_on_disk_is_had_with_its_key_only(tmp_path: Path, ash: dict[str, object]) -> None:
    (tmp_path / "key").write_text("07" * 32 + "\n")
    (tmp_path / "key").chmod(0o600)
    disk: list[dict[str, object]] = [{"path": str(tmp_path / "disk"), "bytes": "256MiB"}]
    settings: dict[str, Any] = {"disk": disk, "disk_wait": "60s", "host_tier": "off"}
    right = models.plain_greedy(ash["source"], PROMPT, TOKENS)
    name = str(ash["name"])
    with serve(tmp_path, models=[ash], disk_key_file="key", **settings) as server:
        server.wait_for(name, "asleep")
        opened(server, name)
        assert ask(server, name) == (right, 0)
        saved(server, name, blocks_of(PROMPT))
    marker = json.loads((tmp_path / "disk" / f"kv-{name}" / "tier.json").read_text())
    assert marker["encrypted"]["cipher"] == "AES-256-GCM"
    with serve(tmp_path, models=[ash], disk_key_file="key", **settings) as server:
        server.wait_for(name, "asleep")
        opened(server, name)
        assert ask(server, name) == (right, (len(PROMPT) - 1) // 16 * 16), "the next server has it, with the key"
    with serve(tmp_path, models=[ash], **settings) as server:
        hold(server, name, lambda tier: "is encrypted; name its key" in str(tier["reason"]))
        assert ask(server, name) == (right, 0), "without the key it serves, and computes"


def test_a_damaged_log_costs_computing_again(tmp_path: Path, ash: dict[str, object]) -> None:
    disk: list[dict[str, object]] = [{"path": str(tmp_path / "disk"), "bytes": "256MiB"}]
    right = models.plain_greedy(ash["source"], PROMPT, TOKENS)
    name = str(ash["name"])
    with serve_on(tmp_path, ash, disk) as server:
        server.wait_for(name, "asleep")
        opened(server, name)
        assert ask(server, name) == (right, 0)
        saved(server, name, blocks_of(PROMPT))
        # Every payload is damaged, with the worker running, which knows where each lies.
        log = tmp_path / "disk" / f"kv-{name}" / "log"
        size = log.stat().st_size
        with log.open("r+b") as file:
            for at in range(8192, min(size, 16 << 20), 4096):
                file.seek(at + 1000)
                file.write(b"\xa5\x5a\xa5")
        server.order(name, "sleep")
        pid = server.workers()[name]
        os.kill(pid, signal.SIGKILL)
        begun_again(server, name, pid)
        assert ask(server, name) == (right, 0), "nothing of it is served"
        found = tier(server, name)
        assert found["loaded"] == 0
        saved(server, name, blocks_of(PROMPT))
        pid = server.workers()[name]
        os.kill(pid, signal.SIGKILL)
        begun_again(server, name, pid)
        assert ask(server, name) == (right, (len(PROMPT) - 1) // 16 * 16), "what was saved again is found"


def test_a_directory_that_cannot_be_used_is_named_and_left_alone(tmp_path: Path, ash: dict[str, object]) -> None:
    name, folder = str(ash["name"]), tmp_path / "disk" / f"kv-{ash['name']}"
    folder.mkdir(parents=True)
    (folder / "diary.txt").write_text("mine")
    disk: list[dict[str, object]] = [{"path": str(tmp_path / "disk"), "bytes": "256MiB"}]
    right = models.plain_greedy(ash["source"], PROMPT, TOKENS)
    with serve_on(tmp_path, ash, disk) as server:
        server.wait_for(name, "asleep")
        hold(server, name, lambda tier: "diary.txt" in (tier["reason"] or ""))
        assert ask(server, name) == (right, 0)
        assert ask(server, name)[0] == right
        assert [path.name for path in folder.iterdir()] == ["diary.txt"]


def test_a_disk_that_is_full_makes_room(tmp_path: Path, ash: dict[str, object]) -> None:
    """More than fits: what is oldest goes, and every answer is right."""
    name = str(ash["name"])
    # A block of this model is 128 KiB: 64 MiB are 500 of them, and these are about 650.
    path = str(tmp_path / "disk")
    disk: list[dict[str, object]] = [{"path": path, "bytes": "64MiB", "write_bytes_per_hour": "10GiB"}]
    prompts = [f"{number:03} " + (PROMPT * 2)[:430] for number in range(24)]
    with serve_on(tmp_path, ash, disk) as server:
        server.wait_for(name, "asleep")
        opened(server, name)
        texts = [ask(server, name, prompt)[0] for prompt in prompts]
        # The KV cache is small too: what it forgets before it was saved is not.
        hold(server, name, lambda tier: tier["saved"] + tier["unsaved"] >= 24 * blocks_of(prompts[0]))
        pid = server.workers()[name]
        os.kill(pid, signal.SIGKILL)
        begun_again(server, name, pid)
        again = [ask(server, name, prompt) for prompt in reversed(prompts)]
        assert [text for text, _ in reversed(again)] == texts
        assert max(found for _, found in again) > 0, "what was kept is found"
        (place,) = tier(server, name)["places"]
        assert place["state"] == "ready"
        assert place["bytes"] <= 64 << 20
        assert (tmp_path / "disk" / f"kv-{name}" / "log").stat().st_size <= 64 << 20


def test_another_server_on_the_same_directory_is_refused(tmp_path: Path, ash: dict[str, object]) -> None:
    disk: list[dict[str, object]] = [{"path": str(tmp_path / "disk"), "bytes": "256MiB"}]
    with serve_on(tmp_path, ash, disk):
        home = tmp_path / "other"
        home.mkdir()
        config = write_config(home, {"listen": "127.0.0.1:0", "device": "sim", "disk": disk}, [ash])
        command = [sys.executable, "-m", "shoal", "serve", str(config)]
        said = subprocess.run(command, env=environment(home), capture_output=True, text=True, timeout=60, check=False)
        assert said.returncode != 0
        assert "keeps its disk tier in" in said.stderr + said.stdout
        assert "directory of its own" in said.stderr + said.stdout
