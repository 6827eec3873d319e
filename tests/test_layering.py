"""The walls between the crates, read from `cargo metadata` and from the tree (docs/design.md says why they stand)."""

from __future__ import annotations

import json
import re
import shutil
import subprocess
import tomllib
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parents[1]
CRATES = ROOT / "crates"

# Each crate and those of ours that it may depend on.
MAY_DEPEND_ON = {
    "shoal-core": set(),
    "shoal-device": {"shoal-core"},
    "shoal-memory": {"shoal-core", "shoal-device"},
    "shoal-server": {"shoal-core", "shoal-device", "shoal-memory"},
    "shoal-python": {"shoal-core", "shoal-device", "shoal-memory", "shoal-server"},
}

# Packages that a crate must not depend on directly.
NEVER = {
    "shoal-core": {"tokio", "rustix", "libc", "cudarc", "pyo3", "axum", "hyper", "rand", "parking_lot"},
    "shoal-device": {"tokio", "pyo3", "axum", "hyper"},
    "shoal-memory": {"cudarc", "pyo3", "axum", "hyper"},
    "shoal-server": {"cudarc", "pyo3"},
    "shoal-python": {"cudarc"},
}

# Where a word may stand in Rust code: path prefixes below crates/.
HOMES = {
    "unsafe": (
        "shoal-device/",
        "shoal-memory/src/disk/ring.rs",
        "shoal-python/src/buffer.rs",
        "shoal-python/src/dlpack.rs",
        "shoal-python/src/torch_hooks/",
    ),
    "pyo3": ("shoal-python/",),
    "cudarc": ("shoal-device/src/cuda/",),
}

# What shoal-core must not name: it decides, so time is an argument and files are somebody else's.
CORE_NEVER = (
    r"std::time::(Instant|SystemTime)",
    r"\bInstant::now",
    r"\bSystemTime::now",
    r"std::thread",
    r"thread::(sleep|spawn)",
    r"std::fs",
    r"std::net",
    r"std::os",
    r"std::process",
    r"std::env",
    r"std::sync::(Mutex|RwLock|Condvar|mpsc)",
)


def rust_files(below: Path) -> list[Path]:
    return sorted(path for path in below.rglob("*.rs") if "target" not in path.relative_to(below).parts)


def code_of(path: Path) -> str:
    """Give the file's text without comments and without string literals, line for line."""
    text = path.read_text(encoding="utf-8")
    pattern = re.compile(
        r'r(?P<hashes>#+)".*?"(?P=hashes)|b?"(?:\\.|[^"\\])*"|\'(?:\\.|[^\'\\])\'|//[^\n]*|/\*.*?\*/', re.DOTALL
    )
    return pattern.sub(lambda match: "\n" * match.group().count("\n"), text)


def test_the_reader_of_code_sees_code_only(tmp_path: Path) -> None:
    sample = tmp_path / "a.rs"
    sample.write_text(
        '// unsafe\nlet a = "unsafe"; /* unsafe\n */ let b = \'"\';\nunsafe { x() }\nlet c = r#"unsafe"#;\n'
    )
    lines = code_of(sample).splitlines()
    assert [number for number, line in enumerate(lines, 1) if "unsafe" in line] == [4]


@pytest.fixture(scope="module")
def packages() -> dict[str, dict]:
    cargo = shutil.which("cargo")
    if cargo is None:
        pytest.skip("cargo is not installed")
    said = subprocess.run(
        [cargo, "metadata", "--format-version", "1", "--no-deps", "--offline"],
        cwd=ROOT, check=True, capture_output=True, text=True,
    )  # fmt: skip
    return {package["name"]: package for package in json.loads(said.stdout)["packages"]}


def test_the_crates_are_the_five(packages: dict[str, dict]) -> None:
    assert set(packages) == set(MAY_DEPEND_ON)


