"""The engine of causal models: continuous batching in one thread, every step inside a guard.

transformers computes; this module decides when a step runs and what happens when memory is short:

- A batch is scheduled, and memory for its blocks asked for, outside of any guard: whoever has to give that memory up
  may be waiting for ours. No tensor on the device is touched by it.
- The batch is then computed inside `Memory.guard`, so eviction happens only between steps (I13), and a step on evicted
  weights or blocks first brings them back. A batch whose guard could not be had stays prepared and is tried again;
  if that does not help, its requests give their blocks up and are scheduled anew, as far as memory then reaches.
- Without requests the thread holds no guard, touches nothing and owns no KV block. What prefixes hold stays cached as
  long as nobody else wants the memory.
- A request whose prefix is on its way from a tier below the device is passed over until that has come, and the others
  run; where all that could run waits so, the thread waits for the next one, or for somebody to come or go.
- Where memory cannot be had, requests wait, up to `stall_timeout_s` without any step; then they fail, each with a
  clear error. The engine itself goes on (I10: every wait has a deadline).

Requests come in and tokens go out through :class:`Generation`, an async iterator for the event loop that made it.
"""

from __future__ import annotations

import asyncio
import functools
import itertools
import logging
import threading
import time
from typing import TYPE_CHECKING, Any

import torch
from transformers import GenerationConfig
from transformers.generation.configuration_utils import ContinuousBatchingConfig
from transformers.generation.continuous_batching.cb_logits_processors import ContinuousBatchingLogitsProcessorList
from transformers.generation.continuous_batching.continuous_api import (
    ContinuousBatchingManager,
    ContinuousBatchProcessor,
)
from transformers.generation.continuous_batching.requests import RequestStatus
from transformers.generation.logits_process import LogitsProcessorList

from . import hooks, scheduling
from .errors import ApiError, described
from .kv import PADDING_BLOCKS, ElasticCache, UnboundedMemoryHandler
from .memory import Ahead, Memory, ShortageError
from .sampling import RowSampler, Sampling
from .usage import Counts, no_one_asks

if TYPE_CHECKING:
    from collections.abc import AsyncIterator, Callable, Sequence

    from transformers import PreTrainedModel
    from transformers.generation.continuous_batching.requests import GenerationOutput, RequestState

    from .limits import CausalLimits
    from .logprobs import TokenLogprob
    from .spec import WorkerSpec

logger = logging.getLogger(__name__)

_LINGER_S = 0.2  # how long an idle engine keeps its padding blocks, so that a series of requests maps them once
_RETRY_S = 0.05  # how long a stalled engine lets go before it asks for memory again, and one that waits looks about
_LOOK_S = 0.005  # how soon one that waits for a tier below sees that somebody has come
_GUARD_S = 10.0  # how long one attempt to bring weights back may take
_COMPACT_S = 1.0  # how often KV blocks may be moved together
_UNSHARED_STEPS = 4  # a step in which nobody decodes may take as many tokens as so many others
_PREEMPT_S = 2.0  # how long a prepared batch waits for its guard before its requests give their blocks up


class Generation:
    """One request inside the engine; iterate for lists of new tokens.

    Attributes
    ----------
    finish_reason
        ``"stop"`` or ``"length"`` after the last token.
    logprobs
        How likely each token was, if that was asked for; never behind the tokens that were given out.
    cached_tokens
        How many tokens of the prompt were found in the KV cache, and not computed; known with the first token.
    """

    def __init__(
        self, engine: CausalEngine, name: str, eos: frozenset[int], told: int | None = None, salt: str = ""
    ) -> None:
        self._engine = engine
        self._loop = asyncio.get_running_loop()
        self._events: asyncio.Queue[list[int] | Exception | None] = asyncio.Queue()  # bounded by the token limit
        self._eos = eos
        self._closed = False
        self.name = name
        self.finish_reason: str | None = None
        self.logprobs: list[TokenLogprob] = []
        self.told = told
        self.salt = salt
        self.cached_tokens = 0
        self.has_looked = False  # in the KV cache, for its prompt
        self.ahead: Ahead | None = None
        self.delivered = 0
        self.created = time.monotonic()
        self.ended = False

    def __aiter__(self) -> AsyncIterator[list[int]]:
        return self

    async def __anext__(self) -> list[int]:
        if self._closed:
            raise StopAsyncIteration
        event = await self._events.get()
        if event is None:
            self._closed = True
            raise StopAsyncIteration
        if isinstance(event, Exception):
            raise event
        return event

    def cancel(self) -> None:
        """Leave the engine; the blocks are freed before its next step."""
        self._engine.cancel(self)

    def go_no_further(self) -> None:
        """Bring nothing up ahead of it any more: its turn has come, or never will."""
        ahead, self.ahead = self.ahead, None  # taken once: a cancel may come from another thread at the same time
        if ahead is not None:
            ahead.cancel()

    def push(self, tokens: list[int], *, last: bool) -> None:
        """From the engine's thread: new tokens, and whether they are the last."""
        if last:
            self.ended = True
        if tokens:
            self._post(tokens)
        if last:
            self.finish_reason = "stop" if tokens and tokens[-1] in self._eos else "length"
            self._post(None)

    def fail(self, error: Exception) -> None:
        """From the engine's thread: there will be no more tokens."""
        if not self.ended:
            self.ended = True
            self._post(error)

    def _post(self, event: list[int] | Exception | None) -> None:
        try:
            self._loop.call_soon_threadsafe(self._events.put_nowait, event)
        except RuntimeError:
            logger.debug("the event loop of request %s is gone", self.name)


