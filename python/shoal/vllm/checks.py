"""Under ``shoal serve``: one token after each wake, compared with what the engine said before it ever slept.

What comes back from host memory is not hashed on its way, so that a wake runs at the link's speed. What a wrong byte
does is seen here: the same prompt of eight tokens is computed once before the server hears that requests are answered,
and again after all weights have come back. It lives in the process of vLLM's API server,
beside the requests that woke the engine, and no request waits for it.
"""

from __future__ import annotations

import asyncio
import logging
import time
from typing import Any

from shoal.vllm.control import Said, compared, one_token_async

__all__ = ["WakeChecks"]

logger = logging.getLogger("shoal.vllm")

LOOK_S = 1.0
"""How often the engine is asked whether its weights were away."""

ROUNDING = 0.5
"""By how much its log probability may differ here, where an engine is ended for it. vLLM's logits are rounded to the
model's type, in bfloat16 to an eighth from 16 up and to a fourth from 32 up, the likeliest one's and this one's."""

TRIES = 3
"""How often another token has to be said before it counts: a wrong byte of weights stays wrong, rounding does not."""


class WakeChecks:
    """Checks one engine's wakes.

    Parameters
    ----------
    engine
        vLLM's ``AsyncLLM`` with Shoal's worker.
    """

    def __init__(self, engine: Any) -> None:
        self._engine = engine
        self._said: Said | None = None
        # Bytes that had left the device when it was last said, and how often weights had been written anew.
        self._seen = (0, 0)

    async def begin(self) -> None:
        """Compute the token. An engine that cannot (``--max-logprobs 1``, say) is served all the same, unchecked."""
        try:
            self._seen = await self._whole() or self._seen
            self._said = await one_token_async(self._engine)
            if self._said is None:
                logger.warning("Wakes of this engine will not be checked: it said nothing")
        except Exception as error:  # noqa: BLE001 - whatever it is, requests can be answered
            logger.warning("Wakes of this engine will not be checked: %s", error)

    async def run(self) -> None:
        """Look for wakes, and check each.

        Weights that have left again meanwhile are not brought back for it: then the next wake is checked. Those that
        somebody has written anew say something else, which is what is expected from then on.

        Raises
        ------
        Error
            The engine says something else than before. Its ``kind`` is ``"check"``.
        """
        while self._said is not None:
            await asyncio.sleep(LOOK_S)
            seen = await self._whole()
            if seen is None or seen == self._seen:
                continue
            began = time.perf_counter()
            now = await one_token_async(self._engine)
            for _ in range(TRIES - 1):
                if now is None or seen[1] != self._seen[1] or self._said.agrees(now, ROUNDING):
                    break
                now = await one_token_async(self._engine)
            if now is None:
                continue
            if seen[1] == self._seen[1]:
                report = compared(self._said, now, began, is_same=self._said.agrees(now, ROUNDING))
                logger.info("A wake was checked: %s", report)
            else:
                self._said = now
            self._seen = seen

    async def _whole(self) -> tuple[int, int] | None:
        """Ask the worker; None while not all of its weights are there."""
        (said,) = await self._engine.collective_rpc("shoal_weights")
        return said if said is None else (int(said[0]), int(said[1]))
