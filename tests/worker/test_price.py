"""What a cached prefix is worth: what steps take that compute prompts, and how much of what is cached a use finds."""

from __future__ import annotations

import asyncio
from types import SimpleNamespace

import pytest
import torch

from shoal.testing import simulated_memory
from shoal.worker.device import DeviceMemory
from shoal.worker.kv import PADDING_BLOCKS, KvLayout
from shoal.worker.price import FoundShare, PromptCost, rounded

from .conftest import llama
from .plain import PlainMemory
from .test_device_memory import engine_on
from .test_engine_causal import GREEDY, MIXED, engine_of, settled, small, tokens_of

LAYOUT = KvLayout(layers=4, groups=1, kv_heads=2, head_dim=16, dtype=torch.float32, block_tokens=16)


def test_a_token_takes_what_half_of_them_took_at_most():
    cost = PromptCost()
    assert cost.us_per_token is None
    assert cost.saw(100, 1.0, 1)
    assert cost.us_per_token == pytest.approx(10_000), "the first step loads its kernels, but it is all that is known"
    cost.saw(100, 0.01, 1)
    assert cost.us_per_token == pytest.approx(100)
    cost.saw(2_000, 0.1, 1)
    for _ in range(8):
        cost.saw(32, 0.008, 4)
    assert cost.us_per_token == pytest.approx(50), "most of what short steps take is not their tokens'"


def test_what_is_long_ago_is_forgotten():
    cost = PromptCost()
    cost.saw(5, 0.001, 1)
    cost.saw(100_000, 1.0, 1)
    for _ in range(16):
        cost.saw(100, 0.1, 1)
        cost.saw(5, 0.02, 1)
    assert cost.us_per_token == pytest.approx(800)


@pytest.mark.parametrize(("tokens", "requests"), [(2, 1), (31, 1), (79, 10)])
def test_a_step_that_begins_a_request_with_next_to_nothing_is_what_any_step_takes(tokens, requests):
    cost = PromptCost()
    assert not cost.saw(tokens, 0.02, requests)
    assert cost.us_per_token is None, "it says nothing of prompts"
    cost.saw(1_000, 0.12, 1)
    assert cost.us_per_token == pytest.approx(100)
    for _ in range(2):
        cost.saw(tokens, 0.01, requests)
    assert cost.us_per_token == pytest.approx(110)
    cost.saw(tokens, 5.0, requests)
    assert cost.us_per_token == pytest.approx(110), "one that waited is not what half of them take"


@pytest.mark.parametrize("requests", [1, 64])
def test_answers_say_nothing(requests):
    cost = PromptCost()
    cost.saw(1_000, 0.12, 1)
    assert not cost.saw(requests, 0.05, requests)
    assert cost.us_per_token == pytest.approx(120)


def test_a_prompt_that_takes_no_longer_than_any_step_costs_next_to_nothing():
    cost = PromptCost()
    cost.saw(4, 0.02, 1)
    cost.saw(100, 0.019, 1)
    assert cost.us_per_token == 0
    assert rounded(0.0) == 1, "0 would say that nobody knows"


@pytest.mark.parametrize(("us", "said"), [(0.002, 1), (1.4, 1), (9.96, 10), (123.4, 120), (15_499.0, 15_000)])
def test_two_digits_are_said(us, said):
    assert rounded(us) == said


def test_before_anybody_has_looked_a_half_is_found():
    finds = FoundShare()
    finds.looked(0, 0, 0.0)
    assert finds.share == 0.5, "there was nothing to find"


@pytest.mark.parametrize(("cached", "found"), [(16, 1), (16, 16), (16, 0), (1, 1)])
def test_the_share_becomes_what_uses_find(cached, found):
    finds = FoundShare()
    before = finds.share
    for second in range(40):
        finds.looked(cached, found, float(second))
        part = found / cached
        assert abs(finds.share - part) < abs(before - part), "nearer with each use"
        before = finds.share
    assert finds.share == pytest.approx(found / cached, abs=0.01)


def test_the_newest_use_counts_for_an_eighth():
    finds = FoundShare()
    for second in range(100):
        finds.looked(10, 0, float(second))
    finds.looked(10, 8, 100.0)
    assert finds.share == pytest.approx(0.1, abs=1e-4)
    finds.looked(10, 0, 101.0)
    assert finds.share == pytest.approx(0.1 * 7 / 8, abs=1e-4)


def test_what_comes_at_once_is_one_use():
    at_once, in_turn = FoundShare(), FoundShare()
    for use in range(40):
        for place in range(16):
            # A conversation that goes on has its blocks: they are not cached for the next one to look.
            at_once.looked(16 - place, 1, use * 60 + place / 20)
            in_turn.looked(16, 1, use * 60 + place * 3.0)
    assert at_once.share == pytest.approx(1.0, abs=0.01), "all of it was needed each time that somebody came"
    assert in_turn.share == pytest.approx(1 / 16, abs=0.01)
    at_once.looked(16, 16, 1e6)
    at_once.looked(1, 16, 1e6)
    assert at_once.share <= 1.0, "what was found twice was there once"


def test_what_a_request_found_of_all_that_was_cached():
    memory = PlainMemory()
    one, other = [1] * 49, [2] * 97  # a token more than whole blocks
    with engine_of(llama(), memory) as engine:

        async def ask(prompt):
            await tokens_of(engine, prompt, 1)
            await settled(lambda: not memory.space.ids)
            return memory.space.lookups[-1]

        async def run():
            assert await ask(one) == (0, 0)
            assert await ask(other) == (3, 0), "nothing of it"
            assert await ask(one) == (9, 3)
            assert await ask([*other, 5]) == (9, 6)
            assert await ask([*other[:32], 7]) == (9, 2), "the beginning, which two have"
            assert len(memory.space.lookups) == 5, "of each request once"

        asyncio.run(run())


