"""The scripts behind make: what they refuse, and what they say then."""

from __future__ import annotations

import importlib.util
import json
import os
import signal
import subprocess
import sys
import tarfile
import threading
import time
from pathlib import Path
from typing import TYPE_CHECKING, Any

import pytest

if TYPE_CHECKING:
    from types import ModuleType

ROOT = Path(__file__).resolve().parents[1]


def load(name: str) -> ModuleType:
    spec = importlib.util.spec_from_file_location(name, ROOT / "scripts" / f"{name}.py")
    assert spec is not None
    assert spec.loader is not None
    module = importlib.util.module_from_spec(spec)
    sys.modules[name] = module  # where dataclasses look their own module up
    spec.loader.exec_module(module)
    return module


def preflight(purpose: str, **environment: str) -> subprocess.CompletedProcess[str]:
    command = [sys.executable, str(ROOT / "scripts/preflight.py"), purpose]
    return subprocess.run(command, env=environment, capture_output=True, text=True, timeout=60, check=False)


def test_preflight_names_the_remedy_for_what_is_missing(tmp_path: Path) -> None:
    said = preflight("demo", PATH=str(tmp_path), HOME=str(tmp_path))
    assert said.returncode == 1
    assert "MISSING rustc (needs >= 1.95)" in said.stdout
    assert "rustup default stable" in said.stdout
    assert "sudo apt-get install build-essential" in said.stdout


def test_preflight_refuses_a_place_for_torch_that_is_none(tmp_path: Path) -> None:
    said = preflight("test", PATH=str(tmp_path), HOME=str(tmp_path), SHOAL_TORCH_INDEX=str(tmp_path / "nowhere"))
    assert said.returncode == 1
    assert f"MISSING SHOAL_TORCH_INDEX ({tmp_path / 'nowhere'})" in said.stdout
    assert "neither a folder nor an address" in said.stdout
    for place in (str(tmp_path), "https://example.org/cpu"):
        said = preflight("test", PATH=str(tmp_path), HOME=str(tmp_path), SHOAL_TORCH_INDEX=place)
        assert f"ok      SHOAL_TORCH_INDEX ({place})" in said.stdout


def test_gpu_tests_say_that_they_need_one(tmp_path: Path) -> None:
    for name in ("sh", "dirname"):
        (tmp_path / name).symlink_to(Path("/usr/bin") / name)
    command = ["/bin/sh", str(ROOT / "tests/gpu/run.sh"), "vmm"]
    environment = {"PATH": str(tmp_path), "OUT": str(tmp_path / "results")}
    said = subprocess.run(command, env=environment, capture_output=True, text=True, timeout=60, check=False)
    assert said.returncode == 1
    assert "need an NVIDIA GPU" in said.stderr
    assert not (tmp_path / "results").exists()


def test_of_what_vllm_needs_a_gpu_machine_gets_only_what_it_lacks(tmp_path: Path) -> None:
    packages = {"pytest": "pytest/__init__.py", "lacking": "lacking_everywhere/__init__.py", "one": "lacking_one.py"}
    with tarfile.open(tmp_path / "vllm_more.tar.xz", "w:xz") as archive:
        for package, file in packages.items():
            inside = tmp_path / "apart" / package / file
            inside.parent.mkdir(parents=True)
            inside.write_text("")
        archive.add(tmp_path / "apart", ".")
    command = [sys.executable, "-m", "tests.gpu.vllm_site", str(tmp_path / "site"), str(tmp_path / "vllm_more.tar.xz")]
    done = subprocess.run(command, cwd=ROOT, capture_output=True, text=True, timeout=60, check=True)
    assert done.stdout == "added: lacking one\n"
    assert sorted(path.name for path in (tmp_path / "site").iterdir()) == ["lacking_everywhere", "lacking_one.py"]


def test_preflight_refuses_an_old_compiler(tmp_path: Path) -> None:
    for name in ("rustc", "cargo", "cc"):
        program = tmp_path / name
        program.write_text(f"#!/bin/sh\necho '{name} 1.63.0 (4b91a6ea7 2022-08-08)'\n")
        program.chmod(0o755)
    said = preflight("test", PATH=str(tmp_path), HOME=str(tmp_path))
    assert said.returncode == 1
    assert "MISSING rustc 1.63.0 (needs >= 1.95)" in said.stdout


