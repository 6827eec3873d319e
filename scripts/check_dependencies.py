"""Hold the Rust dependencies to deny.toml: licences, duplicate versions, banned crates, where they come from.

The rules are those of cargo-deny, read from its own file, but only cargo and the standard library are needed. Packages
that only other platforms use are left out, as deny.toml's targets say.
"""

from __future__ import annotations

import json
import re
import subprocess
import sys
import tomllib
from collections import defaultdict
from pathlib import Path
from typing import Any

ROOT = Path(__file__).resolve().parent.parent


def main() -> int:
    """Check everything and print each finding; the exit status is 1 if there is one."""
    rules = tomllib.loads((ROOT / "deny.toml").read_text("utf-8"))
    packages = resolved(rules["graph"]["targets"])
    problems = [*licences(packages, rules), *duplicates(packages, rules), *banned(packages, rules), *origins(packages)]
    for problem in problems:
        print(f"dependency: {problem}")
    print(f"{len(packages)} crates: licences, duplicates, bans, sources: {len(problems)} problems")
    return 1 if problems else 0


def resolved(targets: list[str]) -> list[dict[str, Any]]:
    """Return the packages that any of ``targets`` builds."""
    found: dict[str, dict[str, Any]] = {}
    for target in targets:
        command = ["cargo", "metadata", "--locked", "--format-version=1", f"--filter-platform={target}"]
        metadata = json.loads(subprocess.run(command, check=True, capture_output=True, cwd=ROOT).stdout)
        used = {node["id"] for node in metadata["resolve"]["nodes"]}
        found |= {package["id"]: package for package in metadata["packages"] if package["id"] in used}
    return sorted(found.values(), key=lambda package: (package["name"], package["version"]))


def licences(packages: list[dict[str, Any]], rules: dict[str, Any]) -> list[str]:
    """Find packages whose licence expression cannot be met with allowed licences alone."""
    allowed = set(rules["licenses"]["allow"])
    return [
        f"{label(package)} has licence {package['license']!r}, which deny.toml does not allow"
        for package in packages
        if not satisfies(package["license"] or "", allowed)
    ]


def satisfies(expression: str, allowed: set[str]) -> bool:
    """Tell whether an SPDX expression can be met; the old form `MIT/Apache-2.0` means OR."""
    tokens = re.findall(r"[()]|[^\s()]+", expression.replace("/", " OR "))
    position = 0

    def either() -> bool:
        nonlocal position
        result = both()
        while position < len(tokens) and tokens[position] == "OR":
            position += 1
            result = both() or result
        return result

    def both() -> bool:
        nonlocal position
        result = one()
        while position < len(tokens) and tokens[position] == "AND":
            position += 1
            result = one() and result
        return result

    def one() -> bool:
        nonlocal position
        if position >= len(tokens):
            return False
        word = tokens[position]
        position += 1
        if word == "(":
            result = either()
            position += 1
            return result
        if position + 1 < len(tokens) and tokens[position] == "WITH":
            word = f"{word} WITH {tokens[position + 1]}"
            position += 2
        return word in allowed

    return either() and position == len(tokens)


def duplicates(packages: list[dict[str, Any]], rules: dict[str, Any]) -> list[str]:
    """Find crates present in several versions, and skips in deny.toml that skip nothing any more."""
    versions = defaultdict(list)
    for package in packages:
        versions[package["name"]].append(package["version"])
    skipped = {(entry["crate"].partition("@")[0], entry["crate"].partition("@")[2]) for entry in rules["bans"]["skip"]}
    problems = []
    for name, present in versions.items():
        left = [version for version in present if (name, version) not in skipped]
        if len(left) > 1:
            problems.append(f"{name} is there in versions {', '.join(present)}; `cargo tree -i {name}@{present[0]}`")
    stale = [f"{name}@{version}" for name, version in sorted(skipped) if len(versions[name]) < 2]
    return problems + [f"deny.toml skips {entry}, which is no duplicate (any more)" for entry in stale]


def banned(packages: list[dict[str, Any]], rules: dict[str, Any]) -> list[str]:
    """Find crates that deny.toml does not want at all."""
    reasons = {entry["crate"]: entry["reason"] for entry in rules["bans"]["deny"]}
    return [f"{label(package)}: {reasons[package['name']]}" for package in packages if package["name"] in reasons]


def origins(packages: list[dict[str, Any]]) -> list[str]:
    """Find crates that come neither from this repository nor from the registry."""
    return [
        f"{label(package)} comes from {package['source']}"
        for package in packages
        if package["source"] and not package["source"].startswith(("registry+", "sparse+"))
    ]


def label(package: dict[str, Any]) -> str:
    """Name a package with its version."""
    return f"{package['name']} {package['version']}"


if __name__ == "__main__":
    sys.exit(main())
