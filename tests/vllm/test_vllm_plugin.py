"""What the plugin does where vLLM is not, or is another one: nothing, or a refusal that names the range."""

from __future__ import annotations

import asyncio
import subprocess
import sys
import types
from pathlib import Path
from typing import TYPE_CHECKING, Any

import pytest

import shoal.vllm
from shoal.vllm import plugin, versions

if TYPE_CHECKING:
    from collections.abc import AsyncIterator

ROOT = Path(__file__).resolve().parents[2]


def test_importing_it_imports_neither_vllm_nor_torch() -> None:
    code = "import sys, shoal.vllm, shoal.vllm.plugin; print({'vllm', 'torch'} & set(sys.modules))"
    out = subprocess.run([sys.executable, "-c", code], check=True, capture_output=True, text=True)
    assert out.stdout.strip() == "set()"


def test_the_entry_point_is_the_function() -> None:
    import tomllib

    project = tomllib.loads((ROOT / "pyproject.toml").read_text())["project"]
    assert project["entry-points"]["vllm.general_plugins"] == {"shoal": "shoal.vllm.plugin:register"}
    assert callable(plugin.register)


@pytest.mark.parametrize("value", [None, "0", ""])
def test_it_is_inert_unless_asked(monkeypatch: pytest.MonkeyPatch, value: str | None) -> None:
    monkeypatch.delenv("SHOAL", raising=False)
    if value is not None:
        monkeypatch.setenv("SHOAL", value)
    monkeypatch.setattr(plugin, "check_version", lambda: pytest.fail("it looked at vLLM"))
    plugin.register()


@pytest.mark.parametrize("found", ["0.25.9", "0.27.0", "0.33.1", "1.0", "dev"])
def test_another_version_is_refused_and_the_range_is_named(found: str) -> None:
    with pytest.raises(versions.VersionError, match=r"0\.26 up to, not including, 0\.27") as caught:
        versions.check_version(found)
    assert caught.value.found == found


@pytest.mark.parametrize("found", ["0.26.0", "0.26.1.dev3+cu130"])
def test_a_tested_version_is_taken(found: str) -> None:
    assert versions.check_version(found) == found


def test_our_worker_is_preferred_only_where_none_is_named() -> None:
    class Platform:
        @classmethod
        def check_and_update_config(cls, vllm_config: Any) -> None:
            if vllm_config.parallel_config.worker_cls == "auto":
                vllm_config.parallel_config.worker_cls = "theirs"

    plugin._prefer(Platform)
    plugin._prefer(Platform)
    for named, wanted in (("auto", plugin.WORKER), ("mine.Worker", "mine.Worker")):
        config = types.SimpleNamespace(parallel_config=types.SimpleNamespace(worker_cls=named))
        Platform().check_and_update_config(config)
        assert config.parallel_config.worker_cls == wanted


class Llm:
    """What is asked of vLLM's engines."""

    def __init__(self, failing: bool = False) -> None:
        self.said: list[object] = []
        self.failing = failing

    def rpc(self, name: str, args: tuple[object, ...]) -> list[dict[str, object]]:
        self.said.append((name, *args))
        if self.failing and name == "shoal_sleep":
            raise shoal.OutOfMemoryError("the host is full", tier="host")
        return [{"seconds": 0.1}]

    def collective_rpc(self, name: str, args: tuple[object, ...] = ()) -> list[dict[str, object]]:
        return self.rpc(name, args)


class AsyncLlm(Llm):
    async def collective_rpc(self, name: str, args: tuple[object, ...] = ()) -> list[dict[str, object]]:  # type: ignore[override]
        return self.rpc(name, args)

    async def pause_generation(self, *, mode: str, clear_cache: bool) -> None:
        self.said.append(("pause", mode, clear_cache))

    async def resume_generation(self) -> None:
        self.said.append("resume")


def test_an_llm_sleeps_and_wakes_by_our_own_calls() -> None:
    llm = Llm()
    assert shoal.vllm.suspend(llm, "forget") == {"seconds": 0.1}
    shoal.vllm.resume(llm)
    assert llm.said == [("shoal_sleep", "forget"), ("shoal_wake",)]


