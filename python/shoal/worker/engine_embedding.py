"""The engine of embedding models: one text at a time, every forward inside a guard.

One at a time, so that a text's numbers are those of plain transformers, whatever else was in the request.
"""

from __future__ import annotations

import asyncio
import functools
import logging
import threading
import time
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from typing import TYPE_CHECKING

import torch

from .errors import ApiError
from .memory import Memory, ShortageError
from .usage import Counts, no_one_asks

if TYPE_CHECKING:
    from collections.abc import Callable, Sequence

    from transformers import PreTrainedModel

    from .spec import WorkerSpec

logger = logging.getLogger(__name__)

_GUARD_S = 10.0
_RETRY_S = 0.05


def _mean(states: torch.Tensor) -> torch.Tensor:
    return states.mean(dim=0)


def _cls(states: torch.Tensor) -> torch.Tensor:
    return states[0]


def _max(states: torch.Tensor) -> torch.Tensor:
    return states.max(dim=0).values


def _last(states: torch.Tensor) -> torch.Tensor:
    return states[-1]


def _mean_sqrt(states: torch.Tensor) -> torch.Tensor:
    return states.sum(dim=0) / states.shape[0] ** 0.5


POOLINGS: dict[str, Callable[[torch.Tensor], torch.Tensor]] = {
    "pooling_mode_cls_token": _cls,
    "pooling_mode_max_tokens": _max,
    "pooling_mode_mean_tokens": _mean,
    "pooling_mode_mean_sqrt_len_tokens": _mean_sqrt,
    "pooling_mode_lasttoken": _last,
}  # in the order in which sentence-transformers concatenates them


@dataclass(frozen=True)
class Pooling:
    """How the states of a text's tokens become one vector."""

    modes: tuple[str, ...] = ("pooling_mode_mean_tokens",)
    normalize: bool = True

    def __call__(self, states: torch.Tensor) -> torch.Tensor:
        """One vector from states of shape [tokens, hidden]."""
        vector = torch.cat([POOLINGS[mode](states) for mode in self.modes])
        return torch.nn.functional.normalize(vector, dim=0) if self.normalize else vector


class EmbeddingEngine:
    """Turns texts into vectors, on one thread.

    Parameters
    ----------
    context_tokens
        Longest text; a longer one is an error, never cut.

    Attributes
    ----------
    dimensions
        Numbers of a vector.
    """

    def __init__(
        self, model: PreTrainedModel, memory: Memory, spec: WorkerSpec, pooling: Pooling, context_tokens: int
    ) -> None:
        self.context_tokens = context_tokens
        self.dimensions = model.config.get_text_config().hidden_size * len(pooling.modes)
        self._model = model
        self._memory = memory
        self._spec = spec
        self._pooling = pooling
        self._executor = ThreadPoolExecutor(max_workers=1, thread_name_prefix="engine")
        self.on_idle: Callable[[], None] = no_one_asks  # called when the last request has ended; from any thread
        self._stop = threading.Event()
        self._lock = threading.Lock()  # for the counts
        self._waiting = 0
        self._running = 0
        self._tokens = 0

    def start(self) -> None:
        """Nothing to do: the thread starts with the first text."""

    def stop(self, timeout_s: float = 10.0) -> None:
        """End after the text at hand."""
        del timeout_s
        self._stop.set()
        self._executor.shutdown(wait=True, cancel_futures=True)

    @property
    def alive(self) -> bool:
        """Whether it can serve."""
        return not self._stop.is_set()

    def counts(self) -> Counts:
        """Count requests now, and tokens of the texts that are done; embedding generates none."""
        with self._lock:
            return Counts(running=self._running, waiting=self._waiting, tokens_embedded=self._tokens)

    async def embed(self, texts: Sequence[Sequence[int]]) -> list[torch.Tensor]:
        """One float32 vector for each text; texts are token ids with the model's special tokens.

        Raises
        ------
        ApiError
            Too many requests wait, or no memory became free in time.
        """
        with self._lock:
            if self._waiting + self._running >= self._spec.requests_max:
                raise ApiError(
                    f"{self._waiting + self._running} requests are inside the engine already, the most is "
                    f"{self._spec.requests_max}",
                    status=429,
                    kind="rate_limit_error",
                    code="too_many_requests",
                )
            self._waiting += 1
        cancelled = threading.Event()
        future = self._executor.submit(self._embed_all, texts, cancelled)
        future.add_done_callback(lambda done: self._leave(started=not done.cancelled()))
        try:
            return await asyncio.wrap_future(future)
        except asyncio.CancelledError:
            cancelled.set()
            raise

    def _leave(self, *, started: bool) -> None:
        with self._lock:
            if started:
                self._running -= 1
            else:
                self._waiting -= 1
            is_idle = self._running == self._waiting == 0
        if is_idle:
            self.on_idle()

    @torch.no_grad()
    def _embed_all(self, texts: Sequence[Sequence[int]], cancelled: threading.Event) -> list[torch.Tensor]:
        with self._lock:
            self._waiting -= 1
            self._running += 1
        vectors = []
        for text in texts:
            if cancelled.is_set():
                break
            vectors.append(self._embed_one(text, cancelled))
            with self._lock:
                self._tokens += len(text)
        return vectors

    def _is_wanted(self, cancelled: threading.Event) -> bool:
        return not (cancelled.is_set() or self._stop.is_set())

    def _embed_one(self, text: Sequence[int], cancelled: threading.Event) -> torch.Tensor:
        limit = self._spec.stall_timeout_s
        deadline = time.monotonic() + limit
        while True:
            if self._stop.is_set():
                raise ApiError("the model is shutting down", status=503, code="shutting_down")
            try:
                wanted = functools.partial(self._is_wanted, cancelled)
                with self._memory.guard(min(_GUARD_S, limit), wanted, tokens=len(text)):
                    ids = torch.tensor([list(text)], device=self._model.device)
                    states = self._model(input_ids=ids, attention_mask=torch.ones_like(ids)).last_hidden_state[0]
                    return self._pooling(states.float()).cpu()
            except ShortageError as shortage:
                if cancelled.is_set():
                    raise ApiError("the client went away", status=503, code="cancelled") from shortage
                if time.monotonic() > deadline:
                    raise ApiError(
                        f"no device memory became free within {limit:g} s: {shortage}", status=503, code="out_of_memory"
                    ) from shortage
                logger.info("waiting for memory: %s", shortage)
                time.sleep(_RETRY_S)
