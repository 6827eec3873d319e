"""Prefixes of models with sliding windows: found where every layer can go on, exact, and kept no longer than needed."""

from __future__ import annotations

import asyncio
import random

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from shoal.testing import simulated_memory
from shoal.worker import kv as worker_kv
from shoal.worker.device import DeviceMemory
from shoal.worker.engine_causal import CausalEngine
from shoal.worker.kv import PADDING_BLOCKS, KvLayout
from shoal.worker.limits import CausalLimits
from shoal.worker.spec import WorkerSpec
from shoal.worker.windows import NO_BLOCK, HybridPrefixes, WindowedAllocator

from .plain import PlainMemory
from .test_engine_causal import GREEDY, alone, engine_of, settled, small, tokens_of
from .test_prefixes import TOKENS, computing

MIB = 1 << 20
BLOCK = 16
STEM = [7 * i % 251 + 1 for i in range(110)]
# Gemma's pattern (five windowed layers to a full one) in small, others, and windows alone; blocks are of 16 tokens.
MODELS = {
    "Gemma3, 5 to 1": lambda: small(
        "Gemma3", num_hidden_layers=6, sliding_window=24, layer_types=["sliding_attention"] * 5 + ["full_attention"]
    ),
    "Gemma3, in turn": lambda: small(
        "Gemma3", sliding_window=33, layer_types=["sliding_attention", "full_attention"] * 2
    ),
    "Qwen2, the last ones": lambda: small(
        "Qwen2", sliding_window=16, use_sliding_window=True,
        layer_types=["full_attention", "full_attention", "sliding_attention", "sliding_attention"],
    ),
    "Mistral, windows alone": lambda: small("Mistral", sliding_window=24),
    "Mistral, of two tokens": lambda: small("Mistral", sliding_window=2),
}  # fmt: skip


async def ask(engine, prompt, count=TOKENS):
    """The answer, and how much of the prompt was found."""
    generation = engine.submit(prompt, GREEDY, count)
    return [token async for tokens in generation for token in tokens], generation.cached_tokens


@pytest.mark.parametrize("name", MODELS)
@pytest.mark.parametrize("batch", [1024, 48])
def test_what_was_computed_is_not_computed_again(name, batch, monkeypatch):
    model = MODELS[name]()
    first, second, third = [*STEM, 5, 6], [*STEM, 9], [*STEM[:70], 4, 4]
    wanted = [alone(model, prompt, TOKENS) for prompt in (first, second, third)]
    longer = [*second, *wanted[1], 3, 1]
    wanted.append(alone(model, longer, TOKENS))
    memory = PlainMemory()
    with engine_of(model, memory, batch_tokens_max=batch, kv_max_bytes=4 * MIB) as engine:
        computed = computing(engine, monkeypatch)

        async def run():
            told = []
            for prompt, answer in zip((first, second, third, longer), wanted, strict=True):
                computed.clear()
                tokens, cached = await ask(engine, prompt)
                assert tokens == answer
                assert sum(computed) == len(prompt) - cached + TOKENS - 1
                told.append(cached)
            # All of the stem; its part that a prompt shares which goes on differently, far behind the last window; and
            # the answer that a conversation goes on from.
            assert told == [0, 96, 64, 128]
            await settled(lambda: not memory.space.ids)

        asyncio.run(run())


@pytest.mark.parametrize("name", MODELS)
def test_tenants_do_not_share(name):
    model = MODELS[name]()
    wanted = alone(model, STEM, 4)
    with engine_of(model, PlainMemory(), kv_max_bytes=4 * MIB) as engine:

        async def one(salt):
            generation = engine.submit(STEM, GREEDY, 4, salt=salt)
            assert [token async for tokens in generation for token in tokens] == wanted
            return generation.cached_tokens

        async def run():
            return [await one(salt) for salt in ("a", "b", "a", "", "b")]

        assert asyncio.run(run()) == [0, 0, 96, 0, 96]


def test_what_has_left_the_window_is_freed_while_the_request_runs():
    """With nothing cached, a long answer of a windowed model takes no more than its windows."""
    model, prompt = small("Mistral", sliding_window=24), STEM + STEM
    wanted = alone(model, prompt, 30)
    memory = PlainMemory()
    layout = KvLayout.of(model.config, model.dtype, BLOCK)
    with engine_of(model, memory, prefix_caching=False, batch_tokens_max=512, kv_max_bytes=4 * MIB) as engine:

        async def run():
            assert await tokens_of(engine, prompt, 30) == wanted
            assert memory.space.peak <= layout.window_blocks + PADDING_BLOCKS < len(prompt) // BLOCK

        asyncio.run(run())


