"""`engine = "vllm"` under a real `shoal serve` on the simulated device, over a stand-in for vLLM (`tests/vllm/fake`).

The stand-in has the seams of vLLM 0.26 that this package uses, each with the name it has there
(`test_vllm_contract.py` looks for them in the real one). Its answers follow from everything that lies in the KV cache
and from the weights, and are compared with what the same arithmetic gives here.
"""

from __future__ import annotations

import os
import random
import signal
import time
from array import array
from concurrent.futures import ThreadPoolExecutor
from functools import cache
from pathlib import Path
from typing import TYPE_CHECKING, Any

import pytest
from tests.support.server import Server, serve

if TYPE_CHECKING:
    from collections.abc import Callable

FAKE = Path(__file__).parent / "fake"
MIB = 1 << 20
SIZE = 2_000_000
"""Elements of a model's weights: 8 MB."""
LAYERS = 2


def table(root: Path, name: str, *args: str, **keys: object) -> dict[str, Any]:
    folder = root / f"{name}.model"
    folder.mkdir(exist_ok=True)
    (folder / "model.bin").write_bytes(weights(name).tobytes())
    (folder / "config.json").write_text("{}")
    return {"name": name, "source": str(folder), "engine": "vllm", "args": list(args), **keys}


@pytest.fixture(autouse=True)
def _path(monkeypatch: pytest.MonkeyPatch) -> None:
    """Every worker finds the stand-in."""
    monkeypatch.setenv("PYTHONPATH", os.pathsep.join(filter(None, [str(FAKE), os.environ.get("PYTHONPATH", "")])))


@cache
def weights(name: str) -> array[int]:
    chance = random.Random(name)
    return array("i", (chance.randrange(1, 200) for _ in range(SIZE)))


def expected(name: str, prompt: str, tokens: int) -> str:
    """Do by hand what the stand-in does."""
    weight = weights(name)
    said = list(prompt.encode())
    for _ in range(tokens):
        total = sum(
            ((token + layer) % 128 + layer) * weight[(at * 7919) % SIZE]
            for at, token in enumerate(said)
            for layer in range(LAYERS)
        )
        said.append(33 + total % 90)
    return bytes(said[len(prompt) :]).decode()


def ask(server: Server, model: str, prompt: str, tokens: int = 8, **extra: object) -> dict[str, Any]:
    answer = server.http.post("/v1/completions", json={"model": model, "prompt": prompt, "max_tokens": tokens, **extra})
    assert answer.status_code == 200, answer.text + server.logs()
    return dict(answer.json())


def up(server: Server, name: str, *others: str) -> dict[str, Any]:
    found = server.wait_for(name, "awake", "failed", *others)
    assert found["status"] != "failed", str(found["error"]) + server.logs()
    return found


def cached(answer: dict[str, Any]) -> int:
    return int(answer["usage"]["prompt_tokens_details"]["cached_tokens"])


def kept(server: Server, name: str) -> int:
    """Memory of KV that no request uses."""
    found = server.model(name)["bytes"]
    return int(found["kv_device"]) - int(found["kv_live"])


def is_gone(pid: int) -> bool:
    """Whether a process has ended; what nobody has waited for yet has."""
    try:
        return Path(f"/proc/{pid}/stat").read_text().rpartition(")")[2].split()[0] == "Z"
    except OSError:
        return True


def until(condition: Callable[[], bool], otherwise: str, seconds: float = 30) -> None:
    deadline = time.monotonic() + seconds
    while not condition():
        assert time.monotonic() < deadline, otherwise
        time.sleep(0.05)


