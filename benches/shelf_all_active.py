"""All models busy at once with 100, 75 and 50 % of the memory they need together.

Closed-loop clients, equally many a model, for a fixed time. The ceiling is the same traffic with all the memory needed:
what less memory costs is the ratio to it. Fairness is Jain's index over the tokens each model was given (1 = equal;
R. Jain, D. Chiu, W. Hawe, 1984).
"""

from __future__ import annotations

import argparse
import shutil
import sys
import tempfile
import threading
import time
from collections import defaultdict
from dataclasses import dataclass, field
from pathlib import Path

ROOT = Path(__file__).resolve().parents[1]
sys.path.insert(0, str(ROOT))

import httpx  # noqa: E402
from tests.support import models  # noqa: E402
from tests.support.server import Server, serve  # noqa: E402

from benches.client import Timed, stream  # noqa: E402
from benches.results import Row, percentile, save  # noqa: E402

NAMES = ["ash", "birch", "cedar"]
KV_ROOM_BYTES = 8 << 20


@dataclass
class Run:
    """What came of one stretch of traffic."""

    seconds: float
    answers: dict[str, list[Timed]] = field(default_factory=lambda: defaultdict(list))
    moved_bytes: int = 0
    evictions: int = 0


def moved(server: Server) -> tuple[int, int]:
    """Bytes copied to the device and evictions so far."""
    state = server.state()["models"]
    return sum(model["counts"]["restored"] for model in state), sum(model["counts"]["evictions"] for model in state)


def drive(server: Server, seconds: float, clients_per_model: int) -> Run:
    """Keep every model busy for `seconds`, then let what runs finish."""
    run = Run(seconds)
    before = moved(server)
    end = time.monotonic() + seconds
    lock = threading.Lock()

    def client(name: str, number: int) -> None:
        with httpx.Client(timeout=180) as http:
            turn = 0
            while time.monotonic() < end:
                turn += 1
                prompt = f"# client {number}, turn {turn}\ndef work(items):\n    "
                answer = stream(http, f"{server.url}/v1/completions", name, prompt, 32)
                with lock:
                    run.answers[name].append(answer)

    threads = [threading.Thread(target=client, args=(name, n)) for name in NAMES for n in range(clients_per_model)]
    start = time.monotonic()
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    run.seconds = time.monotonic() - start
    after = moved(server)
    run.moved_bytes, run.evictions = after[0] - before[0], after[1] - before[1]
    return run


def jain(values: list[float]) -> float:
    """Jain's fairness index."""
    squares = len(values) * sum(value * value for value in values)
    return sum(values) ** 2 / squares if squares else 0.0


def rows_of(case: str, run: Run) -> list[Row]:
    """Turn one stretch into rows."""
    every = [answer for answers in run.answers.values() for answer in answers]
    good = [answer for answer in every if answer.status == httpx.codes.OK]
    first = [answer.first_s for answer in good] or [float("nan")]
    per_model = [float(sum(answer.tokens for answer in run.answers[name])) for name in NAMES]
    return [
        Row(case, "first token p50", percentile(first, 0.5), "s", "lower", samples=len(good)),
        Row(case, "first token p99", percentile(first, 0.99), "s", "lower", samples=len(good)),
        Row(case, "tokens a second", sum(per_model) / run.seconds, "tokens/s", "higher", samples=len(good)),
        Row(case, "moved to the device", run.moved_bytes / 2**20, "MiB", "lower"),
        Row(case, "evictions", run.evictions, "count", "lower"),
        Row(case, "refused", len(every) - len(good), "requests", "lower", samples=len(every)),
        Row(case, "fairness", jain(per_model), "Jain index", "higher", ceiling=1.0),
    ]


def main() -> None:
    """Run the three budgets and write `shelf_all_active.json`."""
    arguments = argparse.ArgumentParser(description=__doc__)
    arguments.add_argument("--seconds", type=float, default=30)
    arguments.add_argument("--clients", type=int, default=2, help="clients a model")
    arguments.add_argument("--percent", type=int, nargs="+", default=[100, 75, 50], help="of the memory needed")
    arguments.add_argument("--keep", type=Path, help="where to leave the servers' logs")
    options = arguments.parse_args()
    rows: list[Row] = []
    with tempfile.TemporaryDirectory() as scratch:
        home = Path(scratch)
        paths = {name: models.make_llama(home / name, seed=seed) for seed, name in enumerate(NAMES)}
        tables: list[dict[str, object]] = [
            {"name": name, "source": str(path), "dtype": "float32", "context": 512} for name, path in paths.items()
        ]
        weights = sum((path / "model.safetensors").stat().st_size for path in paths.values())
        need = weights + len(NAMES) * KV_ROOM_BYTES
        base: dict[str, float] = {}
        for percent in options.percent:
            directory = home / f"at-{percent}"
            directory.mkdir()
            with serve(directory, models=tables, device_budget=need * percent // 100) as server:
                for name in NAMES:
                    server.wait_for(name, "asleep", "awake", "partly_resident")
                    server.complete(name, "warm", 4)
                run = drive(server, options.seconds, options.clients)
            if options.keep:
                shutil.copytree(directory, options.keep / directory.name, ignore=shutil.ignore_patterns("*.sock"))
            fresh = rows_of(f"{percent} % of {need >> 20} MiB", run)
            for row in fresh:
                if row.metric in {"first token p50", "first token p99", "tokens a second"}:
                    row.ceiling = base.setdefault(row.metric, row.value)
            rows += fresh
    save("shelf_all_active", rows)


if __name__ == "__main__":
    main()