def test_preflight_knows_what_is_still_to_be_had(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    script = load("preflight")
    monkeypatch.setattr(script, "ROOT", tmp_path)
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path))
    monkeypatch.setenv("CARGO_TARGET_DIR", str(tmp_path / "target"))
    for name in ("SHOAL_TORCH_INDEX", "PIP_FIND_LINKS"):
        monkeypatch.delenv(name, raising=False)
    demo = {label: download for label, _, download, _ in script.pending("demo")}
    assert demo["the chat model"] == 93_000_000
    assert demo["the documents model"] == 84_000_000
    assert demo["torch with its CUDA libraries"] > 2 << 30
    assert any("trained here" in label for label in demo)
    assert not any("model" in label for label, *_ in script.pending("test"))

    (tmp_path / "wheels").mkdir()
    (tmp_path / "wheels" / "torch-2.11.0+cpu-cp311-cp311-linux_x86_64.whl").write_bytes(b"x" * 10)
    monkeypatch.setenv("PIP_FIND_LINKS", str(tmp_path / "wheels"))
    assert script.pending("test")[0][0].startswith("torch, from ")
    monkeypatch.setenv("SHOAL_TORCH_INDEX", "https://example.org/cpu")
    assert script.pending("test")[0][0] == "torch, from https://example.org/cpu"

    (tmp_path / ".venv/lib/python3.11/site-packages/torch").mkdir(parents=True)
    (tmp_path / ".venv/lib/python3.11/site-packages/torch/version.py").touch()
    (tmp_path / ".venv/.environment").touch()
    (tmp_path / "target/release").mkdir(parents=True)
    assert script.pending("test") == []


def test_preflight_tells_of_the_demos_models_what_the_demo_says() -> None:
    from shoal.demo.shelf import MODELS

    script = load("preflight")
    assert {model.name: model.recipe for model in MODELS.values()} == script.RECIPES
    assert {model.name: model.seconds for model in MODELS.values()} == script.MODEL_S
    for model in MODELS.values():
        size = model.package.download_bytes if model.package else 0
        assert script.MODELS[model.name][1] == pytest.approx(size, rel=0.01)


def test_preflight_does_not_take_an_old_copy_for_a_new_one(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    script = load("preflight")
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path))
    for recipe, prepared in ((script.RECIPES["code"] - 1, False), (script.RECIPES["code"], True)):
        made = tmp_path / f"shoal/models/demo/code-{recipe}"
        made.mkdir(parents=True)
        (made / "shoal-demo.json").write_text('{"files": {}}')
        assert script.is_prepared("code") == prepared


def test_environment_takes_torch_from_where_it_is_told(tmp_path: Path) -> None:
    environment = load("environment")
    assert environment.torch_from(None) == []
    assert environment.torch_from("") == []
    assert environment.torch_from("https://example.org/cpu") == ["--index-url", "https://example.org/cpu"]
    assert environment.torch_from(str(tmp_path)) == ["--find-links", str(tmp_path)]
    with pytest.raises(ValueError, match="neither a folder nor an address"):
        environment.torch_from(str(tmp_path / "nowhere"))


FAKE_MATURIN = """#!/bin/sh
echo "$@" > {0}/begun
while [ ! -e {0}/go ]; do sleep 0.01; done
echo $PWD > {0}/built
exit {1}
"""


def environment_in(tree: Path, status: int = 0) -> ModuleType:
    """The script, in a tree whose maturin builds when it is told to."""
    environment = load("environment")
    for name in ("ROOT", "VENV", "EXTENSION", "AHEAD"):
        setattr(environment, name, tree / getattr(environment, name).relative_to(ROOT))
    maturin = tree / ".venv/bin/maturin"
    maturin.parent.mkdir(parents=True)
    maturin.write_text(FAKE_MATURIN.format(tree, status))
    maturin.chmod(0o755)
    return environment


