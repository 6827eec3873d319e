"""Blocks by name on a tier, as an engine with a block table of its own uses them."""

from __future__ import annotations

import os
import random
import select
import time
from typing import TYPE_CHECKING

import pytest

import shoal
from shoal.blocks import BlockStore, Finished

if TYPE_CHECKING:
    from collections.abc import Iterator
    from pathlib import Path

SIZE = 5000
"""Not a whole number of a disk's units."""


def content(number: int, size: int = SIZE) -> bytes:
    return random.Random(number).randbytes(size)


def name(number: int) -> bytes:
    return f"block {number}".encode()


def end(blocks: BlockStore, job: int) -> Finished:
    """Wait for one job, which is the only one."""
    assert blocks.drain(60)
    (finished,) = blocks.finished()
    assert finished.job == job
    return finished


def put(blocks: BlockStore, *numbers: int) -> list[bool]:
    return end(blocks, blocks.put([name(one) for one in numbers], [content(one) for one in numbers])).ok


def get(blocks: BlockStore, *numbers: int) -> list[bool]:
    """Read blocks, and look at every byte."""
    memory = [bytearray(SIZE) for _ in numbers]
    finished = end(blocks, blocks.get([name(one) for one in numbers], memory))
    for number, is_there, found in zip(numbers, finished.ok, memory, strict=True):
        assert bytes(found) == (content(number) if is_there else bytes(SIZE))
    assert finished.nbytes == SIZE * sum(finished.ok)
    return finished.ok


@pytest.fixture
def host() -> Iterator[BlockStore]:
    blocks = BlockStore(shoal.HostTier("16MiB"), {"model": "a"}, part_bytes="16KiB")
    yield blocks
    assert blocks.close()


def test_blocks_come_back_by_name(host: BlockStore) -> None:
    assert get(host, 1) == [False]
    assert put(host, *range(40)) == [True] * 40
    assert put(host, 3) == [True], "what is there is there"
    assert host.contains([name(7), name(99)]) == [True, False]
    assert get(host, 99, *range(40), 77) == [False, *[True] * 40, False]
    usage = host.usage()
    assert (usage["written"], usage["already"], usage["read"], usage["missed"]) == (40, 1, 40, 3)
    assert end(host, host.remove([name(5), name(99)])).ok == [True, False]
    assert get(host, 5, 6) == [False, True]
    assert (usage["jobs"], usage["waiting_bytes"]) == (0, 0)


def test_other_facts_and_tenants_have_other_blocks() -> None:
    tier = shoal.HostTier("16MiB")
    first = BlockStore(tier, {"model": "a"}, salt="alice")
    put(first, 1)
    for facts, salt, there in (
        ({"model": "a"}, "alice", True),
        ({"model": "b"}, "alice", False),
        ({"model": "a"}, "", False),
    ):
        other = BlockStore(tier, facts, salt=salt)
        assert other.contains([name(1)]) == [there]
        assert get(other, 1) == [there]
        assert other.close()
    assert first.close()


def test_a_descriptor_says_when_something_has_ended(host: BlockStore) -> None:
    descriptor = host.fileno()
    assert host.fileno() == descriptor
    readable = lambda: bool(select.select([descriptor], [], [], 0)[0])  # noqa: E731
    assert not readable()
    looked = host.look([name(1)])
    assert readable()
    assert host.finished() == [Finished(looked, [False], 0, 0.0)]
    assert not readable()
    job = host.put([name(1)], [content(1)])
    assert select.select([descriptor], [], [], 60)[0]
    assert [one.job for one in host.finished()] == [job]
    assert not readable()
    empty = host.get([], [])
    assert readable()
    assert [one.job for one in host.finished()] == [empty]


