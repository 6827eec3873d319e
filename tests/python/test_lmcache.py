"""Shoal under LMCache's `native_plugin`: by its six methods, and by the real adapter where LMCache is installed."""

from __future__ import annotations

import ctypes
import random
import select
import time
from typing import TYPE_CHECKING, Any

import pytest

from shoal import TierStack, lmcache
from shoal.lmcache import ShoalConnector

if TYPE_CHECKING:
    from pathlib import Path

SIZE = 6000


def content(number: int) -> bytes:
    return random.Random(number).randbytes(SIZE)


def key(number: int) -> str:
    """As LMCache writes it: model, rank, group and hash."""
    return f"model@00000000@0@{number:064x}"


def memory(number: int | None = None) -> memoryview:
    """Memory as LMCache gives it, which is ctypes'."""
    array = (ctypes.c_ubyte * SIZE)()
    if number is not None:
        array[:] = content(number)
    return memoryview(array)


def end(connector: ShoalConnector, job: int) -> tuple[bool, str, list[bool] | None]:
    """Wait by the descriptor, as LMCache does."""
    deadline = time.monotonic() + 60
    while time.monotonic() < deadline:
        if select.select([connector.event_fd()], [], [], 1)[0]:
            for number, is_done, why, which in connector.drain_completions():
                assert number == job
                return is_done, why, which
    raise AssertionError("the job does not end")


@pytest.mark.parametrize("is_encrypted", [False, True])
def test_six_methods_keep_and_give_objects_over_a_restart(tmp_path: Path, is_encrypted: bool) -> None:
    disks = [{"path": str(tmp_path / "kv"), "bytes": "64MiB"}]
    (tmp_path / "key").write_bytes(bytes(32))
    key_file = str(tmp_path / "key") if is_encrypted else None
    connector = ShoalConnector(host="1MiB", disks=disks, key_file=key_file)
    numbers = list(range(20))
    keys = [key(number) for number in numbers]
    assert end(connector, connector.submit_batch_exists(keys)) == (True, "", [False] * 20)
    job = connector.submit_batch_set(keys, [memory(number) for number in numbers])
    assert end(connector, job) == (True, "", None)
    connector.close()
    assert (content(4)[:64] in (tmp_path / "kv" / "log").read_bytes()) == (not is_encrypted)

    connector = ShoalConnector(host="1MiB", disks=disks, key_file=key_file)
    deadline = time.monotonic() + 60
    while not all(end(connector, connector.submit_batch_exists(keys))[2] or []):
        assert time.monotonic() < deadline, "the directory was not opened"
    for _ in range(2):  # from the disk, then from memory
        room = [memory() for _ in range(21)]
        job = connector.submit_batch_get([*keys, key(99)], room)
        assert end(connector, job) == (True, "", [True] * 20 + [False])
        assert [bytes(one) for one in room] == [*map(content, numbers), bytes(SIZE)]
    assert end(connector, connector.submit_batch_delete([key(3), key(99)])) == (True, "", [True, False])
    assert end(connector, connector.submit_batch_exists([key(3), key(4)])) == (True, "", [False, True])
    connector.close()

    other = ShoalConnector({"revision": "2"}, disks=disks, key_file=key_file)
    assert end(other, other.submit_batch_exists([key(4)])) == (True, "", [False])
    other.close()


def test_who_asks_for_what_is_on_its_way_waits_for_the_same_transfer(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    stacks: list[TierStack] = []

    def stack(tiers: Any) -> TierStack:
        stacks.append(TierStack(tiers))
        return stacks[-1]

    monkeypatch.setattr(lmcache, "TierStack", stack)
    connector = ShoalConnector(disks=[{"path": str(tmp_path / "kv"), "bytes": "64MiB"}])
    (stack_of_disk,) = stacks
    content = random.Random(1).randbytes(2 << 20)
    assert end(connector, connector.submit_batch_set([key(1)], [memoryview(bytearray(content))])) == (True, "", None)
    asked, deadline = 0, time.monotonic() + 60
    # Two may miss each other, so several times. A hit is one read of the disk.
    while stack_of_disk.counts()[0]["hits"] == asked:
        assert time.monotonic() < deadline, f"{asked} requests, two at a time, cost a read each"
        room = [memoryview(bytearray(len(content))) for _ in range(2)]
        jobs = {connector.submit_batch_get([key(1)], [one]) for one in room}
        asked += len(jobs)
        while jobs and time.monotonic() < deadline:
            for number, is_done, _, which in connector.drain_completions():
                assert (is_done, which) == (True, [True])
                jobs.remove(number)
        assert all(one == content for one in room)
    connector.close()


def test_what_cannot_be_kept_is_said() -> None:
    connector = ShoalConnector(host="64KiB", deadline_s=0.0)
    big = memoryview(bytearray(1 << 20))
    is_done, why, which = end(connector, connector.submit_batch_set([key(1)], [big]))
    # A tier that does not want it is no failure; it is only not there.
    assert (is_done, why, which) == (True, "", None)
    assert end(connector, connector.submit_batch_exists([key(1)])) == (True, "", [False])
    connector.close()
    with pytest.raises(ValueError, match="not size"):
        ShoalConnector(host="1MiB", size=3)
    with pytest.raises(ValueError, match="has no place"):
        ShoalConnector()


class Object:
    """What LMCache's adapter looks at of a memory object."""

    def __init__(self, view: memoryview) -> None:
        self.byte_array = view


@pytest.mark.filterwarnings("ignore")  # LMCache's own imports warn
def test_lmcaches_own_adapter_takes_it(tmp_path: Path) -> None:
    try:
        from lmcache.v1.distributed.api import ObjectKey
        from lmcache.v1.distributed.l2_adapters import native_plugin_l2_adapter as plugin
    except ImportError as error:
        pytest.skip(f"needs LMCache with all that it imports: {error}")
    disks = [{"path": str(tmp_path / "kv"), "bytes": "64MiB"}]
    config = plugin.NativePluginL2AdapterConfig.from_dict(
        {"type": "native_plugin", "module_path": "shoal.lmcache", "class_name": "ShoalConnector",
         "adapter_params": {"host": "1MiB", "disks": disks}}
    )  # fmt: skip
    adapter = plugin._create_native_plugin_l2_adapter(config)
    keys = [ObjectKey(chunk_hash=bytes([number]) * 32, model_name="model", kv_rank=0) for number in range(5)]

    def until(take: Any) -> Any:
        deadline = time.monotonic() + 60
        while not (found := take()):
            assert time.monotonic() < deadline, "LMCache's task does not end"
            time.sleep(0.005)
        return found

    task = adapter.submit_store_task(keys[:4], [Object(memory(number)) for number in range(4)])
    assert until(adapter.pop_completed_store_tasks)[task].is_successful()
    looked = adapter.submit_lookup_and_lock_task(keys, {})
    found = until(lambda: adapter.query_lookup_and_lock_result(looked))
    assert [found.test(place) for place in range(5)] == [True] * 4 + [False]
    room = [memory() for _ in range(5)]
    loading = adapter.submit_load_task(keys, [Object(view) for view in room])
    loaded = until(lambda: adapter.query_load_result(loading))
    assert [loaded.test(place) for place in range(5)] == [True] * 4 + [False]
    assert [bytes(one) for one in room[:4]] == [content(number) for number in range(4)]
    adapter.delete(keys[:1])
    looked = adapter.submit_lookup_and_lock_task(keys[:2], {})
    found = until(lambda: adapter.query_lookup_and_lock_result(looked))
    assert [found.test(place) for place in range(2)] == [False, True]
    adapter.close()
