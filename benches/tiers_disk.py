"""The disk tier against plain direct I/O on the same disk, and how long a start takes with a full log of 100 GiB.

`$SHOAL_DISK` names a directory on the disk to measure (the build folder by default). Nothing else should use the disk.
"""

from __future__ import annotations

import sys
from pathlib import Path

ROOT = Path(__file__).resolve().parents[1]
sys.path.insert(0, str(ROOT))

from benches.results import Row, save  # noqa: E402
from benches.shelf_sharing import cargo_bench  # noqa: E402

LOWER = {"s", "s/GiB"}


def rows_of(text: str) -> list[Row]:
    """Read the lines that the program prints."""
    rows = []
    for line in text.splitlines():
        if not line.startswith("row\t"):
            continue
        _, case, metric, unit, value, ceiling, target, samples, first, last = line.split("\t")
        row = Row(case, metric, float(value), unit, "lower" if unit in LOWER else "higher", samples=int(samples))
        row.ceiling = float(ceiling) if ceiling else None
        row.spread = (float(first), float(last))
        if target:
            row.target = float(target)
            row.met = row.value <= row.target if row.better == "lower" else row.value >= row.target
        rows.append(row)
    return rows


def main() -> None:
    """Measure and save."""
    save("tiers_disk", rows_of(cargo_bench("shoal-memory", "tiers_disk")))


if __name__ == "__main__":
    main()