@pytest.mark.parametrize("crate", sorted(MAY_DEPEND_ON))
def test_dependencies_point_one_way(packages: dict[str, dict], crate: str) -> None:
    named = {dependency["name"] for dependency in packages[crate]["dependencies"]}
    ours = {name for name in named if name.startswith("shoal-")}
    assert ours <= MAY_DEPEND_ON[crate] | {crate}, f"{crate} depends on {sorted(ours - MAY_DEPEND_ON[crate])}"
    shipped = {
        dependency["name"] for dependency in packages[crate]["dependencies"] if dependency["kind"] in (None, "build")
    }
    assert not shipped & NEVER[crate], f"{crate} must never depend on {sorted(shipped & NEVER[crate])}"


def test_the_fuzzers_lock_is_that_of_the_crates(packages: dict[str, dict]) -> None:
    # `fuzz` is a workspace of its own, so nothing else notices that its lock has become stale.
    def locked(path: Path) -> dict[str, list[dict]]:
        found: dict[str, list[dict]] = {}
        for package in tomllib.loads(path.read_text(encoding="utf-8"))["package"]:
            found.setdefault(package["name"], []).append(package)
        return found

    whole, fuzz = locked(ROOT / "Cargo.lock"), locked(ROOT / "fuzz" / "Cargo.lock")
    for name in MAY_DEPEND_ON["shoal-server"] | {"shoal-server"}:
        shipped = {
            dependency["name"]
            for dependency in packages[name]["dependencies"]
            if dependency["kind"] in (None, "build") and not dependency["optional"]
        }
        (package,) = fuzz.get(name, [{"dependencies": []}])
        lacking = shipped - {dependency.split(" ")[0] for dependency in package["dependencies"]}
        assert not lacking, f"fuzz/Cargo.lock lacks {sorted(lacking)} of {name}: run cargo update -w in fuzz"
    for name, versions in fuzz.items():
        others = {package["version"] for package in whole.get(name, versions)}
        strays = {package["version"] for package in versions} - others
        assert name == "shoal-fuzz" or not strays, f"fuzz/Cargo.lock has {name} {strays}, Cargo.lock {others}"


@pytest.mark.parametrize("word", sorted(HOMES))
def test_words_stay_in_their_homes(word: str) -> None:
    # `unsafe_code` and the like are names of lints; `unsafe` as a word is the keyword.
    pattern = re.compile(rf"\b{word}\b")
    strays = [
        f"{path.relative_to(ROOT)}:{number}"
        for path in rust_files(CRATES)
        if not str(path.relative_to(CRATES)).startswith(HOMES[word])
        for number, line in enumerate(code_of(path).splitlines(), 1)
        if pattern.search(line)
    ]
    assert not strays, f"`{word}` outside {HOMES[word]}: {strays}"


def test_core_decides_and_does_nothing() -> None:
    pattern = re.compile("|".join(CORE_NEVER))
    strays = []
    for path in rust_files(CRATES / "shoal-core" / "src"):
        # Unit tests stand at the end of a file and may use what they like.
        code = code_of(path).split("#[cfg(test)]", maxsplit=1)[0]
        strays += [
            f"{path.relative_to(ROOT)}:{number}: {line.strip()}"
            for number, line in enumerate(code.splitlines(), 1)
            if pattern.search(line)
        ]
    assert not strays, strays


def test_import_of_torch_stands_in_its_home() -> None:
    homes = ("torch/", "compat/", "worker/", "demo/", "sources/", "vllm/")
    pattern = re.compile(r"^\s*(import torch\b|from torch\b|import transformers\b|from transformers\b)", re.MULTILINE)
    package = ROOT / "python" / "shoal"
    strays = [
        str(path.relative_to(package))
        for path in sorted(package.rglob("*.py"))
        if not str(path.relative_to(package)).startswith(homes) and pattern.search(path.read_text(encoding="utf-8"))
    ]
    assert not strays, strays


def test_design_tells_where_unsafe_may_stand() -> None:
    text = (ROOT / "docs/design.md").read_text(encoding="utf-8")
    table = re.search(r"^\| `unsafe` in .*?\n\n", text, re.MULTILINE | re.DOTALL)
    assert table is not None
    for home in HOMES["unsafe"]:
        crate, _, inside = home.partition("/")
        assert crate in table[0], home
        assert inside.removeprefix("src/") in table[0], home