def test_keys_do_not_find_one_anothers_prefixes_where_they_are_to_be_separate(tmp_path: Path) -> None:
    alice, bob = "a" * 32, "b" * 32
    keys = tmp_path / "keys"
    keys.write_text(f"alice {alice}\nbob {bob}\n")
    keys.chmod(0o600)
    prompt = "the same beginning for both of them " * 4
    settings = {"api_key_file": str(keys), "separate_keys": True}
    with serve(
        tmp_path, models=[table(tmp_path, "ash")], device_budget="128MiB", host_budget="128MiB", **settings
    ) as server:

        def found(key: str, **extra: object) -> bool:
            server.http.headers["Authorization"] = f"Bearer {key}"
            answer = ask(server, "ash", prompt, **extra)
            assert text(answer) == expected("ash", prompt, 8)
            return cached(answer) >= 128

        server.http.headers["Authorization"] = f"Bearer {alice}"
        up(server, "ash")
        assert [found(key) for key in (alice, bob, alice, bob)] == [False, False, True, True]
        assert [found(alice, cache_salt="mine") for _ in range(2)] == [False, True], "her own one counts within her key"
        assert not found(bob, cache_salt="mine")
        assert "separate_keys" not in (tmp_path / "serve.log").read_text(), "the start says that it does not hold"


def text(answer: dict[str, Any]) -> str:
    return str(answer["choices"][0]["text"])


def test_an_engine_lives_as_any_worker_does_and_finds_its_prefixes_again(tmp_path: Path) -> None:
    prompt = "the same beginning for each of them " * 4
    shelf = [table(tmp_path, "ash")]
    with serve(tmp_path, models=shelf, device_budget="128MiB", host_budget="128MiB") as server:
        ready = up(server, "ash")
        can = ready["capabilities"]
        assert (can["routes"], can["context_tokens"], can["dtype"]) == (["completions"], 512, "float32")
        assert can["weights_bytes"] >= 4 * SIZE
        assert ready["lease"]["weights"] == can["weights_bytes"], "what the start did not need is still leased"
        # Bodies pass as they are.
        first = ask(server, "ash", prompt, vllm_xargs={"kept": [1, "as", None]})
        assert first["echo"] == {"kept": [1, "as", None]}
        assert (text(first), cached(first)) == (expected("ash", prompt, 8), 0)
        for _ in range(2):
            assert server.order("ash", "sleep").status_code == 200
            asleep = server.wait_for("ash", "asleep")
            assert asleep["lease"] == {**asleep["lease"], "weights": 0, "kv": 0}
            again = ask(server, "ash", prompt)
            assert text(again) == text(first)
            assert cached(again) >= 128, "the prefix was forgotten while it slept"
        body = {"model": "ash", "prompt": "x", "max_tokens": 4, "stream": True}
        assert server.http.post("/v1/completions", json=body).text.endswith("data: [DONE]\n\n")
        until(lambda: server.model("ash")["counts"]["tokens_out"] == 8 * 3 + 4, "tokens are not counted")
        # Another server finds it as it is.
        pid = server.workers()["ash"]
        server.kill()
        server.start_again()
        up(server, "ash")
        assert server.workers()["ash"] == pid
        again = ask(server, "ash", prompt)
        assert text(again) == text(first)
        assert cached(again) >= 128


def test_engines_that_do_not_fit_together_take_turns_and_nothing_is_lost(tmp_path: Path) -> None:
    """Three engines in less than they need, one of them started while the others serve."""
    names = ["ash", "birch", "cedar"]
    chance = random.Random(5)
    beginnings = ["".join(chance.choice("abcdef ") for _ in range(chance.randrange(20, 120))) for _ in range(4)]
    asked = [
        (chance.choice(names), chance.choice(beginnings) + str(number), chance.randrange(1, 12)) for number in range(60)
    ]
    shelf = [table(tmp_path, name, "--step-seconds", "0.01") for name in names]
    with serve(tmp_path, models=shelf, device_budget="28MiB", host_budget="128MiB", quantum="200ms") as server:
        with ThreadPoolExecutor(8) as clients:
            answers = list(clients.map(lambda one: text(ask(server, one[0], one[1], one[2])), asked))
        for (name, prompt, tokens), answer in zip(asked, answers, strict=True):
            assert answer == expected(name, prompt, tokens), (name, prompt)
        state = server.state()
        assert sum(model["lease"]["total"] for model in state["models"]) <= 28 * MIB
        assert sum(model["counts"]["evictions"] for model in state["models"]) >= 2, state
        # A busy engine gives up what it only remembers, and goes on.
        for number in range(10):
            ask(server, "ash", f"{number} " * 120, 1)
        until(lambda: kept(server, "ash") >= 4 * MIB, "what is only cached is not told")
        with ThreadPoolExecutor(1) as clients:
            long = clients.submit(lambda: text(ask(server, "ash", "long", 150)))
            time.sleep(0.3)
            others = [text(ask(server, "birch", f"{number} " * 100, 4)) for number in range(6)]
            assert long.result(60) == expected("ash", "long", 150)
        assert others == [expected("birch", f"{number} " * 100, 4) for number in range(6)]


