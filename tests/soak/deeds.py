"""What is done to a server in a soak beside its traffic: orders, changed files, kills, and looking at what is held.

One thread does one deed after another, drawn from a bag that holds each kind a fixed number of times, so that no seed
leaves a kind out. The same seed draws the same deeds; at which moment of a request they fall is real time's.
"""

from __future__ import annotations

import random
import signal
import subprocess
import sys
import threading
import time
from contextlib import suppress
from typing import TYPE_CHECKING, Any

import httpx

from tests.soak.clients import ANSWER_S_MAX
from tests.soak.disturbances import REMOVED
from tests.soak.shelf_file import EXTRA, ORPHAN_S_MAX
from tests.support.server import Server, environment
from tests.support.streams import alive
from tests.support.witness import Sample, Witness, send, until

if TYPE_CHECKING:
    from collections.abc import Callable

    from tests.soak.answers import Case
    from tests.soak.clients import Traffic
    from tests.soak.disturbances import Disturbance, Disturbances
    from tests.soak.shelf_file import ShelfFile

SERVING = {"asleep", "awake", "partly_resident", "waking"}
WELL_S_MAX = 180.0
"""How long a model may take to be served again after its worker was killed, on a busy machine."""
WORKER_END_S_MAX = 45.0
BAG = {
    "sleep": 4, "wake": 4, "pin": 2, "reload": 4, "reload_wrong": 1, "kill_worker": 4, "kill_server": 2,
    "stop_worker": 2, "look": 3, "herd": 1, "count": 4, "quiet": 1,
}  # fmt: skip


