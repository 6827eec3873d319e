"""What other managers of models are known for, each as a test through the public API.

Complaint (where it was seen): test.

- A herd on a sleeping model starts it several times (LM Studio 1751, kvcached's controller):
  `test_a_herd_is_one_wake`.
- A wake during a drain or sleep is lost, or errors (Sardeenz (drain timeout: ERROR), kvcached's controller (500 for a
  minute)): `test_a_wake_in_the_middle_of_a_sleep`.
- A client that went away while it waited leaves something behind (llama-swap (pruned there), Ollama's queue):
  `test_a_client_gone_while_parked_leaves_nothing`.
- Other parameters of a request load the model again (Ollama 8029, 8903, 10948, 12783):
  `test_other_parameters_never_load_a_model_again`.
- An eviction's target comes back to life, and all wait for ever (Ollama 17408):
  `test_an_eviction_target_that_is_asked_for`.
- Out of memory in a wake destroys the weights (vLLM 47654, 16564, llm-d FMA 746):
  `test_out_of_memory_in_a_wake_loses_nothing`.
- A wake that failed is reported as done (Sardeenz `wakeModel`): `test_out_of_memory_in_a_wake_loses_nothing`.
- A worker that ignores SIGTERM blocks a stop or a reload (llama-swap `unloadTimeout`):
  `test_a_worker_that_heeds_no_signal`, `test_kills::test_stopping_leaves_nothing`.
- A request an instant after a sleep fails, or is garbage (kvcached's controller, vLLM 29341):
  `test_a_request_an_instant_after_a_sleep`.
- A sleep aborts what is being answered (Sardeenz (`mode=abort`)): `test_a_wake_in_the_middle_of_a_sleep`.
- Unloading one takes others along; a changed file stops all (llama-swap 58, 392, Ollama):
  `test_one_is_put_to_sleep_and_the_others_keep_what_they_have`, `test_reload`.
- Somebody else's process is taken for an orphan and killed (Sardeenz (any line of `ps` with "vllm")):
  `test_processes_of_others_are_left_alone`.
- A model that is waited for blocks those that are there (Ollama's one pending request):
  `test_one_that_is_waited_for_holds_nobody_else_up`.
- Weights are garbage after sleep and wake (vLLM 29341, Sardeenz level 2):
  `test_shelf::test_every_answer_is_exact_and_every_byte_within_its_lease`.
- Orders with misplaced fields are silently ignored (tags, level) (Sardeenz, llama-swap's wrapper):
  `test_bad_input::test_orders`.
- A sleeping model is 503; a wrong name evicts another (Sardeenz, llama-swap 749): `test_shelf`,
  `test_bad_input::test_requests` (a bad request wakes nobody).
- All is lost on a restart of the manager (Sardeenz): `test_restart`.
- Device and host memory leak over sleeps and wakes (vLLM 28783, 16663): `test_shelf` (its witness),
  `test_host_memory`, the soak.
- Pins and priorities do not hold under pressure (Ollama 9206, 4681):
  `test_shelf::test_a_pinned_model_does_not_yield`, shoal-core `policy_sim`.
- Idle models are unloaded though nobody needs the room (ServerlessLLM 306, 54):
  `test_one_is_put_to_sleep_and_the_others_keep_what_they_have`.
- The default model does not come back after a big one (llama-swap 413): shoal-server
  `sharing::a_preloaded_model_is_there_unasked_...`.
- A busy model keeps others out for ever (llama-swap's router): shoal-server `shelf::busy_models_take_turns`,
  shoal-core `policy_sim`.
- One client's herd keeps all others waiting (Ollama's FIFO): `test_keys`.
- Queues without bound or deadline (ServerlessLLM): shoal-server `shelf::queues_are_bounded_...`, `turns`.
- Loading shows nothing (Ollama 10438, 5253): shoal-server `gateway::a_stream_that_waits_long_begins_with_comments`,
  `test_page`.
- Nobody says why a model was evicted (all of them): shoal-server `shelf::a_model_says_why_it_is_as_it_is`.
"""

from __future__ import annotations

