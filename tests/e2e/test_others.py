"""Memory that no lease covers: other processes on the device, the dead, and holders that do not answer."""

from __future__ import annotations

import os
import signal
import subprocess
import sys
import textwrap
import time
from typing import TYPE_CHECKING, Any

import httpx
import pytest
from tests.support.server import Server, environment, serve
from tests.support.stranger import stranger
from tests.support.streams import Stream, alive
from tests.support.witness import until, wait_stopped

if TYPE_CHECKING:
    from pathlib import Path

MIB = 1 << 20
BUDGET, HEADROOM = 64 * MIB, 8 * MIB
PROMPT = "abc"


def shoal(server: Server, *command: str) -> str:
    """What a command prints."""
    said = subprocess.run(
        [sys.executable, "-m", "shoal", *command, "--server", server.url],
        env=environment(server.home), check=True, capture_output=True, text=True, timeout=30,
    )  # fmt: skip
    return said.stdout


def resident(server: Server) -> int:
    """What models hold of the device."""
    return sum(model["lease"]["total"] for model in server.state()["models"])


def room_beside(server: Server, others: int) -> int:
    """What is free on the device, once the driver was seen to know of all that others have."""
    seen = server.device()["driver"]
    return int(seen["free"]) if seen["others"] == others else 0


def test_others_take_memory_and_leave(tmp_path: Path, model_tables: list[dict[str, object]]) -> None:
    """Models yield what others took, no further; all answer rightly meanwhile; the budget grows back."""
    names = [str(table["name"]) for table in model_tables]
    settings: dict[str, Any] = {"device_budget": f"{BUDGET}", "headroom": f"{HEADROOM}"}
    with serve(tmp_path, models=model_tables, **settings) as server:
        for name in names:
            server.wait_for(name, "asleep")
        right = {name: server.complete(name, PROMPT, 8) for name in names}
        assert server.order(names[2], "sleep").status_code == httpx.codes.OK
        for name in names[:2]:
            assert server.order(name, "wake").status_code == httpx.codes.OK
        until(lambda: server.device()["driver"] is not None, 60, "the driver is asked")
        before = server.device()
        assert (before["taken"], before["budget"], before["driver"]["others"]) == (0, BUDGET, 0)
        assert before["leased"] > 40 * MIB
        pids = server.workers()
        with stranger(server, BUDGET + HEADROOM) as other:
            other.take(16 * MIB)
            until(lambda: server.device()["taken"] == 16 * MIB, 60, "it comes off the budget")
            until(lambda: server.device()["leased"] <= BUDGET - 16 * MIB, 60, "what is leased beyond comes back")
            until(lambda: server.device()["driver"]["free"] >= HEADROOM - 2 * MIB, 60, "what is to stay free is free")
            now = server.device()
            assert now["driver"]["others"] == 16 * MIB
            assert [process["pid"] for process in now["driver"]["processes"]] == [other.process.pid]
            assert now["driver"]["is_by_process"]
            # Only as much as was owed.
            assert now["leased"] > BUDGET - 16 * MIB - 8 * MIB
            # Whoever asks is served in what is left, with the same answers.
            for _ in range(2):
                for name in names:
                    assert server.complete(name, PROMPT, 8) == right[name]
                    assert resident(server) <= BUDGET - 16 * MIB
            shown = shoal(server, "ps")
            assert "others have 16 MiB, of which 16 MiB come off the budget" in shown, shown
            assert str(other.process.pid) in shown
            assert "Others have 16 MiB of the device" in shoal(server, "why", names[0])
            metrics = server.http.get("/metrics").text
            assert f'shoal_device_ledger_bytes{{kind="taken"}} {16 * MIB}' in metrics
            assert f'shoal_device_driver_bytes{{kind="others"}} {16 * MIB}' in metrics
            # It grows, and finds room each time, as long as models have something to give. Nobody is ended.
            others = 16 * MIB
            while others < 48 * MIB:
                until(lambda others=others: room_beside(server, others) >= 6 * MIB, 60, "models make room")
                other.take(4 * MIB)
                others += 4 * MIB
            until(lambda: server.device()["taken"] == others, 60, "all of it comes off")
            assert server.workers() == pids
            events = server.told("device_taken")
            assert [event["taken"] for event in events] == sorted(event["taken"] for event in events)
            assert f"{other.process.pid}: " in events[0]["text"]
            evicted = [event for event in server.told("evict_started") if "others have 16 MiB" in event["text"]]
            assert evicted, "models yielded for somebody's sake"
        until(lambda: server.device()["taken"] == 0, 60, "the budget grows back")
        assert "can be shared again" in server.told("device_taken")[-1]["text"]
        for name in names:
            assert server.complete(name, PROMPT, 8) == right[name]
        assert server.workers() == pids, "somebody was ended for it"


def test_a_model_that_does_not_fit_beside_others_waits_and_comes_when_they_leave(
    tmp_path: Path, model_tables: list[dict[str, object]]
) -> None:
    """A request is refused in time with the numbers; one that waits is answered once others have left."""
    name = str(model_tables[0]["name"])
    with serve(tmp_path, models=model_tables[:1], device_budget=f"{BUDGET}", wait_s_max=60) as server:
        server.wait_for(name, "asleep")
        right = server.complete(name, PROMPT, 8)
        server.order(name, "sleep")
        with stranger(server, BUDGET) as other:
            other.take(48 * MIB)
            until(lambda: server.device()["taken"] == 48 * MIB, 60, "it comes off")
            refused = server.order(name, "wake", wait_s=10)
            assert refused.status_code != httpx.codes.OK
            assert "while others have 48 MiB of the device" in refused.text, refused.text
            client = Stream(server, name)
            until(lambda: server.model(name)["counts"]["requests_parked"] == 1, 60, "it waits")
        text = client.end()
        assert text.startswith(right)
        assert not client.errors


