"""What a cached prefix costs: measured by the steps that compute prompts, and not by what they waited for."""

from __future__ import annotations

import asyncio
from types import SimpleNamespace

import pytest
import torch

from shoal.testing import simulated_memory
from shoal.worker.device import DeviceMemory
from shoal.worker.kv import KvLayout
from shoal.worker.price import PromptCost, rounded

from .test_device_memory import engine_on
from .test_engine_causal import tokens_of

LAYOUT = KvLayout(layers=4, groups=1, kv_heads=2, head_dim=16, dtype=torch.float32, block_tokens=16)


def test_a_token_takes_what_half_of_them_took_at_most():
    cost = PromptCost()
    assert cost.us_per_token is None
    cost.saw(100, 1.0)
    assert cost.us_per_token == pytest.approx(10_000), "the first step loads its kernels, but it is all that is known"
    cost.saw(100, 0.01)
    assert cost.us_per_token == pytest.approx(100)
    cost.saw(2_000, 0.1)
    for _ in range(8):
        cost.saw(32, 0.008)
    assert cost.us_per_token == pytest.approx(50), "most of what short steps take is not their tokens'"


def test_what_is_long_ago_is_forgotten():
    cost = PromptCost()
    cost.saw(100_000, 1.0)
    for _ in range(16):
        cost.saw(100, 0.1)
    assert cost.us_per_token == pytest.approx(1_000)


@pytest.mark.parametrize(("us", "said"), [(0.002, 1), (1.4, 1), (9.96, 10), (123.4, 120), (15_499.0, 15_000)])
def test_two_digits_are_said(us, said):
    assert rounded(us) == said


def test_a_mib_is_computed_again_or_loaded_whichever_is_faster():
    with simulated_memory("64MiB") as mem:
        kv = DeviceMemory(mem).kv(LAYOUT, 1024, is_caching=True)
        assert kv.back_us_per_mib == 0, "nobody knows"
        kv.computed(64, 0.064)
        assert LAYOUT.block_bytes == 16 << 10
        assert kv.back_us_per_mib == 1_000_000, "1000 us a token, of which 1024 are a MiB"
        for load_us, said in ((None, 1_000_000), (2e6, 1_000_000), (70.4, 70)):
            below = SimpleNamespace(computed=lambda *_: None, load_us_per_mib=lambda us=load_us: us)
            kv.below = below
            assert kv.back_us_per_mib == said


def test_layers_that_do_not_share_blocks_count_together():
    layout = KvLayout(2, 2, 2, 16, torch.float32, 16, windowed=1, window_blocks=8)
    with simulated_memory("64MiB") as mem:
        kv = DeviceMemory(mem).kv(layout, 1024, is_caching=True)
        kv.computed(64, 0.064)
        assert kv.back_us_per_mib == 1_000_000, "a token has as many bytes as where all layers share one block"


def test_the_worker_says_it_once_a_prompt_was_computed():
    with simulated_memory("64MiB") as mem, engine_on(mem) as engine:

        async def run():
            assert engine.counts().kv_back_us_per_mib == 0
            await tokens_of(engine, [3, 4, 5], 4)
            assert engine.counts().kv_back_us_per_mib == 0, "steps of a token or three do not tell"
            for first in (1, 2):  # of one the weights may still be coming
                await tokens_of(engine, [first] * 60, 2)
            said = engine.counts().kv_back_us_per_mib
            assert said > 0
            await tokens_of(engine, [7], 16)
            assert engine.counts().kv_back_us_per_mib == said, "nor do answers"

        asyncio.run(run())