import os
import signal
import subprocess
import time
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import TYPE_CHECKING

import httpx
import pytest
from tests.support.server import Server, serve
from tests.support.streams import TOKENS, Stream, alive
from tests.support.witness import until

import shoal

if TYPE_CHECKING:
    from collections.abc import Iterator

MIB = 1 << 20
BUDGET = "44MiB"  # for one model of the three, and a half
NAMES = ["ash", "birch", "cedar"]
REST = {"asleep", "awake", "partly_resident"}


def tables(shelf_models: dict[str, Path]) -> list[dict[str, object]]:
    """The three models, as `[[model]]` tables."""
    shape = {"dtype": "float32", "context": 512}
    return [{"name": name, "source": str(path), **shape} for name, path in shelf_models.items()]


@pytest.fixture(scope="module")
def shelf(tmp_path_factory: pytest.TempPathFactory, shelf_models: dict[str, Path]) -> Iterator[Server]:
    """One server for all tests here: what one of them leaves behind would be seen by the next."""
    home = tmp_path_factory.mktemp("known")
    with serve(home, models=tables(shelf_models), device_budget=BUDGET, quantum="200ms", policy="value") as server:
        yield server


@pytest.fixture(autouse=True)
def rested(shelf: Server) -> None:
    """All models sleep, and nobody wants anything, before and after."""
    for name in NAMES:
        shelf.wait_for(name, *REST)
        assert shelf.order(name, "sleep").status_code == httpx.codes.OK, shelf.logs()
    state = shelf.state()
    assert state["device"]["leased"] == 0, state
    assert all(model["counts"]["requests_active"] == 0 for model in state["models"]), state
    assert state["waiting"] == []


@pytest.fixture(scope="module")
def right(shelf: Server) -> dict[str, str]:
    """What each model says of itself, undisturbed."""
    for name in NAMES:
        shelf.wait_for(name, *REST)
    return {name: shelf.complete(name, "abc", TOKENS) for name in NAMES}


def counts(shelf: Server, name: str) -> dict[str, int]:
    return dict(shelf.model(name)["counts"])


def test_a_herd_is_one_wake(shelf: Server, right: dict[str, str]) -> None:
    before = counts(shelf, "ash")["wakes"]
    with ThreadPoolExecutor(24) as clients:
        answers = list(clients.map(lambda _: shelf.complete("ash", "abc", TOKENS), range(24)))
    assert set(answers) == {right["ash"]}
    assert counts(shelf, "ash")["wakes"] == before + 1


def test_a_wake_in_the_middle_of_a_sleep(shelf: Server, right: dict[str, str]) -> None:
    """Orders cross each other while an answer is on its way: each is carried out, and the answer is whole."""
    for _ in range(3):
        client = Stream(shelf, "ash")
        until(lambda client=client: len(client.texts) > 3, 60, "the stream goes on")
        with ThreadPoolExecutor(2) as people:
            sleep = people.submit(shelf.order, "ash", "sleep")
            wake = people.submit(shelf.order, "ash", "wake")
            assert sleep.result().status_code == httpx.codes.OK, sleep.result().text
            assert wake.result().status_code == httpx.codes.OK, wake.result().text
        assert client.end() == right["ash"]
        assert shelf.complete("ash", "abc", TOKENS) == right["ash"]


def test_a_client_gone_while_parked_leaves_nothing(shelf: Server, right: dict[str, str]) -> None:
    pid = shelf.workers()["ash"]
    os.kill(pid, signal.SIGSTOP)  # it cannot wake
    try:
        for stream in (True, False):
            body = {"model": "ash", "prompt": "abc", "max_tokens": TOKENS, "stream": stream}
            with httpx.Client(base_url=shelf.url, timeout=0.5) as impatient, pytest.raises(httpx.TimeoutException):
                impatient.post("/v1/completions", json=body)
        until(lambda: counts(shelf, "ash")["requests_parked"] == 0, 30, "both are forgotten")
    finally:
        os.kill(pid, signal.SIGCONT)
    assert shelf.complete("ash", "abc", TOKENS) == right["ash"]
    until(lambda: counts(shelf, "ash")["requests_active"] == 0, 30, "nothing of them is left")