class Deeds:
    """Does them until time is over."""

    def __init__(
        self,
        server: Server,
        seed: int,
        file: ShelfFile,
        traffic: Traffic,
        during: Disturbances,
        *,
        cases: list[Case],
    ) -> None:
        self.server, self.file, self.traffic, self.during = server, file, traffic, during
        self.tally = traffic.tally
        self.done: list[str] = []
        self.longest_recovery_s = 0.0
        self._dice = random.Random(f"{seed} deeds")
        self._cases = [case for case in cases if not case.refusal]
        self._witness = Witness(server)
        self._recoveries: list[threading.Thread] = []
        self._helpers: list[threading.Thread] = []
        self._extra_gone: Disturbance | None = None
        self._is_over = threading.Event()

    def run(self, seconds: float, server_kills_s: float) -> None:
        """Go on for `seconds`; the server is killed only in the first of them, so that one of its lives is long."""
        start = time.monotonic()
        bag: list[str] = []
        while (passed := time.monotonic() - start) < seconds and not self._is_over.is_set():
            if not bag:
                bag = [name for name, count in BAG.items() for _ in range(count)]
                self._dice.shuffle(bag)
            name = bag.pop()
            dice = random.Random(self._dice.random())  # of its own: how much a deed draws may depend on what it meets
            if name == "kill_server" and passed > server_kills_s:
                continue
            self._is_over.wait(min(self._dice.expovariate(1 / 3), 10))
            self.done.append(name)
            try:
                getattr(self, f"_{name}")(dice)
            except Exception as error:  # noqa: BLE001 - whatever it is, it belongs into the report
                self.tally.fault(f"{name}: {error!r}")
        self._join()
        self.quiet_point()

    def interrupt(self) -> None:
        """End as soon as the deed under way is over."""
        self._is_over.set()

    # Orders

    def _order(self, what: str, path: str, body: dict[str, Any]) -> httpx.Response | None:
        """Send an order, which is carried out, refused in words, or broken off by a kill of the server."""
        began = time.monotonic()
        try:
            answer = httpx.post(self.server.url + path, json=body, timeout=ANSWER_S_MAX)
        except httpx.TransportError as error:
            if not self.during.of("server", began, time.monotonic()):
                self.tally.fault(f"{what}: {error!r} with nobody killed")
            return None
        if answer.status_code != httpx.codes.OK:
            error = answer.json().get("error", {})
            if answer.status_code not in {404, 409, 503, 504} or not (error.get("message") and error.get("code")):
                self.tally.fault(f"{what}: {answer.status_code} {answer.text}")
        return answer

    def _aside(self, target: Callable[..., Any], *arguments: Any) -> None:
        thread = threading.Thread(target=target, args=arguments, daemon=True)
        thread.start()
        self._helpers.append(thread)

    def _name(self, dice: random.Random) -> str:
        return dice.choice([name for name in self.file.models if name != EXTRA or self.file.has_extra])

    def _sleep(self, dice: random.Random) -> None:
        name, keep = self._name(dice), dice.choice([0, 0, 0.3, 0.7])
        self._aside(self._order, f"sleep {name}", f"/api/v1/models/{name}/sleep", {"keep": keep})

    def _wake(self, dice: random.Random) -> None:
        name = self._name(dice)
        self._aside(self._order, f"wake {name}", f"/api/v1/models/{name}/wake", {})

    def _pin(self, dice: random.Random) -> None:
        name, seconds = self._name(dice), dice.uniform(0.5, 5)
        # Beside some that are pinned others have no room, and say so.
        others = [self.during.begin(other, "another is pinned") for other in self.file.models if other != name]
        self._order(f"pin {name}", f"/api/v1/models/{name}/pin", {"pinned": True})
        self._is_over.wait(seconds)
        self._order(f"unpin {name}", f"/api/v1/models/{name}/pin", {"pinned": False})
        for other in others:
            self.during.end(other)

    def _reload(self, dice: random.Random) -> None:
        said = self.file.change(dice)
        self._mark_extra()
        how = dice.choice(["command", "signal", "request"])
        print(f"  reload by {how}: {said}", flush=True)
        if how == "command":
            ran = subprocess.run(
                [sys.executable, "-m", "shoal", "reload"],
                env=environment(self.server.home),
                capture_output=True,
                text=True,
                timeout=120,
                check=False,
            )
            if ran.returncode:
                self.tally.fault(f"shoal reload ({said}): {ran.stderr}{ran.stdout}")
        elif how == "signal":
            self.server.process.send_signal(signal.SIGHUP)
        else:
            answer = self._order("reload", "/api/v1/reload", {})
            if answer is not None and answer.status_code != httpx.codes.OK:
                self.tally.fault(f"reload ({said}): {answer.text}")
        self._extra_is_back()

    def _reload_wrong(self, dice: random.Random) -> None:
        self.file.write(wrong="nonsense = 1")
        answer = self._order("a wrong reload", "/api/v1/reload", {})
        self.file.write()
        if answer is None or answer.status_code != 409 or "nonsense" not in answer.text:
            self.tally.fault(f"a wrong file was not refused as it should be: {answer and answer.text}")

    def _mark_extra(self) -> None:
        if not self.file.has_extra and self._extra_gone is None:
            self._extra_gone = self.during.begin(EXTRA, REMOVED)

    def _extra_is_back(self) -> None:
        if self.file.has_extra and self._extra_gone is not None:
            until(lambda: self.status(EXTRA) is not None, 30, "the fourth model is there again")
            self.during.end(self._extra_gone)
            self._extra_gone = None

    # Looking

    def state(self) -> dict[str, Any]:
        """What the server says."""
        return dict(httpx.get(f"{self.server.url}/api/v1/state", timeout=30).json())

    def status(self, name: str) -> dict[str, Any] | None:
        """One model's part of it; None where there is no such model."""
        return next((model for model in self.state()["models"] if model["name"] == name), None)

    def pids(self) -> dict[str, int]:
        """The server's process and the workers'; what is known while the server is down."""
        found = {"server": self.server.process.pid}
        with suppress(httpx.HTTPError, ValueError):
            found |= {model["name"]: model["pid"] for model in self.state()["models"] if model.get("pid")}
        return found

    def _look(self, dice: random.Random) -> None:
        path = dice.choice(
            ["/", "/metrics", "/healthz", "/v1/models", "/api/v1/models/chat/why", "/openapi.json", "/api/v1/state"]
        )
        answer = httpx.get(self.server.url + path, timeout=30)
        if answer.status_code != httpx.codes.OK or not answer.text:
            self.tally.fault(f"GET {path}: {answer.status_code}")

    def _count(self, dice: random.Random) -> None:
        self._check_ledger(self._sample())

    def _sample(self) -> Sample | None:
        # A worker may end meanwhile by itself (a changed file) or start; then it is counted another time.
        return next((sample for _ in range(5) if (sample := self._witness.sample()) is not None), None)

    def _check_ledger(self, sample: Sample | None) -> None:
        """The ledger's sum is its parts, within the budget; nobody maps or holds more than its lease."""
        state = self.state()
        parts = sum(model["lease"]["total"] for model in state["models"])
        device = state["device"]
        if parts > device["leased"] or device["leased"] > device["budget"]:
            self.tally.fault(f"the ledger does not add up: {parts} of models, {device}")
        for name, mapped in (sample.mapped if sample else {}).items():
            leased, held = sample.leased.get(name, 0), sample.allocated[name]
            if max(mapped, held) > leased:
                self.tally.fault(f"{name} maps {mapped} and holds {held}, its lease is {leased}")

    # Kills

    def _victim(self, dice: random.Random) -> tuple[str, int] | None:
        workers = sorted((name, pid) for name, pid in self.pids().items() if name != "server")
        return dice.choice(workers) if workers else None

    def _kill_worker(self, dice: random.Random) -> None:
        victim = self._victim(dice)
        if victim is None:
            return
        name, pid = victim
        killed = self.during.begin(name, "worker killed")
        print(f"  SIGKILL of {name}'s worker {pid}", flush=True)
        send(pid, signal.SIGKILL)
        recovery = threading.Thread(target=self._see_well, args=(name, pid, killed), daemon=True)
        recovery.start()
        self._recoveries.append(recovery)
        if dice.random() < 0.6:  # else the next deed comes while it is down
            recovery.join(WELL_S_MAX + 10)
            self._check_ledger(self._sample())

    def _see_well(self, name: str, pid: int, killed: Disturbance) -> None:
        """Wait until another worker serves the model, or the model is gone from the file."""
        began = time.monotonic()

        def is_well() -> bool:
            with suppress(httpx.HTTPError, ValueError):
                model = self.status(name)
                if model is None:
                    return not alive(pid)
                return model.get("pid") not in {None, pid} and model["status"] in SERVING and not alive(pid)
            return False

        try:
            until(is_well, WELL_S_MAX, f"{name} is served again")
            self.longest_recovery_s = max(self.longest_recovery_s, time.monotonic() - began)
        except TimeoutError as error:
            self.tally.fault(f"{error}: {self._last_words(name)}")
        self.during.end(killed)

    def _last_words(self, name: str) -> str:
        with suppress(httpx.HTTPError):
            return str(self.status(name))
        return "the server does not answer"

    def _stop_worker(self, dice: random.Random) -> None:
        victim = self._victim(dice)
        if victim is None:
            return
        send(victim[1], signal.SIGSTOP)
        time.sleep(dice.uniform(0.2, 3))
        send(victim[1], signal.SIGCONT)

    def _kill_server(self, dice: random.Random) -> None:
        down_s = dice.choice([0, 0.2, 1, 3, ORPHAN_S_MAX + 7])
        also_worker, also_file = dice.random() < 0.3, dice.random() < 0.3
        before = {model["name"]: model for model in self.state()["models"] if model.get("pid")}
        killed = self.during.begin("server", "server killed")
        print(f"  SIGKILL of the server, for {down_s} s", flush=True)
        self.server.kill()
        gone: set[str] = set()
        if also_worker and before:
            name = dice.choice(sorted(before))
            send(before[name]["pid"], signal.SIGKILL)
            gone.add(name)
        if also_file:
            print(f"  and meanwhile: {self.file.change(dice)}", flush=True)
            self._mark_extra()
            gone |= set(self.file.models)  # which of them may go on is tests/e2e's to say
        time.sleep(down_s)
        if down_s > ORPHAN_S_MAX:
            # What a busy worker needs to end, on a busy machine, comes on top.
            with suppress(TimeoutError):
                until(lambda: not any(alive(model["pid"]) for model in before.values()), WORKER_END_S_MAX, "all end")
            left = [name for name, model in before.items() if alive(model["pid"])]
            if left:
                self.tally.fault(f"workers of {left} hold memory long after their server")
            gone |= set(before)
        self.server.start_again()
        self.during.end(killed)
        for name in self.file.models:
            if name != EXTRA or self.file.has_extra:
                until(lambda name=name: self._is_served(name), WELL_S_MAX, f"{name} is served by the next server")
        self._extra_is_back()
        for name, model in before.items():
            is_known = model["status"] in SERVING and not self.during.of(name, killed.began, time.monotonic())
            if name not in gone and is_known and (now := self.status(name)) and now["pid"] != model["pid"]:
                self.tally.fault(f"{name}'s worker {model['pid']} ({model['status']}) did not go on: {now['state']}")
        self._check_ledger(self._sample())

    def _is_served(self, name: str) -> bool:
        model = self.status(name)
        return model is not None and model["status"] in SERVING

    # Herds and quiet points

    def _herd(self, dice: random.Random) -> None:
        self.traffic.herd(dice.choice(self._cases), dice.choice([12, 40]))

    def _quiet(self, dice: random.Random) -> None:
        self.quiet_point()

    def quiet_point(self) -> None:
        """Nobody asks, all sleep: then nothing is leased, nothing mapped, nothing held."""
        self._join()
        self.traffic.pause()
        try:
            for name in self.file.models:
                if name != EXTRA or self.file.has_extra:
                    until(lambda name=name: self._is_served(name), WELL_S_MAX, f"{name} is served before it is quiet")
                    self._order(f"sleep {name}", f"/api/v1/models/{name}/sleep", {})
            until(lambda: self.state()["device"]["leased"] == 0, 30, f"all leases return: {self._leases()}")
            sample = self._sample()
            if sample is None:
                self.tally.fault("no worker stayed for a count although nobody asked for anything")
            elif any(sample.mapped.values()) or any(sample.allocated.values()) or any(sample.leased.values()):
                self.tally.fault(f"all sleep, and this is held: {sample}")
        finally:
            self.traffic.resume()

    def _leases(self) -> dict[str, Any]:
        return {model["name"]: (model["status"], model["lease"]) for model in self.state()["models"]}

    def _join(self) -> None:
        """Wait for the orders and the recoveries under way."""
        for thread in [*self._recoveries, *self._helpers]:
            thread.join(max(ANSWER_S_MAX, WELL_S_MAX) + 30)
            if thread.is_alive():
                self.tally.fault("an order or a recovery never ended")
        self._recoveries.clear()
        self._helpers.clear()
