"""A soak of the real server with the demo shelf: random traffic, orders and kills, and every answer compared.

    python -m tests.soak.serve --minutes 60 [--seed N] [--result FILE] [--keep]

Three models (and a fourth that comes and goes) share `examples/shelf.toml`'s memory, which is too small for all.
Clients ask, stream, leave midway; the server is told to sleep, wake, pin and read changed files; workers and the server
are killed with SIGKILL, workers are stopped for a while. What must hold:

- each answer is the one that its model gave awake and alone, or a refusal with a reason; where a kill tore it, what was
  heard is its beginning (`answers.py`);
- after a kill the model is served again, and the ledger is at least what every process really holds, counted from
  outside; when all sleep, both are zero (`deeds.py`);
- the server's memory, files and threads are in the last tenth of its longest life what they were in the first; at the
  end no process is left, and no file but logs, the lock and the simulated device's book (`watch.py`).

The same seed asks the same things in the same order and does the same deeds. Real time decides what meets what, so a
run is not repeated exactly.
"""

from __future__ import annotations

import argparse
import json
import os
import random
import shutil
import signal
import sys
import tempfile
import threading
import time
from collections import Counter
from contextlib import suppress
from dataclasses import asdict
from pathlib import Path
from typing import Any

ROOT = Path(__file__).resolve().parents[2]
sys.path.insert(0, str(ROOT))

from tests.soak import answers  # noqa: E402
from tests.soak.answers import Case, Right  # noqa: E402
from tests.soak.clients import Tally, Traffic  # noqa: E402
from tests.soak.deeds import Deeds  # noqa: E402
from tests.soak.disturbances import Disturbances  # noqa: E402
from tests.soak.shelf_file import EXTRA, ShelfFile  # noqa: E402
from tests.soak.watch import MIB, Figures, Watch, files_left, processes_of, shared_memory  # noqa: E402
from tests.support.server import Server, free_port, start, wait_until_up  # noqa: E402
from tests.support.witness import until  # noqa: E402

CLIENTS = 6
PROGRESS_S = 30.0
SERVER_KILLS_SHARE = 0.55
"""The server is killed in the first part of the time only: one of its lives has to be long enough to grow in."""
RIGHT_SHARE_MIN = 0.75
"""Of those that were owed a right answer. Fewer would be a server that refuses in place of serving."""


def main() -> int:
    """Run it; the exit status is 0 where everything held."""
    arguments = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    arguments.add_argument("--minutes", type=float, default=10)
    arguments.add_argument("--seed", type=int, default=random.SystemRandom().randrange(1 << 32))
    arguments.add_argument("--result", type=Path, help="where to write the counts as JSON")
    arguments.add_argument("--keep", action="store_true", help="leave logs and files in any case")
    options = arguments.parse_args()
    home = Path(tempfile.mkdtemp(prefix="shoal-soak-"))
    print(f"seed {options.seed}, {options.minutes:g} minutes, in {home}", flush=True)
    soak = Soak(home, options.seed, options.minutes * 60)
    signal.signal(signal.SIGTERM, lambda *_: soak.interrupt())
    signal.signal(signal.SIGINT, lambda *_: soak.interrupt())
    report = soak.run()
    if options.result:
        options.result.parent.mkdir(parents=True, exist_ok=True)
        options.result.write_text(json.dumps(report, indent=1, default=str) + "\n")
    if report["faults"] or options.keep:
        print(f"logs and files are in {home}")
    else:
        shutil.rmtree(home, ignore_errors=True)
    if report["faults"]:
        print(f"{len(report['faults'])} faults (seed {options.seed}); the first: {report['faults'][0]['what']}")
        return 1
    return 130 if report["interrupted"] else 0


