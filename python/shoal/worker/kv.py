"""The KV cache whose blocks have memory only while they are used.

transformers keeps its bookkeeping of blocks; this module makes memory follow it (hooks 1 and 2 of
:mod:`shoal.worker.hooks`). The layout is token-major: K and V of one token in all layers lie together, so one block is
one contiguous piece, and the tensor of each layer is a strided view.

Rules kept here: a block has memory before it is handed out; it loses it only on entering the list of uninitialised
blocks; `num_free_blocks` never promises a block whose memory was just refused; the two padding blocks at the end have
memory while the cache is awake, and the first of them reads as zeros (I12: a new block is zeroed by the device).
"""

from __future__ import annotations

import heapq
from collections import deque
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

import torch
from transformers.generation.continuous_batching import cache as cache_module
from transformers.generation.continuous_batching.cache_manager import BlockManager

if TYPE_CHECKING:
    from collections.abc import Iterable, Iterator, Sequence

    from transformers import PreTrainedConfig

    from .memory import KvSpace

PADDING_BLOCKS = 2


@dataclass(frozen=True)
class KvLayout:
    """Sizes of a token-major KV cache.

    Attributes
    ----------
    layers
        Layers of one group; layers of a group share their blocks.
    groups
        Groups of layers: 1, unless full and windowed attention are mixed. Each has blocks of its own.
    windowed
        Those of them whose attention has a window: there a request holds at most `window_blocks` blocks.
    """

    layers: int
    groups: int
    kv_heads: int
    head_dim: int
    dtype: torch.dtype
    block_tokens: int
    windowed: int = 0
    window_blocks: int = 0

    @classmethod
    def of(cls, config: PreTrainedConfig, dtype: torch.dtype, block_tokens: int) -> KvLayout:
        """Give the layout of a model; `layers` counts those that share a block table (all, if not mixed)."""
        groups, kinds = cache_module.group_layers_by_attn_type(config)
        windowed = kinds.count("sliding_attention")
        return cls(
            layers=len(groups[0]),
            groups=len(groups),
            kv_heads=cache_module.find_num_kv_heads(config),
            head_dim=cache_module.find_head_dim(config),
            dtype=dtype,
            block_tokens=block_tokens,
            windowed=windowed,
            window_blocks=-(-config.sliding_window // block_tokens) if windowed else 0,
        )

    def request_blocks(self, blocks: int) -> int:
        """Count the blocks that a request has in all groups when it has asked for `blocks`."""
        return (self.groups - self.windowed) * blocks + self.windowed * min(blocks, self.window_blocks)

    @property
    def token_elements(self) -> int:
        """Elements between a token and the next."""
        return 2 * self.layers * self.kv_heads * self.head_dim

    @property
    def block_bytes(self) -> int:
        """Bytes of one block: K and V of all layers."""
        return self.block_tokens * self.token_elements * self.dtype.itemsize

    def views(self, space: KvSpace, blocks: int) -> tuple[list[torch.Tensor], list[torch.Tensor]]:
        """One K and one V tensor for each layer, over `blocks` blocks; none is touched."""
        shape = (blocks * self.block_tokens, self.kv_heads, self.head_dim)
        stride = (self.token_elements, self.head_dim, 1)
        step = self.kv_heads * self.head_dim
        tensors = [space.tensor(i * step, shape, stride, self.dtype) for i in range(2 * self.layers)]
        return tensors[0::2], tensors[1::2]


class FreeBlocks:
    """transformers' list of uninitialised blocks, with memory taken on entering and given ahead of leaving.

    The lowest free block leaves first, so that blocks in use stay close together and whole pages fall free.
    """

    def __init__(self, blocks: int, space: KvSpace) -> None:
        self._space = space
        self._bare = list(range(blocks))  # a heap: without memory
        self._backed: deque[int] = deque()  # with memory, about to leave
        self.keep = False  # while true, what enters keeps its memory for the next to leave

    def __len__(self) -> int:
        return len(self._bare) + len(self._backed)

    def __iter__(self) -> Iterator[int]:
        yield from self._backed
        yield from sorted(self._bare)

    @property
    def backed(self) -> int:
        """How many could leave at once."""
        return len(self._backed)

    def back(self, count: int) -> bool:
        """See to it that `count` blocks can leave; False, and nothing changed, where memory cannot be had."""
        missing = count - len(self._backed)
        if missing <= 0:
            return True
        if missing > len(self._bare):
            return False
        blocks = [heapq.heappop(self._bare) for _ in range(missing)]
        try:
            granted = self._space.back(blocks)
        except BaseException:
            self._push(blocks)
            raise
        if not granted:
            self._push(blocks)
            return False
        self._backed.extend(blocks)
        return True

    def settle(self) -> None:
        """Take the memory of all blocks in the list."""
        self.keep = False
        if self._backed:
            blocks = list(self._backed)
            self._backed.clear()
            self._space.unback(blocks)
            self._push(blocks)

    def popleft(self) -> int:
        """Take the next block, which has memory."""
        return self._backed.popleft()

    def append(self, block: int) -> None:
        """Let a block enter."""
        self.extend((block,))

    def extend(self, blocks: Iterable[int]) -> None:
        """Let blocks enter, and lose their memory unless the step at hand is short of it."""
        blocks = list(blocks)
        if self.keep:
            self._backed.extend(blocks)
        elif blocks:
            self._space.unback(blocks)
            self._push(blocks)

    def _push(self, blocks: Sequence[int]) -> None:
        for block in blocks:
            heapq.heappush(self._bare, block)


class ElasticBlockManager(BlockManager):
    """Hook 1: transformers' block manager, whose blocks get memory before `get_free_blocks` returns."""

    def __init__(self, num_blocks: int, block_size: int, tp_on: bool, space: KvSpace) -> None:
        super().__init__(num_blocks, block_size, tp_on)
        self._free = FreeBlocks(num_blocks, space)
        self._uninit_block_ids = self._free
        self._short = False

    @property
    def num_free_blocks(self) -> int:
        """Blocks that can be had: all free ones, until memory was refused in this step; then those that have it."""
        free = self._free.backed if self._short else len(self._free)
        return free + len(self._init_block_ids)

    @property
    def short(self) -> bool:
        """Whether memory was refused in this step."""
        return self._short

    def begin_step(self) -> None:
        """Ask for memory anew."""
        self._short = False

    def end_step(self) -> None:
        """Give back what was kept for this step and not used."""
        self._short = False
        self._free.settle()

    def secure(self, count: int) -> bool:
        """Have memory for `count` blocks before any of them is handed out."""
        if not self.has_enough_free_blocks(count):
            return False
        if self._short and count > self._free.backed:
            return False
        if self._free.back(count):
            return True
        self._short = True
        self._free.keep = True
        return False

    def get_free_blocks(
        self, n_blocks: int, last_block_id: int | None, shareable: bool, group_id: int
    ) -> list[int] | None:
        """As transformers', with memory behind every block returned; None where there is none."""
        if not self.secure(n_blocks):
            return None
        return super().get_free_blocks(n_blocks, last_block_id, shareable, group_id)


class UnboundedMemoryHandler(cache_module.PagedAttentionMemoryHandler):
    """Hook 2: the cache is address space, so no amount of it is too much."""

    def get_available_memory(self) -> int:
        """More than any cache."""
        return 1 << 62


class ElasticCache(cache_module.PagedAttentionCache):
    """Hook 2: transformers' paged cache over our address space."""

    def __init__(self, space: KvSpace, layout: KvLayout, *args: Any, **kwargs: Any) -> None:
        # On the meta device the parent's tensors, and the zeros it writes, take no memory and touch none of ours.
        device = kwargs.pop("device")
        super().__init__(*args, device=torch.device("meta"), **kwargs)
        self.device = device
        self._space = space
        self.key_cache, self.value_cache = layout.views(space, self.num_blocks + PADDING_BLOCKS)
        for tensor in (*self.key_cache, *self.value_cache):
            if tuple(tensor.shape) != tuple(self.cache_shape):
                raise ValueError(f"a KV tensor has shape {tuple(tensor.shape)}, the cache expects {self.cache_shape}")
            torch._dynamo.mark_static_address(tensor)
        self.blocks = ElasticBlockManager(self.num_blocks, self.block_size, False, space)
        self._block_manager = self.blocks
        self._awake = False
        self._zeroed = False
        self._lengths: dict[str, list[int]] = {}

    def lengths(self, name: str, ends: torch.Tensor) -> list[int]:
        """Give `ends` as numbers: fetched once a step, because fetching waits for the GPU."""
        if name not in self._lengths:
            self._lengths[name] = ends.tolist()
        return self._lengths[name]

    @property
    def awake(self) -> bool:
        """Whether the padding blocks have memory."""
        return self._awake

    @property
    def space(self) -> KvSpace:
        """Where the blocks lie."""
        return self._space

    def wake(self) -> bool:
        """Give the padding blocks memory; False where it cannot be had."""
        if self._awake:
            return True
        padding = list(range(self.num_blocks, self.num_blocks + PADDING_BLOCKS))
        if not self._space.back(padding):
            return False
        self._awake, self._zeroed = True, False
        return True

    def begin_step(self) -> None:
        """Forget the last step's lengths; make the read-trash block read as zeros, once after each wake. In a guard."""
        self._lengths.clear()
        if not self._zeroed:
            start = self.num_blocks * self.block_size
            for tensor in (*self.key_cache, *self.value_cache):
                tensor[start : start + self.block_size].zero_()
            self._zeroed = True

    def sleep(self) -> None:
        """Take the memory of the padding blocks; every other block must be free."""
        if self._awake:
            self._awake = False
            self._space.unback(list(range(self.num_blocks, self.num_blocks + PADDING_BLOCKS)))

    def allocate_blocks(self, n_blocks: int, request_id: str, allocated_blocks: int) -> int | None:
        """As transformers', but memory for all groups is secured first: an allocation never fails half-way."""
        if not self.blocks.secure(self.blocks_needed(n_blocks, allocated_blocks)):
            return None
        return super().allocate_blocks(n_blocks, request_id, allocated_blocks)
