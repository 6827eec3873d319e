"""What is mended of vLLM 0.26's offloading: the slot of the last token, aborted requests, loads before their time."""

from __future__ import annotations

from types import SimpleNamespace
from typing import Any

import pytest

from shoal.vllm.mends import order_loads, store_only_what_was_written, written_tokens


def request(*, prompt: int, tokens: int, computed: int, ahead: int = 0, ended: bool = True) -> Any:
    return SimpleNamespace(
        num_prompt_tokens=prompt, num_tokens=tokens, num_computed_tokens=computed, num_output_placeholders=ahead,
        is_finished=lambda: ended,
    )  # fmt: skip


@pytest.mark.parametrize(
    ("one", "written"),
    [
        # 24 tokens made of a prompt of 40: the last one was no step's input.
        (request(prompt=40, tokens=64, computed=63), 63),
        # The same with a step that was scheduled ahead and counts already.
        (request(prompt=40, tokens=64, computed=64, ahead=1), 63),
        (request(prompt=40, tokens=64, computed=64), 63),
        # Aborted in the midst of its prompt, and before anything.
        (request(prompt=40, tokens=40, computed=16), 16),
        (request(prompt=40, tokens=40, computed=0), 0),
        (request(prompt=40, tokens=40, computed=0, ahead=1), 0),
        # All of a prompt, and no token of an answer.
        (request(prompt=48, tokens=48, computed=48), 48),
    ],
)
def test_a_request_that_ended_has_written_all_but_its_last_token(one: Any, written: int) -> None:
    assert written_tokens(one) == written


class Scheduler:
    def _calc_num_offloadable_tokens(self, req_status: Any, num_computed_tokens: int) -> int:
        return min(num_computed_tokens, req_status.req.num_tokens)


def test_a_block_that_ends_with_the_last_token_is_not_stored() -> None:
    class Mended(Scheduler):
        pass

    for _ in range(2):
        store_only_what_was_written(Mended)
    status = SimpleNamespace(req=request(prompt=40, tokens=64, computed=63))
    assert Scheduler()._calc_num_offloadable_tokens(status, 64) == 64
    assert Mended()._calc_num_offloadable_tokens(status, 64) == 63
    running = SimpleNamespace(req=request(prompt=40, tokens=64, computed=48, ended=False))
    assert Mended()._calc_num_offloadable_tokens(running, 64) == 64, "a step that is scheduled writes its tokens"


class Stream:
    def __init__(self, name: str) -> None:
        self.name = name
        self.waits: list[str] = []

    def wait_stream(self, other: Stream) -> None:
        self.waits.append(other.name)


class Handler:
    """As vLLM's: a transfer's stream comes from the end of a list, and goes back to it when the transfer has ended."""

    def __init__(self) -> None:
        self._stream_pool: list[Stream] = []
        self.began: list[Stream] = []

    def transfer_async(self, job: int) -> bool:
        self.began.append(self._stream_pool.pop())
        return True


def test_each_load_waits_for_the_steps_before_it() -> None:
    handler = Handler()
    steps = Stream("steps")
    made: list[Stream] = []

    def another() -> Stream:
        made.append(Stream(f"copies {len(made)}"))
        return made[-1]

    order_loads(SimpleNamespace(_load_handler=handler), lambda: steps, another)
    assert handler.transfer_async(1)
    assert handler.transfer_async(2)
    handler._stream_pool += handler.began
    assert handler.transfer_async(3)
    assert len(made) == 2, "a stream that is free is taken"
    assert [stream.waits for stream in made] == [["steps"], ["steps", "steps"]]