class Soak:
    """One run."""

    def __init__(self, home: Path, seed: int, seconds: float) -> None:
        self.home, self.seed, self.seconds = home, seed, seconds
        self.tally, self.during = Tally(), Disturbances()
        self.file = ShelfFile(home / "shoal.toml", port := free_port())
        (home / "tmp").mkdir()
        os.environ["TMPDIR"] = str(home / "tmp")
        self.shared_before = shared_memory()
        self.server = Server(home, port, start(home, self.file.path), self.file.path)
        self.deeds: Deeds | None = None
        self.left_out: list[str] = []
        self.interrupted = False
        self._began = time.monotonic()
        self._ended = threading.Event()

    def interrupt(self) -> None:
        """End soon, in order, with a report."""
        self.interrupted = True
        if self.deeds is None:
            self.server.stop()
            sys.exit(130)
        self.deeds.interrupt()

    def run(self) -> dict[str, Any]:
        """Learn, soak, end, and count what is left."""
        watch = None
        try:
            wait_until_up(self.server)
            rights = self._learn()
            traffic = Traffic(self.server.url, self.seed, rights, self.during, self.tally, clients=CLIENTS)
            self.deeds = Deeds(self.server, self.seed, self.file, traffic, self.during, cases=list(rights))
            watch = Watch(self.deeds.pids)
            threading.Thread(target=self._progress, daemon=True).start()
            self._began = time.monotonic()
            watch.start()
            traffic.start()
            self.deeds.run(self.seconds, self.seconds * SERVER_KILLS_SHARE)
            watch.stop()
            self._end(traffic)
        finally:
            self._ended.set()
            if self.server.process.poll() is None:
                self.server.stop()
        return self._report(watch)

    def _learn(self) -> dict[Case, Right | None]:
        """Ask each thing once with the model awake and alone."""
        began = time.monotonic()
        rights: dict[Case, Right | None] = {}
        names = [name for name in self.file.models if name != EXTRA]
        for name in [*names, EXTRA]:
            self.server.wait_for(name, "asleep", "awake", "partly_resident", timeout_s=300)

        def ask(case: Case, body: dict[str, Any]) -> dict[str, Any]:
            answer = self.server.http.post(case.path, json=body)
            answer.raise_for_status()
            return dict(answer.json())

        known: dict[tuple[str, str], Right | None] = {}
        for case in answers.cases():
            if case.refusal:
                rights[case] = None
                continue
            if case.model == EXTRA:  # the code model again, asked the same
                if (same := known["code", case.name.removeprefix(EXTRA)]) is not None:
                    rights[case] = same
                continue
            for other in names:
                if other != case.model and self.server.model(other)["lease"]["total"]:
                    self.server.order(other, "sleep").raise_for_status()
            known[case.model, case.name.removeprefix(case.model)] = right = answers.learn(ask, case)
            if right is None:
                self.left_out.append(case.name)
            else:
                rights[case] = right
        print(
            f"{len(rights)} right answers learnt in {time.monotonic() - began:.0f} s; left out, as two tokens were as "
            f"likely: {', '.join(self.left_out) or 'none'}",
            flush=True,
        )
        return rights

    def _end(self, traffic: Traffic) -> None:
        """End in order while clients still ask: they hear of it, and nothing is left."""
        time.sleep(3)
        self.during.begin("server", "server ended")
        threading.Thread(target=traffic.stop, daemon=True).start()
        status = self.server.stop(timeout_s=90)
        traffic.stop()
        if status != 0:
            self.tally.fault(f"the server ended with status {status}")
        with suppress(TimeoutError):
            until(lambda: not processes_of(self.home), 10, "all processes end")
        if left := processes_of(self.home):
            self.tally.fault(f"processes are left: {left}")
        if left := files_left(self.home):
            self.tally.fault(f"files are left: {left}")
        if left := shared_memory() - self.shared_before:
            self.tally.fault(f"shared memory is left: {left}")

    def _progress(self) -> None:
        while not self._ended.wait(PROGRESS_S):
            print(self._line(), flush=True)

    def _line(self) -> str:
        passed = int(time.monotonic() - self._began)
        with self.tally.lock:
            outcomes, longest = Counter(self.tally.outcomes), self.tally.longest_s
        kills = f"{self.during.count('worker killed')} workers and {self.during.count('server killed')} servers killed"
        said = ", ".join(f"{count} {outcome}" for outcome, count in outcomes.most_common(5))
        faults = len(self.tally.faults)
        return f"[{passed // 60:3}:{passed % 60:02}] {said}; {kills}; longest {longest:.1f} s; {faults} faults"

    def _report(self, watch: Watch | None) -> dict[str, Any]:
        growths = watch.growths() if watch else []
        for growth in growths:
            # Python, torch and their threads grow into their work, and a herd leaves the gateway up to 32 connections
            # to a worker; the server has no such reason.
            slack = (8 * MIB, 40, 2) if growth.who == "server" else (96 * MIB, 40, 12)
            for fault in growth.faults(*slack):
                self.tally.fault(fault)
        outcomes = self.tally.outcomes
        if not self.interrupted and (too_few := self.tally.too_few(RIGHT_SHARE_MIN)):
            self.tally.fault(too_few)
        deeds = self.deeds
        report = {
            "seed": self.seed,
            "minutes": round((time.monotonic() - self._began) / 60, 1),
            "interrupted": self.interrupted,
            "requests": sum(outcomes.values()),
            "owed": self.tally.owed,
            "outcomes": dict(outcomes.most_common()),
            "right_by_model": dict(self.tally.of_model),
            "deeds": dict(Counter(deeds.done).most_common()) if deeds else {},
            "workers_killed": self.during.count("worker killed"),
            "servers_killed": self.during.count("server killed"),
            "longest_s": round(self.tally.longest_s, 1),
            "longest": self.tally.longest,
            "longest_recovery_s": round(deeds.longest_recovery_s, 1) if deeds else None,
            "left_out": self.left_out,
            "growth": [asdict(growth) for growth in growths],
            "faults": self.tally.faults,
        }
        for key, value in report.items():
            if key not in {"faults", "growth"}:
                print(f"{key}: {value}")
        for growth in growths:
            print(f"{growth.who}, {growth.seconds:.0f} s: {_held(growth.first)}; then {_held(growth.last)}")
        return report


def _held(figures: Figures) -> str:
    return f"{figures.private_bytes / MIB:.1f} MiB, {figures.files} files, {figures.threads} threads"


if __name__ == "__main__":
    sys.exit(main())
