"""The token after a wake: what is compared, with what, and when. Needs no vLLM."""

from __future__ import annotations

import asyncio
import os
import subprocess
import sys
import types
from pathlib import Path
from typing import TYPE_CHECKING, Any

import pytest

import shoal
from shoal.vllm import checks
from shoal.vllm.checks import WakeChecks
from shoal.vllm.control import Said

if TYPE_CHECKING:
    from collections.abc import AsyncIterator


class Engine:
    """One that answers from a list, and ends the test when it is asked once more."""

    def __init__(self, weights: list[list[int] | None], says: list[int | None]) -> None:
        self.weights, self.says = list(weights), list(says)
        self.asked = 0

    async def collective_rpc(self, name: str) -> list[list[int] | None]:
        assert name == "shoal_weights"
        if not self.weights:
            raise EOFError
        return [self.weights.pop(0)]

    async def generate(self, prompt: dict[str, Any], sampling: Any, number: str) -> AsyncIterator[Any]:
        assert number.startswith("shoal-check-")
        assert (sampling.max_tokens, sampling.temperature, len(prompt["prompt_token_ids"])) == (1, 0, 8)
        self.asked += 1
        token = self.says.pop(0)
        if token is None:
            yield types.SimpleNamespace(outputs=[types.SimpleNamespace(token_ids=[], logprobs=[])])
            return
        said = types.SimpleNamespace(token_ids=[token], logprobs=[{token: types.SimpleNamespace(logprob=-0.5)}])
        yield types.SimpleNamespace(outputs=[said])


@pytest.fixture(autouse=True)
def _at_once(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(checks, "LOOK_S", 0)
    monkeypatch.setitem(sys.modules, "vllm", types.SimpleNamespace(SamplingParams=types.SimpleNamespace))


def run(engine: Engine) -> None:
    async def both() -> None:
        wakes = WakeChecks(engine)
        await wakes.begin()
        await wakes.run()

    asyncio.run(both())


def test_it_is_asked_once_for_each_time_that_weights_were_away() -> None:
    engine = Engine([[0, 0], [0, 0], None, None, [8, 0], [8, 0], [8, 0], None, [24, 0]], [7, 7, 7])
    with pytest.raises(EOFError):
        run(engine)
    assert engine.asked == 3


def test_another_token_is_an_error_that_says_both() -> None:
    engine = Engine([[0, 0], [8, 0]], [7, 9, 9, 9])
    with pytest.raises(shoal.Error, match=r"says token 9 .* where it said 7") as wrong:
        run(engine)
    assert wrong.value.kind == "check"


def test_weights_that_somebody_wrote_say_what_is_expected_from_then_on() -> None:
    engine = Engine([[0, 0], [0, 1], [8, 1], None, [16, 2], [24, 2]], [7, 9, 9, 5, 9, 9, 9])
    with pytest.raises(shoal.Error, match=r"says token 9 .* where it said 5"):
        run(engine)


def test_an_engine_that_cannot_be_asked_is_not_checked() -> None:
    engine = Engine([[0, 0], [8, 0]], [])
    run(engine)
    assert engine.asked == 1


def test_a_token_that_is_another_once_is_asked_again() -> None:
    engine = Engine([[0, 0], [8, 0]], [7, 9, 9, 7])
    with pytest.raises(EOFError):
        run(engine)
    assert engine.asked == 4


def test_a_check_that_somebody_ended_is_made_again_at_the_next_look() -> None:
    engine = Engine([[0, 0], [8, 0], [8, 0]], [7, None, 9, 9, 9])
    with pytest.raises(shoal.Error, match=r"says token 9"):
        run(engine)
    assert engine.asked == 5


@pytest.mark.parametrize("step", [0.0, 0.125, 0.25, -0.5])
def test_rounding_is_no_other_token(step: float) -> None:
    before = Said(7, -1.0, {7: -1.0, 8: -1.1})
    assert before.agrees(Said(7, -1.0 + step, {7: -1.0 + step, 8: -1.1}), checks.ROUNDING)
    swapped = Said(8, -0.9, {8: -0.9, 7: -1.0 + step})
    assert before.agrees(swapped, checks.ROUNDING)


@pytest.mark.parametrize("others", [{8: -0.2, 9: -2.0}, {8: -0.2, 7: -1.6}])
def test_a_token_that_is_no_more_likely_is_another(others: dict[int, float]) -> None:
    assert not Said(7, -1.0, {7: -1.0}).agrees(Said(8, -0.2, others), checks.ROUNDING)


WRITES = """
import contextlib
from vllm.v1.worker import gpu_worker

def fails(self, *arguments):
    raise OSError("a file was cut")

gpu_worker.Worker.reload_weights = gpu_worker.Worker.update_weights = fails
from shoal.vllm.worker import Worker

class Memory:
    def guard(self):
        return contextlib.nullcontext()

worker = object.__new__(Worker)
worker._memory, worker._written = Memory(), 0
for write in (worker.reload_weights, lambda: worker.update_weights({})):
    with contextlib.suppress(OSError):
        write()
print(worker._written)
"""


def test_weights_whose_writing_failed_midway_are_others() -> None:
    fake = Path(__file__).parent / "fake"
    paths = os.pathsep.join([str(fake), os.environ.get("PYTHONPATH", "")])
    done = subprocess.run(
        [sys.executable, "-c", WRITES],
        env=os.environ | {"PYTHONPATH": paths},
        capture_output=True,
        text=True,
        check=False,
    )
    assert done.stdout.strip() == "2", done.stderr
