"""Rows of a benchmark's result, written in the one schema that README and tools read.

A row may carry a ceiling and a peer measured in the same run; the ratio to each is printed beside it, and a target that
is missed is printed as missed.
"""

from __future__ import annotations

import json
import os
import platform
import shutil
import statistics
import subprocess
from dataclasses import asdict, dataclass
from datetime import UTC, datetime
from pathlib import Path
from typing import Literal

ROOT = Path(__file__).resolve().parents[1]


@dataclass
class Row:
    """One figure: what was measured, how well, and against what."""

    case: str
    metric: str
    value: float
    unit: str
    better: Literal["lower", "higher"]
    ceiling: float | None = None
    peer: str | None = None
    peer_value: float | None = None
    target: float | None = None
    met: bool | None = None
    samples: int = 1
    spread: tuple[float, float] | None = None

    def line(self) -> str:
        """Say it in one line, ratios and misses included."""
        text = f"{self.case:44} {self.metric:26} {self.value:12.4g} {self.unit:10}"
        if self.ceiling:
            text += f"  {self.value / self.ceiling:7.2f} x ceiling"
        if self.peer_value:
            text += f"  {self.value / self.peer_value:7.2f} x {self.peer}"
        if self.target is not None:
            text += f"  target {self.target:g}: {'met' if self.met else 'MISSED'}"
        return text


def of_samples(case: str, metric: str, values: list[float], unit: str, better: Literal["lower", "higher"]) -> Row:
    """Make a row of the median, with the spread of all samples."""
    return Row(
        case,
        metric,
        statistics.median(values),
        unit,
        better,
        samples=len(values),
        spread=(min(values), max(values)),
    )


def of_best(case: str, metric: str, samples: list[float], unit: str = "s") -> Row:
    """Make a row of the least of several rounds' means, with the spread of all of them."""
    return Row(case, metric, min(samples), unit, "lower", samples=len(samples), spread=(min(samples), max(samples)))


def over(case: str, metric: str, samples: list[float], base: list[float], target: float | None = None) -> Row:
    """Make a row of how many times `base` it is, best over best; the spread is that of rounds made in turn."""
    ratios = [one / other for one, other in zip(samples, base, strict=True)]
    ratio = min(samples) / min(base)
    row = Row(case, metric, ratio, "", "lower", samples=len(ratios), spread=(min(ratios), max(ratios)))
    if target is not None:
        row.target, row.met = target, ratio <= target
    return row


def percentile(values: list[float], share: float) -> float:
    """Give the value below which `share` of the sorted values lie (nearest rank)."""
    ordered = sorted(values)
    return ordered[min(len(ordered) - 1, int(share * len(ordered)))]


def commit() -> str:
    """Name the commit that was measured, with a plus where the tree differs from it."""
    git = ["git", "-C", str(ROOT)]
    head = subprocess.run([*git, "rev-parse", "--short=12", "HEAD"], capture_output=True, text=True, check=False)
    dirty = subprocess.run([*git, "status", "--porcelain", "-uno"], capture_output=True, text=True, check=False)
    return head.stdout.strip() + ("+" if dirty.stdout.strip() else "")


def torch_version() -> str | None:
    """Give torch's version without loading it."""
    from importlib import metadata

    try:
        return metadata.version("torch")
    except metadata.PackageNotFoundError:
        return None


def processor() -> str:
    """Name this machine's processor and its number of cores."""
    names = [
        line.split(":", 1)[1].strip() for line in Path("/proc/cpuinfo").read_text().splitlines() if "model name" in line
    ]
    return f"{names[0] if names else platform.machine()}, {len(names)} cores, simulated device"


def save(bench: str, rows: list[Row], *, device: str = "cpu") -> Path:
    """Print the rows and write `benches/results/DEVICE/BENCH.json`."""
    for row in rows:
        print(row.line())
    path = ROOT / "benches" / "results" / device / f"{bench}.json"
    write(path, rows, device=processor(), shoal_commit=commit())
    return path


def save_gpu(path: Path, rows: list[Row]) -> None:
    """Print the rows and write the file of a part of `tests/gpu/run.sh`, which names driver and commit."""
    for row in rows:
        print(row.line())
    found = shutil.which("nvidia-smi")
    asked = [found, "--query-gpu=name", "--format=csv,noheader"]
    said = subprocess.run(asked, capture_output=True, text=True, check=False).stdout if found else ""
    write(
        path,
        rows,
        device=next(iter(said.splitlines()), None) or processor(),
        driver=os.environ.get("SHOAL_DRIVER") or None,
        cuda=(torch_version() or "").partition("+cu")[2] or None,
        shoal_commit=os.environ.get("SHOAL_COMMIT") or None,
    )


def write(path: Path, rows: list[Row], **facts: str | None) -> None:
    """Write rows and what they were measured on."""
    record = {
        "device": None,
        "driver": None,
        "cuda": None,
        "torch": torch_version(),
        "python": platform.python_version(),
        "shoal_commit": None,
        "date": datetime.now(UTC).date().isoformat(),
        **facts,
        "rows": [asdict(row) for row in rows],
    }
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text(json.dumps(record, indent=1) + "\n")