def test_other_parameters_never_load_a_model_again(shelf: Server) -> None:
    shelf.complete("ash", "abc", 1)
    before, starts = counts(shelf, "ash"), shelf.model("ash")["starts"]
    for more in (
        {"max_tokens": 3}, {"temperature": 1.5, "seed": 7}, {"top_p": 0.5}, {"n": 3}, {"stop": ["x"]}, {"logprobs": 2},
        {"cache_salt": "mine"}, {"stream": True}, {"prompt": "x" * 300}, {"prompt": [1, 2, 3]}, {"user": "somebody"},
    ):  # fmt: skip
        body = {"model": "ash", "prompt": "abc", "max_tokens": 4, **more}
        assert shelf.http.post("/v1/completions", json=body).status_code == httpx.codes.OK, more
    # What would change how a model is loaded elsewhere is refused, not obeyed.
    for foreign in ({"options": {"num_ctx": 64}}, {"keep_alive": 0}, {"num_ctx": 64}):
        body = {"model": "ash", "prompt": "abc", "max_tokens": 4, **foreign}
        assert shelf.http.post("/v1/completions", json=body).status_code == httpx.codes.BAD_REQUEST, foreign
    after = counts(shelf, "ash")
    assert (after["wakes"], after["evictions"]) == (before["wakes"], before["evictions"])
    assert shelf.model("ash")["starts"] == starts


def test_an_eviction_target_that_is_asked_for(shelf: Server, right: dict[str, str]) -> None:
    """The victim of an eviction is asked for before it has gone: nobody waits for ever, and all answers are right."""
    for _ in range(3):
        shelf.complete("ash", "abc", 1)
        pid = shelf.workers()["ash"]
        os.kill(pid, signal.SIGSTOP)  # so that its eviction takes a while
        with ThreadPoolExecutor(3) as clients:
            other = clients.submit(shelf.complete, "birch", "abc", TOKENS)
            until(lambda: shelf.model("ash")["lease"]["reclaiming"] > 0, 30, "it is to make room")
            again = [clients.submit(shelf.complete, "ash", "abc", TOKENS) for _ in range(2)]
            until(lambda: counts(shelf, "ash")["requests_parked"] == 2, 30, "it is asked for")
            os.kill(pid, signal.SIGCONT)
            assert other.result(120) == right["birch"]
            assert [answer.result(120) for answer in again] == [right["ash"]] * 2


def test_out_of_memory_in_a_wake_loses_nothing(shelf: Server, right: dict[str, str]) -> None:
    """Somebody else has the device's memory: the wake fails and says so, and what sleeps is whole when it is gone."""
    somebody = shoal.MemoryManager(
        "sim", device_capacity=BUDGET, device_budget=BUDGET, host_budget="64MiB", runtime_dir=shelf.runtime_dir
    )
    taken = 36 * MIB
    held = somebody.region("held", taken, kind="workspace")

    def refused_by_the_device() -> bool:
        """Give whether it had its lease, and no memory: the server sees who else is on the device once a second."""
        held.commit(0, taken)
        try:
            wake = shelf.order("ash", "wake", wait_s=4)
            assert wake.status_code in {httpx.codes.CONFLICT, httpx.codes.GATEWAY_TIMEOUT}, wake.text
            model = shelf.model("ash")
            assert model["status"] != "awake", model
            assert wake.json()["error"]["message"]
        finally:
            held.decommit(0, taken)
        until(lambda: shelf.device()["taken"] == 0, 60, "it is gone")
        return any("out of memory" in event["reason"] for event in shelf.told("wake_failed"))

    # Where the server looks between the two, it refuses the lease.
    assert any(refused_by_the_device() for _ in range(10)), shelf.told("wake_failed")
    assert shelf.complete("ash", "abc", TOKENS) == right["ash"]
    assert shelf.order("ash", "wake").status_code == httpx.codes.OK
    assert shelf.model("ash")["status"] == "awake"


