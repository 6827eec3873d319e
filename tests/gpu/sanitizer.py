"""Run every kernel of ours and regions that sleep, wake and swap, a few MiB each, under compute-sanitizer.

A row says how many errors each tool found. Usage: ``python -m tests.gpu.sanitizer CUDA SWAP RESULT LOGS``, with the
test programs of the device and of swaps.
"""

from __future__ import annotations

import json
import os
import re
import subprocess
import sys
import time
from pathlib import Path

from tests.gpu.report import result

# What a tool looks for: accesses out of bounds, hazards in shared memory, wrong use of barriers.
TOOLS = ("memcheck", "racecheck", "synccheck")
RUNS = (
    ("hash, gather and scatter", "lists::a_small_run_of_every_kernel"),
    ("regions that sleep, wake and swap", "two_regions_take_turns_in_the_room_of_one"),
)
SECONDS_MAX = 240


def row(case: str, metric: str, value: float, unit: str, target: float | None = None) -> dict[str, object]:
    """Make a row of which less is better."""
    return {"case": case, "metric": metric, "value": value, "unit": unit, "better": "lower", "ceiling": None,
            "peer": None, "peer_value": None, "target": target, "met": None if target is None else value <= target,
            "samples": 1, "spread": [value, value]}  # fmt: skip


def errors_in(log: str) -> int | None:
    """Read the last line of a tool; None where it did not come to its end, or the program failed."""
    found = re.search(r"(?:ERROR SUMMARY: (\d+) error|RACECHECK SUMMARY: (\d+) hazard)", log)
    if found is None or not re.search(r"^test result: ok\. 1 passed", log, re.MULTILINE):
        return None
    return int(found[1] or found[2] or 0)


def main() -> None:
    """Run the tools one after another; fail if one found something."""
    programs, target, logs = sys.argv[1:3], Path(sys.argv[3]), Path(sys.argv[4])
    rows: list[dict[str, object]] = []
    has_failed = False
    for (what, test), program in zip(RUNS, programs, strict=True):
        for tool in TOOLS:
            command = ["compute-sanitizer", "--tool", tool, program, "--exact", "--nocapture", test]
            start = time.monotonic()
            done = subprocess.run(
                command, check=False, text=True, stdout=subprocess.PIPE, stderr=subprocess.STDOUT, timeout=SECONDS_MAX,
                # What copies cost under a tool must not be kept for later.
                env={**os.environ, "SHOAL_TEST_GPU": "1", "XDG_CACHE_HOME": str(logs / f"cache-{tool}")},
            )  # fmt: skip
            (logs / f"sanitizer-{tool}-{test.rpartition(':')[2]}.log").write_text(done.stdout, "utf-8")
            found = errors_in(done.stdout)
            print(f"{tool}, {what}: {'did not finish' if found is None else f'{found} errors'}")
            if found is None:
                print(done.stdout[-4000:])
            else:
                rows.append(row(f"{tool}, {what}", "errors", found, "errors", 0))
                rows.append(row(f"{tool}, {what}", "time", round(time.monotonic() - start, 1), "s"))
            has_failed |= found != 0
    target.write_text(json.dumps(result(rows), indent=1) + "\n", "utf-8")
    sys.exit(has_failed)


if __name__ == "__main__":
    main()
