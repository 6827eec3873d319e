"""Style as a test: what a reader relies on everywhere, checked everywhere."""

from __future__ import annotations

import ast
import re
import subprocess
import tomllib
from functools import cache
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parents[1]
LINES_MAX = 700
CODE = {".rs", ".py", ".pyi", ".toml", ".sh", ".js", ".css", ".html", ".cfg"}
TEXT = CODE | {".md", ".txt", ".json", ".yml", ""}


@cache
def tracked() -> tuple[Path, ...]:
    """Every file that git knows or would know."""
    command = ["git", "ls-files", "--cached", "--others", "--exclude-standard"]
    names = subprocess.run(command, cwd=ROOT, check=True, capture_output=True, text=True).stdout.splitlines()
    return tuple(path for name in names if (path := ROOT / name).is_file())


def text_of(path: Path) -> str:
    return path.read_text("utf-8")


def short(path: Path) -> str:
    return str(path.relative_to(ROOT))


def test_files_stay_short() -> None:
    long = {
        short(path): lines
        for path in tracked()
        if path.suffix in {".rs", ".py", ".js"} and (lines := text_of(path).count("\n")) > LINES_MAX
    }
    assert not long, f"more than {LINES_MAX} lines, so more than one subject: {long}"


def test_test_files_have_names_of_their_own() -> None:
    """pytest imports a test file outside a package by its bare name: two of one name stop the whole run."""
    seen: dict[str, Path] = {}
    for path in tracked():
        if path.match("tests/**/test_*.py") and not (path.parent / "__init__.py").exists():
            other = seen.setdefault(path.name, path)
            assert other == path, f"{short(path)} and {short(other)} are one module to pytest"


def test_code_is_ascii() -> None:
    strange = {}
    for path in tracked():
        if path.suffix in CODE or path.name in {"Makefile", "run"}:
            for number, line in enumerate(text_of(path).splitlines(), 1):
                if not line.isascii():
                    strange[f"{short(path)}:{number}"] = line.strip()
    assert not strange, strange


def test_lines_end_cleanly() -> None:
    untidy = []
    for path in tracked():
        if path.suffix not in TEXT or path.name == "LICENSE":
            continue
        text = text_of(path)
        if text and not text.endswith("\n"):
            untidy.append(f"{short(path)}: no newline at the end")
        untidy += [
            f"{short(path)}:{number}"
            for number, line in enumerate(text.splitlines(), 1)
            if line != line.rstrip() or "\r" in line
        ]
    assert not untidy, untidy


def test_nothing_names_one_persons_machine() -> None:
    machine = re.compile(
        r"(?<![\w.])/(?:home|root|Users|work)/[\w.-]+|/tmp/(?!shoal\b)[a-z]\w+/|\bTODO\b|\bFIXME\b|\bXXX\b"
    )
    found = {}
    for path in tracked():
        if path.suffix not in TEXT or path.name in {"LICENSE", "Cargo.lock", Path(__file__).name}:
            continue
        for number, line in enumerate(text_of(path).splitlines(), 1):
            if match := machine.search(line):
                found[f"{short(path)}:{number}"] = match[0]
    assert not found, found


def test_modules_say_what_they_are() -> None:
    silent = []
    for path in tracked():
        is_source = path.suffix == ".rs" and "/src/" in short(path) and path.name != "tests.rs"
        if is_source and not text_of(path).startswith("//!"):
            silent.append(short(path))
        is_module = path.suffix == ".py" and short(path).startswith("python/")
        if is_module and ast.get_docstring(ast.parse(text_of(path))) is None:
            silent.append(short(path))
    assert not silent, f"no word at the top on what this is: {silent}"


def rust_dependencies() -> set[str]:
    names: set[str] = set()
    for path in [ROOT / "Cargo.toml", ROOT / "fuzz/Cargo.toml", *ROOT.glob("crates/*/Cargo.toml")]:
        manifest = tomllib.loads(text_of(path))
        tables = [manifest, manifest.get("workspace", {}), *manifest.get("target", {}).values()]
        for table in tables:
            for kind in ("dependencies", "dev-dependencies", "build-dependencies"):
                names |= set(table.get(kind, {}))
    return {name for name in names if not name.startswith("shoal-")}


