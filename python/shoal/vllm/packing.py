"""All layers of a KV block side by side, where vLLM 0.26 would give each layer a tensor of its own.

Then a block lies in one place: one handle of the driver serves many blocks, where there was one a layer for a few, so
the cache grows, shrinks and goes to sleep with a fraction of the driver's calls. vLLM has that layout for other models,
and both of its model runners cut their views by what the plan says; only the decision is replaced, for models whose
layers are all alike and whose attention was seen to give the same tokens with it.
"""

from __future__ import annotations

import functools
import logging
import os
from typing import TYPE_CHECKING, Any

from shoal.vllm.cache import HANDLE_BYTES

if TYPE_CHECKING:
    from collections.abc import Callable

__all__ = ["BACKENDS", "LAYOUT_VARIABLE", "pack", "why_not"]

logger = logging.getLogger("vllm.shoal")

BACKENDS = ("FLASH_ATTN",)
"""The attention that was seen to give the same tokens: FlashAttention 3, on a GPU of Hopper's kind."""

LAYOUT_VARIABLE = "SHOAL_VLLM_KV_LAYOUT"
"""In the environment: ``block`` (what is done without it), or ``layer`` for vLLM's own."""


def why_not(
    vllm_config: Any, kv_cache_groups: list[Any], backends: list[Any], kernel_block: Callable[[int, list[Any]], int]
) -> str | None:
    """Say why a model's layers keep a tensor each.

    Parameters
    ----------
    vllm_config
        vLLM's ``VllmConfig``.
    kv_cache_groups
        vLLM's list of ``KVCacheGroupSpec``.
    backends
        The classes of its layers' attention backends.
    kernel_block
        Gives the tokens of a block as these cut it, by vLLM's block size and them: ``select_common_block_size``.

    Returns
    -------
    str or None
        The reason; None where they can lie side by side.

    Raises
    ------
    ValueError
        :data:`LAYOUT_VARIABLE` is set to something else.
    """
    layout = os.environ.get(LAYOUT_VARIABLE) or "block"
    if layout not in ("block", "layer"):
        raise ValueError(f"{LAYOUT_VARIABLE} is 'block' or 'layer', not {layout!r}")
    if layout == "layer":
        return f"{LAYOUT_VARIABLE} says so"
    if vllm_config.kv_transfer_config is not None:
        return "its KV connector takes layers one by one"
    if vllm_config.speculative_config is not None:
        return "a draft model's layers are not like the others"
    if len(kv_cache_groups) != 1:
        return f"its layers are of {len(kv_cache_groups)} kinds"
    spec = kv_cache_groups[0].kv_cache_spec
    if type(spec).__name__ != "FullAttentionSpec":
        return f"its layers are {type(spec).__name__}"
    if spec.kv_quant_mode != 0 or spec.page_size_padded is not None or spec.storage_block_size != spec.block_size:
        return "its KV is quantised, padded or compressed"
    if spec.page_size_bytes * len(kv_cache_groups[0].layer_names) > HANDLE_BYTES:
        return f"a block of all layers would have more than {HANDLE_BYTES >> 20} MiB"
    if len({spec.head_size, spec.head_size_v}) != 1:
        return "keys and values have different lengths"
    if not spec.indexes_kv_by_block_stride:
        return "its attention does not go by the distance between blocks"
    names = {backend.get_name() for backend in backends}
    if not names or names - set(BACKENDS):
        return f"it was not tried with attention of {', '.join(sorted(names - set(BACKENDS))) or 'no name'}"
    if kernel_block(spec.block_size, backends) != spec.block_size:
        return f"its attention cuts blocks of {spec.block_size} tokens into smaller ones"
    return None


def pack(
    utils: Any, backends_of: Callable[[Any, list[str]], list[Any]], kernel_block: Callable[[int, list[Any]], int]
) -> None:
    """Let vLLM plan its KV cache with all layers of a block side by side where that can be.

    Parameters
    ----------
    utils
        vLLM's module ``v1.core.kv_cache_utils``.
    backends_of
        Gives the classes of attention backends, by vLLM's configuration and names of layers.
    kernel_block
        As in :func:`why_not`.
    """
    original = utils._use_packed_kv_cache_config
    if getattr(original, "_is_shoals", False):
        return

    @functools.wraps(original)
    def use_packed(vllm_config: Any, kv_cache_groups: list[Any]) -> bool:
        if original(vllm_config, kv_cache_groups):
            return True
        names = [name for group in kv_cache_groups for name in group.layer_names]
        reason = why_not(vllm_config, kv_cache_groups, backends_of(vllm_config, names), kernel_block)
        if reason is not None:
            logger.info("Each layer's KV has a tensor of its own: %s.", reason)
        return reason is None

    use_packed._is_shoals = True  # type: ignore[attr-defined]
    utils._use_packed_kv_cache_config = use_packed