def test_of_layers_with_a_window_the_last_one_is_found():
    memory = PlainMemory()
    with engine_of(small("Gemma3", **MIXED), memory) as engine:

        async def run():
            for prompt in ([1] * 97, [1] * 97, [*[1] * 33, *[2] * 20]):
                await tokens_of(engine, prompt, 1)
                await settled(lambda: not memory.space.ids)

        asyncio.run(run())
    assert memory.space.lookups == [(0, 0), (12, 6 + 2), (12, 2 + 2)], "six blocks of each kind; two are a window"


def test_what_somebody_has_would_not_have_gone():
    memory = PlainMemory()
    stem = [1] * 49
    with engine_of(llama(), memory) as engine:

        async def run():
            await tokens_of(engine, stem, 1)
            await settled(lambda: not memory.space.ids)
            with memory.held:  # all in one batch
                tasks = [asyncio.create_task(tokens_of(engine, [*stem, at], 1)) for at in range(4)]
                await settled(lambda: engine.counts().running + engine.counts().waiting == 4)
            await asyncio.gather(*tasks)
            assert sorted(memory.space.lookups) == [(0, 0)] * 4 + [(3, 3)]

        asyncio.run(run())


def test_a_request_that_waits_or_is_computed_again_is_no_new_use():
    memory = PlainMemory(blocks_max=PADDING_BLOCKS + 11)
    prompts = [[at + 1] * 40 for at in range(4)]
    with engine_of(llama(), memory, batch_tokens_max=256) as engine:
        looks, find, waiting = [], engine._cache.search_prefix_match, engine._processor.scheduler.waiting_requests

        def finding(name, prompt):
            looks.append("again" if waiting[name]._true_initial_tokens else name)
            return find(name, prompt)

        engine._cache.search_prefix_match = finding

        async def run():
            await asyncio.gather(*(tokens_of(engine, prompt, 60) for prompt in prompts))

        asyncio.run(run())
        again = looks.count("again")
        assert again > 0, "some had to give their blocks up"
        assert len(looks) - again > len(prompts), "and some waited for theirs"
        assert len(memory.space.lookups) == len(prompts)


def test_what_is_loaded_from_below_was_not_found():
    said = []
    with simulated_memory("64MiB", host_budget="64MiB") as mem, engine_on(mem, kv_max_bytes=2 << 20) as engine:
        memory, kv = engine._memory, engine._memory._kv
        memory.keep_below(16 << 20, [], lambda: {"model": "one"}, 60.0)
        looked = kv.looked
        kv.looked = lambda cached, found: said.append((cached, found)) or looked(cached, found)

        async def run():
            await settled(lambda: memory.tiers()[0]["reason"] is None)
            prompt = [5] * 49
            await tokens_of(engine, prompt, 1)
            assert kv.below._tier.flush(60)
            await settled(lambda: kv.cached_blocks() == 3)
            kv.free(kv.alloc(kv.available()))  # what is cached too: nothing of it is on the device any more
            await tokens_of(engine, [6] * 49, 1)
            await settled(lambda: kv.live_bytes == 0)
            # There is room for the padding and one block more: what is loaded takes the place of what is cached.
            held = kv.alloc(kv.available() - PADDING_BLOCKS - 4)
            assert kv.cached_blocks() == 3
            generation = engine.submit(prompt, GREEDY, 1)
            assert [token async for tokens in generation for token in tokens]
            assert generation.cached_tokens == 48, "it was loaded"
            kv.free(held)

        asyncio.run(run())
    assert said == [(0, 0), (0, 0), (3, 0)]


def test_a_mib_is_computed_again_or_loaded_whichever_is_faster():
    with simulated_memory("64MiB") as mem:
        kv = DeviceMemory(mem).kv(LAYOUT, 1024, is_caching=True)
        assert kv.back_us_per_mib == 0, "nobody knows"
        kv.computed(64, 0.064, 1)
        assert LAYOUT.block_bytes == 16 << 10
        assert kv.back_us_per_mib == 1_000_000, "1000 us a token, of which 1024 are a MiB"
        kv.computed(4, 0.016, 1)
        assert kv.back_us_per_mib == 770_000, "a step that finds all of it takes its time too"
        for load_us, said in ((None, 770_000), (2e6, 770_000), (70.4, 70)):
            below = SimpleNamespace(computed=lambda *_: None, load_us_per_mib=lambda us=load_us: us)
            kv.below = below
            assert kv.back_us_per_mib == said


def test_layers_that_do_not_share_blocks_count_together():
    layout = KvLayout(2, 2, 2, 16, torch.float32, 16, windowed=1, window_blocks=8)
    with simulated_memory("64MiB") as mem:
        kv = DeviceMemory(mem).kv(layout, 1024, is_caching=True)
        kv.computed(64, 0.064, 1)
        assert kv.back_us_per_mib == 1_000_000, "a token has as many bytes as where all layers share one block"


def test_the_worker_says_it_once_a_prompt_was_computed():
    with simulated_memory("64MiB") as mem, engine_on(mem) as engine:

        async def run():
            assert engine.counts().kv_back_us_per_mib == 0
            await tokens_of(engine, [3, 4, 5], 4)
            assert engine.counts().kv_back_us_per_mib == 0, "steps of a token or three say nothing of prompts"
            for first in (1, 2):  # of one the weights may still be coming
                await tokens_of(engine, [first] * 60, 2)
            assert engine.counts().kv_back_us_per_mib > 0
            assert engine.counts().kv_found_milli <= 438, "of what the first two left the others found nothing"

        asyncio.run(run())
