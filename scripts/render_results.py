"""Write the figures in benches/results/ into README, between the markers.

A number in README therefore exists only as a row of a result file, with the commit and the machine it came from; rows
that miss their target are printed like the others.
"""

from __future__ import annotations

import argparse
import json
import sys
from pathlib import Path
from typing import Any

ROOT = Path(__file__).resolve().parent.parent
README = ROOT / "README.md"
RESULTS = ROOT / "benches" / "results"
BEGIN, END = "<!-- results: begin -->", "<!-- results: end -->"
NOTES = {
    "cpu": "Two CPU cores, the device simulated in RAM. These figures show the cost of Shoal's own work; "
    "they say nothing about a GPU.",
    "h100": "One H100 80GB HBM3 (SXM, PCIe Gen5), 16 virtual cores; ceilings measured in the same run.",
}


def main() -> int:
    """Render, or with ``--check`` tell whether README is up to date (exit status 1 if not)."""
    parser = argparse.ArgumentParser(description="Render benches/results/ into README.")
    parser.add_argument("--check", action="store_true", help="change nothing; fail if README would change")
    options = parser.parse_args()
    before = README.read_text("utf-8")
    head, _, rest = before.partition(BEGIN)
    _, found, tail = rest.partition(END)
    if not found:
        print(f"README has no lines {BEGIN} and {END}", file=sys.stderr)
        return 1
    after = f"{head}{BEGIN}\n{render()}\n{END}{tail}"
    if options.check:
        return 0 if after == before else 1
    README.write_text(after, "utf-8")
    return 0


def render() -> str:
    """Return all result files as Markdown tables, one section a device."""
    sections = []
    for device in sorted(path for path in RESULTS.glob("*") if path.is_dir()):
        rows = []
        origin = ""
        for file in sorted(device.glob("*.json")):
            result = json.loads(file.read_text("utf-8"))
            origin = f"{result['date'][:10]}, commit {result['shoal_commit'][:9]}"
            # What passed or failed is no figure.
            rows += [line(file.stem, row) for row in result["rows"] if row["unit"] != "bool"]
        if rows:
            note = NOTES.get(device.name, "")
            table = ["| bench | case | figure | ceiling | peer | target |", "|---|---|---|---|---|---|", *rows]
            sections.append("\n".join([f"**{device.name}** ({origin}). {note}".strip(), "", *table]))
    return "\n\n".join(sections) or "No figures yet."


def line(bench: str, row: dict[str, Any]) -> str:
    """Return one row of a result file as a row of a table."""
    unit = row["unit"]
    peer = f"{row['peer']} {number(row.get('peer_value'))}" if row.get("peer") else ""
    target = "" if row.get("target") is None else f"{number(row['target'])} {'met' if row.get('met') else 'missed'}"
    cells = [bench, f"{row['case']}: {row['metric']}", f"{number(row['value'])} {unit}", number(row.get("ceiling"))]
    return "| " + " | ".join([*cells, peer, target]) + " |"


def number(value: float | None) -> str:
    """Return a number with three digits that matter, or nothing for None."""
    if value is None:
        return ""
    if value == 0 or 1000 <= abs(value) < 1e9:
        return f"{value:,.0f}"
    return f"{value:.3g}"


if __name__ == "__main__":
    sys.exit(main())
