"""The contract with transformers' internals: what we hook into is there, and what moves is named."""

from __future__ import annotations

import pytest
from transformers.generation.continuous_batching import cache, cache_manager, continuous_api, model_runner, utils

from shoal.worker import hooks
from shoal.worker.hooks import HookError


def test_all_hooks_stand_in_the_pinned_version():
    hooks.verify()


def _renamed(self, blocks, shareable, why):
    del self, blocks, shareable, why


@pytest.mark.parametrize(
    ("owner", "name", "named"),
    [
        (cache_manager.BlockManager, "free_blocks", "hook 1"),
        (cache_manager.SlidingAttentionCacheAllocator, "allocate_blocks", "hook 1"),
        (cache_manager.SlidingAttentionCacheAllocator, "get_read_indices", "hook 1"),
        (cache_manager.BlockManager, "get_free_blocks", "hook 1"),
        (cache.PagedAttentionCache, "allocate_blocks", "hook 2"),
        (cache.PagedAttentionCache, "update", "hook 2"),
        (cache.PagedAttentionCache, "get_seqlens_k", "hook 2"),
        (cache.PagedAttentionCache, "search_prefix_match", "prefix sharing"),
        (cache.PagedAttentionCache, "mark_shareable_blocks_as_complete", "prefix sharing"),
        (continuous_api.ContinuousBatchingManager, "_create_batch_processor", "hook 2"),
        (utils, "attn_mask_is_needed", "hook 3"),
        (continuous_api.ContinuousBatchProcessor, "prepare_next_batch", "the engine step"),
        (model_runner.ModelRunner, "_sample", "per-request sampling"),
    ],
)
def test_a_hook_that_moved_is_named_in_one_sentence(monkeypatch, owner, name, named):
    monkeypatch.setattr(owner, name, _renamed)
    with pytest.raises(HookError, match=named) as caught:
        hooks.verify()
    assert "was written for 5.17" in str(caught.value)
    assert "\n" not in str(caught.value)


def test_a_hook_that_is_gone_is_named(monkeypatch):
    monkeypatch.delattr(continuous_api, "ContinuousBatchProcessor")
    with pytest.raises(HookError, match="the engine step"):
        hooks.verify()
