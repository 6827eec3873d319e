"""Run the criterion benches of the crates and put their figures into `benches/results/cpu/` in the common schema."""

from __future__ import annotations

import json
import os
import re
import subprocess
import sys
from pathlib import Path

ROOT = Path(__file__).resolve().parents[1]
sys.path.insert(0, str(ROOT))

from benches.results import Row, save  # noqa: E402

BENCHES = {
    "copy_plan": ("shoal-core", "copy_plan"),
    "kv_core": ("shoal-core", "kv_blocks"),
    "kv_eviction": ("shoal-core", "eviction"),
    "kv_prefix": ("shoal-core", "prefix"),
    "page_table": ("shoal-core", "page_table"),
    "policy": ("shoal-core", "policy"),
    "simulator_device": ("shoal-device", "sim"),
}
NANOSECONDS = 1e-9
# What is asked of blocks through a buffer: 16 at once, and 10 ns each in bulk; the same when fragmented.
TARGETS = {
    f"alloc_and_free/{state}/{count}": seconds
    for state in ("fresh", "fragmented")
    for count, seconds in ((16, 0.6e-6), (4096, 4096 * 10e-9))
}


# What `eviction` prints: tokens that are cached, then for each policy the part found and the part of the cost saved.
HITS = re.compile(r"^ *(\d+) +([\d.]+) % \( *([\d.]+) %\) +([\d.]+) % \( *([\d.]+) %\) +([\d.]+) % \( *([\d.]+) %\)$")
POLICIES = ("lru", "s3fifo", "cost")


def hits_of(printed: str) -> list[Row]:
    """Read the table of what each eviction policy finds."""
    rows = []
    for found in filter(None, map(HITS.match, printed.splitlines())):
        cached, *figures = found.groups()
        for place, policy in enumerate(POLICIES):
            case = f"{policy}, {cached} tokens cached"
            for metric, figure in zip(("prompt tokens found", "cost saved"), figures[2 * place :], strict=False):
                rows.append(Row(case, metric, float(figure) / 100, "", "higher", ceiling=1.0))
    return rows


def target_directory() -> Path:
    """Where cargo builds."""
    return Path(os.environ.get("CARGO_TARGET_DIR", ROOT / "target"))


def rows_of(directory: Path, started: float) -> list[Row]:
    """Read every estimate written since `started`."""
    rows = []
    for path in sorted(directory.glob("**/new/estimates.json")):
        if path.stat().st_mtime < started:
            continue
        name = json.loads((path.parent / "benchmark.json").read_text())["full_id"]
        median = json.loads(path.read_text())["median"]
        bounds = median["confidence_interval"]
        seconds, target = median["point_estimate"] * NANOSECONDS, TARGETS.get(name)
        rows.append(
            Row(
                name,
                "time",
                seconds,
                "s",
                "lower",
                target=target,
                met=None if target is None else seconds <= target,
                samples=len(json.loads((path.parent / "sample.json").read_text())["times"]),
                spread=(bounds["lower_bound"] * NANOSECONDS, bounds["upper_bound"] * NANOSECONDS),
            )
        )
    return rows


def main() -> None:
    """Run what is named on the command line, or all."""
    import time

    for name in sys.argv[1:] or BENCHES:
        crate, bench = BENCHES[name]
        started = time.time()
        command = ["cargo", "bench", "-p", crate, "--bench", bench]
        lines = []
        with subprocess.Popen(command, cwd=ROOT, stdout=subprocess.PIPE, text=True) as running:
            for line in running.stdout or ():
                print(line, end="", flush=True)
                lines.append(line)
        if running.returncode != 0:
            sys.exit(f"{' '.join(command)} failed")
        hits = hits_of("".join(lines))
        if name == "kv_eviction" and not hits:
            sys.exit("the bench printed no table of what its policies find")
        save(name, [*rows_of(target_directory() / "criterion", started), *hits])


if __name__ == "__main__":
    main()
