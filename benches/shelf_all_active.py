"""All models busy at once with 100, 75 and 50 % of the memory they need together.

Closed-loop clients, equally many a model, for a fixed time. The ceiling of tokens and first tokens is the same traffic
with all the memory needed: what less memory costs is the ratio to it. Where only one model fits at a time, the ceiling
of tokens is what one alone gives in its turns, with a memcpy of a whole model between two of them. Their peer is plain
transformers with all models loaded in one process, which answers such prompts in batches of a model's clients. Beside
the bytes moved stands what a memcpy of them takes here. Fairness is Jain's index over the tokens each model was given
(1 = equal; R. Jain, D. Chiu, W. Hawe, 1984).
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
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from collections.abc import Sequence

ROOT = Path(__file__).resolve().parents[1]
sys.path.insert(0, str(ROOT))

import httpx  # noqa: E402
from tests.support import models  # noqa: E402
from tests.support.server import Server, serve  # noqa: E402

from benches.ceilings import memcpy_s, plain_tokens_per_s  # noqa: E402
from benches.client import Timed, stream  # noqa: E402
from benches.results import Row, of_samples, percentile, save  # noqa: E402

NAMES = ["ash", "birch", "cedar"]
KV_ROOM_BYTES = 8 << 20
TOKENS = 32
PROMPT = "# client {client}, turn {turn}\ndef work(items):\n    "
PLAIN = "plain transformers"
WHOLE = 100
AGAINST_WHOLE = {"first token p50", "first token p99", "tokens a second"}


@dataclass
class Run:
    """What came of one stretch of traffic."""

    seconds: float
    answers: dict[str, list[Timed]] = field(default_factory=lambda: defaultdict(list))
    moved_bytes: int = 0
    wakes: int = 0
    evictions: int = 0


def moved(server: Server) -> tuple[int, int, int]:
    """Bytes copied to the device, wakes and evictions so far."""
    counts = [model["counts"] for model in server.state()["models"]]
    return (
        sum(count["restored"] for count in counts),
        sum(count["wakes"] for count in counts),
        sum(count["evictions"] for count in counts),
    )


def drive(server: Server, seconds: float, clients_per_model: int, names: Sequence[str] = NAMES) -> Run:
    """Keep these models busy for `seconds`, then let what runs finish."""
    run = Run(seconds)
    before = moved(server)
    end = time.monotonic() + seconds
    lock = threading.Lock()

    def client(name: str, number: int) -> None:
        with httpx.Client(timeout=180) as http:
            turn = 0
            while time.monotonic() < end:
                turn += 1
                prompt = PROMPT.format(client=number, turn=turn)
                answer = stream(http, f"{server.url}/v1/completions", name, prompt, TOKENS)
                with lock:
                    run.answers[name].append(answer)

    threads = [threading.Thread(target=client, args=(name, n)) for name in names for n in range(clients_per_model)]
    start = time.monotonic()
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    run.seconds = time.monotonic() - start
    after = moved(server)
    run.moved_bytes, run.wakes, run.evictions = (now - then for now, then in zip(after, before, strict=True))
    return run


def tokens_per_s(run: Run) -> float:
    """Tokens of all models a second."""
    return sum(answer.tokens for answers in run.answers.values() for answer in answers) / run.seconds


def one_at_a_time(alone: float, turn_s: float, move_s: float) -> float:
    """Tokens a second where models take turns of `turn_s` and nothing but bringing the next one back costs time."""
    return alone * turn_s / (turn_s + move_s)


def turn_s(server: Server) -> float:
    """How long a busy model runs while others wait."""
    return float(server.state()["sharing"]["quantum_ms"]) / 1000


def jain(values: list[float]) -> float:
    """Jain's fairness index."""
    squares = len(values) * sum(value * value for value in values)
    return sum(values) ** 2 / squares if squares else 0.0


def rows_of(case: str, run: Run, memcpy_bytes_per_s: float) -> list[Row]:
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
        Row(case, "a memcpy of what moved", run.moved_bytes / memcpy_bytes_per_s, "s", "lower"),
        Row(case, "wakes", run.wakes, "count", "lower"),
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
        one = weights // len(NAMES)
        copy = of_samples(f"memcpy of {one / 2**20:.0f} MiB", "time", memcpy_s(one), "s", "lower")
        alone_s = max(1.0, options.seconds / 3)
        prompt = PROMPT.format(client=0, turn=1)
        alone = plain_tokens_per_s(list(paths.values()), prompt, options.clients, TOKENS, alone_s)
        rows += [copy, Row(f"{PLAIN}, all models loaded", "tokens a second", alone, "tokens/s", "higher")]
        base: dict[str, float] = {}
        single = 0.0
        for percent in sorted(options.percent, reverse=True):
            directory = home / f"at-{percent}"
            directory.mkdir()
            with serve(directory, models=tables, device_budget=need * percent // 100) as server:
                for name in NAMES:
                    server.wait_for(name, "asleep", "awake", "partly_resident")
                    server.complete(name, "warm", 4)
                if percent == WHOLE:
                    single = tokens_per_s(drive(server, alone_s, options.clients, NAMES[:1]))
                    rows.append(Row("one model alone", "tokens a second", single, "tokens/s", "higher"))
                run = drive(server, options.seconds, options.clients)
                turns = one_at_a_time(single, turn_s(server), copy.value)
            if options.keep:
                shutil.copytree(directory, options.keep / directory.name, ignore=shutil.ignore_patterns("*.sock"))
            fresh = rows_of(f"{percent} % of {need >> 20} MiB", run, one / copy.value)
            if percent == WHOLE:
                base = {row.metric: row.value for row in fresh if row.metric in AGAINST_WHOLE}
            for row in fresh:
                row.ceiling = base.get(row.metric, row.ceiling)
                if row.metric == "tokens a second":
                    # Two do not fit.
                    if single and need * percent // 100 < 2 * one:
                        row.ceiling = turns
                    row.peer, row.peer_value = PLAIN, alone
            rows += fresh
    save("shelf_all_active", rows)


if __name__ == "__main__":
    main()