def wait_for_file(path: Path) -> None:
    deadline = time.monotonic() + 30
    while not (path.is_file() and path.read_text()):
        assert time.monotonic() < deadline, path
        time.sleep(0.01)


@pytest.mark.parametrize("status", [0, 3])
def test_the_rust_half_is_compiled_while_packages_are_installed(tmp_path: Path, status: int) -> None:
    """Where that fails, `make` builds it afterwards and says why."""
    with environment_in(tmp_path, status).compiling():
        wait_for_file(tmp_path / "begun")
        assert not (tmp_path / "built").exists()
        (tmp_path / "go").touch()
    assert (tmp_path / "built").read_text().strip() == str(tmp_path), "it was waited for"
    ahead = ["build", "--release", "--locked", "--quiet", "--out", str(tmp_path / ".shoal/ahead")]
    assert (tmp_path / "begun").read_text().split() == ahead


def test_what_is_compiled_ahead_is_what_make_installs() -> None:
    """With another profile or other features all of it would be compiled twice."""
    makefile = (ROOT / "Makefile").read_text()
    assert "maturin develop --release --locked --quiet" in makefile
    assert f"\nSTAMPS := {load('environment').EXTENSION.parent.relative_to(ROOT)}\n" in makefile


def test_nothing_is_compiled_for_an_installation_that_failed(tmp_path: Path) -> None:
    environment = environment_in(tmp_path)
    with pytest.raises(ValueError, match="no torch"), environment.compiling():
        wait_for_file(tmp_path / "begun")
        raise ValueError("no torch")
    (tmp_path / "go").touch()
    time.sleep(0.2)
    assert not (tmp_path / "built").exists()


@pytest.mark.parametrize("number", [signal.SIGINT, signal.SIGTERM, signal.SIGHUP])
def test_what_is_compiled_ahead_ends_with_who_waits_for_it(tmp_path: Path, number: signal.Signals) -> None:
    environment = environment_in(tmp_path)
    before = {one: signal.getsignal(one) for one in (signal.SIGTERM, signal.SIGHUP)}

    def end_it() -> None:
        wait_for_file(tmp_path / "begun")
        time.sleep(0.2)
        os.kill(os.getpid(), number)

    ends = threading.Thread(target=end_it)
    try:
        environment.end_by_signals()
        with pytest.raises((KeyboardInterrupt, SystemExit)), environment.compiling():
            ends.start()
    finally:
        ends.join()
        for one, handler in before.items():
            signal.signal(one, handler)
    (tmp_path / "go").touch()
    time.sleep(0.2)
    assert not (tmp_path / "built").exists()


def test_nothing_is_compiled_ahead_where_it_is_built(tmp_path: Path) -> None:
    environment = environment_in(tmp_path)
    environment.EXTENSION.parent.mkdir(parents=True)
    environment.EXTENSION.touch()
    with environment.compiling():
        time.sleep(0.2)
    assert not (tmp_path / "begun").exists()


@pytest.mark.parametrize(
    ("expression", "met"),
    [
        ("MIT", True),
        ("MIT OR GPL-2.0", True),
        ("MIT/Apache-2.0", True),
        ("GPL-2.0", False),
        ("(MIT OR GPL-2.0) AND Unicode-3.0", True),
        ("(MIT OR Apache-2.0) AND GPL-2.0", False),
        ("Apache-2.0 WITH LLVM-exception OR GPL-2.0", True),
        ("GPL-2.0 WITH Classpath-exception", False),
        ("", False),
        ("MIT AND", False),
        ("MIT MIT", False),
    ],
)
def test_licence_expressions(expression: str, met: bool) -> None:
    allowed = {"MIT", "Apache-2.0", "Apache-2.0 WITH LLVM-exception", "Unicode-3.0"}
    assert load("check_dependencies").satisfies(expression, allowed) == met


