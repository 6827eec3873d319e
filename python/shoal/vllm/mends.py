"""Two faults of vLLM 0.26's own KV offloading, mended from outside where our spec is used.

Both give wrong KV without an error, and both are mended in later versions of vLLM (its pull requests 54288 and 50696).
Apart from :mod:`shoal.vllm.offloading` because nothing here needs vLLM to be imported, and because it goes with 0.26.
"""

from __future__ import annotations

import functools
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from collections.abc import Callable

__all__ = ["order_loads", "store_only_what_was_written", "written_tokens"]


def written_tokens(request: Any) -> int:
    """Say how many tokens of a request that has ended have their KV on the device.

    Parameters
    ----------
    request
        vLLM's ``Request``.

    Returns
    -------
    int
        Never the token that was sampled last: no step has had it as its input. Fewer, for one that was aborted.
    """
    computed = int(request.num_computed_tokens - request.num_output_placeholders)
    return max(min(computed, max(int(request.num_prompt_tokens), int(request.num_tokens) - 1)), 0)


def store_only_what_was_written(scheduler: Any) -> None:
    """Keep the connector's scheduler from storing a block whose last slot no step has written.

    vLLM 0.26 counts all tokens of a request that has ended. Where they end with a block, it stores that block under the
    hash of its tokens, and whoever asks with these tokens again gets a slot with whatever lay there. For an aborted
    request it counts tokens that were never computed.

    Parameters
    ----------
    scheduler
        vLLM's class ``OffloadingConnectorScheduler``.
    """
    original = scheduler._calc_num_offloadable_tokens
    if getattr(original, "_is_shoals", False):
        return

    @functools.wraps(original)
    def calc(self: Any, req_status: Any, num_computed_tokens: int) -> int:
        if req_status.req.is_finished():
            num_computed_tokens = min(num_computed_tokens, written_tokens(req_status.req))
        return int(original(self, req_status, num_computed_tokens))

    calc._is_shoals = True  # type: ignore[attr-defined]
    scheduler._calc_num_offloadable_tokens = calc


def order_loads(worker: Any, current_stream: Callable[[], Any], new_stream: Callable[[], Any]) -> None:
    """Let what is copied to the device wait for the steps that were launched before.

    vLLM 0.26 orders only copies from the device after its steps. Its scheduler gives blocks back that a step may still
    write to no sooner than that step has ended, if the connector is one that loads (`kv_both`); what a step zeroes, for
    models with state layers, it does not wait for, and zeroes what was loaded where it comes later.

    Parameters
    ----------
    worker
        vLLM's ``CPUOffloadingWorker``.
    current_stream
        Gives the stream that steps are launched on.
    new_stream
        Makes another one.
    """
    handler = worker._load_handler
    original = handler.transfer_async

    @functools.wraps(original)
    def transfer_async(*arguments: Any, **named: Any) -> Any:
        # The transfer takes its stream from the end of this list.
        if not handler._stream_pool:
            handler._stream_pool.append(new_stream())
        handler._stream_pool[-1].wait_stream(current_stream())
        return original(*arguments, **named)

    handler.transfer_async = transfer_async
