"""What sharing costs and what it is good for, on the CPU.

`shelf_decision`: a decision over 1,000 models with 100,000 extents. `shelf_traces`: hours in virtual time under the
default policy, with the policy `lru` (whole models by their last use, as other managers do it) as the peer in the same
run. `shelf_lease`: a lease asked for by a worker process of a real shelf; its ceiling is an echo of the same lines.
`shelf_at_rest`: servers whose models nobody has asked for, and one whose workers all sleep.
"""

from __future__ import annotations

import json
import os
import subprocess
import sys
import tempfile
import time
from collections import defaultdict
from pathlib import Path

ROOT = Path(__file__).resolve().parents[1]
sys.path.insert(0, str(ROOT))

from tests.support.models import make_llama, tables  # noqa: E402
from tests.support.server import serve  # noqa: E402

from benches.criterion import rows_of, target_directory  # noqa: E402
from benches.results import Row, save  # noqa: E402

PEER = "whole-model LRU"
KEPT = {
    "wait p50": "s",
    "wait p99": "s",
    "wait mean": "s",
    "moved": "GiB",
    "evictions": "count",
    "thrash index": "ratio",
}
REST_S = 5


def cargo_bench(crate: str, bench: str, *arguments: str) -> str:
    """Run a bench of a crate and give what it printed."""
    command = ["cargo", "bench", "--locked", "-q", "-p", crate, "--bench", bench, "--", *arguments]
    done = subprocess.run(command, cwd=ROOT, check=True, stdout=subprocess.PIPE, text=True)
    return done.stdout


def decision() -> list[Row]:
    """Time a decision over 1,000 models under both policies."""
    started = time.time()
    cargo_bench("shoal-core", "shelf_decision")
    rows = {row.case.rsplit("/", 1)[1]: row for row in rows_of(target_directory() / "criterion", started)}
    value, lru = rows["value"], rows["lru"]
    value.case = "one model wants to come back; 1,000 models, 100,000 extents"
    value.metric, value.peer, value.peer_value = "decision", PEER, lru.value
    return [value]


def traces() -> list[Row]:
    """Play the traces under both policies."""
    figures: dict[tuple[str, str], dict[str, float]] = defaultdict(dict)
    for line in cargo_bench("shoal-core", "shelf_traces").splitlines():
        if line.count("\t") == 3:
            trace, policy, metric, value = line.split("\t")
            figures[trace, metric][policy] = float(value)
    rows = []
    for (trace, metric), by in figures.items():
        if metric in KEPT:
            requests = int(figures[trace, "requests"]["value"])
            peer = {"peer": PEER, "peer_value": by["lru"]}
            rows.append(Row(trace, metric, by["value"], KEPT[metric], "lower", samples=requests, **peer))  # type: ignore[arg-type]
    return rows


def lease() -> list[Row]:
    """Ask for leases from a worker process."""
    with tempfile.TemporaryDirectory() as scratch:
        out = Path(scratch) / "rows.json"
        cargo_bench("shoal-server", "lease", "--bench", "--out", str(out))
        told = json.loads(out.read_text("utf-8"))["rows"]
    return [Row(**row | {"spread": tuple(row["spread"])}) for row in told]


def at_rest() -> list[Row]:
    """Look at servers whose models nobody has asked for, and at one whose workers all sleep after an answer each."""
    rows = []
    for count in (3, 100):
        models: list[dict[str, object]] = [
            {
                "name": f"asleep-{number}",
                "engine": "command",
                "command": "true",
                "port": 1,
                "device_bytes": "64MiB",
            }
            for number in range(count)
        ]
        with tempfile.TemporaryDirectory() as home, serve(Path(home), models=models, device="sim") as server:
            rows += resting(f"server at rest, {count} models", server.process.pid)
    with tempfile.TemporaryDirectory() as made:
        home = Path(made)
        made_of = {name: make_llama(home / name, seed=seed) for seed, name in enumerate(("ash", "birch", "cedar"))}
        with serve(home, models=tables(made_of), device="sim") as server:
            for name in made_of:
                server.wait_for(name, "asleep")
                server.complete(name, "x = ", 8)
            for name in made_of:
                server.order(name, "sleep")
                server.wait_for(name, "asleep")
            rows += resting("server at rest, 3 workers that sleep", server.process.pid)
    return rows


def resting(case: str, pid: int) -> list[Row]:
    """Look at a process that has nothing to do."""
    before = cpu_s(pid)
    time.sleep(REST_S)
    busy = (cpu_s(pid) - before) / REST_S
    memory = dict(line.split(":", 1) for line in Path(f"/proc/{pid}/smaps_rollup").read_text().splitlines()[1:])
    kib = {key: int(value.split()[0]) for key, value in memory.items()}
    threads = len(list(Path(f"/proc/{pid}/task").iterdir()))
    return [
        Row(case, "resident", kib["Rss"] / 1024, "MiB", "lower"),
        Row(case, "of its own (private)", (kib["Private_Clean"] + kib["Private_Dirty"]) / 1024, "MiB", "lower"),
        Row(case, "threads", threads, "count", "lower"),
        Row(case, "processor time", busy * 100, "% of a core", "lower"),
    ]


def cpu_s(pid: int) -> float:
    """Processor time that a process has used, in seconds."""
    fields = Path(f"/proc/{pid}/stat").read_text().rsplit(")", 1)[1].split()
    return (int(fields[11]) + int(fields[12])) / os.sysconf("SC_CLK_TCK")


def main() -> None:
    """Run what is named on the command line, or all."""
    parts = {"decision": decision, "traces": traces, "lease": lease, "at_rest": at_rest}
    for name in sys.argv[1:] or parts:
        save(f"shelf_{name}", parts[name]())


if __name__ == "__main__":
    main()
