"""Lives of workers and programs on a GPU: a new server, a changed file, somebody else's program, what prefixes cost.

Run by `tests/gpu/run.sh shelf_life`. Writes to $SHOAL_RESULT what each took and whether it held: workers that go on
under the next server with what they hold, one that died while there was none, `shoal reload` beside a stream, a program
of torch that takes more than it declares, and the price by which cached prefixes are given up.
"""

from __future__ import annotations

import os
import re
import signal
import subprocess
import sys
import tempfile
import time
from pathlib import Path
from typing import TYPE_CHECKING, Any

from tests.gpu.shelf import DEVICE, ON_GPU, SIZE, TORCH_DEVICE, Report, expect, fall_asleep, first_token_s, used_bytes
from tests.support import models
from tests.support.server import Server, environment, serve, write_config
from tests.support.streams import TOKENS, Stream, alive
from tests.support.witness import until

if TYPE_CHECKING:
    from collections.abc import Iterator

NAMES = ["ash", "birch", "cedar"]
PROMPT = "def main("
ENGINE = Path(__file__).resolve().parents[2] / "crates/shoal-server/tests/fake_engine.py"
BODY = b'{ "model" : "program",\t"messages": [],  "made_up": 1.50 }'
SLACK = 64 << 20  # between two readings of the GPU's memory
MIB = 1 << 20
# What the program declares, and what it takes beside a context of its own.
DECLARED, TAKEN = (1024, 2048) if ON_GPU else (24, 48)
OVERHEAD = 0 if not ON_GPU else 832 * MIB
CONTEXT = 512
# A worker keeps the KV of four contexts at most. So many prompts fill what another model's weights leave.
PRICES_CONTEXT, PROMPTS = (4096, 40) if ON_GPU else (CONTEXT, 12)
KV_BYTES = 2 * SIZE["layers"] * 2 * (SIZE["hidden"] // 4) * 4  # a token, of models.make_llama in float32
PRICED = re.compile(
    r"(\w+) holds [^;]* of KV for prompts.*?(\d+) us to bring it back, a use finds ([0-9.]+)% of it again"
)


def main() -> int:
    """Run everything; the exit status says whether all held."""
    report = Report()
    with tempfile.TemporaryDirectory(prefix="shelf-life-") as directory:
        root = Path(directory)
        paths = {
            name: models.make_llama(root / name, seed=seed, context=PRICES_CONTEXT, **SIZE)
            for seed, name in enumerate(NAMES)
        }
        right = {name: models.plain_greedy(paths[name], PROMPT, TOKENS, TORCH_DEVICE) for name in NAMES}
        if ON_GPU:
            import torch

            torch.cuda.empty_cache()
        tables: list[dict[str, object]] = [
            {"name": name, "source": str(path), "dtype": "float32", "context": CONTEXT} for name, path in paths.items()
        ]
        before = used_bytes()
        for part in (next_servers, reloads, programs, turns, prices):
            home = root / part.__name__
            home.mkdir()
            report.check(f"{part.__name__}: to its end", lambda: part(report, home, tables, right))  # noqa: B023 - called here
            report.check(f"{part.__name__}: nothing is left on the GPU", lambda: returns_to(before))
            # What is cut off by a limit of time has at least this.
            report.save()
    return 1 if report.failed else 0


def returns_to(before: int) -> None:
    until(lambda: used_bytes() <= before + SLACK, 20, "the GPU has its memory back")


def room(nbytes: int) -> dict[str, Any]:
    """Settings of a server that may use so much; on the simulated device the device has little more."""
    return {"device": DEVICE, "device_budget": nbytes}


def rested(server: Server, names: list[str]) -> None:
    for name in names:
        server.wait_for(name, "asleep", "awake", "partly_resident", timeout_s=100)


def next_servers(report: Report, home: Path, tables: list[dict[str, object]], right: dict[str, str]) -> None:
    """The server is killed; workers go on under the next one, and one that died meanwhile is started again."""
    awake, partly, asleep = NAMES
    with serve(home, models=tables, **room(3 * OVERHEAD + 2048 * MIB)) as server:
        rested(server, NAMES)
        for name in NAMES:
            assert server.complete(name, PROMPT, TOKENS) == right[name], name
        server.order(asleep, "sleep").raise_for_status()
        server.order(partly, "sleep", keep=0.5).raise_for_status()
        server.wait_for(asleep, "asleep", timeout_s=20)
        server.wait_for(partly, "partly_resident", timeout_s=20)
        time.sleep(2)
        pids = server.workers()
        stood = {name: server.model(name) for name in NAMES}
        used = used_bytes()

        def go_on() -> None:
            client = Stream(server, awake)
            until(lambda: len(client.texts) > 5, 60, "the stream goes on")
            server.kill()
            assert all(alive(pid) for pid in pids.values())
            begun = time.monotonic()
            server.start_again()
            for name in NAMES:
                server.wait_for(name, stood[name]["status"], timeout_s=120)
            report.figure("a killed server's three workers", "under the next one", [time.monotonic() - begun], "s")
            assert server.workers() == pids, "the same processes"
            assert len(server.told("worker_adopted")) == len(NAMES)
            for name in NAMES:
                now = server.model(name)
                assert now["bytes"]["weights_device"] == stood[name]["bytes"]["weights_device"], name
                assert now["lease"]["weights"] == stood[name]["lease"]["weights"], name
                assert now["starts"] == 1, "it was started again"
            if ON_GPU:
                expect(abs(used_bytes() - used), SLACK)
            begun = time.monotonic()
            for name in NAMES:
                assert server.complete(name, PROMPT, TOKENS) == right[name], name
            report.figure("answers of all three after that", "time", [time.monotonic() - begun], "s")

        report.check("workers go on under the next server with what they hold", go_on)

        def died_meanwhile() -> None:
            server.kill()
            os.kill(pids[awake], signal.SIGKILL)
            until(lambda: not alive(pids[awake]), 20, "it is gone")
            server.start_again()
            until(lambda: server.workers().get(awake) not in {None, pids[awake]}, 60, "another is started")
            for name in NAMES:
                assert server.complete(name, PROMPT, TOKENS) == right[name], name
            assert {name: pid for name, pid in server.workers().items() if name != awake} == {
                name: pid for name, pid in pids.items() if name != awake
            }

        report.check("one that died while there was no server is started again, beside the others", died_meanwhile)
        if report.failed:
            print(server.logs(60))


def reloads(report: Report, home: Path, tables: list[dict[str, object]], right: dict[str, str]) -> None:
    """Models come, go and change beside a stream, and what goes gives its memory back."""
    ash, birch, cedar = NAMES
    settings = room(3 * OVERHEAD + 2048 * MIB)
    with serve(home, models=tables[:2], **settings) as server:
        rested(server, [ash, birch])
        assert server.complete(birch, PROMPT, TOKENS) == right[birch]
        assert server.complete(ash, PROMPT, TOKENS) == right[ash]
        full = server.complete(ash, "abc", TOKENS)
        pids, used = server.workers(), used_bytes()

        def reload() -> None:
            stream = Stream(server, ash)
            until(lambda: bool(stream.texts), 60, "the stream begins")
            listen = {"listen": f"127.0.0.1:{server.port}", "tier_load": "always", **settings}
            write_config(home, listen, [tables[2], tables[0] | {"priority": 4}])
            command = [sys.executable, "-m", "shoal", "reload"]
            begun = time.monotonic()
            ran = subprocess.run(command, env=environment(home), capture_output=True, text=True, check=False)
            report.figure("shoal reload", "time", [time.monotonic() - begun], "s")
            assert ran.stdout == f"configuration read again (added: {cedar}; removed: {birch}; changed: {ash})\n", ran
            until(lambda: not alive(pids[birch]), 20, "the model that went is gone")
            if ON_GPU:
                # The new model's worker takes a context of its own, which may come before the old one's goes.
                until(lambda: used_bytes() < used, 20, "its memory is back")
                report.figure("a removed model's memory", "back after", [time.monotonic() - begun], "s")
            rested(server, [cedar])
            report.figure("an added model", "ready after", [time.monotonic() - begun], "s")
            assert stream.end() == full, "the stream beside it suffered"
            assert server.workers()[ash] == pids[ash]
            assert server.complete(cedar, PROMPT, TOKENS) == right[cedar]
            assert server.model(ash)["priority"] == 4

        report.check("models come, go and change beside a stream", reload)
        if report.failed:
            print(server.logs(60))


def program(taken: int, declared: int) -> dict[str, object]:
    """The `[[model]]` table of somebody's program that takes so many MiB, on the GPU with torch."""
    args = [str(ENGINE), "--port", "{port}", "--mib", str(taken)]
    args += ["--torch", DEVICE] if ON_GPU else []
    return {
        "name": "program", "engine": "command", "command": sys.executable, "args": args,
        "device_bytes": f"{declared}MiB",
    }  # fmt: skip


def ask_program(server: Server) -> float:
    """Ask it; gives the seconds that its answer took."""
    begun = time.monotonic()
    headers = {"Content-Type": "application/json"}
    answer = server.http.post("/v1/chat/completions", content=BODY, headers=headers, timeout=90)
    assert (answer.status_code, answer.content) == (200, BODY), f"{answer.text}\n{server.logs()}"
    return time.monotonic() - begun


def programs(report: Report, home: Path, tables: list[dict[str, object]], right: dict[str, str]) -> None:
    """A program that takes more than it declares is charged with it, dies, comes back, and goes with its server."""
    ash = NAMES[0]
    more: dict[str, Any] = {"device": DEVICE} if ON_GPU else {"device": DEVICE, "device_budget": 256 * MIB}
    with serve(home, models=[program(TAKEN, DECLARED), tables[0]], **more) as server:
        rested(server, [ash])
        assert server.complete(ash, PROMPT, TOKENS) == right[ash]
        time.sleep(2)
        idle, others = used_bytes(), server.device()["taken"]

        def charged() -> None:
            report.figure("a program of torch", "started and answered", [ask_program(server)], "s")
            excess = (TAKEN - DECLARED) * MIB
            taken: list[int] = []

            def accounted() -> bool:
                lease = server.model("program")["lease"]["total"]
                taken[:] = [lease, server.device()["taken"] - others]
                took = used_bytes() - idle if ON_GPU else DECLARED * MIB + excess
                # Not both of them: what is not seen to be its own at first is others' until it is.
                return abs(sum(taken) - took) <= SLACK and sum(taken) >= DECLARED * MIB + excess

            begun = time.monotonic()
            until(accounted, 20, f"what it takes is charged to it or to others: {taken}")
            report.figure("a program of torch", "charged with all of it after", [time.monotonic() - begun], "s")
            lease, elsewhere = taken
            print("the program's lease", lease, "and taken by others", elsewhere, server.model("program")["lease"])
            if ON_GPU:
                took = used_bytes() - idle
                report.figure("a program of torch", "what the GPU has less", [took], "bytes")
                report.figure("a program of torch", "its lease", [lease], "bytes")
            assert server.complete(ash, PROMPT, TOKENS) == right[ash]

        report.check("all that a program takes is charged, to it where the driver shows whose it is", charged)

        def dies() -> None:
            pid = server.workers()["program"]
            seen = len(server.told("memory_returned"))
            os.kill(pid, signal.SIGKILL)
            until(lambda: len(server.told("memory_returned")) > seen, 30, "its memory is seen free")
            event = server.told("memory_returned")[-1]
            print(event["text"])
            report.figure("a killed program's memory", "seen free after", [event["after_ms"]], "ms")
            if ON_GPU:
                until(lambda: used_bytes() <= idle + SLACK, 20, "the GPU has it back")
            until(lambda: server.device()["taken"] <= others, 20, "nothing of it is others'")
            ask_program(server)
            assert server.workers()["program"] != pid

        report.check("a killed program's memory comes back, and the next request starts another", dies)

        def goes_with_server() -> None:
            pids = server.workers()
            server.kill()
            until(lambda: not alive(pids["program"]), 20, "the program goes with its server")
            if ON_GPU:
                until(lambda: used_bytes() <= idle + SLACK, 20, "its memory is back")
            assert alive(pids[ash]), "the worker stays"
            server.start_again()
            rested(server, [ash])
            assert server.workers()[ash] == pids[ash]
            assert server.complete(ash, PROMPT, TOKENS) == right[ash]
            ask_program(server)

        report.check("a program goes with a killed server, a worker stays", goes_with_server)
        if report.failed:
            print(server.logs(60))


def turns(report: Report, home: Path, tables: list[dict[str, object]], right: dict[str, str]) -> None:
    """A program and a model take turns in memory that has room for one of them."""
    ash = NAMES[0]
    declared = DECLARED + 512 if ON_GPU else 64
    budget = OVERHEAD + declared * MIB + (64 if ON_GPU else 12) * MIB
    taken = 512 if ON_GPU else 8
    with serve(home, models=[program(taken, declared), tables[0]], **room(budget)) as server:
        rested(server, [ash])

        def by_turns() -> None:
            started, woken = [], []
            for _ in range(3):
                started.append(ask_program(server))
                pid = server.workers()["program"]
                woken.append(first_token_s(server, ash, PROMPT))
                until(lambda: not alive(pid), 20, "the program yielded")  # noqa: B023 - looked at here
                assert server.complete(ash, PROMPT, TOKENS) == right[ash]
                assert server.model("program")["lease"]["total"] == 0
            report.figure("a program that a model yields to", "answer", started, "s")
            report.figure("a model that a program yields to", "first token", woken, "s")

        report.check("a program and a model take turns", by_turns)
        if report.failed:
            print(server.logs(60))


def priced(server: Server) -> Iterator[tuple[str, int, float]]:
    """Whose cached prefixes were given up, what a MiB of them was said to cost, and how much of them a use finds."""
    for event in server.told("evict_started"):
        for name, cost, found in PRICED.findall(event["text"]):
            yield name, int(cost), float(found)


def prices(report: Report, home: Path, tables: list[dict[str, object]], right: dict[str, str]) -> None:
    """A model's cached prefixes are given up at the price that computing them was measured to have."""
    ash, birch, _ = NAMES
    weights = sum(file.stat().st_size for file in Path(str(tables[0]["source"])).glob("*.safetensors"))
    # Room for both models' weights and little more: while one sleeps the other's prefixes fill what is left.
    budget = 2 * OVERHEAD + 2 * weights + 2 * CONTEXT * KV_BYTES + (64 if ON_GPU else 4) * MIB
    long = [table | {"context": PRICES_CONTEXT} for table in tables[:2]]
    with serve(home, models=long, **room(budget)) as server:
        rested(server, [ash, birch])

        def told() -> None:
            times: list[float] = []
            again: list[float] = []
            tokens = 0
            for turn in range(3):
                fall_asleep(server, birch)
                for number in range(PROMPTS):
                    # Written once, and asked again.
                    prompt = f"{turn} {number:02d} " + "def work(items):\n    return sorted(items)\n" * 9
                    tokens = len(prompt)
                    times.append(first_token_s(server, ash, prompt))
                    again.append(first_token_s(server, ash, prompt))
                first_token_s(server, birch, PROMPT)
            found = [one for one in priced(server) if one[0] in NAMES]
            print("priced:", found)
            assert found, [event["text"] for event in server.told("evict_started")]
            of_mib = 1e6 / (tokens * KV_BYTES / MIB)
            computed, at_once = (sorted(one)[len(one) // 2] * of_mib for one in (times, again))
            costs = [float(cost) for _, cost, _ in found]
            report.figure("a MiB of a cached prefix: first tokens of prompts that are not", "cost", [computed], "us")
            report.figure("a MiB of a cached prefix: first tokens of those that are", "cost", [at_once], "us")
            report.figure("a MiB of a cached prefix: as the policy prices it", "cost", costs, "us")
            report.figure("a cached prefix", "a use finds", [share for *_, share in found], "%")
            # What a first token takes anyhow is in neither: the price is about what finding saves of it.
            price, saved = sorted(costs)[len(costs) // 2], computed - at_once
            if saved > computed / 4:
                assert saved / 3 < price < saved * 3, (price, saved, computed)
            else:  # too little to be told from what first tokens differ by
                assert price < computed / 2, (price, saved, computed)

        report.check("cached prefixes are given up at what finding them saves", told)
        assert server.complete(ash, PROMPT, TOKENS) == right[ash]
        if report.failed:
            print(server.logs(60))


if __name__ == "__main__":
    sys.exit(main())
