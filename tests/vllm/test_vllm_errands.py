"""Work for vLLM's loop: between its steps, while it waits for requests, in its place while it waits for memory."""

from __future__ import annotations

import queue
import sys
import threading
import types
from concurrent.futures import ThreadPoolExecutor

import pytest

from shoal.vllm.errands import WAITING_MAX, Errands, listen


class Loop:
    """As much of `EngineCoreProc` as is listened to."""

    def __init__(self) -> None:
        self.input_queue: queue.Queue[object] = queue.Queue()
        self.idle = 0

    def _notify_idle_state_callbacks(self) -> None:
        self.idle += 1


@pytest.fixture
def errands(monkeypatch: pytest.MonkeyPatch) -> Errands:
    kinds = types.SimpleNamespace(WAKEUP="wakeup")
    for name in ("vllm", "vllm.v1"):
        monkeypatch.setitem(sys.modules, name, types.ModuleType(name))
    engine = types.ModuleType("vllm.v1.engine")
    engine.EngineCoreRequestType = kinds  # type: ignore[attr-defined]
    monkeypatch.setitem(sys.modules, "vllm.v1.engine", engine)
    return Errands()


def test_an_idle_loop_is_woken_and_does_it(errands: Errands) -> None:
    class Own(Loop):
        pass

    begun, idle = [], []
    listen(Own, errands, begun.append, lambda: idle.append(errands.engine))
    loop = Own()
    loop._notify_idle_state_callbacks()
    loop._notify_idle_state_callbacks()
    assert (begun, loop.idle) == ([loop], 2)
    assert idle == [loop, loop], "that it is idle is not said each time"
    with ThreadPoolExecutor(1) as others:
        thread = others.submit(errands.do, threading.get_ident, 20)
        assert loop.input_queue.get(timeout=20) == ("wakeup", None)
        loop._notify_idle_state_callbacks()
        assert thread.result(20) == threading.get_ident(), "it was done by another thread than the loop's"


def test_what_it_raises_is_raised_where_it_was_asked_for_and_the_loop_goes_on(errands: Errands) -> None:
    def fail() -> None:
        raise ValueError("no")

    with ThreadPoolExecutor(2) as others:
        failing, fine = others.submit(errands.do, fail, 20), others.submit(errands.do, lambda: 7, 20)
        while not (failing.done() and fine.done()):
            errands.run()
        with pytest.raises(ValueError, match="no"):
            failing.result()
        assert fine.result() == 7


def test_a_loop_that_does_not_come_is_not_waited_for_and_does_it_no_more(errands: Errands) -> None:
    done: list[int] = []
    with pytest.raises(TimeoutError):
        errands.do(lambda: done.append(1), 0.01)
    errands.run()
    assert done == []


def test_there_is_an_end_to_what_may_wait(errands: Errands) -> None:
    for _ in range(WAITING_MAX):
        with pytest.raises(TimeoutError):
            errands.do(int, 0)
    with pytest.raises(TimeoutError, match="wait for the engine"):
        errands.do(int, 20)


def test_a_loop_that_waits_for_memory_is_not_waited_for(errands: Errands) -> None:
    """The work is done by whoever asks, and the loop does not go on before it has ended."""
    begun, may_end, order = threading.Event(), threading.Event(), []

    def work() -> int:
        begun.set()
        assert may_end.wait(20)
        order.append("work")
        return threading.get_ident()

    def loop() -> None:
        with errands.parked():
            assert begun.wait(20)
            may_end.set()
        order.append("loop")

    with ThreadPoolExecutor(2) as others:
        looping = others.submit(loop)
        assert errands.do(work, 20) == threading.get_ident()
        looping.result(20)
    assert order == ["work", "loop"]
    # What comes later waits for the loop again.
    with pytest.raises(TimeoutError):
        errands.do(int, 0.01)
