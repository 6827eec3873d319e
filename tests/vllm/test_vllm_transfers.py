"""Which blocks a connector may still read, and what the queue of blocks does about them. Needs no vLLM."""

from __future__ import annotations

import random
from types import SimpleNamespace
from typing import TYPE_CHECKING, Any

import pytest

from shoal.errors import RegionError
from shoal.vllm.queue import ElasticQueue
from shoal.vllm.transfers import Transfers

if TYPE_CHECKING:
    from collections.abc import Iterable


class Memory:
    """Ids that are out."""

    def __init__(self, total: int) -> None:
        self.total = total
        self.out: set[int] = set()

    def alloc(self, n: int) -> list[int] | None:
        free = [number for number in range(self.total) if number not in self.out]
        if len(free) < n:
            return None
        self.out.update(free[:n])
        return free[:n]

    def free(self, ids: Iterable[int]) -> None:
        for number in ids:
            self.out.remove(number)

    def available(self) -> int:
        return self.total - len(self.out)


def blocks(count: int) -> list[Any]:
    return [SimpleNamespace(block_id=number) for number in range(count)]


def test_what_is_still_read_keeps_its_memory_until_it_was_read() -> None:
    memory = Memory(8)
    queue = ElasticQueue(blocks(8), memory, 8)
    read = {1, 2}
    queue.read = lambda: read
    taken = queue.popleft_n(4)
    queue.append_n([taken[0], taken[1]])
    queue.give_up([taken[0], taken[1]])
    queue.prepend_n([taken[2], taken[3]])
    assert (memory.out, queue.kept_back, queue.used) == ({1, 2}, 2, 0)
    assert queue.num_free_blocks == 6
    assert [block.block_id for block in queue.popleft_n(6)] == [0, 3, 4, 5, 6, 7]
    with pytest.raises(ValueError, match="1 free blocks"):
        queue.popleft()
    read.remove(1)
    queue.look_again()
    assert [block.block_id for block in queue.popleft_n(1)] == [1]
    read.clear()
    queue.look_again()
    assert (queue.kept_back, memory.out) == (0, {0, 1, 3, 4, 5, 6, 7})


@pytest.mark.parametrize("seed", range(6))
def test_no_id_is_lost_and_none_goes_early(seed: int) -> None:
    """Random takes, ends, reads and looks: what is read is out, and in the end everything is back."""
    chance = random.Random(seed)
    memory = Memory(40)
    queue = ElasticQueue(blocks(40), memory, 40)
    read: set[int] = set()
    queue.read = lambda: read
    users: list[list[Any]] = []
    for _ in range(600):
        match chance.randrange(5):
            case 0 | 1:
                count = chance.randrange(1, 6)
                queue.expect(count)
                if queue.num_free_blocks >= count:
                    users.append(queue.popleft_n(count))
            case 2 if users:
                done = users.pop(chance.randrange(len(users)))
                read.update(block.block_id for block in done if chance.random() < 0.5)
                cached = [block for block in done if chance.random() < 0.5]
                queue.prepend_n([block for block in done if block not in cached])
                queue.append_n(cached)
            case 3 if queue.cached:
                queue.give_up(queue.get_all_free_blocks()[: chance.randrange(1, 5)])
            case 4 if read:
                read.difference_update(chance.sample(sorted(read), chance.randrange(1, len(read) + 1)))
                queue.look_again()
        in_use = {block.block_id for user in users for block in user}
        # Who takes a cached block that is read is vLLM's own fence's business.
        read -= in_use
        assert read <= memory.out, "memory went of what is still read"
        assert len(in_use) == queue.used
        assert len(memory.out) == queue.used + queue.cached + queue.kept_back + len(queue._ready)
    read.clear()
    for user in users:
        queue.prepend_n(user)
    queue.give_up(queue.get_all_free_blocks())
    queue.look_again()
    assert not memory.out


def status(*, ended: bool, block_ids: list[int], stored: int = 0) -> Any:
    group = SimpleNamespace(block_ids=block_ids, next_stored_chunk_idx=stored)
    return SimpleNamespace(
        req=SimpleNamespace(is_finished=lambda: ended), group_states=[group], config=SimpleNamespace(blocks_per_chunk=2)
    )


class Scheduler:
    """What is looked at of vLLM's."""

    def __init__(self) -> None:
        self._jobs: dict[int, Any] = {}
        self._req_status: dict[str, Any] = {}

    def update_connector_output(self, output: Any) -> str:
        self._jobs.pop(output, None)
        return "updated"

    def build_connector_meta(self, output: Any) -> str:
        self._req_status.pop(output, None)
        return "meta"


