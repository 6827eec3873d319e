"""KV caches on a GPU: blocks that kernels write, with memory that comes and goes. Run by `tests/gpu/run.sh python`."""

from __future__ import annotations

import random
import time
from typing import TYPE_CHECKING

import numpy as np
import pytest

import shoal
from shoal import KvCache, KvGroupSpec

if TYPE_CHECKING:
    from collections.abc import Callable, Iterator

    from shoal import MemoryManager

torch = pytest.importorskip("torch")

MIB = 1 << 20
GIB = 1 << 30


@pytest.fixture(autouse=True)
def no_fault() -> Iterator[None]:
    """A fault of a kernel ends the context: the test that caused it must be the one that fails."""
    yield
    torch.cuda.synchronize()


def small(mem: MemoryManager, **words: object) -> KvCache:
    """Blocks of 256 KiB: 2 layers, 16 tokens."""
    given: dict = {"layers": 2, "kv_heads": 4, "head_dim": 512, "dtype": "float16", "max_bytes": "1GiB", **words}
    return mem.kv_cache(**given)


def until(what: str, is_so: Callable[[], bool]) -> None:
    deadline = time.monotonic() + 30
    while not is_so():
        assert time.monotonic() < deadline, what
        time.sleep(0.005)


def noise(kv: KvCache, blocks: list[int], seed: int) -> list[torch.Tensor]:
    """Write bits of no pattern to blocks, in a kernel a layer; returns what was written. In a guard."""
    written = []
    for layer, tensor in enumerate(kv.tensors()):
        generator = torch.Generator(device=tensor.device).manual_seed(1000 * seed + layer)
        shape = (len(blocks), *tensor.shape[1:])
        bits = torch.randint(-(2**15), 2**15, shape, dtype=torch.int16, device=tensor.device, generator=generator)
        tensor.view(torch.int16).index_copy_(0, torch.tensor(blocks, dtype=torch.int64, device=tensor.device), bits)
        written.append(bits.cpu())
    return written


def bits(kv: KvCache, blocks: list[int]) -> list[torch.Tensor]:
    """Read blocks, in a kernel a layer. In a guard."""
    tensors = kv.tensors()
    at = torch.tensor(blocks, dtype=torch.int64, device=tensors[0].device)
    return [tensor.view(torch.int16).index_select(0, at).cpu() for tensor in tensors]


def same(one: list[torch.Tensor], two: list[torch.Tensor]) -> bool:
    return all(torch.equal(a, b) for a, b in zip(one, two, strict=True))


@pytest.mark.parametrize("layout", ["block", "layer"])
def test_kernels_write_all_kinds_of_blocks(mem: MemoryManager, layout: str) -> None:
    groups = [
        KvGroupSpec("full", 3, 32, "full", 2, 16, dtype=torch.float32),
        KvGroupSpec("window", 2, 32, "window", 4, 16, window=64, dtype="float32"),
        KvGroupSpec("latent", 2, 576, "latent", None, 16, dtype="bfloat16"),
        KvGroupSpec("state", 2, 700_000, "state", dtype="float32"),
    ]
    kv = mem.kv_cache(groups=groups, max_bytes="96MiB", layout=layout)
    assert mem.device_memory()["used_by_this_process"] == 0
    taken = [group.alloc(3) for group in kv.groups]
    assert None not in taken
    with mem.guard():
        for group, ids in zip(kv.groups, taken, strict=True):
            for layer, tensor in enumerate(group.tensors()):
                for block in ids:
                    assert (tensor[block] == 0).all(), "new memory is zero"
                    tensor[block] = 10 * layer + block
        for group, ids in zip(kv.groups, taken, strict=True):
            for layer, tensor in enumerate(group.tensors()):
                for block in ids:
                    assert (tensor[block] == 10 * layer + block).all(), (group, layer, block)
    kv.record_step(torch.cuda.current_stream())
    for group, ids in zip(kv.groups, taken, strict=True):
        group.free(ids)
    kv.trim()
    until("all memory goes", lambda: mem.device_memory()["used_by_this_process"] == 0)
    kv.check()


def test_what_blocks_hold_stays_while_others_come_and_go(mem: MemoryManager) -> None:
    kv = small(mem, granule_max="32MiB")
    draw, held, steps = random.Random(5), {}, 120
    for step in range(steps):
        count = draw.choice((1, 3, 17, 64, 250))
        ids = np.zeros(count, np.int64)
        if kv.alloc_into(ids):
            with mem.guard():
                held[step] = ids, noise(kv, ids.tolist(), step)
                kv.record_step(torch.cuda.current_stream())
        for name in draw.sample(sorted(held), min(len(held), draw.randrange(3))):
            ids, written = held.pop(name)
            with mem.guard():
                assert same(bits(kv, ids.tolist()), written), name
                kv.record_step(torch.cuda.current_stream())
            kv.free_from(ids)
        if step % 20 == 19:
            kv.trim()
    with mem.guard():
        for name, (ids, written) in held.items():
            assert same(bits(kv, ids.tolist()), written), name
    kv.check()
    for ids, _ in held.values():
        kv.free_from(ids)
    kv.trim()
    until("all memory goes", lambda: mem.device_memory()["used_by_this_process"] == 0)


