"""What cached blocks of a vLLM engine are worth: by what its steps took, and by what its requests found."""

from __future__ import annotations

from collections import deque
from dataclasses import dataclass, field
from types import SimpleNamespace
from typing import Any

import pytest

from shoal.vllm.control import CHECK
from shoal.vllm.prices import LAUNCHED_MAX, Prices


@dataclass
class Step:
    """What the scheduler gives for one."""

    num_scheduled_tokens: dict[str, int] = field(default_factory=dict)
    new: tuple[str, ...] = ()
    resumed: set[str] = field(default_factory=set)
    preempted: tuple[str, ...] = ()
    found: int = 0
    scheduled_spec_decode_tokens: dict[str, list[int]] = field(default_factory=dict)
    scheduled_encoder_inputs: dict[str, list[int]] = field(default_factory=dict)

    @property
    def total_num_scheduled_tokens(self) -> int:
        return sum(self.num_scheduled_tokens.values())

    @property
    def scheduled_new_reqs(self) -> list[Any]:
        return [SimpleNamespace(req_id=name) for name in self.new]

    @property
    def scheduled_cached_reqs(self) -> Any:
        return SimpleNamespace(resumed_req_ids=self.resumed)


class Engine:
    """A scheduler that gives prepared steps, and a clock that is set."""

    def __init__(self, **named: Any) -> None:
        self.queue = SimpleNamespace(cached=100, found=0)
        self.steps: deque[Step] = deque()
        self.now = 100.0
        self.schedules_s = 0.0
        self.requests: dict[str, Any] = {}
        self.prices = Prices(self.queue, 16.0, clock=lambda: self.now, **named)  # type: ignore[arg-type]
        self.prices.watch(self)

    def schedule(self, throttle_prefills: bool = False) -> Step:
        step = self.steps.popleft()
        self.queue.found += step.found
        self.now += self.schedules_s
        self.requests = {name: SimpleNamespace(num_preemptions=int(name in step.preempted)) for name in step.new}
        return step

    def update_from_output(self, output: Step, said: str) -> tuple[Step, str]:
        return output, said

    def launch(self, step: Step) -> Step:
        self.steps.append(step)
        assert self.schedule(False) is step, "what the scheduler says is lost"
        self.prices.launched(step)
        return step

    def end(self, step: Step) -> None:
        assert self.update_from_output(step, "tokens") == (step, "tokens"), "what it says is lost"

    def run(self, step: Step, seconds: float) -> None:
        self.launch(step)
        self.now += seconds
        self.end(step)


def prompt(tokens: int, name: str = "a", **named: Any) -> Step:
    return Step({name: tokens}, **named)


def test_a_step_of_prompts_says_what_a_mib_takes() -> None:
    engine = Engine()
    assert engine.prices.back_us_per_mib == 0, "nobody knows"
    engine.run(prompt(100), 0.01)
    assert engine.prices.back_us_per_mib == 1_600, "100 us a token, of which 16 are a MiB"


def test_what_any_step_takes_is_not_the_prompts() -> None:
    engine = Engine()
    engine.run(Step({}), 0.001)
    engine.run(Step({"a": 1}), 0.002)
    engine.run(Step({"a": 16}), 0.01)
    engine.run(prompt(100), 0.02)
    assert engine.prices.back_us_per_mib == 1_600


def test_a_step_beside_which_the_loop_waited_says_nothing() -> None:
    engine = Engine()
    first = engine.launch(prompt(1_000))
    engine.schedules_s = 5.0
    second = engine.launch(prompt(1_000, "b"))
    engine.end(first)
    assert engine.prices.back_us_per_mib == 0, "that time was not the step's"
    engine.now += 0.1
    engine.end(second)
    assert engine.prices.back_us_per_mib == 1_600


def test_what_it_does_not_understand_ends_the_learning_and_not_the_engine() -> None:
    engine = Engine()
    engine.run(prompt(100), 0.01)
    strange = prompt(100)
    strange.num_scheduled_tokens = None  # type: ignore[assignment]
    engine.run(strange, 0.01)
    engine.run(prompt(100), 5)
    assert engine.prices.back_us_per_mib == 1_600


def test_a_step_that_was_launched_beside_another_has_only_its_own_time() -> None:
    engine = Engine()
    first = engine.launch(prompt(1_000))
    engine.now += 0.001
    second = engine.launch(prompt(1_000, "b"))
    engine.now += 0.099
    engine.end(first)
    engine.now += 0.1
    engine.end(second)
    assert engine.prices.back_us_per_mib == 1_600, "the step before it is counted"
    engine.now += 60  # nothing runs
    engine.run(prompt(1_000), 0.1)
    assert engine.prices.back_us_per_mib == 1_600, "the time in which nothing ran is counted"


@pytest.mark.parametrize(
    "step",
    [
        Step({str(number): 1 for number in range(64)}),
        prompt(31),
        prompt(512, scheduled_spec_decode_tokens={"a": [1, 2]}),
        prompt(512, scheduled_encoder_inputs={"a": [0]}),
    ],
    ids=["answers", "a few tokens", "guesses", "images"],
)
def test_other_steps_say_nothing(step: Step) -> None:
    engine = Engine()
    engine.run(step, 0.5)
    assert engine.prices.back_us_per_mib == 0


def test_a_step_that_was_never_launched_says_nothing_and_one_that_never_ends_is_forgotten() -> None:
    engine = Engine()
    engine.end(prompt(100))
    assert engine.prices.back_us_per_mib == 0
    lost = [engine.launch(prompt(100)) for _ in range(LAUNCHED_MAX + 1)]
    engine.now += 1
    engine.end(lost[0])
    assert engine.prices.back_us_per_mib == 0, "more steps are kept than there can be"
    engine.end(lost[1])
    assert engine.prices.back_us_per_mib > 0


def test_where_forgotten_blocks_come_back_from_a_tier_no_price_is_said() -> None:
    engine = Engine(is_kept_below=True)
    engine.run(prompt(100), 0.01)
    assert (engine.prices.back_us_per_mib, engine.prices.found_milli) == (0, 0)


def found_by(*steps: Step) -> int:
    engine = Engine()
    for step in steps:
        engine.run(step, 0.01)
        engine.now += 2
    return engine.prices.found_milli


def test_what_requests_find_counts_once_for_each_that_came() -> None:
    assert found_by() == 500, "nobody has looked"
    nothing, all_of_it = (Step({"a": 40}, new=("a",), found=found) for found in (0, 100))
    assert found_by(nothing) < 500 < found_by(all_of_it)
    assert found_by(nothing, nothing) < found_by(nothing), "a request that finds nothing does not count"
    assert found_by(prompt(40)) == 500, "a step that goes on with a prompt looks for nothing"
    assert found_by(Step({"a": 40}, resumed={"a"}, found=100)) == 500, "it found its own"
    again = Step({"a": 40}, new=("a", "b"), preempted=("a",), found=100)
    assert found_by(again) == 500, "it found its own, and is told among the new ones"
    assert found_by(Step({"c": 1}, new=(f"{CHECK}1",))) == 500, "what checks a wake is nobody's request"
    loaded = Step({}, found=100)
    assert found_by(loaded) == found_by(all_of_it), "what waits for a connector has found it"