def test_a_request_an_instant_after_a_sleep(shelf: Server, right: dict[str, str]) -> None:
    for delay_ms in (0, 1, 2, 5, 10, 20, 50):
        shelf.complete("ash", "abc", 1)
        with ThreadPoolExecutor(1) as person:
            sleep = person.submit(shelf.order, "ash", "sleep")
            time.sleep(delay_ms / 1_000)
            assert shelf.complete("ash", "abc", TOKENS) == right["ash"], delay_ms
            assert sleep.result().status_code == httpx.codes.OK, sleep.result().text


def test_one_is_put_to_sleep_and_the_others_keep_what_they_have(tmp_path: Path, shelf_models: dict[str, Path]) -> None:
    with serve(tmp_path, models=tables(shelf_models)[:2], device_budget="96MiB") as server:
        for name in NAMES[:2]:
            server.wait_for(name, "asleep")
            server.complete(name, "abc", 4)
        pids, kept = server.workers(), server.model("birch")["lease"]["weights"]
        assert server.order("ash", "sleep").status_code == httpx.codes.OK
        time.sleep(1)  # nobody needs the room
        assert server.model("birch")["lease"]["weights"] == kept
        assert server.model("birch")["status"] == "awake"
        assert server.workers() == pids, "a sleep ends no process"


def test_one_that_is_waited_for_holds_nobody_else_up(shelf: Server, right: dict[str, str]) -> None:
    """A model that cannot come back at the moment is no reason for another to wait."""
    shelf.complete("birch", "abc", 1)
    pid = shelf.workers()["ash"]
    os.kill(pid, signal.SIGSTOP)
    try:
        with ThreadPoolExecutor(1) as clients:
            stuck = clients.submit(shelf.complete, "ash", "abc", TOKENS)
            until(lambda: counts(shelf, "ash")["requests_parked"] == 1, 30, "it waits")
            for _ in range(3):
                assert shelf.complete("birch", "abc", TOKENS) == right["birch"]
            assert not stuck.done()
            os.kill(pid, signal.SIGCONT)
            assert stuck.result(120) == right["ash"]
    finally:
        os.kill(pid, signal.SIGCONT)


def test_processes_of_others_are_left_alone(tmp_path: Path, shelf_models: dict[str, Path]) -> None:
    """Neither a start nor a stop of the server ends what only looks like one of its workers."""
    disguise = f"exec -a 'python -m shoal.worker --control {tmp_path}/run/shoal/control.sock --model ash' sleep 900"
    other = subprocess.Popen(["bash", "-c", disguise])
    try:
        table: dict[str, object] = {
            "name": "ash",
            "source": str(shelf_models["ash"]),
            "dtype": "float32",
            "context": 512,
        }
        with serve(tmp_path, models=[table], device_budget="64MiB") as server:
            server.wait_for("ash", "asleep")
        assert alive(other.pid)
    finally:
        other.kill()
        other.wait(10)


def test_a_worker_that_heeds_no_signal(tmp_path: Path, shelf_models: dict[str, Path]) -> None:
    """Taken off the shelf while it hangs: it is killed, its memory comes back, and the others go on meanwhile."""
    with serve(tmp_path, models=tables(shelf_models)[:2], device_budget="96MiB") as server:
        for name in NAMES[:2]:
            server.wait_for(name, "asleep")
            server.complete(name, "abc", 4)
        pid = server.workers()["ash"]
        os.kill(pid, signal.SIGSTOP)
        text = server.config.read_text()
        start, end = text.index('[[model]]\nname = "ash"'), text.index('[[model]]\nname = "birch"')
        server.config.write_text(text[:start] + text[end:])
        assert server.http.post("/api/v1/reload", json={}).json()["removed"] == ["ash"]
        assert len(server.complete("birch", "abc", 4)) > 0
        until(lambda: not alive(pid), 60, "it is killed")
        until(lambda: server.state()["device"]["returning"] == 0, 30, "its memory is back")
        state = server.state()
        assert state["device"]["leased"] == server.model("birch")["lease"]["total"], state