@pytest.mark.parametrize("name", ["Gemma3, 5 to 1", "Mistral, windows alone"])
def test_where_memory_is_short_windows_get_what_they_need(name, monkeypatch):
    """A chunk for all of whose blocks there is no memory is computed with those that are read later, and is exact."""
    model, prompt = MODELS[name](), STEM + STEM
    layout = KvLayout.of(model.config, model.dtype, BLOCK)
    cut, other = [*prompt[:100], 3], [2, *prompt]
    wanted, after_cut, after_other = (alone(model, one, TOKENS) for one in (prompt, cut, other))
    blocks = layout.request_blocks(-(-(len(prompt) + TOKENS) // BLOCK) + 2)
    assert blocks < layout.groups * len(prompt) // BLOCK
    memory = PlainMemory(blocks_max=blocks + PADDING_BLOCKS)
    with engine_of(model, memory, batch_tokens_max=512, kv_max_bytes=4 * MIB) as engine:

        async def run():
            assert await ask(engine, prompt) == (wanted, 0)
            assert memory.space.refusals == 1, "the first try was for all"
            # Later there is memory again: first for what is needed, then for all.
            memory.blocks_max = 1 << 30
            assert (await ask(engine, cut))[0] == after_cut
            monkeypatch.setattr(engine._cache, "_frugal_until", 0.0)
            assert await ask(engine, other) == (after_other, 0)
            assert (await ask(engine, [*other[:100], 3]))[1] == 96

        asyncio.run(run())


def test_after_a_failed_step_nothing_is_remembered(monkeypatch):
    model = MODELS["Gemma3, in turn"]()
    wanted = alone(model, STEM, 6)
    memory = PlainMemory()
    with engine_of(model, memory, kv_max_bytes=4 * MIB) as engine:
        step = engine._compute

        def broken():
            step()
            raise RuntimeError("the device fell over")

        async def run():
            with monkeypatch.context() as patch:
                patch.setattr(engine, "_compute", broken)
                with pytest.raises(Exception, match="the device fell over"):
                    await tokens_of(engine, STEM, 6)
            await settled(lambda: engine.kv_bytes() == (0, 0))
            assert engine._cache._hybrid._keys == {}
            assert await ask(engine, STEM, 6) == (wanted, 0)
            assert await ask(engine, STEM, 6) == (wanted, 96)
            await settled(lambda: not engine._cache._hybrid._keys)

        asyncio.run(run())


def test_on_our_memory_prefixes_are_found_until_they_are_evicted():
    model = small(
        "Gemma3",
        hidden_size=128,
        head_dim=64,
        sliding_window=24,
        layer_types=["sliding_attention"] * 3 + ["full_attention"],
    )
    asked = [[*STEM, end] for end in (5, 9)]
    wanted = [alone(model, prompt, TOKENS) for prompt in asked]
    with simulated_memory("64MiB") as mem:
        memory = DeviceMemory(mem)
        spec = WorkerSpec(source="x", threads=1, kv_max_bytes=16 * MIB, batch_tokens_max=256, block_tokens=BLOCK)
        memory.place(model)
        layout = KvLayout.of(model.config, model.dtype, BLOCK)
        engine = CausalEngine(model, memory, spec, CausalLimits.of(layout, 256, spec))
        engine.start()

        async def run():
            assert await ask(engine, asked[0]) == (wanted[0], 0)
            assert await ask(engine, asked[1]) == (wanted[1], 96)
            await settled(lambda: engine.kv_bytes()[1] == 0)
            assert engine.kv_bytes()[0] > 0, "cached"
            mem.reclaim(1 << 40)
            assert engine.kv_bytes()[0] == 0
            assert await ask(engine, asked[1]) == (wanted[1], 0)
            assert await ask(engine, asked[0]) == (wanted[0], 96)

        try:
            asyncio.run(run())
        finally:
            engine.stop()
        memory._kv.cache.check()


# ------------------------------------------------------------------------------------------ the search, by itself


class Pool:
    """Blocks of which any may be gone: found by key, counted by owner."""

    def __init__(self):
        self.blocks: dict[bytes, int] = {}
        self.owners: dict[int, int] = {}

    def match_keys(self, keys, salt):
        assert salt == "a"
        found = []
        for key in keys:
            if key not in self.blocks:
                break
            found.append(self.blocks[key])
            self.owners[found[-1]] = self.owners.get(found[-1], 0) + 1
        return found

    def seal_keys(self, keys, blocks, salt, after):
        for key, block in zip(keys, blocks, strict=True):
            self.blocks[key] = block

    def free(self, blocks):
        for block in blocks:
            assert self.owners[block] > 0, "freed more often than owned"
            self.owners[block] -= 1


class Full:
    def __init__(self):
        self.block_table: dict[str, list[int]] = {}


def searching(pool, windows, block_tokens):
    """A search over a group of full attention for each None, and windowed groups else."""
    groups = [
        Full() if window is None else WindowedAllocator(at, block_tokens, window, 1, 16)
        for at, window in enumerate(windows)
    ]
    return HybridPrefixes(pool, groups, block_tokens), groups


@settings(max_examples=300, deadline=None)
@given(
    windows=st.lists(st.one_of(st.none(), st.integers(1, 20)), min_size=1, max_size=4),
    length=st.integers(0, 10),
    gone=st.sets(st.tuples(st.integers(0, 3), st.integers(0, 9)), max_size=12),
)
def test_the_longest_prefix_is_found_and_nothing_else_is_kept(windows, length, gone):
    """Against the definition: every group has what it needs, and no longer prefix is one."""
    size, pool = 4, Pool()
    tokens = list(range(length * size))
    search, groups = searching(pool, windows, size)
    for at, group in enumerate(groups):
        group.block_table["writer"] = [100 * at + place for place in range(length)]
    search.seal("writer", tokens, "a")
    pool.blocks = {key: block for key, block in pool.blocks.items() if (block // 100, block % 100) not in gone}

    def has(at, place):
        return (at, place) not in gone

    def can_go_on(blocks):
        return all(
            all(has(at, place) for place in range(blocks))
            if window is None
            else all(
                has(at, at_block)
                for at_block in {token // size for token in range(max(0, blocks * size - window + 1), blocks * size)}
            )
            for at, window in enumerate(windows)
        )

    wanted = max(blocks for blocks in range(length + 1) if can_go_on(blocks))
    assert search.find("reader", [*tokens, 7], "a") == wanted * size
    kept: dict[int, int] = {}
    for at, (group, window) in enumerate(zip(groups, windows, strict=True)):
        table = group.block_table.get("reader", [])
        assert len(table) == wanted
        first = 0 if window is None else max(0, wanted * size - window + 1) // size
        assert table == [NO_BLOCK if place < first else 100 * at + place for place in range(wanted)]
        kept |= {block: 1 for block in table if block != NO_BLOCK}
    assert {block: owners for block, owners in pool.owners.items() if owners} == kept


@settings(max_examples=200, deadline=None)
@given(
    window=st.integers(1, 40),
    size=st.integers(4, 16),
    seed=st.integers(0, 1 << 30),
    keeps_all=st.booleans(),
)
def test_every_token_is_read_where_it_was_written(window, size, seed, keeps_all):
    """Chunks as transformers schedules them: each reads the window before it as written, whatever was left out."""
    draw = random.Random(seed)
    allocator = WindowedAllocator(0, size, window, 1, 0)
    allocator.keeps_all = keeps_all
    free, memory, past, allocated = list(range(1, 400)), {}, 0, 0

    class Manager:
        def get_free_blocks(self, count, last, shareable, group):
            return [free.pop(0) for _ in range(count)]

        def free_blocks(self, blocks, shareable):
            free.extend(blocks)

    manager, most = Manager(), 0
    for _ in range(12):
        chunk = draw.choice((1, 1, draw.randrange(1, 60)))
        missing = chunk - (allocated * size - past)
        if missing > 0 or not allocated:  # as transformers' scheduler counts
            allocated += allocator.allocate_blocks((missing + 1) // size + 1, "r", manager)
        most = max(most, len(allocator.held("r")))
        read = allocator.get_read_indices("r", past, chunk)
        before = min(past, window - 1)
        assert [memory[place] for place in read[:before]] == list(range(past - before, past))
        assert read[before:] == [1] * chunk
        for token, place in enumerate(allocator.get_write_indices("r", past, chunk), past):
            assert not keeps_all or place != 0
            memory[place] = token
        past += chunk
        allocator.release("r", past, manager)
        assert len(allocator.held("r")) <= -(-window // size) + 3
    if not keeps_all:
        config = small("Mistral", sliding_window=window).config if draw.random() < 0.02 else None
        bound = 2 * -(-window // size) + 4
        assert config is None or KvLayout.of(config, torch.float32, size).window_blocks == bound
        assert most <= bound
    allocator.free_blocks("r", manager)
    assert sorted(free) == list(range(1, 400))


def test_memory_is_asked_for_in_full_again_after_a_while(monkeypatch):
    """The first refusal makes it frugal for some time, and not for ever."""
    monkeypatch.setattr(worker_kv, "_FRUGAL_S", 0.0)
    model, prompt = MODELS["Mistral, windows alone"](), STEM + STEM
    wanted = alone(model, prompt, TOKENS)
    memory = PlainMemory(blocks_max=10 + PADDING_BLOCKS)
    with engine_of(model, memory, batch_tokens_max=512, kv_max_bytes=4 * MIB) as engine:

        async def run():
            assert await ask(engine, prompt) == (wanted, 0)
            memory.blocks_max = 1 << 30
            other = [2, *prompt]
            assert (await ask(engine, other))[1] == 0
            assert (await ask(engine, [*other[:100], 3]))[1] == 96

        asyncio.run(run())
