"""What vLLM's ``OffloadingConnector`` copies between device and host memory, as far as memory must not go meanwhile.

vLLM gives the blocks of a request that has ended back at once, and copies them afterwards: a job is made with the next
step, and begun with the one after that. Whoever takes such a block in its own books waits for the copy, by vLLM's own
fence; that its memory could go, vLLM does not know. Here is told which blocks may still be read, to the blocks' queue
(:mod:`shoal.vllm.queue`), which keeps them, and which streams copies run on, to the marks behind which memory goes.
Apart from the worker and the pool because it looks into both halves of the connector, which live in one process here.
"""

from __future__ import annotations

import collections
import functools
from typing import TYPE_CHECKING, Any

from shoal.errors import RegionError

if TYPE_CHECKING:
    from collections.abc import Callable, Iterable

__all__ = ["CONNECTORS", "Transfers"]

CONNECTORS = ("OffloadingConnector", "ShoalConnector")
"""Those whose books are known here."""


class Transfers:
    """Both halves of a connector.

    What was not seen cannot be told apart from what copies nothing. So whoever asks while a half is missing is refused:
    memory that a copy reads could go otherwise.

    Attributes
    ----------
    ended
        Called when copies may have ended: what waited for them can go.
    """

    def __init__(self) -> None:
        self._scheduler: Any = None
        self._worker: Any = None
        self.ended: Callable[[], None] = lambda: None

    def listen(self, scheduler: Any) -> None:
        """Take the next scheduler's half that is made for the one to look into.

        Parameters
        ----------
        scheduler
            vLLM's class ``OffloadingConnectorScheduler``.
        """
        original = scheduler.__init__

        @functools.wraps(original)
        def __init__(made: Any, *arguments: Any, **named: Any) -> None:  # noqa: N807 - it takes that one's place
            original(made, *arguments, **named)
            scheduler.__init__ = original
            self.attach_scheduler(made)

        scheduler.__init__ = __init__

    def attach_scheduler(self, scheduler: Any) -> None:
        """Look into the scheduler's half.

        Parameters
        ----------
        scheduler
            vLLM's ``OffloadingConnectorScheduler``.
        """
        self._scheduler = scheduler
        # Each of these forgets jobs that have ended, or requests of which nothing is to be stored.
        for name in ("update_connector_output", "build_connector_meta"):
            setattr(scheduler, name, self._then_ended(getattr(scheduler, name)))

    def attach_worker(self, worker: Any) -> None:
        """Look into the worker's half.

        Parameters
        ----------
        worker
            vLLM's ``OffloadingConnectorWorker``.

        Raises
        ------
        RegionError
            There is none, or what copies for it is not vLLM's own. Its ``kind`` is ``"unsupported"``.
        """
        if worker is None:
            raise RegionError("vLLM's connector has no half in its worker's process", kind="unsupported")
        self._worker = worker
        collections.deque(self.streams(), maxlen=0)

    def check(self) -> None:
        """See to it that both halves are looked into.

        Raises
        ------
        RegionError
            One is not; the message says which. Its ``kind`` is ``"unsupported"``.
        """
        halves = {"scheduler's": self._scheduler, "worker's": self._worker}
        missing = [name for name, half in halves.items() if half is None]
        if missing:
            raise RegionError(
                f"the {' and the '.join(missing)} half of vLLM's connector was not made where it was expected to be: "
                "which blocks it copies is not known, so no memory may go",
                kind="unsupported",
            )

    def read(self) -> set[int]:
        """Say which blocks a copy from the device may still read.

        Returns
        -------
        set of int
            Blocks of jobs that have not ended, of jobs that were forgotten in a reset and have not begun, and of
            requests that have ended and of which jobs may still be made.

        Raises
        ------
        RegionError
            As :meth:`check`.
        """
        self.check()
        found: set[int] = set()
        for job in self._scheduler._jobs.values():
            if job.is_store:
                found.update(job.non_sliding_window_block_ids or ())
                found.update(job.sliding_window_block_ids or ())
        for status in self._scheduler._req_status.values():
            if status.req.is_finished():
                for group in status.group_states:
                    # Of what lies before, jobs were made.
                    found.update(group.block_ids[group.next_stored_chunk_idx * status.config.blocks_per_chunk :])
        for _, source, _ in self._worker._unsubmitted_store_jobs:
            found.update(int(block) for block in source.block_ids)
        return found

    def streams(self) -> Iterable[Any]:
        """Give the streams that copies run on now.

        Returns
        -------
        iterable
            Of torch's streams.

        Raises
        ------
        RegionError
            What copies is not vLLM's own: on which streams, is not known. Its ``kind`` is ``"unsupported"``.
        """
        # Nothing copies before the cache was made known to it.
        copies = self._worker.worker
        for name in ("_store_handler", "_load_handler") if copies is not None else ():
            running = getattr(getattr(copies, name, None), "_transfers", None)
            if running is None:
                raise RegionError(
                    f"{type(copies).__name__} has no {name} with copies that run: nobody can wait for what it copies",
                    kind="unsupported",
                )
            for transfer in running:
                yield transfer.stream

    @property
    def has_waiting(self) -> bool:
        """Whether copies are to begin with the next step."""
        return bool(self._worker._unsubmitted_store_jobs)

    def begin_waiting(self) -> None:
        """Begin the copies that would begin with the next step. All memory has to be there."""
        waiting, self._worker._unsubmitted_store_jobs = self._worker._unsubmitted_store_jobs, []
        for job, source, target in waiting:
            if not self._worker.worker.submit_store(job, source, target):
                raise RuntimeError(f"vLLM did not begin to store job {job}")

    def _then_ended(self, original: Callable[..., Any]) -> Callable[..., Any]:
        @functools.wraps(original)
        def call(*arguments: Any, **named: Any) -> Any:
            result = original(*arguments, **named)
            self.ended()
            return result

        return call