def test_engines_that_start_at_once_and_need_more_than_they_foresaw_do_not_wait_for_one_another(tmp_path: Path) -> None:
    """Each gets its first 16 MiB; the 4 MiB that either lacks then are there only when the other gives some back."""
    names = ["ash", "birch"]
    shelf = [table(tmp_path, name, "--profile-seconds", "3") for name in names]
    with (
        serve(tmp_path, models=shelf, device_budget="34MiB", host_budget="128MiB") as server,
        ThreadPoolExecutor(2) as clients,
    ):
        asked = [clients.submit(ask, server, name, "both", 4) for name in names]
        for name, answer in zip(names, asked, strict=True):
            assert text(answer.result(300)) == expected(name, "both", 4)
        assert server.state()["waiting"] == []


def test_an_idle_engine_gives_weights_before_prefixes_that_take_longer_to_compute(tmp_path: Path) -> None:
    prompts = [f"{number} " * 200 for number in range(8)]
    shelf = [table(tmp_path, "ash", "--token-seconds", "0.0002"), table(tmp_path, "birch")]
    with serve(tmp_path, models=shelf, device_budget="30MiB", host_budget="128MiB") as server:
        assert text(ask(server, "birch", "first")) == expected("birch", "first", 8)
        assert server.order("birch", "sleep").status_code == 200
        server.wait_for("birch", "asleep")
        for prompt in prompts:
            assert text(ask(server, "ash", prompt, 2)) == expected("ash", prompt, 2)
        weights = server.model("ash")["bytes"]["weights_device"]
        until(lambda: kept(server, "ash") >= 12 * MIB, "what is only cached is not told")
        time.sleep(1)  # whoever may go on at once is not idle
        assert text(ask(server, "birch", "now")) == expected("birch", "now", 8)
        assert server.model("ash")["bytes"]["weights_device"] < weights, "nothing was wanted of it"
        assert kept(server, "ash") >= 12 * MIB, server.logs()
        # Whoever was brought back only just now keeps its memory for a while, and the other would make room of its own.
        assert server.order("birch", "sleep").status_code == 200
        server.wait_for("birch", "asleep")
        for prompt in prompts:
            again = ask(server, "ash", prompt, 1)
            assert text(again) == expected("ash", prompt, 1)
            assert cached(again) >= 256, "its prefix went before its weights"


def test_a_killed_engine_comes_back_and_the_others_do_not_notice(tmp_path: Path) -> None:
    shelf = [table(tmp_path, name) for name in ("ash", "birch")]
    with serve(tmp_path, models=shelf, device_budget="128MiB", host_budget="128MiB") as server:
        for name in ("ash", "birch"):
            up(server, name)
        others = server.workers()["birch"]
        for who in ("engine", "leader"):
            leader = server.workers()["ash"]
            children = Path(f"/proc/{leader}/task/{leader}/children").read_text().split()
            engine = next(int(pid) for pid in children if "spawn_main" in Path(f"/proc/{pid}/cmdline").read_text())
            server.order("ash", "sleep")
            server.wait_for("ash", "asleep")
            body = {"model": "ash", "prompt": "woken", "max_tokens": 8}
            with ThreadPoolExecutor(1) as clients:
                answer = clients.submit(lambda body=body: server.http.post("/v1/completions", json=body))
                os.kill(engine if who == "engine" else leader, signal.SIGKILL)
                assert text(ask(server, "birch", "at once")) == expected("birch", "at once", 8)
                assert answer.result(100).status_code in (200, 500, 502, 503)
            assert server.workers()["birch"] == others
            again = lambda leader=leader: server.workers().get("ash") not in (None, leader)  # noqa: E731
            until(again, "it is not started again", 60)
            assert text(ask(server, "ash", "again")) == expected("ash", "again", 8)
            for pid in (engine, leader):
                until(lambda pid=pid: is_gone(pid), f"process {pid} outlives its engine", 60)  # type: ignore[misc]