def test_a_holder_that_does_not_answer(tmp_path: Path, model_tables: list[dict[str, object]]) -> None:
    """The next one is asked; where nobody answers, who asked hears so in time. Nobody is ended."""
    first, second, asking = (str(table["name"]) for table in model_tables)
    with serve(tmp_path, models=model_tables, device_budget="56MiB", quantum="200ms", wait_s_max=30) as server:
        for name in (first, second, asking):
            server.wait_for(name, "asleep")
        right = {name: server.complete(name, PROMPT, 8) for name in (asking, first, second)}
        for name in (first, second):
            assert server.order(name, "wake").status_code == httpx.codes.OK
        pids = server.workers()
        # The one that the policy asks first is seen from whom it would have asked.
        os.kill(pids[first], signal.SIGSTOP)
        os.kill(pids[second], signal.SIGSTOP)
        try:
            for name in (first, second):
                wait_stopped(pids[name])
            refused = server.order(asking, "wake", wait_s=8)
            assert refused.status_code != httpx.codes.OK
            assert "did not answer when asked" in refused.text, refused.text
            late = server.told("evict_timed_out")
            assert {event["model"] for event in late} == {first, second}, "the next one was not asked"
            os.kill(pids[second], signal.SIGCONT)
            assert server.complete(asking, PROMPT, 8) == right[asking]
            assert server.workers() == pids
        finally:
            for name in (first, second):
                os.kill(pids[name], signal.SIGCONT)
        for name, text in right.items():
            assert server.complete(name, PROMPT, 8) == text
        assert server.workers() == pids
        assert all(alive(pid) for pid in pids.values())


# Takes the device memory of a lease and a child that outlives it: what it held is not free when it is gone.
HOLDER = """
    import os, sys, time
    from pathlib import Path
    import shoal

    client = shoal.BrokerClient.connect(sys.argv[1], sys.argv[2])
    client.on_disconnect = "exit"
    mem = shoal.MemoryManager(broker=client)
    if not Path(sys.argv[3]).exists():
        region = mem.region("weights", 40 << 20, kind="kv")
        region.commit(0, 40 << 20)
        child = os.fork()
        if child == 0:
            os.setsid()  # what is left in the worker's group is ended with it
            Path(sys.argv[3]).write_text(str(os.getpid()))
            time.sleep(600)
            os._exit(0)
        while not Path(sys.argv[3]).exists() or not Path(sys.argv[3]).read_text():
            time.sleep(0.01)
    client.ready({
        "routes": ["completions"], "context_tokens": 16, "weights_bytes": 2 << 20, "kv_block_bytes": 0,
        "kv_bytes_min": 0, "kv_block_tokens": 0, "dtype": "float32",
    })
    while client.connected:
        time.sleep(0.2)
"""


@pytest.fixture
def holder(tmp_path: Path) -> dict[str, object]:
    """A model whose worker is `HOLDER`."""
    script = tmp_path / "holder.py"
    script.write_text(textwrap.dedent(HOLDER))
    args = [sys.executable, str(script), "{control}", "{model}", str(tmp_path / "child")]
    return {"name": "holder", "source": str(tmp_path), "engine": "worker", "args": args}


def test_the_memory_of_the_dead_is_returning_until_it_is_seen_free(
    tmp_path: Path, model_tables: list[dict[str, object]], holder: dict[str, object]
) -> None:
    """Killed with SIGKILL, and the device still has its bytes: they are leased to nobody before they are free."""
    name, child_file = str(model_tables[0]["name"]), tmp_path / "child"
    with serve(tmp_path, models=[model_tables[0], holder], device_budget=f"{BUDGET}") as server:
        server.wait_for(name, "asleep")
        server.wait_for("holder", "asleep", "partly_resident", "awake")
        until(lambda: server.model("holder")["lease"]["total"] == 40 * MIB, 60, "it holds")
        until(lambda: server.device()["driver"]["ours"] == 40 * MIB, 60, "the driver shows it")
        pid = server.workers()["holder"]
        child = int(child_file.read_text())
        try:
            os.kill(pid, signal.SIGKILL)
            until(lambda: not alive(pid), 60, "it is gone")
            until(lambda: server.device()["returning"] == 40 * MIB, 60, "its bytes are returning")
            client = Stream(server, name)
            # It is waited for at first, and after a while it counts as others': nobody has it either way.
            waits, is_others = "not seen to be free yet", "are still there by the driver's word"
            said = waits
            deadline = time.monotonic() + 60
            while said == waits and time.monotonic() < deadline:
                why = " ".join(server.http.get(f"/api/v1/models/{name}/why").json()["now"])
                said = waits if waits in why else is_others
                assert said in why, why
                now = server.device()
                assert (now["returning"], now["leased"]) == (40 * MIB, 40 * MIB), "given away before it was free"
                assert now["taken"] == 0, "counted twice"
                assert not client.texts
                time.sleep(0.1)
            assert said == is_others, "it is waited for without end"
            assert is_others in shoal(server, "why", name)
            assert not client.texts
        finally:
            os.kill(child, signal.SIGKILL)
        assert client.end()
        assert server.device()["returning"] == 0
        (returned,) = server.told("memory_returned")
        assert (returned["pid"], returned["bytes"], returned["seen"]) == (pid, 40 * MIB, True)
        assert returned["after_ms"] > 2_000
