"""A prefix that comes slowly from below holds up its own request alone; what is dropped on the way leaves nothing."""

from __future__ import annotations

import asyncio
import time
from collections import deque
from contextlib import contextmanager
from types import SimpleNamespace
from typing import TYPE_CHECKING, Any

import pytest
from transformers.generation.continuous_batching.requests import RequestStatus

import shoal.testing
from shoal.worker import loads
from shoal.worker.device import DeviceMemory
from shoal.worker.engine_causal import CausalEngine, Generation
from shoal.worker.errors import ApiError
from shoal.worker.kv import KvLayout
from shoal.worker.limits import CausalLimits
from shoal.worker.scheduling import ElasticScheduler
from shoal.worker.spec import RemoteShare, WorkerSpec
from tests.support.redis import redis

from .conftest import llama
from .test_engine_causal import GREEDY, alone
from .test_tiers import FACTS, until

if TYPE_CHECKING:
    from collections.abc import Callable, Iterator
    from pathlib import Path

    import torch

    from tests.support.redis import FakeRedis

READ_S = 0.5  # a remote gives a try two seconds
ANSWER = 6
WHOLE = 96  # tokens of full blocks of a prompt, all but the last one's


def prompt_of(number: int) -> list[int]:
    return [(7 * at + 13 * number) % 251 + 1 for at in range(100)]


class Bench:
    """An engine whose cache has a remote below it, which has the prompts that were asked, and the device has not."""

    def __init__(self, mem: shoal.MemoryManager, fake: FakeRedis, where: Path, wait_s: float) -> None:
        self.mem, self.fake = mem, fake
        self.model: torch.nn.Module = llama(5)
        spec = WorkerSpec(source="x", threads=1, kv_max_bytes=8 << 20)
        self.memory = DeviceMemory(mem)
        self.memory.place(self.model)
        layout = KvLayout.of(self.model.config, self.model.dtype, spec.block_tokens)
        self.engine = CausalEngine(self.model, self.memory, spec, CausalLimits.of(layout, 1024, spec))
        for name, content in (("key", "07" * 32), ("login", ":a secret")):
            (where / name).write_text(content)
            (where / name).chmod(0o600)
        share = RemoteShare(fake.address, str(where / "key"), str(where / "login"))
        self.memory.keep_below(0, [], lambda: FACTS, wait_s, remote=share)
        until("the tier is open", lambda: self.memory.tiers()[0]["reason"] is None)
        self.engine.start()

    @property
    def kv(self) -> Any:
        return self.memory._kv

    @property
    def loads(self) -> loads.Loads:
        return self.engine._cache.loads

    def figures(self) -> dict[str, Any]:
        (figures,) = self.memory.tiers()
        return figures

    async def answer(self, number: int) -> tuple[list[int], int]:
        """What is said to a prompt, and how much of that was found."""
        generation = self.engine.submit(prompt_of(number), GREEDY, ANSWER)
        return [token async for tokens in generation for token in tokens], generation.cached_tokens

    async def keep(self, *numbers: int) -> None:
        """Let the remote alone have these prompts; from here on it is slow."""
        for number in numbers:
            await self.answer(number)
        assert self.kv.below._tier.flush(60)
        self.kv.forget_all()
        self.fake.read_s = READ_S

    async def reads(self) -> None:
        """Wait until the remote is asked for a block."""
        await soon("a read", lambda: "GET" in self.fake.asked)


async def soon(what: str, is_so: Callable[[], bool]) -> None:
    deadline = time.monotonic() + 60
    while not is_so():
        assert time.monotonic() < deadline, what
        await asyncio.sleep(0.005)


@contextmanager
def bench(where: Path, wait_s: float = 60.0) -> Iterator[Bench]:
    with redis() as fake, shoal.testing.simulated_memory("64MiB", host_budget="64MiB") as mem:
        one = Bench(mem, fake, where, wait_s)
        try:
            yield one
        finally:
            one.engine.stop()
            assert not one.engine._thread.is_alive()
            one.memory.close()