def test_what_cannot_be_served_is_said_and_not_tried_again(tmp_path: Path) -> None:
    wrong = {
        "two": (("--tensor-parallel-size", "2"), "tensor and pipeline parallel sizes whose product is 1, not 2"),
        "none": (("--max-num-seqs", "0"), "max_num_seqs is less than 1"),
        "odd": (("--no-such-thing",), "vLLM does not take the model's `args` ['--no-such-thing']"),
        "small": ((), "and can have 4194304"),
        "warm": (("--fail-at", "warm"), "warming up: told to fail at warm"),
    }
    shelf = [table(tmp_path, name, *args) for name, (args, _) in wrong.items()]
    next(one for one in shelf if one["name"] == "small")["max"] = "4MiB"
    with serve(tmp_path, models=shelf, device_budget="128MiB") as server:
        for name, (_, said) in wrong.items():
            until(lambda name=name: bool(server.model(name)["error"]), f"no error of {name} is shown", 100)
            found = server.model(name)
            assert said in found["error"], found["error"] + server.logs()
            if name != "warm":  # what may be otherwise the next time is tried again
                assert found["status"] == "failed", found


def test_an_engine_that_says_something_else_after_a_wake_is_ended_and_started_anew(tmp_path: Path) -> None:
    rot = tmp_path / "rotten"
    shelf = [table(tmp_path, "ash", "--rots-with", str(rot), wake_check=True)]
    with serve(tmp_path, models=shelf, device_budget="128MiB", host_budget="128MiB") as server:
        up(server, "ash")
        pid = server.workers()["ash"]

        def checked() -> int:
            return server.logs(10_000).count("A wake was checked")

        def wakes(prompt: str) -> None:
            assert server.order("ash", "sleep").status_code == 200
            server.wait_for("ash", "asleep")
            assert text(ask(server, "ash", prompt)) == expected("ash", prompt, 8)

        wakes("well")
        until(lambda: checked() == 1, "a wake was not checked")
        time.sleep(2.5)
        assert checked() == 1, "it is checked although nothing left the device"
        wakes("well again")
        until(lambda: checked() == 2, "the second wake was not checked")
        tokens = server.model("ash")["counts"]["tokens_out"]
        assert tokens == 16, "tokens that nobody asked for are counted"
        assert server.order("ash", "sleep").status_code == 200
        server.wait_for("ash", "asleep")
        rot.touch()
        assert server.order("ash", "wake").status_code == 200
        until(lambda: "where it said" in str(server.model("ash")["error"]), "nobody was told", 60)
        rot.unlink()
        until(lambda: server.workers().get("ash") != pid, "it goes on", 60)
        assert text(ask(server, "ash", "after")) == expected("ash", "after", 8)
        assert server.workers()["ash"] != pid


def test_wakes_are_not_checked_where_nobody_wants_it_or_the_engine_cannot(tmp_path: Path) -> None:
    rot = tmp_path / "rotten"
    shelf = [
        table(tmp_path, "ash", "--rots-with", str(rot)),
        table(tmp_path, "birch", "--rots-with", str(rot), "--max-logprobs", "1", wake_check=True),
    ]
    with serve(tmp_path, models=shelf, device_budget="128MiB", host_budget="128MiB") as server:
        for name in ("ash", "birch"):
            up(server, name)
            assert server.order(name, "sleep").status_code == 200
            server.wait_for(name, "asleep")
        pids = server.workers()
        rot.touch()
        for name in ("ash", "birch"):
            assert text(ask(server, name, "x")) != expected(name, "x", 8)
        time.sleep(3)
        assert server.workers() == pids
        said = "Wakes of this engine will not be checked: Requested sample logprobs of 5"
        assert server.logs(10_000).count(said) == 1