def test_memory_of_freed_blocks_goes_only_after_the_step_that_writes_them(mem: MemoryManager) -> None:
    kv = small(mem)
    ids = kv.alloc(512)
    assert ids is not None
    tensors, at = kv.tensors(), torch.tensor(ids, device=kv.tensors()[0].device)
    stream = torch.cuda.Stream()
    with mem.guard(), torch.cuda.stream(stream):
        torch.cuda._sleep(400_000_000)  # clocks: a fifth of a second at 2 GHz
        for tensor in tensors:
            tensor.index_fill_(0, at, 3)
        kv.record_step(stream)
    kv.free(ids)  # while it runs; a kernel that finds its memory gone faults, and the fixture sees it
    kv.trim()
    torch.cuda.synchronize()
    until("all memory goes", lambda: kv.usage()["mapped"] == 0)
    kv.check()


def test_blocks_come_while_a_kernel_runs(mem: MemoryManager) -> None:
    """New memory, what is mapped, and what is only cached: nothing waits for the GPU, and the GPU for nothing."""
    kv = small(mem, max_bytes="512MiB", granule_max="64MiB", spare_max=0, patience_s=30)
    fits = 512 * MIB // kv.groups[0].block_bytes
    stream, begin, end = torch.cuda.Stream(), *(torch.cuda.Event(enable_timing=True) for _ in range(2))
    length = torch.cuda.Event(enable_timing=True)
    with torch.cuda.stream(stream):
        torch.cuda._sleep(1000)  # so that nothing is loaded for the first time below
        length.record(stream)
        torch.cuda._sleep(2_000_000_000)  # clocks: a second at 2 GHz
        begin.record(stream)
        torch.cuda._sleep(2_000_000_000)
        end.record(stream)
    kv.record_step(stream)
    small_, large = kv.alloc(4), kv.alloc(fits - 4)
    assert small_ is not None
    assert large is not None
    kv.free(small_)
    again = kv.alloc(4)
    kv.seal(range(16 * len(large)), large)
    kv.free(large)
    evicted = kv.alloc(fits - 4)
    was_running = not begin.query()
    torch.cuda.synchronize()
    assert was_running, "an allocation waited for the kernel"
    assert again is not None
    assert evicted is not None
    alone, beside = begin.elapsed_time(end), length.elapsed_time(begin)
    assert beside < 1.1 * alone, f"beside allocations {beside:.0f} ms, alone {alone:.0f} ms"
    kv.check()


def test_a_limit_takes_what_is_cached_and_then_what_becomes_free(mem: MemoryManager) -> None:
    kv = small(mem, granule_max="2MiB")
    tokens = list(range(16 * 512))
    cached, owned = kv.alloc(512), kv.alloc(512)
    assert cached is not None
    assert owned is not None
    with mem.guard():
        noise(kv, cached, 1)
        written = noise(kv, owned, 2)
        kv.record_step(torch.cuda.current_stream())
    kv.seal(tokens, cached)
    kv.free(cached)
    assert kv.usage()["cached"] == 128 * MIB
    kv.set_limit("144MiB")
    until("what is cached above the limit goes", lambda: kv.usage()["mapped"] <= 144 * MIB)
    assert kv.usage()["live"] == 128 * MIB
    assert kv.alloc(65) is None, "64 blocks of 256 KiB are left below the limit"
    kv.free(owned[256:])
    kv.set_limit("64MiB")
    until("what becomes free above the limit goes", lambda: kv.usage()["mapped"] <= 64 * MIB)
    assert kv.alloc(1) is None
    kv.set_limit("1GiB")
    more = kv.alloc(3000)
    assert more is not None
    with mem.guard():
        noise(kv, more, 3)
        assert same(bits(kv, owned[:256]), [tensor[:256] for tensor in written])
    kv.check()