def expected(one: Bench, number: int) -> list[int]:
    return alone(llama(5), prompt_of(number), ANSWER)


def test_others_go_on_while_a_remote_reads(tmp_path: Path) -> None:
    with bench(tmp_path) as one:

        async def run() -> None:
            await one.keep(1)
            times: list[float] = []

            async def talk() -> None:
                async for tokens in one.engine.submit(prompt_of(2), GREEDY, 900):
                    times.extend(time.monotonic() for _ in tokens)

            talking = asyncio.create_task(talk())
            await soon("it talks", lambda: len(times) > 3)
            assert await one.answer(1) == (expected(one, 1), WHOLE)
            begun, ended = min(one.fake.reads)[0], max(ended for _, ended in one.fake.reads)
            beside = sum(begun < at < ended for at in times)
            assert ended - begun >= READ_S
            assert beside >= 5, f"{beside} tokens in {ended - begun:.2f} s"
            assert not talking.done(), "nothing was tested"
            talking.cancel()
            figures = one.figures()
            assert (figures["loaded"], figures["failed"], figures["late"]) == (WHOLE // 16, 0, 0)

        asyncio.run(run())


def test_where_all_wait_the_engine_sleeps_and_whoever_comes_runs(tmp_path: Path) -> None:
    with bench(tmp_path) as one:

        async def run() -> None:
            right = [expected(one, number) for number in (1, 2)]
            await one.keep(1)
            one.fake.read_s = 1.5
            schedule, calls = one.engine._processor.scheduler.schedule_batch, []

            def counted(*arguments: Any) -> Any:
                calls.append(time.monotonic())
                return schedule(*arguments)

            one.engine._processor.scheduler.schedule_batch = counted
            waiting = asyncio.create_task(one.answer(1))
            await one.reads()
            before, begun = len(calls), time.monotonic()
            await asyncio.sleep(0.3)
            passed = time.monotonic() - begun
            assert len(calls) - before <= 2 + 25 * passed, "it does not wait"
            assert one.engine._stalled_since is None, "nobody lacks memory"
            assert not waiting.done()
            begun = time.monotonic()
            assert await one.answer(2) == (right[1], 0)
            assert not waiting.done(), f"it took {time.monotonic() - begun} s"
            assert await waiting == (right[0], WHOLE)

        asyncio.run(run())


def test_few_are_loaded_at_a_time_and_what_is_nowhere_passes_them(tmp_path: Path) -> None:
    numbers = range(1, loads._TOGETHER + 3)
    with bench(tmp_path) as one:

        async def run() -> None:
            await one.keep(*numbers)
            one.fake.read_s = 0.2
            waiting = {number: asyncio.create_task(one.answer(number)) for number in numbers}
            await soon("they wait", lambda: len(one.loads._later) == 2)
            assert len(one.loads._under_way) == loads._TOGETHER
            assert await one.answer(1) == (expected(one, 1), WHOLE), "the same as another that waits"
            for number, answer in waiting.items():
                assert await answer == (expected(one, number), WHOLE), one.figures()
            assert not one.loads._later
            assert not one.loads._under_way

        asyncio.run(run())


@pytest.mark.parametrize("others", [0, 1])
def test_who_leaves_on_the_way_leaves_nothing(tmp_path: Path, others: int) -> None:
    with bench(tmp_path) as one:

        async def run() -> None:
            await one.keep(1, 2)
            generations: list[Generation] = [one.engine.submit(prompt_of(number), GREEDY, 9) for number in (1, 1, 2)]
            talking = [asyncio.create_task(one.answer(9)) for _ in range(others)]
            await one.reads()
            for generation in generations:
                generation.cancel()
            for task in talking:
                assert await task == (expected(one, 9), 0)
            await soon("nothing is under way", lambda: not one.loads._under_way and not one.loads._later)
            one.fake.read_s = 0
            await soon("nothing is owned", lambda: one.kv.live_bytes == 0)
            assert one.figures()["failed"] == 0
            assert await one.answer(1) == (expected(one, 1), WHOLE)

        asyncio.run(run())


def test_a_model_that_is_put_to_sleep_meanwhile_answers_as_ever(tmp_path: Path) -> None:
    with bench(tmp_path) as one:

        async def run() -> None:
            await one.keep(1)
            waiting = asyncio.create_task(one.answer(1))
            await one.reads()
            await asyncio.to_thread(one.mem.reclaim, 64 << 20, timeout_s=60)
            said, _ = await waiting
            assert said == expected(one, 1)
            await soon("nothing is owned", lambda: one.engine.counts().is_idle)
            assert await one.answer(2) == (expected(one, 2), 0)

        asyncio.run(run())


def test_an_engine_that_ends_meanwhile_leaves_nothing(tmp_path: Path) -> None:
    with bench(tmp_path) as one:

        async def run() -> None:
            await one.keep(1)
            waiting = asyncio.create_task(one.answer(1))
            await one.reads()
            begun = time.monotonic()
            await asyncio.to_thread(one.engine.stop)
            with pytest.raises(ApiError) as raised:
                await waiting
            assert raised.value.code == "shutting_down"
            assert time.monotonic() - begun < 10
            assert not one.loads._under_way

        asyncio.run(run())


def test_what_does_not_come_in_time_is_computed(tmp_path: Path) -> None:
    with bench(tmp_path, wait_s=0.2) as one:

        async def run() -> None:
            await one.keep(1)
            assert await one.answer(1) == (expected(one, 1), 0)
            assert one.figures()["late"] >= 1
            one.fake.read_s = 0

        asyncio.run(run())


class Silent:
    """Tiers whose loads end when the test says so, or never."""

    def __init__(self) -> None:
        self.done = False
        self.cancelled = 0

    def cached_blocks(self) -> int:
        return 0

    def match(self, tokens: list[int], salt: str) -> list[int]:
        return [7]

    def begin_load(self, tokens: list[int], held: int, salt: str) -> Silent:
        assert held == 1
        return self

    def wait(self, timeout_s: float) -> bool:
        return self.done

    def take(self) -> list[int] | None:
        return [8, 9] if self.done else None

    def cancel(self) -> None:
        self.cancelled += 1


def test_a_load_that_nobody_does_any_more_is_given_up(monkeypatch: pytest.MonkeyPatch) -> None:
    tiers, table = Silent(), dict[str, list[int]]()
    some = loads.Loads(tiers, table)  # type: ignore[arg-type]
    assert some.look("a", [1, 2, 3], "") is None
    assert some.look("a", [1, 2, 3], "") is None
    assert some.waits("a")
    monkeypatch.setattr(loads, "_LONGEST_S", 0.0)
    found = some.look("a", [1, 2, 3], "")
    assert found is not None
    assert (found.blocks, table, tiers.cancelled) == (1, {"a": [7]}, 1), "what the device had stays"
    assert not some.waits("a")


def test_who_has_what_others_may_lack_is_looked_at_first() -> None:
    """Where nothing is free, transformers looks no further than the first that waits and cannot run."""
    scheduler = ElasticScheduler.__new__(ElasticScheduler)
    first, second = Silent(), Silent()
    some = loads.Loads(first, {})  # type: ignore[arg-type]
    assert some.look("under way", [1], "") is None
    some._kv = second  # type: ignore[assignment]
    assert some.look("done", [1], "") is None
    second.done = True
    assert [some.turn(name) for name in ("done", "under way", "none")] == [0, 1, 2]
    scheduler.cache = SimpleNamespace(loads=some)
    names = ["none", "under way", "done", "another"]
    scheduler.waiting_requests_order = deque(names)
    scheduler.waiting_requests = {
        name: SimpleNamespace(request_id=name, status=RequestStatus.PENDING, is_cpu_offloaded=False) for name in names
    }
    assert [state.request_id for state in scheduler._get_waiting_candidates()] == [
        "done", "none", "under way", "another",
    ]  # fmt: skip