def test_what_is_asked_for_wrongly_is_refused_and_costs_nobody_anything(host: BlockStore) -> None:
    with pytest.raises(ValueError, match="2 names and 1 buffers"):
        host.put([name(1), name(2)], [content(1)])
    with pytest.raises(TypeError, match="memoryview"):
        host.get([name(1)], [7])
    # A buffer that may not be written is a block that was not read.
    put(host, 1)
    assert end(host, host.get([name(1)], [bytes(SIZE)])).ok == [False]
    # One of another length too.
    assert end(host, host.get([name(1)], [bytearray(SIZE - 1)])).ok == [False]
    assert get(host, 1) == [True]
    with pytest.raises(ValueError, match="threads"):
        BlockStore(shoal.HostTier("1MiB"), {}, threads=0)


def test_what_is_too_much_ends_at_once() -> None:
    blocks = BlockStore(shoal.HostTier("64MiB"), {}, threads=1, waiting_bytes_max=SIZE)
    jobs = [blocks.put([name(one)], [content(one)]) for one in range(200)]
    assert blocks.drain(60)
    ended = {one.job: one.ok for one in blocks.finished()}
    assert list(ended) == sorted(ended, key=list(ended).index)
    assert set(ended) == set(jobs)
    usage = blocks.usage()
    assert usage["written"] + usage["refused"] == 200
    assert sum(ok == [True] for ok in ended.values()) == usage["written"] >= 1
    assert blocks.close()


def test_a_closed_store_takes_nothing_and_leaves_no_job(host: BlockStore) -> None:
    blocks = BlockStore(shoal.HostTier("64MiB"), {}, threads=1)
    jobs = [blocks.put([name(one)], [content(one)]) for one in range(50)]
    assert blocks.close(60)
    assert {one.job for one in blocks.finished()} == set(jobs)
    assert blocks.usage()["waiting_bytes"] == 0
    for call in (lambda: blocks.get([name(1)], [bytearray(SIZE)]), lambda: blocks.look([name(1)]), blocks.fileno):
        with pytest.raises(ValueError, match="closed"):
            call()


def test_disks_give_what_another_process_left_and_nothing_that_is_damaged(tmp_path: Path) -> None:
    tier = shoal.DiskTier([(tmp_path / "kv", "64MiB")])
    blocks = BlockStore(tier, {"model": "a"})
    assert put(blocks, *range(30)) == [True] * 30
    assert blocks.flush(60)
    assert blocks.close()
    assert tier.close(60)
    # A bit of a block on the disk.
    wanted = content(11)[1000:1064]
    (segment,) = [path for path in (tmp_path / "kv").rglob("*") if path.is_file() and wanted in path.read_bytes()]
    with segment.open("r+b") as file:
        at = segment.read_bytes().index(wanted)
        file.seek(at)
        file.write(bytes([wanted[0] ^ 1]))
        os.fsync(file.fileno())
    tier = shoal.DiskTier([(tmp_path / "kv", "64MiB")])
    deadline = time.monotonic() + 60
    while tier.places()[0]["state"] != "ready":
        assert time.monotonic() < deadline, tier.places()
        time.sleep(0.01)
    stack = shoal.TierStack([shoal.HostTier("16MiB"), tier])
    blocks = BlockStore(stack, {"model": "a"}, part_bytes="16KiB")
    assert get(blocks, *range(30)) == [number != 11 for number in range(30)]
    assert tier.places()[0]["corrupt"] == 1
    assert get(blocks, 11) == [False], "it was dropped"
    assert blocks.close()
    assert tier.close(60)


def test_another_process_is_refused(host: BlockStore) -> None:
    put(host, 1)
    reading, writing = os.pipe()
    child = os.fork()
    if child == 0:
        refused = 0
        for call in (host.finished, host.drain, host.usage, host.close, lambda: host.contains([name(1)])):
            try:
                call()
            except shoal.ForkError:
                refused += 1
        os.write(writing, str(refused).encode())
        os._exit(0)
    os.waitpid(child, 0)
    assert os.read(reading, 10) == b"5"
    os.close(reading)
    os.close(writing)
    assert get(host, 1) == [True]