def test_dependencies_that_break_a_rule_are_found() -> None:
    check = load("check_dependencies")
    rules: dict[str, Any] = {
        "licenses": {"allow": ["MIT"]},
        "bans": {"skip": [{"crate": "old@1.0.0"}, {"crate": "gone@1.0.0"}], "deny": [{"crate": "bad", "reason": "no"}]},
    }

    def package(name: str, version: str, licence: str = "MIT", source: str | None = "registry+x") -> dict[str, Any]:
        return {"name": name, "version": version, "license": licence, "source": source}

    packages = [
        package("old", "1.0.0"),
        package("old", "2.0.0"),
        package("twice", "1.0.0"),
        package("twice", "2.0.0", "GPL-3.0"),
        package("bad", "1.0.0", source="git+https://example.org/bad"),
    ]
    assert [problem.split()[0] for problem in check.licences(packages, rules)] == ["twice"]
    assert check.duplicates(packages, rules) == [
        "twice is there in versions 1.0.0, 2.0.0; `cargo tree -i twice@1.0.0`",
        "deny.toml skips gone@1.0.0, which is no duplicate (any more)",
    ]
    assert check.banned(packages, rules) == ["bad 1.0.0: no"]
    assert check.origins(packages) == ["bad 1.0.0 comes from git+https://example.org/bad"]


def figure_rows() -> list[dict[str, Any]]:
    empty = {"ceiling": None, "peer": None, "peer_value": None, "target": None, "met": None}
    return [
        {**empty, "case": "8 models", "metric": "p50", "value": 0.3512, "unit": "ms", "target": 0.3, "met": False},
        {**empty, "case": "8 models", "metric": "p99", "value": 2.0, "unit": "ms", "target": 3, "met": True},
        {
            **empty,
            "case": "asleep",
            "metric": "held",
            "value": 3 << 20,
            "unit": "bytes",
            "peer": "other",
            "peer_value": 0,
        },
        {**empty, "case": "it holds", "metric": "passed", "value": 1, "unit": "bool", "target": 1, "met": True},
        {
            **empty,
            "case": "it fails",
            "metric": "passed",
            "value": 0,
            "unit": "bool",
            "target": 1,
            "met": False,
        },
    ]


