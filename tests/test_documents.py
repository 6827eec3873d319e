"""What README and the examples show is run, so that it stays true."""

from __future__ import annotations

import re
import subprocess
import sys
import tomllib
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parents[1]
README = (ROOT / "README.md").read_text("utf-8")


def blocks(language: str, text: str = README) -> list[str]:
    return re.findall(rf"^```{language}\n(.*?)^```$", text, re.MULTILINE | re.DOTALL)


def run(*arguments: str) -> subprocess.CompletedProcess[str]:
    return subprocess.run(
        [sys.executable, *arguments], cwd=ROOT, capture_output=True, text=True, timeout=120, check=False
    )


def test_readme_has_one_block_for_clients_and_one_for_programs() -> None:
    assert [block.splitlines()[0] for block in blocks("python")] == ["from openai import OpenAI", "import shoal"]


@pytest.mark.parametrize("block", [block for block in blocks("python") if block.startswith("import shoal")])
def test_readme_program_runs(block: str) -> None:
    done = run("-c", block)
    assert done.returncode == 0, done.stderr


@pytest.mark.torch
def test_the_page_on_torch_runs_without_a_gpu() -> None:
    pytest.importorskip("torch")
    # The first block wants a GPU: tests/gpu runs it.
    on_gpu, simulated = blocks("python", (ROOT / "docs/torch.md").read_text("utf-8"))
    assert "cuda:0" in on_gpu
    done = run("-W", "ignore", "-c", simulated)
    assert done.returncode == 0, done.stderr


def test_readme_configuration_is_one() -> None:
    for block in blocks("toml"):
        assert {"server", "model"} == set(tomllib.loads(block))


def test_memory_example_runs() -> None:
    done = run("examples/memory.py")
    assert done.returncode == 0, done.stderr
    assert [line.split()[0] for line in done.stdout.splitlines()] == ["first", "second", "first"]


def test_shelf_of_the_demo_has_the_demo_s_models() -> None:
    shelf = tomllib.loads((ROOT / "examples/shelf.toml").read_text("utf-8"))
    assert [(model["name"], model["source"]) for model in shelf["model"]] == [
        (name, f"demo:{name}") for name in ("chat", "documents", "code")
    ]


def test_what_readme_says_about_the_shelf_is_in_it() -> None:
    budget = tomllib.loads((ROOT / "examples/shelf.toml").read_text("utf-8"))["server"]["device_budget"]
    assert f'device_budget = "{budget}"' in README
