"""Scheduling when memory may be short: wait instead of failing.

transformers ends its engine with "No requests can be scheduled" when a cache is full and nothing can be preempted. Here
that is an ordinary state: another model has the memory. The scheduler reports an empty batch, the engine lets go of its
guard and asks again. So is a request whose prefix is still on its way from a tier below the device: it is passed over.
"""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

from transformers.generation.continuous_batching.requests import RequestStatus
from transformers.generation.continuous_batching.scheduler import SCHEDULER_MAPPING, FIFOScheduler

if TYPE_CHECKING:
    from collections.abc import Iterable

    from transformers.generation.continuous_batching.requests import RequestState

NAME = "shoal"


class ElasticScheduler(FIFOScheduler):
    """First in, first out; an allocation that cannot be met now leaves its request waiting.

    Attributes
    ----------
    stalled
        Whether the last batch stayed empty for want of memory.
    waits_below
        Whether it stayed empty because what could run waits for a tier below the device.
    shared_tokens
        Most tokens of a step in which somebody decodes, who waits for each step's next token. Where nobody does, a step
        takes all that the budget allows: then a long prompt computes beside the bytes of a wake, where it would else
        compute its first piece beside them and the others after. None: the budget is always the limit.
    """

    stalled = waits_below = False
    shared_tokens: int | None = None
    _short = False  # whether memory was refused when the last batch was scheduled

    def schedule_batch(self, token_budget: int, cache_budget: int) -> tuple[list[Any] | None, bool, int, int]:
        """As transformers', but None (preempt somebody) only where preempting helps."""
        if not self.active_requests:
            # A preemption blocks new requests until an active one finishes; one that was cancelled never does.
            self.block_new_requests = False
        self.cache.blocks.begin_step()
        self.cache.loads.has_passed = False
        token_budget = self._budget(token_budget, self.active_requests.values())
        batch, fast_path, tokens, kv_read = super().schedule_batch(token_budget, cache_budget)
        self._short = self.cache.blocks.short
        self.waits_below = not batch and not self._short and self.cache.loads.has_passed
        self.stalled = batch is None and not self.waits_below
        if batch is None and not self._preempting_helps():
            return [], fast_path, 0, 0
        return batch, fast_path, tokens, kv_read

    def next_blocks(self, token_budget: int) -> int:
        """Count the blocks that the step after the one that is scheduled will take, as far as is known now.

        Nobody comes, is cancelled or ends before its limit; where memory was just refused, nothing is expected. What
        of a waiting prompt is found in the cache is counted as if it were not.

        Parameters
        ----------
        token_budget
            Tokens of a step in which nobody decodes.
        """
        blocks, requests = 0, self.max_requests_per_batch
        # Those that do not end with this step.
        going = [
            state
            for state in self.active_requests.values()
            if state.status != RequestStatus.DECODING or state.generated_len() + 1 < state._new_tokens_limit
        ]
        token_budget = self._budget(token_budget, going)
        states = sorted(going, key=lambda state: state.status != RequestStatus.DECODING)
        if not self.block_new_requests:
            names = (name for name in self.waiting_requests_order if not self.cache.loads.waits(name))
            states += [self.waiting_requests[name] for name in names]
        for state in () if self._short else states:
            is_decoding = state.status == RequestStatus.DECODING
            tokens = 1 if is_decoding else min(len(state.remaining_prefill_tokens), token_budget)
            missing = tokens - (state.allocated_blocks * self.cache.block_size - state.current_len())
            if missing > 0 or not state.allocated_blocks:  # as the parent counts
                wanted = (missing + 1) // self.cache.block_size + 1
                blocks += self.cache.blocks_needed(wanted, state.allocated_blocks)
            token_budget, requests = token_budget - tokens, requests - 1
            if token_budget <= 0 or requests <= 0:
                break
        return blocks

    def _infer_request_tokens(self, state: RequestState, request_ids_to_remove_from_waiting: set[str]) -> list[int]:
        """As transformers', but a request that a found prefix made active waits no longer, whatever it lacks still."""
        tokens: list[int] = super()._infer_request_tokens(state, request_ids_to_remove_from_waiting)
        if state.request_id in self.active_requests:
            self.waiting_requests.pop(state.request_id, None)
        return tokens

    def _get_waiting_candidates(self) -> list[RequestState]:
        """As transformers', but those whose load is done come first: where nothing is free, it looks no further.

        What has come for them has memory that nobody else can have, and others may wait for just that.
        """
        return sorted(super()._get_waiting_candidates(), key=lambda state: self.cache.loads.turn(state.request_id) > 0)

    def _allocate_blocks_if_needed(self, state: RequestState, len_next_tokens: int) -> bool:
        """As transformers', but what waits for a tier below is not scheduled, as if it could not be had now."""
        if self.cache.loads.waits(state.request_id):
            return False
        return bool(super()._allocate_blocks_if_needed(state, len_next_tokens))

    def _budget(self, token_budget: int, states: Iterable[RequestState]) -> int:
        """Give the tokens of a step of these requests: fewer where one of them decodes, or where memory was short."""
        is_shared = self._short or any(state.status == RequestStatus.DECODING for state in states)
        return min(token_budget, self.shared_tokens) if self.shared_tokens and is_shared else token_budget

    def _preempting_helps(self) -> bool:
        """Whether the offloading manager would find a victim (its own conditions, asked before it is)."""
        demand = sum(blocks for _, blocks in self.starved_requests)
        return (
            bool(self.starved_requests) and len(self.active_requests) > 1 and demand > self.cache.get_num_free_blocks()
        )


SCHEDULER_MAPPING[NAME] = ElasticScheduler