@pytest.fixture
def render(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> ModuleType:
    """The script that renders, over results of its own."""
    script = load("render_results")
    monkeypatch.setattr(script, "RESULTS", tmp_path)
    monkeypatch.setattr(script, "HEADLINES", [("cpu", "gateway_latency", "8 models", "p99")])
    result = {"date": "2026-01-02T03:04:05Z", "shoal_commit": "0123456789abcdef", "rows": figure_rows()}
    (tmp_path / "cpu").mkdir()
    (tmp_path / "cpu" / "gateway_latency.json").write_text(json.dumps(result))
    return script


def test_all_figures_are_rendered_with_where_they_come_from(render: ModuleType) -> None:
    text = render.tables(render.figures())
    assert "### gateway_latency (2026-01-02, commit 012345678)" in text
    assert "| 8 models: p50 | 0.351 ms |  |  | 0.3 **missed** |" in text
    assert "| 8 models: p99 | 2 ms |  |  | 3 met |" in text
    assert "| asleep: held | 3 MiB |  | other: 0 |  |" in text
    assert "it holds" not in text, "what passed is no figure"
    assert "it fails | **failed**" in text
    assert render.tables([]) == "No figures yet."


def test_readme_shows_headlines_and_every_loss(render: ModuleType, monkeypatch: pytest.MonkeyPatch) -> None:
    text = render.headlines(render.figures())
    assert "p99 | 2 ms" in text
    assert "p50 | 0.351 ms |  |  | 0.3 **missed** |" in text, "a loss is shown although it is no headline"
    assert "asleep" not in text
    assert "Of 2 figures with a target 1 meet it" in text
    assert "Of 2 recorded tests 1 passed" in text
    assert "| it fails | **failed** |  |  |  |" in text
    assert "| it holds |" not in text
    monkeypatch.setattr(render, "HEADLINES", [("cpu", "gateway_latency", "9 models", "p99")])
    with pytest.raises(ValueError, match="9 models"):
        render.headlines(render.figures())


def test_documents_show_the_figures_there_are() -> None:
    command = [sys.executable, str(ROOT / "scripts/render_results.py"), "--check"]
    assert subprocess.run(command, check=False).returncode == 0, "run scripts/render_results.py"


FAKE_MAKE = """#!/bin/sh
shift
for target; do
  echo "makes $target"
  [ "$target" != bad ] || exit 3
  [ "$target" != slow ] || { echo $$ > "$0.pid"; sleep 60; }
done
"""


@pytest.fixture
def fake_make(tmp_path: Path) -> Path:
    made = tmp_path / "make"
    made.write_text(FAKE_MAKE)
    made.chmod(0o755)
    return made


def run_all(fake_make: Path, *parts: str) -> subprocess.Popen[str]:
    """Run parts of :mod:`test_all`: of each its targets, the first one printed at once."""
    code = f"""
import sys; sys.path.insert(0, {str(ROOT / "scripts")!r})
from pathlib import Path
from test_all import Part, main
names = {parts!r}
parts = [Part(f"part {{n}}", tuple(name.split()), f"{{n}}.log" if n else None, nice=n) for n, name in enumerate(names)]
sys.exit(main({str(fake_make)!r}, Path({str(fake_make.parent / "logs")!r}), tuple(parts)))
"""
    return subprocess.Popen([sys.executable, "-c", code], stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True)


@pytest.mark.parametrize(
    ("parts", "status", "failed"),
    [
        (("one", "two three", "four"), 0, []),
        (("bad", "two", "four"), 1, ["part 0"]),
        (("one", "two", "four bad five"), 1, ["part 2"]),
        (("bad", "bad", "four"), 1, ["part 0", "part 1"]),
    ],
)
def test_all_parts_of_the_tests_are_run_and_each_failure_is_named(
    fake_make: Path, parts: tuple[str, ...], status: int, failed: list[str]
) -> None:
    run = run_all(fake_make, *parts)
    said = run.communicate(timeout=60)[0]
    assert run.returncode == status, said
    assert [line for line in said.splitlines() if line.startswith("FAILED")] == [
        f"FAILED: {name} (see above)" for name in failed
    ]
    assert ("makes five" in said) is False
    for number, part in enumerate(parts):
        made = part.split("bad")[0].split()
        assert all(f"makes {target}" in said for target in made), (number, said)


def test_every_test_of_python_belongs_to_one_part() -> None:
    targets = [target for part in load("test_all").PARTS for target in part.targets]
    assert sorted(targets) == ["test-others", "test-rust", "test-servers", "test-tiers", "test-wheel"]
    said = subprocess.run(
        ["make", "--dry-run", "--no-print-directory", *targets], cwd=ROOT, capture_output=True, text=True, check=True
    ).stdout
    runs = [line.split("pytest -q", 1)[1].split() for line in said.splitlines() if "pytest -q" in line]
    assert len(runs) == 3
    tests = [str(path.relative_to(ROOT)) for path in (ROOT / "tests").rglob("test_*.py")]

    def is_run(test: str, arguments: list[str]) -> bool:
        ignored = [argument.removeprefix("--ignore=") for argument in arguments if argument.startswith("--ignore=")]
        named = [argument for argument in arguments if not argument.startswith("--")] or ["tests"]
        within = [any(Path(test).is_relative_to(place) for place in places) for places in (named, ignored)]
        return within == [True, False]

    for test in tests:
        assert sum(is_run(test, arguments) for arguments in runs) == 1, test


def test_parts_of_the_tests_end_with_who_runs_them(fake_make: Path) -> None:
    run = run_all(fake_make, "one", "slow")
    pid = fake_make.with_name("make.pid")
    deadline = time.monotonic() + 30
    while not (pid.is_file() and pid.read_text().strip()):
        assert time.monotonic() < deadline
        time.sleep(0.01)
    run.terminate()
    assert "Ended by SIGTERM" in run.communicate(timeout=30)[0]
    assert run.returncode == 130
    while Path(f"/proc/{pid.read_text().strip()}").exists():
        assert time.monotonic() < deadline, "it goes on"
        time.sleep(0.01)
