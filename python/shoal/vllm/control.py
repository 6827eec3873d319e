"""Putting vLLM to sleep without losing anything: its own ``sleep`` aborts requests and forgets what is cached.

New requests wait, running ones end, and only then does memory go; cached blocks stay unless they are to be forgotten.
"""

from __future__ import annotations

import time
import weakref
from typing import TYPE_CHECKING, Any, NamedTuple

from shoal.errors import Error

if TYPE_CHECKING:
    from shoal.vllm.memory import KvWhileAsleep

__all__ = ["resume", "resume_async", "suspend", "suspend_async"]

CHECKED = tuple(range(1, 9))
"""The prompt that a wake is checked with: shorter than any block, so that it is computed each time."""


class _Said(NamedTuple):
    token: int
    logprob: float


# What an engine that sleeps said last.
_said: weakref.WeakKeyDictionary[Any, _Said] = weakref.WeakKeyDictionary()


def suspend(llm: Any, kv: KvWhileAsleep = "keep", *, check: bool = False) -> dict[str, Any]:
    """Put an ``LLM`` to sleep. Between two of its calls nothing is running.

    Parameters
    ----------
    llm
        A ``vllm.LLM`` with Shoal's worker.
    kv
        ``"keep"``: cached KV blocks are moved to host memory, and found again after :func:`resume`; ``"forget"``: they
        are forgotten.
    check
        Whether :func:`resume` is to compute one token of a short prompt and compare it with what the engine says now.
        Costs a step of one request before, and one after.

    Returns
    -------
    dict
        ``seconds``, and what each part freed and copied.
    """
    said = _one_token(llm) if check else None
    report = _one(llm.collective_rpc("shoal_sleep", args=(kv,)))
    _said.pop(llm, None)
    if said is not None:
        _said[llm] = said
    return report


def resume(llm: Any) -> dict[str, Any]:
    """Wake an ``LLM``.

    Parameters
    ----------
    llm
        A ``vllm.LLM`` that :func:`suspend` was called on.

    Returns
    -------
    dict
        ``seconds`` and ``restored`` bytes; where :func:`suspend` was told to ``check``, also ``check``: the ``seconds``
        that took, and by how much the token's ``logprob`` differs from the one before.

    Raises
    ------
    Error
        The token is another one than before the sleep: the engine is awake, and is not what it was. Its ``kind`` is
        ``"check"``.
    """
    report = _one(llm.collective_rpc("shoal_wake"))
    before = _said.pop(llm, None)
    if before is not None:
        began = time.perf_counter()
        now = _one_token(llm)
        report["check"] = {
            "seconds": time.perf_counter() - began, "logprob": now.logprob - before.logprob,
        }  # fmt: skip
        if now.token != before.token:
            raise Error(
                f"the engine woke, and says token {now.token} (log probability {now.logprob:.4f}) where it said "
                f"{before.token} ({before.logprob:.4f}) before its sleep",
                kind="check",
            )
    return report


def _one_token(llm: Any) -> _Said:
    """Compute one token, by the likeliest."""
    from vllm import SamplingParams

    sampling = SamplingParams(max_tokens=1, temperature=0, logprobs=1, ignore_eos=True, detokenize=False)
    (made,) = llm.generate([{"prompt_token_ids": list(CHECKED)}], sampling, use_tqdm=False)
    token = made.outputs[0].token_ids[0]
    (chances,) = made.outputs[0].logprobs
    return _Said(token, float(chances[token].logprob))


async def suspend_async(engine: Any, kv: KvWhileAsleep = "keep") -> dict[str, Any]:
    """Let an ``AsyncLLM``'s running requests end, let new ones wait, and put it to sleep.

    Parameters
    ----------
    engine
        A ``vllm.v1.engine.async_llm.AsyncLLM`` with Shoal's worker.
    kv
        As for :func:`suspend`.

    Returns
    -------
    dict
        As :func:`suspend`.
    """
    await engine.pause_generation(mode="wait", clear_cache=False)
    try:
        return _one(await engine.collective_rpc("shoal_sleep", args=(kv,)))
    except BaseException:
        await resume_async(engine)
        raise


async def resume_async(engine: Any) -> dict[str, Any]:
    """Wake an ``AsyncLLM``; what waited goes on.

    Parameters
    ----------
    engine
        One that :func:`suspend_async` was called on.

    Returns
    -------
    dict
        As :func:`resume`.
    """
    report = _one(await engine.collective_rpc("shoal_wake"))
    await engine.resume_generation()
    return report


def _one(reports: list[dict[str, Any]]) -> dict[str, Any]:
    """Give the report of the one worker there is."""
    return reports[0]
