"""Work for the thread that schedules: done between two steps, or at once while the engine waits for requests.

vLLM's books of blocks belong to its one busy loop. Others leave work here; the loop does it before a step is launched
(the scheduler has decided by then, and what it freed is in its queue), and an idle engine, which waits in its input
queue, is woken by an item of vLLM's own that means nothing else.
"""

from __future__ import annotations

import collections
import concurrent.futures
import contextlib
import functools
import threading
import time
from typing import TYPE_CHECKING, Any, TypeVar

if TYPE_CHECKING:
    from collections.abc import Callable, Iterator

__all__ = ["Errands", "listen"]

T = TypeVar("T")

WAITING_MAX = 64


class Errands:
    """Work that waits for the engine's loop.

    Attributes
    ----------
    engine
        vLLM's ``EngineCoreProc``, once it has waited for its first request.
    """

    def __init__(self) -> None:
        self.engine: Any = None
        self._waiting: collections.deque[tuple[concurrent.futures.Future[Any], Callable[[], Any]]] = collections.deque()
        self._changed = threading.Condition()
        # Whoever has it may look into vLLM's books. While the loop is parked, that is whoever has work; else the loop.
        self._books = threading.Lock()
        self._is_parked = False

    def do(self, work: Callable[[], T], timeout_s: float) -> T:
        """Have something done by the engine's loop, or in its place where that waits for memory.

        Parameters
        ----------
        work
            What.
        timeout_s
            How long to wait for it, in seconds. What was not begun by then is not done.

        Returns
        -------
        object
            What it gives.

        Raises
        ------
        TimeoutError
            The engine did not come to it in time, or has too much such work.
        Exception
            Whatever it raises.
        """
        future: concurrent.futures.Future[T] = concurrent.futures.Future()
        with self._changed:
            if len(self._waiting) >= WAITING_MAX:
                raise TimeoutError(f"{WAITING_MAX} errands wait for the engine")
            self._waiting.append((future, work))
        self._wake()
        deadline = time.monotonic() + timeout_s
        while not future.done():
            with self._changed:
                here = self._changed.wait_for(
                    lambda: self._is_parked or future.done(), max(deadline - time.monotonic(), 0)
                )
            if future.done():
                break
            # Begun meanwhile, it is waited for: it is short.
            if not here:
                if future.cancel():
                    raise TimeoutError(f"the engine did not come to it in {timeout_s} s")
                return future.result()
            with self._books:
                if self._is_parked:
                    self.run()
        return future.result()

    @contextlib.contextmanager
    def parked(self) -> Iterator[None]:
        """While it lasts the loop touches nothing of vLLM's: it waits. Entered by the engine's loop alone."""
        with self._changed:
            self._is_parked = True
            self._changed.notify_all()
        try:
            yield
        finally:
            with self._books:
                self._is_parked = False

    def run(self) -> None:
        """Do what waits. Called by the engine's loop, or in its place."""
        while self._waiting:
            with self._changed:
                if not self._waiting:
                    return
                future, work = self._waiting.popleft()
            if not future.set_running_or_notify_cancel():
                continue
            try:
                future.set_result(work())
            except Exception as error:  # noqa: BLE001 - it is raised where the work was asked for
                future.set_exception(error)
            with self._changed:
                self._changed.notify_all()

    def _wake(self) -> None:
        if self.engine is not None:
            from vllm.v1.engine import EngineCoreRequestType

            self.engine.input_queue.put_nowait((EngineCoreRequestType.WAKEUP, None))


def listen(
    engine_class: Any, errands: Errands, begun: Callable[[Any], None], idle: Callable[[], None] = lambda: None
) -> None:
    """Let an engine do errands whenever it is about to wait for requests.

    Parameters
    ----------
    engine_class
        vLLM's ``EngineCoreProc``.
    errands
        The work.
    begun
        Told the engine when it waits for the first time.
    idle
        Called by the loop each time.
    """
    original = engine_class._notify_idle_state_callbacks

    @functools.wraps(original)
    def notify(self: Any) -> None:
        if errands.engine is None:
            errands.engine = self
            begun(self)
        errands.run()
        idle()
        original(self)

    engine_class._notify_idle_state_callbacks = notify
