"""Attention over a packed batch of continuous batching: ``paged|shoal``, what transformers' layers call.

Apart, because it is computed in two ways. Where torch has FlashAttention for packed sequences (a GPU from Ampere on,
float16 or bfloat16, heads of up to 256), one kernel a layer does the whole batch: the launches of a loop over its
sequences took longer than their arithmetic. Anywhere else it works sequence by sequence, by the function that a plain
``generate()`` calls, so that the numbers are the same. Neither builds a mask for the whole batch, and in both a
sequence's numbers do not depend on its neighbours.
"""

from __future__ import annotations

import inspect
from functools import cache as cached
from itertools import pairwise
from typing import TYPE_CHECKING, Any, cast

import torch
from transformers.integrations.sdpa_attention import repeat_kv

if TYPE_CHECKING:
    from collections.abc import Callable, Sequence


def _kernel() -> Callable[..., Any] | None:
    """Give torch's attention of packed sequences; none where torch is older than 2.10."""
    try:
        from torch.nn.attention.varlen import varlen_attn
    except ImportError:
        return None
    return varlen_attn


KERNEL = _kernel()
REVISION = "1"
"""Goes up whenever the numbers change: KV that was computed by another is not taken for ours."""
_CAPABILITY_MIN = (8, 0)
_HEAD_DIM_MAX = 256
_ALIGNED = 8  # elements a head's dimension has to be a multiple of


def paged_attention(  # noqa: PLR0917 - the signature is transformers'
    module: torch.nn.Module,
    query: torch.Tensor,
    key: torch.Tensor,
    value: torch.Tensor,
    attention_mask: torch.Tensor | None,
    dropout: float = 0.0,
    scaling: float | None = None,
    **kwargs: Any,
) -> tuple[torch.Tensor, None]:
    """Write the new tokens' states to the cache, and attend over what each sequence has there.

    Parameters
    ----------
    query
        Shape [1, heads, tokens of the batch, head dimension].
    key, value
        The new tokens' states, shape [1, kv heads, tokens of the batch, head dimension].
    kwargs
        What continuous batching passes: ``cache``, ``cu_seq_lens_q`` and ``_k``, ``read_index``, ``write_index``.

    Returns
    -------
    tuple of torch.Tensor and None
        Shape [1, tokens of the batch, heads, head dimension].
    """
    del attention_mask, dropout
    cache = kwargs["cache"]
    key, value = cache.update(
        key_states=key,
        value_states=value,
        layer_idx=module.layer_idx,
        read_index=kwargs["read_index"],
        write_index=kwargs["write_index"],
    )
    window = cache.sliding_windows[module.layer_idx]  # 1 stands for full attention
    of_q, of_k, kind = kwargs["cu_seq_lens_q"], kwargs["cu_seq_lens_k"], "full_attention"
    if isinstance(of_k, dict):
        kind = "sliding_attention" if window > 1 else kind
        of_k = of_k[kind]
    ends_q, ends_k = cache.lengths("queries", of_q), cache.lengths(kind, of_k)
    if _is_fast(query.device, query.dtype, query.shape[-1]) and key.dtype == query.dtype:
        return packed(query, key, value, (of_q, of_k), (ends_q, ends_k), window, scaling), None
    return one_by_one(query, key, value, (ends_q, ends_k), window, scaling), None


def _has_windows(kernel: Callable[..., Any] | None) -> bool:
    """Whether there is a kernel, and as it is from torch 2.11 on: a window tells causal and sliding attention."""
    return kernel is not None and "window_size" in inspect.signature(kernel).parameters


@cached
def _is_fast(device: torch.device, dtype: torch.dtype, head_dim: int) -> bool:
    """Whether FlashAttention takes such heads there."""
    return (
        _has_windows(KERNEL)
        and device.type == "cuda"
        and torch.version.hip is None
        and torch.backends.cuda.is_flash_attention_available()
        and torch.cuda.get_device_capability(device) >= _CAPABILITY_MIN
        and dtype in {torch.float16, torch.bfloat16}
        and head_dim <= _HEAD_DIM_MAX
        and head_dim % _ALIGNED == 0
    )


def packed(  # noqa: PLR0917 - tensors, and what tells of them
    query: torch.Tensor,
    key: torch.Tensor,
    value: torch.Tensor,
    cumulated: tuple[torch.Tensor, torch.Tensor],
    ends: tuple[Sequence[int], Sequence[int]],
    window: int,
    scaling: float | None,
) -> torch.Tensor:
    """Attend in one kernel.

    Parameters
    ----------
    query
        Shape [1, heads, tokens, head dimension].
    key, value
        All that the sequences have, shape [tokens in the cache, kv heads, head dimension].
    cumulated, ends
        Where the sequences' queries and keys end, from 0 on, as tensors of int32 there and as numbers here.
    window
        How many keys a query sees, its own included; 1 for all before it.
    scaling
        Of the scores.

    Returns
    -------
    torch.Tensor
        Shape [1, tokens, heads, head dimension].
    """
    of_q, of_k = (one if one.dtype == torch.int32 else one.int() for one in cumulated)
    longest_q, longest_k = (max(_lengths(found), default=0) for found in ends)
    # With single queries only, the kernel would split keys by how many sequences there are: the numbers of one would
    # depend on its neighbours.
    attended = cast("Callable[..., Any]", KERNEL)(
        query[0].transpose(0, 1),
        key,
        value,
        of_q,
        of_k,
        max(longest_q, 2),
        max(longest_k, 1),
        scale=scaling,
        window_size=(window - 1, 0) if 1 < window < longest_k else (-1, 0),
    )
    return cast("torch.Tensor", attended).unsqueeze(0)  # nothing else was asked for


def one_by_one(  # noqa: PLR0917 - the same
    query: torch.Tensor,
    key: torch.Tensor,
    value: torch.Tensor,
    ends: tuple[Sequence[int], Sequence[int]],
    window: int,
    scaling: float | None,
) -> torch.Tensor:
    """Attend sequence by sequence; parameters and result as for :func:`packed`."""
    ends_q, ends_k = ends
    groups = query.shape[1] // key.shape[1]
    output = query.new_empty((1, query.shape[2], query.shape[1], value.shape[-1]))
    for i in range(len(ends_q) - 1):
        queries = query[:, :, ends_q[i] : ends_q[i + 1]]
        keys = repeat_kv(key[ends_k[i] : ends_k[i + 1]].transpose(0, 1).unsqueeze(0), groups)
        values = repeat_kv(value[ends_k[i] : ends_k[i + 1]].transpose(0, 1).unsqueeze(0), groups)
        count_q, count_k = queries.shape[2], keys.shape[2]
        mask = _mask(count_q, count_k, window, queries.device)
        attended = torch.nn.functional.scaled_dot_product_attention(
            queries, keys, values, attn_mask=mask, scale=scaling, is_causal=mask is None and count_q > 1
        )
        output[:, ends_q[i] : ends_q[i + 1]] = attended.transpose(1, 2)
    return output


def _lengths(ends: Sequence[int]) -> list[int]:
    return [end - begin for begin, end in pairwise(ends)]


def _mask(count_q: int, count_k: int, window: int, device: torch.device) -> torch.Tensor | None:
    """Tell which keys each query sees; None where plain causal attention (or a single query) says the same."""
    windowed = 1 < window < count_k
    if not windowed and (count_q in (1, count_k)):
        return None
    position_q = torch.arange(count_k - count_q, count_k, device=device)[:, None]
    position_k = torch.arange(count_k, device=device)[None, :]
    mask = position_k <= position_q
    if windowed:
        mask &= position_k > position_q - window
    return mask