def python_dependencies() -> set[str]:
    project = tomllib.loads(text_of(ROOT / "pyproject.toml"))
    lines = [*project["build-system"]["requires"], *project["project"]["dependencies"]]
    for extra in project["project"]["optional-dependencies"].values():
        lines += extra
    for path in (ROOT / "requirements").glob("*.txt"):
        lines += [line for line in text_of(path).splitlines() if path.name != "constraints.txt" and line[:1].isalpha()]
    return {match[0].lower() for line in lines if (match := re.match(r"[A-Za-z0-9._-]+", line))}


def named_in_dependencies() -> set[str]:
    names: set[str] = set()
    for line in text_of(ROOT / "docs/dependencies.md").splitlines():
        first = line.split("|")[1] if line.startswith("| `") else line if line.startswith("`shoal[vllm]`") else ""
        names |= set(re.findall(r"`([a-z0-9_.-]+)`", first))
    return names


def test_every_dependency_has_a_reason() -> None:
    used = rust_dependencies() | python_dependencies()
    assert used - named_in_dependencies() == set(), "not in docs/dependencies.md"
    assert named_in_dependencies() - used == set(), "in docs/dependencies.md, but no dependency"


def test_every_constraint_is_of_something_installed() -> None:
    pinned = {
        line.partition("=")[0]
        for line in text_of(ROOT / "requirements/constraints.txt").splitlines()
        if line[:1].isalpha()
    }
    # What comes along and decides results.
    assert pinned - python_dependencies() <= {"tokenizers"}


def make_targets() -> set[str]:
    return set(re.findall(r"^([a-z-]+):", text_of(ROOT / "Makefile"), re.MULTILINE))


@pytest.mark.parametrize("document", ["README.md", "CONTRIBUTING.md", "docs/operations.md", ".ci/run"])
def test_make_commands_that_are_written_down_exist(document: str) -> None:
    targets = set(re.findall(r"(?:^|`)make ([a-z-]+)", text_of(ROOT / document), re.MULTILINE))
    assert targets - make_targets() == set()


def test_makefile_names_its_own_commands() -> None:
    text = text_of(ROOT / "Makefile")
    phony = set(re.search(r"^\.PHONY: (.*)$", text, re.MULTILINE)[1].split())  # type: ignore[index]
    assert make_targets() == phony


def test_links_between_documents_lead_somewhere() -> None:
    broken = {}
    for path in tracked():
        if path.suffix != ".md":
            continue
        for target in re.findall(r"\]\((?!https?:|#)([^)#]+)", text_of(path)):
            if not (path.parent / target).exists():
                broken[f"{short(path)} -> {target}"] = True
    assert not broken, list(broken)


def test_configuration_document_knows_every_key() -> None:
    config = ROOT / "crates/shoal-server/src/config"
    source = "".join(text_of(config / f"{name}.rs") for name in ("keys", "command", "sharing"))
    keys: set[str] = set()
    for name in ("SERVER_KEYS", "MODEL_KEYS", "COMMAND_KEYS", "SHARING_KEYS"):
        block = re.search(rf"const {name}: [^=]*=\s*\[(.*?)\];", source, re.DOTALL)
        assert block is not None, f"{name} is no longer where this test looks"
        keys |= set(re.findall(r'"([a-z_]+)"', block[1]))
    documented = set(re.findall(r"^\| `([a-z_]+)`", text_of(ROOT / "docs/configuration.md"), re.MULTILINE))
    assert keys == documented


def test_contributing_fits_on_a_screen_or_two() -> None:
    assert text_of(ROOT / "CONTRIBUTING.md").count("\n") < 100


def test_every_invariant_is_defined_once() -> None:
    defined = re.findall(r"^\| (I\d+) \|", text_of(ROOT / "docs/design.md"), re.MULTILINE)
    assert defined == [f"I{number}" for number in range(1, 14)]
    cited: set[str] = set()
    for path in tracked():
        if path.suffix == ".rs":
            cited |= set(re.findall(r"\b(I\d{1,2})\b", text_of(path)))
    assert cited <= set(defined), cited - set(defined)
