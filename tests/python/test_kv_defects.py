"""Nine ways in which a published elastic KV cache (kvcached, at e8e6406) goes wrong, each shown not to be ours.

Two need a device that fails or a kernel that is slow, which Rust has: a refused unmap
(`a_refused_unmap_loses_no_memory_and_hangs_nobody`) and the order of unmapping
(`memory_goes_only_after_the_newest_step`), both in crates/shoal-memory/tests/kv_cache.rs.
"""

from __future__ import annotations

import pytest

import shoal
from shoal import KvCache

MIB = 1 << 20


def cache(mem: shoal.MemoryManager, blocks: int = 100, name: str = "kv") -> KvCache:
    """Blocks of 1 MiB."""
    words = {"layers": 2, "kv_heads": 8, "head_dim": 1024, "dtype": "float16", "name": name}
    return mem.kv_cache(max_bytes=blocks * MIB, **words)


@pytest.fixture
def mem() -> shoal.MemoryManager:
    return shoal.MemoryManager("sim", device_budget="256MiB", host_budget="64MiB")


def test_1_a_full_device_is_an_answer_and_ends_no_process() -> None:
    # The budget promises more than the device has.
    mem = shoal.MemoryManager("sim", device_budget="256MiB", host_budget="64MiB", device_capacity="16MiB")
    kv = cache(mem)
    ids = kv.alloc(14)
    assert ids is not None
    was = kv.usage()["live"]
    assert kv.alloc(20) is None
    assert kv.usage()["live"] == was
    kv.free(ids)
    assert kv.alloc(15) is not None


def test_2_two_caches_of_one_process_have_nothing_in_common(mem: shoal.MemoryManager) -> None:
    one, two = cache(mem, 100, "one"), cache(mem, 5, "two")
    assert one.alloc(1) is not None
    assert one.available() == 99
    two.set_limit("2MiB")
    assert (one.available(), two.available()) == (99, 2)
    assert one.usage()["limit"] == 100 * MIB


def test_3_a_limit_can_be_set_back_to_what_it_was(mem: shoal.MemoryManager) -> None:
    kv = cache(mem)
    for limit in (50, 100, 50, 100):
        kv.set_limit(limit * MIB)
        assert kv.available() == limit
    ids = kv.alloc(100)
    assert ids is not None
    assert len(set(ids)) == 100


def test_4_whoever_comes_late_undoes_nothing(mem: shoal.MemoryManager) -> None:
    kv = cache(mem)
    kv.set_limit("50MiB", revision=1)
    kv.set_limit("100MiB", revision=2)
    for limit, revision, kind in [(50, 1, "stale"), (70, 2, "conflict")]:
        with pytest.raises(shoal.RegionError) as caught:
            kv.set_limit(limit * MIB, revision=revision)
        assert caught.value.kind == kind
    assert kv.alloc(80) is not None, "an allocation asks nobody else for the limit"
    assert kv.usage()["limit"] == 100 * MIB


def test_5_no_block_comes_twice_after_shrinking_and_growing(mem: shoal.MemoryManager) -> None:
    kv = cache(mem)
    held = kv.alloc(30)
    kv.set_limit("50MiB")
    kv.set_limit("100MiB")
    more = kv.alloc(70)
    assert held is not None
    assert more is not None
    assert len({*held, *more}) == 100
    assert kv.alloc(1) is None
    kv.check()


def test_6_a_limit_above_the_addresses_is_refused(mem: shoal.MemoryManager) -> None:
    kv = cache(mem)
    with pytest.raises(shoal.RegionError, match="above the") as caught:
        kv.set_limit(1000 * MIB)
    assert caught.value.kind == "limit"
    assert kv.available() == 100
    ids = kv.alloc(100)
    assert ids is not None
    assert max(ids) == 99


def test_7_a_block_freed_twice_is_nobodys_twice(mem: shoal.MemoryManager) -> None:
    kv = cache(mem)
    ids = kv.alloc(4)
    assert ids is not None
    kv.free(ids[:1])
    for wrong in (ids[:1], [ids[1], ids[2], ids[1]], [ids[1], 5000]):
        with pytest.raises(shoal.RegionError):
            kv.free(wrong)
    assert [kv.groups[0].owners(block) for block in ids] == [None, 1, 1, 1]
    one, two = kv.alloc(1), kv.alloc(1)
    assert one != two


def test_10_a_miss_is_a_value_of_its_own_type(mem: shoal.MemoryManager) -> None:
    import numpy as np

    kv = cache(mem, 4)
    assert kv.alloc(5) is None
    assert kv.alloc_into(np.zeros(5, np.int32)) == 0