def job(blocks_of_windows: list[int] | None = None, *others: int, is_store: bool = True) -> Any:
    return SimpleNamespace(
        is_store=is_store, non_sliding_window_block_ids=list(others), sliding_window_block_ids=blocks_of_windows
    )


def test_blocks_of_jobs_and_of_requests_that_ended_are_read_and_nothing_else() -> None:
    transfers = Transfers()

    class Made(Scheduler):
        pass

    transfers.listen(Made)
    scheduler = Made()
    assert transfers._scheduler is scheduler
    other = Made()
    assert transfers._scheduler is scheduler, "only the next one is looked into"
    assert "update_connector_output" not in vars(other)
    store = SimpleNamespace(block_ids=[30, 31])
    worker = SimpleNamespace(_unsubmitted_store_jobs=[(7, store, None)], worker=None)
    transfers.attach_worker(worker)
    scheduler._jobs = {1: job([3], 4, 5), 2: job(None, 6), 3: job(None, 9, is_store=False)}
    scheduler._req_status = {
        "runs": status(ended=False, block_ids=[1, 2]),
        # Two chunks of two blocks each were stored, or are.
        "ended": status(ended=True, block_ids=[11, 12, 13, 14, 8], stored=2),
    }
    assert transfers.read() == {3, 4, 5, 6, 8, 30, 31}
    told: list[set[int]] = []
    transfers.ended = lambda: told.append(transfers.read())
    assert scheduler.update_connector_output(1) == "updated"
    assert scheduler.build_connector_meta("ended") == "meta"
    assert told == [{6, 8, 30, 31}, {6, 30, 31}]


def test_while_a_half_was_not_seen_no_block_is_let_go() -> None:
    """What a half that nobody looks into copies is not known; "nothing" would let memory go under a copy."""
    nothing = SimpleNamespace(_unsubmitted_store_jobs=[], worker=None)
    with pytest.raises(RegionError, match="scheduler's and the worker's half") as neither:
        Transfers().read()
    assert neither.value.kind == "unsupported"
    no_scheduler, no_worker = Transfers(), Transfers()
    no_scheduler.attach_worker(nothing)
    no_worker.attach_scheduler(Scheduler())
    memory = Memory(4)
    queue = ElasticQueue(blocks(4), memory, 4)
    taken = queue.popleft_n(2)
    for half, transfers in {"scheduler's half": no_scheduler, "worker's half": no_worker}.items():
        queue.read = transfers.read
        with pytest.raises(RegionError, match=half):
            queue.prepend_n(taken)
        assert memory.out == {0, 1}, "memory went of which nobody knows whether it is read"
    no_worker.attach_worker(nothing)
    queue.read = no_worker.read
    queue.prepend_n(taken)
    assert memory.out == set()


def test_a_connector_whose_copies_cannot_be_waited_for_is_refused() -> None:
    with pytest.raises(RegionError, match="no half in its worker's process"):
        Transfers().attach_worker(None)

    class Foreign:
        _store_handler = SimpleNamespace(_transfers=[])

    with pytest.raises(RegionError, match="Foreign has no _load_handler") as foreign:
        Transfers().attach_worker(SimpleNamespace(_unsubmitted_store_jobs=[], worker=Foreign()))
    assert foreign.value.kind == "unsupported"


def test_copies_that_wait_are_begun_once_and_streams_are_those_of_copies_that_run() -> None:
    transfers = Transfers()
    began: list[int] = []
    copies = SimpleNamespace(
        submit_store=lambda number, _source, _target: began.append(number) is None,
        _store_handler=SimpleNamespace(_transfers=[SimpleNamespace(stream="down")]),
        _load_handler=SimpleNamespace(_transfers=[SimpleNamespace(stream="up")]),
    )
    waiting = [(1, SimpleNamespace(block_ids=[1]), None), (2, SimpleNamespace(block_ids=[2]), None)]
    worker = SimpleNamespace(_unsubmitted_store_jobs=list(waiting), worker=copies)
    transfers.attach_worker(worker)
    assert transfers.has_waiting
    transfers.begin_waiting()
    transfers.begin_waiting()
    assert began == [1, 2]
    assert not transfers.has_waiting
    assert list(transfers.streams()) == ["down", "up"]
