"""What vLLM's steps took and what its requests found: by these the server knows what cached blocks are worth.

vLLM's loop shows when a step was launched and when its tokens are there. Where the next step is launched meanwhile, a
step has the device from the moment on at which the tokens of the one before it were there: that is when its time
begins. Apart from the line to the server because it needs nothing but vLLM's scheduler, and the count of its blocks.
"""

from __future__ import annotations

import functools
import logging
import time
from collections import OrderedDict
from typing import TYPE_CHECKING, Any

from shoal.vllm.control import CHECK
from shoal.worker.price import FoundShare, PromptCost, rounded

if TYPE_CHECKING:
    from collections.abc import Callable

    from shoal.vllm.queue import ElasticQueue

__all__ = ["Prices"]

logger = logging.getLogger("vllm.shoal")

LAUNCHED_MAX = 16
"""Steps of which no tokens came yet. With one worker, vLLM has two at most; what is beyond that is forgotten."""

WAITED_S = 0.02
"""From the scheduler's beginning to a launch. If it takes longer, the loop waits for memory or does others' work, and
what it has not looked at meanwhile may have been ready for long."""


class Prices:
    """What bringing back cached blocks takes, and how much of them a use finds.

    Parameters
    ----------
    queue
        The blocks that nobody uses.
    tokens_per_mib
        Tokens whose KV is a MiB.
    is_kept_below
        Whether blocks that were forgotten come back from a tier. What that takes is not known, nor what was found
        there, so neither a price nor a share is said.
    clock
        Gives seconds.
    """

    def __init__(
        self, queue: ElasticQueue, tokens_per_mib: float, *, is_kept_below: bool = False,
        clock: Callable[[], float] = time.monotonic,
    ) -> None:  # fmt: skip
        self._queue = queue
        self._tokens_per_mib = tokens_per_mib
        self._is_kept_below = is_kept_below
        self._clock = clock
        self._cost = PromptCost()
        self._finds = FoundShare()
        self._launched: OrderedDict[int, tuple[Any, float]] = OrderedDict()
        self._is_over = False
        self._begun = 0.0  # when the scheduler was asked last
        self._free_since = 0.0  # when the tokens of the last step were there

    @property
    def back_us_per_mib(self) -> int:
        """Microseconds that computing a MiB of a cached prefix again adds; 0 while nobody knows. For any thread."""
        us = self._cost.us_per_token
        return 0 if us is None or self._is_kept_below else rounded(us * self._tokens_per_mib)

    @property
    def found_milli(self) -> int:
        """What part of what is cached one use finds again, in thousandths; 0 while nobody knows. For any thread."""
        return 0 if self._is_kept_below else max(1, round(self._finds.share * 1_000))

    def watch(self, scheduler: Any) -> None:
        """Learn from a scheduler from now on. What goes wrong with it ends the learning, never the engine.

        Parameters
        ----------
        scheduler
            vLLM's, of the engine whose blocks these are.
        """
        schedule, update = scheduler.schedule, scheduler.update_from_output

        @functools.wraps(schedule)
        def watched_schedule(*arguments: Any, **named: Any) -> Any:
            cached, found, self._begun = self._queue.cached, self._queue.found, self._clock()
            output = schedule(*arguments, **named)
            self._learn(lambda: self._scheduled(scheduler, output, cached, self._queue.found - found))
            return output

        @functools.wraps(update)
        def watched_update(output: Any, *arguments: Any, **named: Any) -> Any:
            self._learn(lambda: self._ended(output))
            return update(output, *arguments, **named)

        scheduler.schedule, scheduler.update_from_output = watched_schedule, watched_update

    def launched(self, output: Any) -> None:
        """Say that a step has all of its memory, and begins.

        Parameters
        ----------
        output
            What the scheduler gave for it.
        """
        now = self._clock()
        if now - self._begun > WAITED_S:
            self._launched.clear()
        self._launched[id(output)] = (output, now)
        while len(self._launched) > LAUNCHED_MAX:
            self._launched.popitem(last=False)

    def _learn(self, learn: Callable[[], None]) -> None:
        if self._is_over:
            return
        try:
            learn()
        except Exception as error:  # noqa: BLE001 - whatever vLLM is by now, its loop goes on
            self._is_over = True
            logger.warning("What computing prompts takes is not measured any more: %r", error)

    def _scheduled(self, scheduler: Any, output: Any, cached: int, found: int) -> None:
        """Learn what requests found that were scheduled for the first time."""
        # One that was preempted finds what was computed for it; some of vLLM's runners have it among the new ones.
        begun = [scheduler.requests[one.req_id] for one in output.scheduled_new_reqs]
        if output.scheduled_cached_reqs.resumed_req_ids or any(one.num_preemptions for one in begun):
            return
        if found or any(not one.req_id.startswith(CHECK) for one in output.scheduled_new_reqs):
            self._finds.looked(cached, found, self._clock())

    def _ended(self, output: Any) -> None:
        """Learn what a step took whose tokens are there."""
        now, free_since = self._clock(), self._free_since
        self._free_since = now
        kept, begun = self._launched.pop(id(output), (None, 0.0))
        # Guesses that are checked are no prompts, and what images take is not the tokens' alone.
        if kept is not output or output.scheduled_spec_decode_tokens or output.scheduled_encoder_inputs:
            return
        if tokens := output.total_num_scheduled_tokens:
            self._cost.saw(tokens, now - max(begun, free_since), len(output.num_scheduled_tokens))