class Speaking(Llm):
    """One whose weights may not be the same after a sleep."""

    def __init__(self, *tokens: tuple[int, float]) -> None:
        super().__init__()
        self.tokens = list(tokens)

    def generate(
        self, prompts: list[dict[str, list[int]]], sampling: types.SimpleNamespace, *, use_tqdm: bool
    ) -> list[object]:
        assert (len(prompts), sampling.max_tokens, sampling.temperature, use_tqdm) == (1, 1, 0, False)
        self.said.append("one token")
        token, logprob = self.tokens.pop(0)
        said = types.SimpleNamespace(token_ids=[token], logprobs=[{token: types.SimpleNamespace(logprob=logprob)}])
        return [types.SimpleNamespace(outputs=[said])]


def test_a_wake_is_checked_by_one_token_if_it_is_wanted(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(sys.modules, "vllm", types.SimpleNamespace(SamplingParams=types.SimpleNamespace))
    llm = Speaking((7, -1.0), (7, -1.0), (7, -1.0), (8, -2.0))
    shoal.vllm.suspend(llm, check=True)
    report = shoal.vllm.resume(llm)
    assert report["check"]["logprob"] == 0
    assert llm.said == ["one token", ("shoal_sleep", "keep"), ("shoal_wake",), "one token"]
    shoal.vllm.suspend(llm, check=True)
    with pytest.raises(shoal.Error, match=r"says token 8 .* where it said 7") as wrong:
        shoal.vllm.resume(llm)
    assert wrong.value.kind == "check"
    # Without being asked for nothing is computed, nor is what was said before a sleep held against a later one.
    shoal.vllm.suspend(llm)
    assert "check" not in shoal.vllm.resume(llm)


class SpeakingAsync(AsyncLlm):
    def __init__(self, *said: dict[int, float]) -> None:
        super().__init__()
        self.answers = list(said)

    async def generate(
        self, prompt: dict[str, list[int]], sampling: types.SimpleNamespace, number: str
    ) -> AsyncIterator[object]:
        assert (len(prompt["prompt_token_ids"]), sampling.max_tokens, sampling.temperature) == (8, 1, 0)
        assert number.startswith("shoal-check-")
        self.said.append("one token")
        chances = self.answers.pop(0)
        token = max(chances, key=lambda one: chances[one])
        logprobs = [{one: types.SimpleNamespace(logprob=chance) for one, chance in chances.items()}]
        yield types.SimpleNamespace(outputs=[types.SimpleNamespace(token_ids=[token], logprobs=logprobs)])


def test_a_serving_engines_wake_is_checked_where_others_are_computed_beside_it(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(sys.modules, "vllm", types.SimpleNamespace(SamplingParams=types.SimpleNamespace))
    # Two tokens are about as likely: rounding may turn them around.
    llm = SpeakingAsync({7: -1.0, 8: -1.02}, {7: -1.03, 8: -1.0}, {7: -1.0, 8: -1.02}, {8: -0.3, 7: -2.0}, {7: -1.0})
    asyncio.run(shoal.vllm.suspend_async(llm, check=True))
    report = asyncio.run(shoal.vllm.resume_async(llm))
    assert report["check"]["logprob"] == pytest.approx(-0.03)
    assert llm.said == [
        "one token", ("pause", "wait", False), ("shoal_sleep", "keep"), ("shoal_wake",), "resume", "one token",
    ]  # fmt: skip
    asyncio.run(shoal.vllm.suspend_async(llm, check=True))
    with pytest.raises(shoal.Error, match=r"says token 8 .* where it said 7") as wrong:
        asyncio.run(shoal.vllm.resume_async(llm))
    assert wrong.value.kind == "check"
    asyncio.run(shoal.vllm.suspend_async(llm))
    assert "check" not in asyncio.run(shoal.vllm.resume_async(llm))
    # A sleep that fails is none, and its wake has nothing to compare.
    llm.failing = True
    with pytest.raises(shoal.OutOfMemoryError):
        asyncio.run(shoal.vllm.suspend_async(llm, check=True))
    assert not llm.answers


def test_running_requests_end_before_memory_goes_and_nothing_is_forgotten() -> None:
    llm = AsyncLlm()
    asyncio.run(shoal.vllm.suspend_async(llm))
    asyncio.run(shoal.vllm.resume_async(llm))
    assert llm.said == [("pause", "wait", False), ("shoal_sleep", "keep"), ("shoal_wake",), "resume"]


def test_a_sleep_that_fails_leaves_the_engine_serving() -> None:
    llm = AsyncLlm(failing=True)
    with pytest.raises(shoal.OutOfMemoryError):
        asyncio.run(shoal.vllm.suspend_async(llm))
    assert llm.said[-2:] == [("shoal_wake",), "resume"]
