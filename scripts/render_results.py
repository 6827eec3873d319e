"""Write the figures in benches/results/ into README (headlines and all losses) and docs/benchmarks.md (every figure).

A number in a document therefore exists only as a row of a result file, with the commit and the machine it came from;
rows that miss their target are printed like the others, and README shows each of them whether it is a headline or not.
Tests that passed are only counted; one that failed is a loss.
"""

from __future__ import annotations

import argparse
import json
import sys
from dataclasses import dataclass
from pathlib import Path
from typing import Any

ROOT = Path(__file__).resolve().parent.parent
README = ROOT / "README.md"
BENCHMARKS = ROOT / "docs" / "benchmarks.md"
RESULTS = ROOT / "benches" / "results"
BEGIN, END = "<!-- results: begin -->", "<!-- results: end -->"
NOTES = {
    "cpu": "Two CPU cores, the device simulated in RAM. These figures show the cost of Shoal's own work; "
    "they say nothing about a GPU.",
    "h100": "One H100 80GB HBM3 (SXM, PCIe Gen5), 16 virtual cores; ceilings measured in the same run.",
    "h200": "One H200 (141 GB, PCIe Gen5), 16 virtual cores; ceilings measured in the same run.",
}
# What README shows besides losses: device, bench, case, metric.
HEADLINES = [
    ("cpu", "shelf_all_active", "75 % of 96 MiB", "tokens a second"),
    ("cpu", "shelf_all_active", "75 % of 96 MiB", "first token p99"),
    ("cpu", "shelf_all_active", "50 % of 96 MiB", "tokens a second"),
    ("cpu", "shelf_all_active", "50 % of 96 MiB", "first token p99"),
    ("cpu", "shelf_first_token", "awake", "first token"),
    ("cpu", "shelf_first_token", "asleep in host memory", "first token"),
    ("cpu", "gateway_latency", "one token, added by the server", "p50"),
    ("cpu", "kv_blocks", "fresh: 16 through a buffer", "alloc and free"),
    ("cpu", "kv_blocks", "part-filled: 16 through a buffer", "alloc and free"),
    ("h100", "shelf", "first token, awake", "time"),
    ("h100", "shelf", "first token, asleep in host memory", "time"),
    ("h100", "shelf", "first token of a model that another must yield to", "time"),
    ("h100", "sleep_wake", "wake, first", "rate"),
    ("h100", "sleep_wake", "sleep, clean, hash checked, later", "time"),
    ("h100", "first_token", "first token, 256 tokens: asleep, woken in order", "seconds"),
    ("h100", "first_token", "first token, 8192 tokens: asleep, woken in order", "seconds"),
    ("h100", "copies", "blocks of 16 KiB, host to device", "rate"),
    ("h100", "vmm", "grow 16 GiB, pooled 64 MiB frames", "rate"),
]
HEAD = ["| {first} | figure | ceiling | peer | target |", "|---|---|---|---|---|"]


@dataclass(frozen=True)
class Figure:
    """One row of a result file, and where it stands."""

    device: str
    bench: str
    origin: str
    row: dict[str, Any]

    @property
    def key(self) -> tuple[str, str, str, str]:
        """What it is called."""
        return self.device, self.bench, self.row["case"], self.row["metric"]

    @property
    def missed(self) -> bool:
        """Whether it has a target and is on the wrong side of it."""
        return self.row.get("target") is not None and not self.row.get("met")

    @property
    def is_test(self) -> bool:
        """Whether it only passed or failed."""
        return bool(self.row["unit"] == "bool")

    def cells(self) -> str:
        """Return it as a row of a table."""
        row, unit = self.row, self.row["unit"]
        if self.is_test:
            return f"| {row['case']} | {'**failed**' if self.missed else 'passed'} |  |  |  |"
        scale: float = 1
        if unit == "bytes":
            scale, unit = 1 << 20, "MiB"
        elif unit == "s" and 0 < abs(row["value"]) < 1e-3:
            scale, unit = 1e-6, "us"

        def shown(value: float | None) -> str:
            return number(None if value is None else value / scale)

        peer = f"{row['peer']}: {shown(row.get('peer_value'))}" if row.get("peer") else ""
        target = "" if row.get("target") is None else f"{shown(row['target'])} {'**missed**' if self.missed else 'met'}"
        named = f"{row['case']}: {row['metric']}"
        return f"| {named} | {shown(row['value'])} {unit} | {shown(row.get('ceiling'))} | {peer} | {target} |"


