"""Scheduling when memory may be short: wait instead of failing.

transformers ends its engine with "No requests can be scheduled" when a cache is full and nothing can be preempted. Here
that is an ordinary state: another model has the memory. The scheduler reports an empty batch, the engine lets go of its
guard and asks again.
"""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

from transformers.generation.continuous_batching.scheduler import SCHEDULER_MAPPING, FIFOScheduler

if TYPE_CHECKING:
    from transformers.generation.continuous_batching.requests import RequestState

NAME = "shoal"


class ElasticScheduler(FIFOScheduler):
    """First in, first out; an allocation that cannot be met now leaves its request waiting.

    Attributes
    ----------
    stalled
        Whether the last batch stayed empty for want of memory.
    """

    stalled = False

    def schedule_batch(self, token_budget: int, cache_budget: int) -> tuple[list[Any] | None, bool, int, int]:
        """As transformers', but None (preempt somebody) only where preempting helps."""
        if not self.active_requests:
            # A preemption blocks new requests until an active one finishes; one that was cancelled never does.
            self.block_new_requests = False
        self.cache.blocks.begin_step()
        batch, fast_path, tokens, kv_read = super().schedule_batch(token_budget, cache_budget)
        self.stalled = batch is None
        if batch is None and not self._preempting_helps():
            return [], fast_path, 0, 0
        return batch, fast_path, tokens, kv_read

    def _infer_request_tokens(self, state: RequestState, request_ids_to_remove_from_waiting: set[str]) -> list[int]:
        """As transformers', but a request that a found prefix made active waits no longer, whatever it lacks still."""
        tokens: list[int] = super()._infer_request_tokens(state, request_ids_to_remove_from_waiting)
        if state.request_id in self.active_requests:
            self.waiting_requests.pop(state.request_id, None)
        return tokens

    def _preempting_helps(self) -> bool:
        """Whether the offloading manager would find a victim (its own conditions, asked before it is)."""
        demand = sum(blocks for _, blocks in self.starved_requests)
        return (
            bool(self.starved_requests) and len(self.active_requests) > 1 and demand > self.cache.get_num_free_blocks()
        )


SCHEDULER_MAPPING[NAME] = ElasticScheduler
