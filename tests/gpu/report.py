"""Turn the log of the GPU's tests into a results file: one row a test, one a case of the suite."""

from __future__ import annotations

import datetime as dt
import json
import os
import re
import subprocess
import sys
from pathlib import Path


def rows(log: str) -> list[dict[str, object]]:
    """Read what passed and what did not, in the order of the log."""
    found: dict[str, int] = {}
    test = ""
    for line in log.splitlines():
        rest = line
        # With --nocapture a test's own lines stand between its name and its outcome.
        if match := re.match(r"test (\S+) \.\.\. (.*)", line):
            test, rest = match[1], match[2]
        if match := re.match(r"case (\S+) passed", rest):
            found[f"{test}: {match[1]}"] = 1
        elif match := re.match(r"\S+::(\S+) (PASSED|FAILED|ERROR)", rest):
            found[match[1]] = int(match[2] == "PASSED")
        elif rest in {"ok", "FAILED"}:
            found[test] = int(rest == "ok")
    common = {"ceiling": None, "peer": None, "peer_value": None, "target": 1, "samples": 1}
    return [
        {"case": case, "metric": "passed", "value": value, "unit": "bool", "better": "higher", **common,
         "met": value == 1, "spread": [value, value]}
        for case, value in found.items()
    ]  # fmt: skip


def query(what: str) -> str:
    """Ask for one property of the first GPU."""
    command = ["nvidia-smi", f"--query-gpu={what}", "--format=csv,noheader"]
    return subprocess.run(command, check=True, capture_output=True, text=True).stdout.splitlines()[0]


def result(rows: list[dict[str, object]]) -> dict[str, object]:
    """Say where and when rows were measured."""
    overview = subprocess.run(["nvidia-smi"], check=True, capture_output=True, text=True).stdout
    version = re.search(r"CUDA Version: *([\d.]+)", overview)
    return {
        "device": query("name"),
        "driver": query("driver_version"),
        "cuda": version[1] if version else None,
        "torch": None,
        "python": None,
        "shoal_commit": os.environ.get("SHOAL_COMMIT") or None,
        "date": dt.datetime.now(dt.UTC).date().isoformat(),
        "rows": rows,
    }


def main() -> None:
    """Write the file; fail when a test failed or none ran."""
    log, target = Path(sys.argv[1]).read_text("utf-8", "replace"), Path(sys.argv[2])
    report = result(rows(log))
    target.write_text(json.dumps(report, indent=1) + "\n", "utf-8")
    # cargo's last line of each program, or pytest's.
    summaries = re.findall(r"^(?:test result: .*|=+ .*\b(?:passed|failed|error).* =+)$", log, re.MULTILINE)
    print("\n".join(summaries) or "the tests did not come to their end")
    has_failed = any(re.search("failed|error|FAILED", line.replace(" 0 failed", "")) for line in summaries)
    if not summaries or has_failed or not report["rows"]:
        print(log[-6000:])
        sys.exit(1)


if __name__ == "__main__":
    main()