class _Router:
    """Takes transformers' outputs to the generations they belong to."""

    def __init__(self, engine: CausalEngine) -> None:
        self._engine = engine

    def deliver(self, output: GenerationOutput) -> None:
        self._engine._deliver(output)

    def deliver_batch(self, outputs: list[GenerationOutput]) -> None:
        for output in outputs:
            self._engine._deliver(output)

    def fail_and_deliver(self, state: RequestState, error: Exception) -> None:
        self._engine._fail(state.request_id, error)


class CausalEngine:
    """Generates tokens for many requests at once.

    Parameters
    ----------
    model
        On the device, its parameters placed in a region.
    memory
        Guards, and the KV cache's space.
    eos
        Tokens that end an answer.

    Attributes
    ----------
    on_idle
        Called when the last request has ended, before its last token is handed out; from any thread.
    """

    def __init__(
        self, model: PreTrainedModel, memory: Memory, spec: WorkerSpec, limits: CausalLimits, eos: Sequence[int] = ()
    ) -> None:
        hooks.verify()
        self._limits = limits
        self.eos = frozenset(eos)
        self._model = model
        self._memory = memory
        self._spec = spec
        self.on_idle: Callable[[], None] = no_one_asks
        self._live: dict[str, Generation] = {}
        self._lock = threading.Lock()  # for _live
        self._names = itertools.count()
        self._tokens_out = 0
        self._tokens_cached = 0
        self._stop = threading.Event()
        self._stalled_since: float | None = None
        self._preempted = False  # in this stall
        self._shortage = ""  # why a step did not run, or did not end
        self._resting = True
        self._prepared = False  # a batch is scheduled and not computed yet: its requests must not change
        self._is_beside_wake = False  # the step at hand waits for the bytes of its weights, layer by layer
        self._compacted = time.monotonic()
        self._sampler = RowSampler()
        self._manager, self._processor, self._cache = self._build()
        self._thread = threading.Thread(target=self._run, name="engine", daemon=True)

    def _build(self) -> tuple[ContinuousBatchingManager, ContinuousBatchProcessor, ElasticCache]:
        limits, spec = self._limits, self._spec
        self._model.set_attn_implementation(hooks.ATTENTION)
        manager = ContinuousBatchingManager(
            self._model,
            GenerationConfig(do_sample=False, eos_token_id=-1, pad_token_id=0),
            ContinuousBatchingConfig(
                block_size=limits.block_tokens,
                num_blocks=limits.blocks,
                max_batch_tokens=_UNSHARED_STEPS * spec.batch_tokens_max,
                max_requests_per_batch=min(spec.requests_max, spec.batch_tokens_max),
                max_blocks_per_request=0,
                max_memory_percent=0.9,
                allow_block_sharing=False,  # the cache shares, not transformers' block manager
                use_async_batching=False,
                use_cuda_graph=False,
                scheduler_type=scheduling.NAME,
                seed=0,
            ),
        )
        manager.logit_processor = ContinuousBatchingLogitsProcessorList(LogitsProcessorList([self._sampler]))
        manager.logit_processor.tensors_required = 1
        manager.output_router = _Router(self)
        layout, is_caching = limits.layout, spec.prefix_caching
        blocks = self._memory.kv(layout, limits.blocks + PADDING_BLOCKS, is_caching=is_caching)
        cache = functools.partial(ElasticCache, blocks, layout, is_caching, self._salt_of, self._found)
        with torch.no_grad(), hooks.elastic_cache(cache, UnboundedMemoryHandler):
            processor = manager._create_batch_processor()
        processor.scheduler.shared_tokens = spec.batch_tokens_max
        processor.cache.pads(processor.inputs_and_outputs)
        manager.batch_processor = processor
        return manager, processor, processor.cache

    def start(self) -> None:
        """Begin to serve."""
        self._thread.start()

    def stop(self, timeout_s: float = 10.0) -> None:
        """End after the step at hand; whatever is still running fails."""
        self._stop.set()
        self._manager._has_new_requests.set()
        if self._thread.is_alive():
            self._thread.join(timeout=timeout_s)

    @property
    def alive(self) -> bool:
        """Whether it can serve."""
        return self._thread.is_alive() and not self._stop.is_set()

    @property
    def requests_max(self) -> int:
        """Most requests inside at once."""
        return self._spec.requests_max

    @property
    def limits(self) -> CausalLimits:
        """What fits, as far as is known by now: the process's own memory is measured while it serves."""
        self._limits = self._limits.with_overhead(self._memory.overhead_peak() or 0)
        return self._limits

    def counts(self) -> Counts:
        """Count requests and tokens now."""
        with self._lock:
            live = len(self._live)
        running = min(live, len(self._processor.scheduler.active_requests))
        return Counts(
            running=running,
            waiting=live - running,
            tokens_out=self._tokens_out,
            kv_back_us_per_mib=self._cache.kv.back_us_per_mib,
            kv_found_milli=self._cache.kv.found_milli,
        )

    def kv_bytes(self) -> tuple[int, int]:
        """Device bytes of the KV cache, and bytes of its blocks that requests have."""
        return self._cache.kv.mapped_bytes, self._cache.kv.live_bytes

    def submit(
        self, prompt: Sequence[int], sampling: Sampling, tokens_max: int, *, ignore_eos: bool = False, salt: str = ""
    ) -> Generation:
        """Take a request in; call it on the event loop that will read the answer.

        Parameters
        ----------
        salt
            Only what requests with the same salt have computed is used again for this one.

        Raises
        ------
        ApiError
            It does not fit, or too many requests are waiting.
        """
        if not prompt:
            raise ApiError("the prompt is empty: at least one token is needed", param="prompt", code="empty_prompt")
        self.limits.check(len(prompt), tokens_max)
        eos = frozenset() if ignore_eos else self.eos
        generation = Generation(self, f"r{next(self._names)}", eos, sampling.logprobs, salt)
        with self._lock:
            if self._stop.is_set():
                raise ApiError("the model is shutting down", status=503, code="shutting_down")
            if len(self._live) >= self._spec.requests_max:
                raise ApiError(
                    f"{len(self._live)} requests are inside the engine already, the most is {self._spec.requests_max}",
                    status=429,
                    kind="rate_limit_error",
                    code="too_many_requests",
                )
            self._live[generation.name] = generation
        if self._cache.use_prefix_sharing:
            generation.ahead = self._cache.kv.prefetch(prompt[:-1], salt)
        self._manager.add_request(
            list(prompt),
            request_id=generation.name,
            max_new_tokens=tokens_max,
            streaming=True,
            eos_token_id=sorted(eos),
            sampling=sampling,
        )
        return generation

    def cancel(self, generation: Generation) -> None:
        """Take a request out, whatever it is doing; from any thread."""
        with self._lock:
            known = self._live.pop(generation.name, None)
        if known is not None:
            generation.ended = True
            generation.go_no_further()
            self._manager.cancel_request(generation.name)
            self._say_if_idle()

    # ------------------------------------------------------------------------------------ on the engine's thread

    @torch.no_grad()
    def _run(self) -> None:
        device = self._model.device
        if device.type == "cuda":
            torch.cuda.set_device(device)
        try:
            while not self._stop.is_set():
                if not self._prepared:
                    self._take_in()
                if not self._processor.has_pending_requests():
                    self._rest()
                elif self._step():
                    self._stalled_since, self._preempted, self._shortage = None, False, ""
                elif self._processor.scheduler.waits_below:
                    self._wait_below()
                else:
                    self._stall()
        except Exception as error:
            logger.exception("the engine's thread ended")
            self._stop.set()
            self._fail_all(error)
            return
        finally:
            self._cache.loads.drop_all()
        self._fail_all(ApiError("the model is shutting down", status=503, code="shutting_down"))

    def _take_in(self) -> None:
        """Take in new requests and cancellations; needs no guard, because no tensor is touched."""
        self._processor._update_tp_group_state()
        self._processor.scheduler.clear_cancelled_requests()

    def _rest(self) -> None:
        """Wait for a request; without one for a moment, own no KV block and give back what none lies in."""
        self._stalled_since = None
        wakeup = self._manager._has_new_requests
        if not wakeup.wait(timeout=None if self._resting else _LINGER_S):
            self._cache.blocks.end_step()
            self._cache.sleep()
            self._cache.kv.hint(0)
            self._cache.compact()
            self._memory.trim()
            self._resting = True
            return
        wakeup.clear()

    def _step(self) -> bool:
        """Schedule, compute and hand out one batch; False where memory is short."""
        self._resting = False
        try:
            if not self._prepared:
                if not self._prepare():
                    return False
                self._prepared = True
                if not self._preempted:  # else the clock runs on: being scheduled again is no progress
                    self._stalled_since = time.monotonic()  # from here on the batch waits as one, its first guard too
            tokens = self._processor.inputs_and_outputs.num_q_tokens
            with self._memory.guard(_GUARD_S, self._is_wanted, tokens=tokens) as self._is_beside_wake:
                self._compute()
            self._prepared = False
        except ShortageError as shortage:
            logger.info("waiting for memory: %s", shortage)
            self._shortage = str(shortage)
            # A step that ended in the middle of a wake is run again: it writes the same KV to the same blocks.
            if self._prepared and not self._is_wanted():
                self._preempt()  # those who left can be taken out then
            return False
        except Exception as error:
            # Which request is at fault is not known here; the state of each is, so all can be ended cleanly.
            logger.exception("an engine step failed; its requests fail, the engine goes on")
            self._abandon(error)
        return True

    def _is_wanted(self) -> bool:
        """Whether anybody waits for the batch at hand."""
        with self._lock:
            return not self._stop.is_set() and any(
                name in self._live for name in self._processor.scheduler.active_requests
            )

    def _prepare(self) -> bool:
        """Schedule a batch with memory behind all its blocks; False where there is none."""
        if time.monotonic() - self._compacted >= _COMPACT_S:
            self._cache.compact()
            self._compacted = time.monotonic()
        self._processor.scheduler.waits_below = False
        if not self._cache.wake():
            return False
        try:
            return self._processor.prepare_next_batch()
        finally:
            self._cache.blocks.end_step()

    def _compute(self) -> None:
        """Run the prepared batch; inside a guard."""
        self._cache.begin_step()
        self._cache.kv.hint(self._processor.scheduler.next_blocks(self._processor.max_batch_tokens))
        begun = time.monotonic()
        try:
            self._processor._generation_step(self._model)  # back when its tokens are on the host
        finally:
            self._cache.kv.record_step(self._stream())
        batch = self._processor.inputs_and_outputs
        # In a step that waited for its weights it is not known what computing took.
        if not self._is_beside_wake:
            self._cache.kv.computed(batch.num_q_tokens, time.monotonic() - begun, batch.num_request_in_batch)
        self._processor.update_batch()

    def _stream(self) -> Any:
        """Give the stream that steps run on; 0 where there are none."""
        if self._model.device.type != "cuda":
            return 0
        return self._processor.inputs_and_outputs.compute_stream or torch.cuda.current_stream(self._model.device)

    def _salt_of(self, name: str) -> str | None:
        with self._lock:
            generation = self._live.get(name)
        return None if generation is None else generation.salt

    def _found(self, name: str, tokens: int) -> bool:
        """Remember how much of a prompt was found; not of one that is computed again, which finds its own.

        Returns
        -------
        bool
            Whether the request has looked for the first time; while it waits, it looks at every step.
        """
        state = self._processor.scheduler.waiting_requests.get(name)
        with self._lock:
            generation = self._live.get(name)
        if generation is not None:
            generation.go_no_further()
        if generation is not None and state is not None and not state._true_initial_tokens:
            self._tokens_cached += tokens - generation.cached_tokens
            generation.cached_tokens = tokens
            is_new, generation.has_looked = not generation.has_looked, True
            return is_new
        return False

    def _abandon(self, error: Exception) -> None:
        """End all requests and begin anew, with every block free."""
        self._prepared = False
        self._processor.fail_all_requests(error)
        self._cache.free_all_requests()
        self._processor.scheduler.reset()
        self._cache.blocks.end_step()
        if self._cache.use_prefix_sharing:
            self._cache.kv.forget_all()  # who knows what the step has written

    def _preempt(self) -> None:
        """Take the blocks of all running requests (soft reset): what they have generated is computed again later."""
        scheduler = self._processor.scheduler
        for state in reversed(list(scheduler.active_requests.values())):
            again = state.create_equivalent_initial_request()
            state._status = RequestStatus.FINISHED
            scheduler.finish_request(state.request_id)
            scheduler.waiting_requests[again.request_id] = again
            scheduler.waiting_requests_order.appendleft(again.request_id)  # ahead of those that never ran
        self._prepared, self._preempted = False, True

    def _wait_below(self) -> None:
        """Wait until a prefix has come from a tier below, or a request has come or left; not for long."""
        wakeup, deadline = self._manager._has_new_requests, time.monotonic() + _RETRY_S
        # What the tiers' thread says cannot be waited for together with what another thread of Python says.
        while not wakeup.is_set() and time.monotonic() < deadline:
            if self._cache.loads.wait(_LOOK_S):
                return
        wakeup.clear()

    def _stall(self) -> None:
        """Let go for a moment; fail what has waited too long."""
        self._cache.kv.hint(0)  # what is short is not to be kept ahead of need
        if not self._processor.has_pending_requests():
            return
        now = time.monotonic()
        since = self._stalled_since = self._stalled_since or now
        limit = self._spec.stall_timeout_s
        with self._lock:
            late = [live for live in self._live.values() if now - max(since, live.created) > limit]
        for generation in late:
            held, live_bytes = self.kv_bytes()
            self._fail(
                generation.name,
                ApiError(
                    f"no device memory became free within {limit:g} s: the KV cache holds {held} bytes, "
                    f"{live_bytes} of them in use, of its {self.limits.blocks * self.limits.block_bytes} and could not "
                    f"get more, or the weights could not be brought back{self._shortage and f' ({self._shortage})'}",
                    status=503,
                    code="out_of_memory",
                ),
            )
            self._processor.scheduler.set_request_cancellation(generation.name)
        if self._prepared and (late or (not self._preempted and now - since >= min(_PREEMPT_S, 0.75 * limit))):
            self._preempt()
        if not late:
            self._memory.trim(cached=True)  # what is only cached may be what somebody waits for, or our own weights
            self._manager._has_new_requests.wait(timeout=_RETRY_S)
            self._manager._has_new_requests.clear()

    def _deliver(self, output: GenerationOutput) -> None:
        last = output.is_finished()
        with self._lock:
            generation = self._live.pop(output.request_id, None) if last else self._live.get(output.request_id)
        if generation is None:
            return
        if output.error is not None:
            self._say_if_idle()
            generation.fail(_as_api_error(output.error))
            return
        tokens = output.generated_tokens[generation.delivered :]
        generation.delivered += len(tokens)
        if generation.told is not None and tokens:
            told = self._sampler.tell(output.request_id, tokens[-1], generation.told)
            if told is not None:
                generation.logprobs.append(told)
        self._tokens_out += len(tokens)
        self._say_if_idle()
        generation.push(tokens, last=last)

    def _fail(self, name: str, error: Exception) -> None:
        with self._lock:
            generation = self._live.pop(name, None)
        if generation is not None:
            self._say_if_idle()
            generation.fail(error if isinstance(error, ApiError) else _as_api_error(error))

    def _say_if_idle(self) -> None:
        with self._lock:
            is_idle = not self._live
        if is_idle:
            self.on_idle()

    def _fail_all(self, error: Exception) -> None:
        with self._lock:
            names = list(self._live)
        for name in names:
            self._fail(name, error)


def _as_api_error(error: Exception | str) -> ApiError:
    detail = described(error) if isinstance(error, Exception) else error
    return ApiError(f"the engine failed on this request: {detail}", status=500, code="engine_error")


__all__ = ["CausalEngine", "Generation"]