def test_a_reclaim_takes_what_is_mapped_ahead_then_what_is_cached_before_it_moves_what_is_owned(
    mem: MemoryManager,
) -> None:
    # Nothing is mapped ahead by itself, so that what lies empty is what is announced.
    kv = small(mem, granule_max="2MiB", spare_max=0)
    tokens = list(range(16 * 256))
    cached, owned = kv.alloc(256), kv.alloc(256)
    assert cached is not None
    assert owned is not None
    with mem.guard():
        noise(kv, cached, 1)
        written = noise(kv, owned, 2)
        kv.record_step(torch.cuda.current_stream())
    kv.seal(tokens, cached)
    kv.free(cached)
    kv.hint(128)
    until("what is announced is mapped", lambda: kv.usage()["empty"] == 32 * MIB)
    report = mem.reclaim("32MiB")
    assert (report.freed, report.copied) == (32 * MIB, 0)
    found, ids = kv.match(tokens)
    assert found == len(tokens), "memory in which nothing lies goes first"
    kv.free(ids)
    # What was just reclaimed is not mapped again for two seconds, and by then the step did not come.
    report = mem.reclaim("32MiB")
    assert report.freed >= 32 * MIB
    assert report.copied == 0, "cached blocks are dropped, not copied"
    found, ids = kv.match(tokens)
    assert 0 < found < len(tokens)
    kv.free(ids)
    at = kv.tensors()[0].data_ptr()
    report = mem.reclaim("1GiB")
    assert report.copied == 64 * MIB, "of owned blocks all, and no others"
    assert kv.match(tokens)[0] == 0
    assert mem.device_memory()["used_by_this_process"] == 0
    with mem.guard():
        assert kv.tensors()[0].data_ptr() == at
        assert same(bits(kv, owned), written)
    kv.check()


def test_what_a_prefix_holds_is_found_bit_for_bit(mem: MemoryManager) -> None:
    """Prompts with shared beginnings, more than the cache holds: whatever is found is what was written."""
    kv = small(mem, max_bytes="64MiB", granule_max="2MiB")
    draw, known, found_tokens = random.Random(3), {}, 0
    stems = [[draw.randrange(5000) for _ in range(draw.randrange(40, 400))] for _ in range(12)]
    for step in range(150):
        stem = draw.choice(stems)
        prompt = [*stem[: draw.randrange(1, len(stem))], *(draw.randrange(5000) for _ in range(draw.randrange(1, 80)))]
        salt = draw.choice("ab")
        n, ids = kv.match(prompt[:-1], salt=salt)
        found_tokens += n
        with mem.guard():
            layers = bits(kv, ids)
            for place in range(len(ids)):
                expected = known[salt, tuple(prompt[: 16 * (place + 1)])]
                assert same([layer[place : place + 1] for layer in layers], expected), (step, place)
        new = np.zeros(-(-len(prompt) // 16) - len(ids), np.int32)
        assert kv.alloc_into(new) == len(new)
        with mem.guard():
            written = noise(kv, new.tolist(), step)
            kv.record_step(torch.cuda.current_stream())
        blocks = [*ids, *new.tolist()]
        kv.seal(prompt, blocks, salt=salt)
        for place in range(len(ids), len(prompt) // 16):
            part = place - len(ids)
            known[salt, tuple(prompt[: 16 * (place + 1)])] = [layer[part : part + 1] for layer in written]
        kv.free(blocks)
        if step % 30 == 29:
            mem.reclaim("8MiB")
    stats = kv.prefix_stats()
    assert found_tokens > 1000
    assert stats["removed"] > 0, "it held everything, so nothing was evicted"
    kv.check()


def test_compaction_moves_what_blocks_hold(mem: MemoryManager) -> None:
    kv = small(mem, granule_max="2MiB")
    ids = kv.alloc(640)
    assert ids is not None
    kept = ids[::5]
    with mem.guard():
        written = noise(kv, kept, 9)
        kv.record_step(torch.cuda.current_stream())
    kept_set = set(kept)
    kv.free([block for block in ids if block not in kept_set])
    before = kv.usage()["mapped"]
    moves = dict(kv.compact(apply=True))
    assert moves
    # What is kept for the demand of the last two seconds goes when that is over.
    until("what the blocks moved out of goes", lambda: kv.usage()["mapped"] < before / 3)
    with mem.guard():
        assert same(bits(kv, [moves.get(block, block) for block in kept]), written)
    kv.check()


def test_debug_mode_finds_a_kernel_that_writes_to_what_is_nobodys(mem: MemoryManager) -> None:
    kv = small(mem, debug=True)
    keys = kv.tensors()[1]
    ids = kv.alloc(6)
    assert ids is not None
    with mem.guard():
        keys[ids] = 1
        kv.record_step(torch.cuda.current_stream())
    kv.free(ids[1:])
    with mem.guard():
        assert torch.isnan(keys[ids[1:]]).all()
        assert (keys[ids[0]] == 1).all()
    assert kv.strays() == []
    with mem.guard():
        keys[ids[3]][1, 5] = 2
        torch.cuda.synchronize()
    ((group, block, offset),) = kv.strays()
    at = keys[ids[3]][1, 5].data_ptr() - keys.data_ptr() + kv.groups[0].block_bytes // 2
    assert (group, block, offset) == (0, ids[3], at)
    with pytest.raises(shoal.RegionError, match="debug"):
        small(mem).strays()
