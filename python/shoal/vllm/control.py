"""Putting vLLM to sleep without losing anything: its own ``sleep`` aborts requests and forgets what is cached.

New requests wait, running ones end, and only then does memory go; cached blocks stay unless they are to be forgotten.
"""

from __future__ import annotations

import time
import uuid
import weakref
from typing import TYPE_CHECKING, Any, NamedTuple

from shoal.errors import Error

if TYPE_CHECKING:
    from shoal.vllm.memory import KvWhileAsleep

__all__ = ["CHECK", "Said", "compared", "one_token_async", "resume", "resume_async", "suspend", "suspend_async"]

CHECKED = tuple(range(1, 9))
"""The prompt that a wake is checked with: shorter than any block, so that it is computed each time."""


CHECK = "shoal-check-"
"""What the ids of requests begin with that nobody else asked for."""

ROUNDING = 0.1
"""By how much a token's log probability may differ where others were computed beside it."""

LIKELIEST = 5


class Said(NamedTuple):
    """The likeliest token, its log probability, and those of the likeliest ones, itself among them."""

    token: int
    logprob: float
    others: dict[int, float]

    def agrees(self, now: Said, rounding: float = ROUNDING) -> bool:
        """Say whether what is said now may be the same, rounded otherwise.

        Parameters
        ----------
        now
            What is said now.
        rounding
            By how much the log probability may differ.

        Returns
        -------
        bool
            Whether this one's token is among the likeliest of those, and about as likely.
        """
        return abs(now.others.get(self.token, float("-inf")) - self.logprob) <= rounding


# What an engine that sleeps said last.
_said: weakref.WeakKeyDictionary[Any, Said] = weakref.WeakKeyDictionary()


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
        report["check"] = compared(before, now, began, is_same=now.token == before.token)
    return report


def compared(before: Said, now: Said, began: float, *, is_same: bool) -> dict[str, float]:
    """Give a report of a check that began at a time of :func:`time.perf_counter`.

    Parameters
    ----------
    before, now
        What was said before the sleep, and now.
    began
        When.
    is_same
        Whether the two count as the same.

    Returns
    -------
    dict
        ``seconds``, and by how much the token's ``logprob`` differs.

    Raises
    ------
    Error
        They do not. Its ``kind`` is ``"check"``.
    """
    if not is_same:
        raise Error(
            f"the engine woke, and says token {now.token} (log probability {now.logprob:.4f}) where it said "
            f"{before.token} ({before.logprob:.4f}) before its sleep",
            kind="check",
        )
    return {"seconds": time.perf_counter() - began, "logprob": now.others[before.token] - before.logprob}


def _sampling() -> Any:
    from vllm import SamplingParams

    return SamplingParams(max_tokens=1, temperature=0, logprobs=LIKELIEST, ignore_eos=True, detokenize=False)


def _said_of(made: Any) -> Said:
    token = made.outputs[0].token_ids[0]
    (chances,) = made.outputs[0].logprobs
    others = {one: float(chance.logprob) for one, chance in chances.items()}
    return Said(token, others[token], others)


def _one_token(llm: Any) -> Said:
    """Compute one token, by the likeliest."""
    (made,) = llm.generate([{"prompt_token_ids": list(CHECKED)}], _sampling(), use_tqdm=False)
    return _said_of(made)


async def one_token_async(engine: Any) -> Said | None:
    """Compute one token of a short prompt, beside whatever else is computed.

    Parameters
    ----------
    engine
        A ``vllm.v1.engine.async_llm.AsyncLLM``.

    Returns
    -------
    Said or None
        What it says. None: somebody ended the request before it was answered.
    """
    number = f"{CHECK}{uuid.uuid4().hex}"
    made = [one async for one in engine.generate({"prompt_token_ids": list(CHECKED)}, _sampling(), number)]
    return _said_of(made[-1]) if made and made[-1].outputs[0].token_ids else None


async def suspend_async(engine: Any, kv: KvWhileAsleep = "keep", *, check: bool = False) -> dict[str, Any]:
    """Let an ``AsyncLLM``'s running requests end, let new ones wait, and put it to sleep.

    Parameters
    ----------
    engine
        A ``vllm.v1.engine.async_llm.AsyncLLM`` with Shoal's worker.
    kv
        As for :func:`suspend`.
    check
        As for :func:`suspend`. Others' requests may be computed beside it, which rounds otherwise: the token that was
        the likeliest has to be among the five likeliest afterwards, with a log probability that differs by 0.1 at most.

    Returns
    -------
    dict
        As :func:`suspend`.
    """
    said = await _checked(engine) if check else None
    _said.pop(engine, None)
    await engine.pause_generation(mode="wait", clear_cache=False)
    try:
        report = _one(await engine.collective_rpc("shoal_sleep", args=(kv,)))
    except BaseException:
        await resume_async(engine)
        raise
    if said is not None:
        _said[engine] = said
    return report


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

    Raises
    ------
    Error
        As :func:`resume`; what waited goes on all the same.
    """
    report = _one(await engine.collective_rpc("shoal_wake"))
    await engine.resume_generation()
    before = _said.pop(engine, None)
    if before is not None:
        began = time.perf_counter()
        now = await _checked(engine)
        report["check"] = compared(before, now, began, is_same=before.agrees(now))
    return report


async def _checked(engine: Any) -> Said:
    said = await one_token_async(engine)
    if said is None:
        raise Error("the engine said nothing to the prompt that its wake is checked with", kind="check")
    return said


def _one(reports: list[dict[str, Any]]) -> dict[str, Any]:
    """Give the report of the one worker there is."""
    return reports[0]
