"""The three places where transformers' continuous batching is made elastic, and a check that they are still there.

1. **Blocks**: a `BlockManager` whose blocks are those of our KV cache, and prefixes found and sealed in that
   (:mod:`shoal.worker.kv`).
2. **KV tensors**: a `PagedAttentionCache` whose tensors are views of our address space, and a memory handler that lets
   the address space be larger than the memory (:mod:`shoal.worker.kv`).
3. **Attention**: ``paged|shoal`` (:mod:`shoal.worker.attention`): no batch-wide mask is built, and a sequence's numbers
   do not depend on its neighbours.

Apart, so that what we rely on in another project's internals is in one list. :func:`verify` reads it back and says in
one sentence which hook moved; the worker calls it before it loads anything.
"""

from __future__ import annotations

import inspect
from contextlib import contextmanager
from threading import Lock
from typing import TYPE_CHECKING, Any

import transformers
from transformers import AttentionInterface
from transformers.generation.continuous_batching import cache as cache_module
from transformers.generation.continuous_batching import (
    cache_manager,
    continuous_api,
    input_outputs,
    model_runner,
    scheduler,
)
from transformers.generation.continuous_batching import cb_logits_processors as logits_module

from .attention import paged_attention
from .errors import described

if TYPE_CHECKING:
    from collections.abc import Callable, Iterator

ATTENTION = "paged|shoal"
TRANSFORMERS = "5.17"


class HookError(RuntimeError):
    """transformers' internals are not as this worker needs them; the message names the hook that moved."""


AttentionInterface.register(ATTENTION, paged_attention)

_patching = Lock()


@contextmanager
def elastic_cache(cache: Callable[..., Any], handler: type) -> Iterator[None]:
    """While inside, transformers builds its paged cache with `cache` and sizes it with `handler` (hook 2)."""
    with _patching:
        before = continuous_api.PagedAttentionCache, cache_module.PagedAttentionMemoryHandler
        continuous_api.PagedAttentionCache, cache_module.PagedAttentionMemoryHandler = cache, handler
        try:
            yield
        finally:
            continuous_api.PagedAttentionCache, cache_module.PagedAttentionMemoryHandler = before


def _parameters(function: Any) -> list[str]:
    return [name for name in inspect.signature(function).parameters if name != "self"]


def _source_has(function: Any, *texts: str) -> bool:
    source = inspect.getsource(function)
    return all(text in source for text in texts)


def _check_blocks() -> bool:
    manager = cache_manager.BlockManager
    probe = manager(2, 4, tp_on=False)
    allocators = (cache_manager.FullAttentionCacheAllocator, cache_manager.SlidingAttentionCacheAllocator)
    return (
        _parameters(manager.__init__) == ["num_blocks", "block_size", "tp_on"]
        and _parameters(manager.get_free_blocks) == ["n_blocks", "last_block_id", "shareable", "group_id"]
        and _parameters(manager.free_blocks) == ["blocks", "shareable"]
        and list(probe._uninit_block_ids) == [0, 1]
        and isinstance(manager.num_free_blocks, property)
        and all(_source_has(kind.allocate_blocks, "block_manager.get_free_blocks(") for kind in allocators)
        and _source_has(cache_manager.CacheAllocator.free_blocks, "self.block_table.pop(", "block_manager.free_blocks(")
        and all(
            _parameters(indices) == ["request_id", "past_length", "query_length"]
            for indices in (allocators[1].get_read_indices, allocators[1].get_write_indices)
        )
    )


def _check_tensors() -> bool:
    cache, api = cache_module.PagedAttentionCache, continuous_api.ContinuousBatchingManager
    return (
        _parameters(cache.__init__)
        == ["config", "continuous_batching_config", "device", "distributed_helper", "tp_plan", "dtype"]
        and _source_has(
            cache.__init__,
            "torch.empty(self.cache_shape, dtype=self.dtype, device=self.device)",
            "((num_blocks + 2) * self.block_size, self.num_key_value_heads, self.head_dim)",
            "self._block_manager = BlockManager(num_blocks, self.block_size",
            "PagedAttentionMemoryHandler(",
        )
        and _source_has(cache.update, "k_cache.index_copy_(0,", "torch.index_select(k_cache, 0,")
        and _source_has(cache.update, "layer_read_index == self.sentinel_index", "masked_scatter_(mask, key_states)")
        and _source_has(cache.get_seqlens_k, "query_length + min(past_length, self.config.sliding_window - 1)")
        and _parameters(cache.blocks_needed) == ["num_requested_blocks", "allocated_blocks"]
        and _parameters(cache.allocate_blocks) == ["n_blocks", "request_id", "allocated_blocks"]
        and _parameters(cache_manager.SlidingAttentionCacheAllocator.__init__)
        == ["index", "block_size", "sliding_window", "sentinel_index", "write_trash_index"]
        and _source_has(input_outputs.ContinuousBatchingIOs.__init__, "_read_trash_index", "_write_trash_index")
        and _source_has(api._create_batch_processor, "PagedAttentionCache(", "SCHEDULER_MAPPING.get(scheduler_type")
        and _parameters(cache_module.PagedAttentionMemoryHandler.get_available_memory) == []
    )


