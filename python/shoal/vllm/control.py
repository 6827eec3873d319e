"""Putting vLLM to sleep without losing anything: its own ``sleep`` aborts requests and forgets what is cached.

New requests wait, running ones end, and only then does memory go; cached blocks stay unless they are to be forgotten.
"""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from shoal.vllm.memory import KvWhileAsleep

__all__ = ["resume", "resume_async", "suspend", "suspend_async"]


def suspend(llm: Any, kv: KvWhileAsleep = "keep") -> dict[str, Any]:
    """Put an ``LLM`` to sleep. Between two of its calls nothing is running.

    Parameters
    ----------
    llm
        A ``vllm.LLM`` with Shoal's worker.
    kv
        ``"keep"``: cached KV blocks are moved to host memory, and found again after :func:`resume`; ``"forget"``: they
        are forgotten.

    Returns
    -------
    dict
        ``seconds``, and what each part freed and copied.
    """
    return _one(llm.collective_rpc("shoal_sleep", args=(kv,)))


def resume(llm: Any) -> dict[str, Any]:
    """Wake an ``LLM``.

    Parameters
    ----------
    llm
        A ``vllm.LLM`` that :func:`suspend` was called on.

    Returns
    -------
    dict
        ``seconds`` and ``restored`` bytes.
    """
    return _one(llm.collective_rpc("shoal_wake"))


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