def main() -> int:
    """Render, or with ``--check`` tell whether the documents are up to date (exit status 1 if not)."""
    parser = argparse.ArgumentParser(description="Render benches/results/ into README and docs/benchmarks.md.")
    parser.add_argument("--check", action="store_true", help="change nothing; fail if a document would change")
    options = parser.parse_args()
    found = figures()
    try:
        texts = {README: headlines(found), BENCHMARKS: tables(found)}
        stale = [path for path, text in texts.items() if not put(path, text, keep=options.check)]
    except ValueError as error:
        print(error, file=sys.stderr)
        return 1
    for path in stale if options.check else []:
        print(f"{path.name} is not what benches/results/ says; run scripts/render_results.py", file=sys.stderr)
    return 1 if options.check and stale else 0


def put(path: Path, text: str, *, keep: bool) -> bool:
    """Put ``text`` between the markers of a document, or only look; gives whether it stood there already."""
    before = path.read_text("utf-8")
    head, _, rest = before.partition(BEGIN)
    _, found, tail = rest.partition(END)
    if not found:
        msg = f"{path.name} has no lines {BEGIN} and {END}"
        raise ValueError(msg)
    after = f"{head}{BEGIN}\n{text}\n{END}{tail}"
    if not keep:
        path.write_text(after, "utf-8")
    return after == before


def figures() -> list[Figure]:
    """Return every figure there is, and every test that passed or failed."""
    found = []
    for file in sorted(RESULTS.glob("*/*.json")):
        result = json.loads(file.read_text("utf-8"))
        commit = result["shoal_commit"]
        # A plus: measured with changes that were not committed.
        origin = f"{result['date'][:10]}, commit {commit[:9]}{'+' if commit[9:].endswith('+') else ''}"
        found += [Figure(file.parent.name, file.stem, origin, row) for row in result["rows"]]
    return found


def tables(found: list[Figure]) -> str:
    """Return all figures as Markdown, a section a device and a table a bench; of tests, those that failed."""
    sections = []
    found = [figure for figure in found if figure.missed or not figure.is_test]
    for device in dict.fromkeys(figure.device for figure in found):
        sections.append(f"## {device}\n\n{NOTES.get(device, '')}".strip())
        for bench in dict.fromkeys(figure.bench for figure in found if figure.device == device):
            own = [figure for figure in found if (figure.device, figure.bench) == (device, bench)]
            head = [line.format(first="case") for line in HEAD]
            table = [*head, *(figure.cells() for figure in own)]
            sections.append("\n".join([f"### {bench} ({own[0].origin})", "", *table]))
    return "\n\n".join(sections) or "No figures yet."


def headlines(found: list[Figure]) -> str:
    """Return the headlines of each device and, whatever they are, all figures that missed their target."""
    gone = set(HEADLINES) - {figure.key for figure in found}
    if found and gone:
        msg = f"HEADLINES in scripts/render_results.py names figures that are in no result file: {sorted(gone)}"
        raise ValueError(msg)
    shown = [figure for figure in found if figure.key in HEADLINES or figure.missed]
    sections = []
    for device in dict.fromkeys(figure.device for figure in shown):
        own = [figure for figure in shown if figure.device == device]
        head = [line.format(first=f"{device}") for line in HEAD]
        sections.append("\n".join([NOTES.get(device, ""), "", *head, *(figure.cells() for figure in own)]).strip())
    # A row may stand for a file of tests: it is told as a figure, and counted as one that passed or did not.
    tests = [
        figure for figure in found if figure.is_test or (figure.row["unit"] == "tests" and figure.row.get("target"))
    ]
    aimed = [figure for figure in found if figure.row.get("target") is not None and figure not in tests]
    if aimed:
        met = sum(not figure.missed for figure in aimed)
        text = f"Of {len(aimed)} figures with a target {met} meet it; those that do not are all above."
        if tests:
            passed = sum(not figure.missed for figure in tests)
            text += (
                f" All {passed} recorded tests passed."
                if passed == len(tests)
                else f" Of {len(tests)} recorded tests {passed} passed; those that did not are above too."
            )
        sections.append(text)
    return "\n\n".join(sections) or "No figures yet."


def number(value: float | None) -> str:
    """Return a number with three digits that matter, or nothing for None."""
    if value is None:
        return ""
    if value == 0 or 1000 <= abs(value) < 1e9:
        return f"{value:,.0f}"
    return f"{value:.3g}"


if __name__ == "__main__":
    sys.exit(main())