def _check_prefixes() -> bool:
    cache, base = cache_module.PagedAttentionCache, scheduler.FIFOScheduler
    return (
        _parameters(cache.search_prefix_match) == ["request_id", "prompt_ids"]
        and _parameters(cache.mark_shareable_blocks_as_complete) == ["state", "num_complete_blocks"]
        and _source_has(
            base._infer_request_tokens,
            "self.cache.use_prefix_sharing and state.status == RequestStatus.PENDING",
            "self.cache.search_prefix_match(state.request_id, state.remaining_prefill_tokens)",
            "state.allocated_blocks += prefill_length // self.cache.block_size",
        )
        and _source_has(base._process_candidates, "if self.cache.allow_block_sharing:")
        and _source_has(input_outputs.ContinuousBatchingIOs.prepare_batch_tensors, "position_offset += query_length")
    )


def _check_attention() -> bool:
    from transformers.generation.continuous_batching.utils import attn_mask_is_needed

    return _source_has(attn_mask_is_needed, '["paged|eager", "paged|sdpa"]') and ATTENTION in AttentionInterface()


def _check_steps() -> bool:
    processor, base = continuous_api.ContinuousBatchProcessor, scheduler.FIFOScheduler
    return (
        _parameters(processor.prepare_next_batch) == []
        and _parameters(processor.update_batch) == []
        and _source_has(processor.update_batch, "self.cache.mark_shareable_blocks_as_complete(state, future_state.")
        and _parameters(processor._generation_step) == ["model"]
        and _source_has(
            input_outputs.ContinuousBatchingIOs.prepare_batch_tensors,
            "self.num_q_tokens = num_q_tokens",
            "self.num_request_in_batch = len(",
        )
        and _parameters(processor._update_tp_group_state) == []
        and _parameters(processor.handle_batch_error) == ["error"]
        and _parameters(base.schedule_batch) == ["token_budget", "cache_budget"]
        and _source_has(processor.prepare_next_batch, "while requests_in_batch is None:", "offload_requests() == 0")
        and "shoal" not in getattr(processor, "__module__", "")
    )


def _check_sampling() -> bool:
    processors = logits_module.ContinuousBatchingLogitsProcessorList
    return (
        _parameters(processors.__init__)
        == ["logits_processor", "per_request_processors", "drop_unsupported_processors"]
        and _parameters(processors.prepare_tensor_args) == ["requests_in_batch", "arg_storage"]
        and _source_has(model_runner.ModelRunner._sample, "torch.argmax(probs, dim=-1, keepdim=True)")
    )


HOOKS: dict[str, tuple[Callable[[], bool], str]] = {
    "blocks": (_check_blocks, "hook 1 (BlockManager in continuous_batching/cache_manager.py)"),
    "tensors": (_check_tensors, "hook 2 (PagedAttentionCache in continuous_batching/cache.py)"),
    "prefixes": (_check_prefixes, "prefix sharing (search_prefix_match, mark_shareable_blocks_as_complete)"),
    "attention": (_check_attention, "hook 3 (AttentionInterface and attn_mask_is_needed)"),
    "steps": (_check_steps, "the engine step (ContinuousBatchProcessor and FIFOScheduler)"),
    "sampling": (
        _check_sampling,
        "per-request sampling (ContinuousBatchingLogitsProcessorList and ModelRunner._sample)",
    ),
}


def verify() -> None:
    """Check that everything this worker hooks into is as it was in the version it was written for.

    Raises
    ------
    HookError
        One sentence that names the hook that moved and the version that is installed.
    """
    for check, place in HOOKS.values():
        try:
            stands = check()
        except Exception as error:  # noqa: BLE001 - whatever fails, the hook is not as it was
            stands, reason = False, f" ({described(error)})"
        else:
            reason = ""
        if not stands:
            raise HookError(
                f"{place} moved: transformers {transformers.__version__} is installed, "
                f"shoal.worker was written for {TRANSFORMERS}{reason}"
            )
