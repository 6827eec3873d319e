"""transformers' paged cache on Shoal's KV blocks.

transformers says which request wants how many blocks; which they are, who owns them and what is found again in them is
the KV cache's business (hooks 1 and 2 of :mod:`shoal.worker.hooks`): its block manager keeps no list of its own. The
layout is token-major: K and V of one token in all layers lie together, so one block is one contiguous piece, and the
tensor of each layer is a strided view.

Rules kept here: a block has memory before it is handed out; `num_free_blocks` never promises a block whose memory was
just refused; two padding blocks are allocated while the cache is awake, and the first of them reads as zeros; a block
is sealed when the step that filled it was launched, and never written again (a request computes at least the last token
of its prompt itself, in a block of its own).

Prefixes of models whose layers all see the whole context are found by their tokens, in one call, and what follows them
in tiers below the device is loaded while other requests run (:mod:`shoal.worker.loads`). Where some have a window, or
all, :mod:`shoal.worker.windows` finds and seals them group by group.
"""

from __future__ import annotations

import time
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

import torch
from transformers.generation.continuous_batching import cache as cache_module
from transformers.generation.continuous_batching.cache_manager import BlockManager, SlidingAttentionCacheAllocator

from .loads import Loads
from .windows import HybridPrefixes, WindowedAllocator

if TYPE_CHECKING:
    from collections.abc import Callable

    from transformers import PreTrainedConfig
    from transformers.generation.continuous_batching.requests import RequestState

    from .memory import KvBlocks

PADDING_BLOCKS = 2
_FRUGAL_S = 60.0  # how long windowed layers get no more blocks than they need, after memory was refused


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
        Those of them whose attention has a window: there a request needs at most `window_blocks` blocks at once.
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
        # The window before a chunk of tokens, that at its end, and what the scheduler takes ahead.
        window_blocks = 2 * -(-config.sliding_window // block_tokens) + 4 if windowed else 0
        return cls(
            layers=len(groups[0]),
            groups=len(groups),
            kv_heads=cache_module.find_num_kv_heads(config),
            head_dim=cache_module.find_head_dim(config),
            dtype=dtype,
            block_tokens=block_tokens,
            windowed=windowed,
            window_blocks=window_blocks,
        )

    def request_blocks(self, blocks: int) -> int:
        """Count the blocks that a request needs in all groups when it has asked for `blocks`."""
        return (self.groups - self.windowed) * blocks + self.windowed * min(blocks, self.window_blocks)

    @property
    def is_uniform(self) -> bool:
        """Whether every layer sees the whole context, by one block table."""
        return self.groups == 1 and not self.windowed

    @property
    def token_elements(self) -> int:
        """Elements between a token and the next."""
        return 2 * self.layers * self.kv_heads * self.head_dim

    @property
    def block_bytes(self) -> int:
        """Bytes of one block: K and V of all layers."""
        return self.block_tokens * self.token_elements * self.dtype.itemsize

    def views(self, blocks: torch.Tensor) -> tuple[list[torch.Tensor], list[torch.Tensor]]:
        """One K and one V tensor for each layer, over all `blocks`, shape [tokens, kv heads, head dimension]."""
        shape = (blocks.shape[0] * self.block_tokens, self.kv_heads, self.head_dim)
        stride = (self.token_elements, self.head_dim, 1)
        step, start = self.kv_heads * self.head_dim, blocks.storage_offset()
        tensors = [blocks.as_strided(shape, stride, start + i * step) for i in range(2 * self.layers)]
        return tensors[0::2], tensors[1::2]


class ElasticBlockManager(BlockManager):
    """Hook 1: transformers' block manager, whose blocks are those of a KV cache.

    The parent's lists stay empty, and what is shared is counted by the cache: no block is "shareable" here.
    """

    def __init__(self, num_blocks: int, block_size: int, blocks: KvBlocks) -> None:
        super().__init__(0, block_size, tp_on=False)
        self.num_blocks = num_blocks
        self._blocks = blocks
        self._secured: list[int] = []  # taken and about to be handed out
        self._left: int | None = None  # how many can still be had, after memory was refused in this step

    @property
    def num_free_blocks(self) -> int:
        """Blocks that can be had: what the limit allows, until memory was refused in this step; then what is there."""
        return len(self._secured) + (self._blocks.available() if self._left is None else self._left)

    @property
    def short(self) -> bool:
        """Whether memory was refused in this step."""
        return self._left is not None

    def begin_step(self) -> None:
        """Ask for memory anew."""
        self._left = None

    def end_step(self) -> None:
        """Give back what was secured and not handed out."""
        self._left = None
        if self._secured:
            self._blocks.free(self._secured)
            self._secured = []

    def secure(self, count: int) -> bool:
        """Take `count` blocks before any of them is handed out."""
        missing = count - len(self._secured)
        if missing <= 0:
            return True
        if self._left is not None and missing > self._left:
            return False
        taken = self._blocks.alloc(missing)
        if taken is None:
            # Others may give memory up at any moment. What is said in this step holds until a block is freed in it.
            self._left = min(missing - 1, self._blocks.ready())
            return False
        if self._left is not None:
            self._left = max(0, self._left - missing)
        self._secured += taken
        return True

    def has_enough_free_blocks(self, n_blocks: int) -> bool:
        """Whether so many can be had, as far as is known."""
        return n_blocks <= self.num_free_blocks

    def get_free_blocks(
        self, n_blocks: int, last_block_id: int | None, shareable: bool, group_id: int
    ) -> list[int] | None:
        """Hand out blocks, each with memory; None where there is none."""
        del last_block_id, shareable, group_id
        if not self.secure(n_blocks):
            return None
        taken, self._secured = self._secured[:n_blocks], self._secured[n_blocks:]
        return taken

    def free_blocks(self, blocks: list[int], shareable: bool) -> None:
        """Take one owner from each block."""
        del shareable
        if blocks:
            self._blocks.free(blocks)
            if self._left is not None:
                self._left = self._blocks.ready()


class UnboundedMemoryHandler(cache_module.PagedAttentionMemoryHandler):
    """Hook 2: the cache is address space, so no amount of it is too much."""

    def get_available_memory(self) -> int:
        """More than any cache."""
        return 1 << 62


class ElasticCache(cache_module.PagedAttentionCache):
    """Hook 2: transformers' paged cache over our address space.

    Parameters
    ----------
    blocks
        Where they lie.
    is_caching
        Whether prefixes are found again.
    salt_of
        The tenant of a request, by its name; None if that is not known any more, and then nothing is shared.
    found
        Told the name of a request that begins, or begins again, and how many of its tokens were found; says whether it
        has come just now.
    """

    def __init__(
        self,
        blocks: KvBlocks,
        layout: KvLayout,
        is_caching: bool,
        salt_of: Callable[[str], str | None],
        found: Callable[[str, int], bool],
        *args: Any,
        **kwargs: Any,
    ) -> None:
        # On the meta device the parent's tensors, and the zeros it writes, take no memory and touch none of ours.
        device = kwargs.pop("device")
        super().__init__(*args, device=torch.device("meta"), **kwargs)
        self.device = device
        self._kv = blocks
        self.key_cache, self.value_cache = layout.views(blocks.tensor())
        for tensor in (*self.key_cache, *self.value_cache):
            if tensor.shape[0] < self.cache_shape[0] or tuple(tensor.shape[1:]) != tuple(self.cache_shape[1:]):
                raise ValueError(f"a KV tensor has shape {tuple(tensor.shape)}, the cache expects {self.cache_shape}")
            torch._dynamo.mark_static_address(tensor)
        self.blocks = ElasticBlockManager(self.num_blocks, self.block_size, blocks)
        self._block_manager = self.blocks
        self.allow_block_sharing = self.use_prefix_sharing = is_caching
        self._salt_of, self._found = salt_of, found
        self._windowed: list[WindowedAllocator] = []
        for at, group in enumerate(self.group_cache_managers):
            if isinstance(group, SlidingAttentionCacheAllocator):
                self._windowed.append(WindowedAllocator.of(group))
                self.group_cache_managers[at] = self._windowed[-1]
        self._hybrid: HybridPrefixes | None = None
        if is_caching and not layout.is_uniform:
            self._hybrid = HybridPrefixes(blocks, self.group_cache_managers, self.block_size)
        self.loads = Loads(blocks, self.group_cache_managers[0].block_table)
        self._frugal_until = 0.0
        self._padding: list[int] = []
        self._pads: list[Any] = []
        self._zeroed = False
        self._lengths: dict[str, list[int]] = {}

    def lengths(self, name: str, ends: torch.Tensor) -> list[int]:
        """Give `ends` as numbers: fetched once a step, because fetching waits for the GPU."""
        if name not in self._lengths:
            self._lengths[name] = ends.tolist()
        return self._lengths[name]

    @property
    def awake(self) -> bool:
        """Whether there are padding blocks."""
        return bool(self._padding)

    @property
    def kv(self) -> KvBlocks:
        """Where the blocks lie."""
        return self._kv

    def pads(self, inputs: Any) -> None:
        """Keep transformers' `inputs` informed of where padding is read and written."""
        self._pads.append(inputs)

    def wake(self) -> bool:
        """Take padding blocks; False where they cannot be had."""
        if self._padding:
            return True
        padding = self._kv.alloc(PADDING_BLOCKS)
        if padding is None:
            return False
        self._zeroed = False
        self._pad_with(padding)
        return True

    def _pad_with(self, padding: list[int]) -> None:
        """Let padding be read from the first of two blocks and written to the second."""
        self._padding = padding
        read, write = padding
        self.read_trash_index = read * self.block_size
        self.sentinel_index = self.read_trash_index + 1
        self.write_trash_index = write * self.block_size
        for inputs in self._pads:
            inputs._read_trash_index, inputs._write_trash_index = self.read_trash_index, self.write_trash_index
        for allocator in self.group_cache_managers:
            if isinstance(allocator, SlidingAttentionCacheAllocator):
                allocator.sentinel_index = self.sentinel_index
                allocator.write_trash_index = self.write_trash_index

    def compact(self) -> None:
        """Let blocks be moved together, and follow them. Between steps: no batch is prepared, no guard is held."""
        moves = self._kv.compact()
        if not moves:
            return
        for allocator in self.group_cache_managers:
            for blocks in allocator.block_table.values():
                blocks[:] = [moves.get(block, block) for block in blocks]
        if self._padding:
            self._pad_with([moves.get(block, block) for block in self._padding])

    def begin_step(self) -> None:
        """Forget the last step's lengths; make the read-trash block read as zeros, once after each wake. In a guard."""
        self._lengths.clear()
        if not self._zeroed:
            start = self.read_trash_index
            for tensor in (*self.key_cache, *self.value_cache):
                tensor[start : start + self.block_size].zero_()
            self._zeroed = True

    def sleep(self) -> None:
        """Free the padding blocks; no request may be inside."""
        if self._padding:
            self._kv.free(self._padding)
            self._padding = []

    def allocate_blocks(self, n_blocks: int, request_id: str, allocated_blocks: int) -> int | None:
        """As transformers', but blocks for all groups are secured first: an allocation never fails half-way.

        Windowed layers take all that can be shared, and where that is refused, for a while, what they need.
        """
        self._keep_windows(self.use_prefix_sharing and time.monotonic() >= self._frugal_until)
        wanted = self.blocks_needed(n_blocks, allocated_blocks)
        has_all = self.blocks.secure(wanted)
        if not has_all:
            self._keep_windows(False)
            needed = self.blocks_needed(n_blocks, allocated_blocks)
            if needed < wanted:
                self._frugal_until = time.monotonic() + _FRUGAL_S
            if needed == wanted or not self.blocks.secure(needed):
                return None
        return super().allocate_blocks(n_blocks, request_id, allocated_blocks)

    def _keep_windows(self, keeps_all: bool) -> None:
        for group in self._windowed:
            group.keeps_all = keeps_all

    def blocks_needed(self, num_requested_blocks: int, allocated_blocks: int) -> int:
        """Count the blocks of all groups that a request takes next."""
        del allocated_blocks
        full = num_requested_blocks * (self.num_groups - len(self._windowed))
        return full + sum(group.wanted(num_requested_blocks) for group in self._windowed)

    def blocks_in_use(self, request_id: str) -> int:
        """Count the blocks that a request has in all groups."""
        places = super().blocks_in_use(request_id)
        tables = ((group, group.block_table.get(request_id, ())) for group in self._windowed)
        return places - sum(len(table) - len(group.held(request_id)) for group, table in tables)

    def free_blocks(self, request_id: str) -> None:
        """Free all blocks of a request."""
        self.loads.drop(request_id)
        super().free_blocks(request_id)
        if self._hybrid is not None:
            self._hybrid.forget(request_id)

    def free_all_requests(self) -> None:
        """Free the blocks of all requests."""
        self.loads.drop_all()
        super().free_all_requests()
        if self._hybrid is not None:
            self._hybrid.forget_all()

    def search_prefix_match(self, request_id: str, prompt_ids: list[int]) -> int:
        """Find the longest cached prefix and give its blocks to the request; all but the last token may be found.

        Nothing as long as some of it is on its way from a tier below (`loads` says so).
        """
        salt, tokens, prompt = self._salt_of(request_id), 0, prompt_ids[:-1]
        cached = found = 0
        if salt is not None and self._hybrid is not None:
            cached = self._kv.cached_blocks()
            tokens = self._hybrid.find(request_id, prompt, salt)
            found = max(0, cached - self._kv.cached_blocks())
        elif salt is not None:
            prefix = self.loads.look(request_id, prompt, salt)
            if prefix is None:
                return 0
            cached, found, tokens = prefix.cached, prefix.found, prefix.blocks * self.block_size
        self._total_prefix_length += tokens
        if self._found(request_id, tokens):
            self._kv.looked(cached, found)
        return tokens

    def mark_shareable_blocks_as_complete(self, state: RequestState, num_complete_blocks: int) -> None:
        """Seal the blocks that the step at hand has filled, and free those that have left a window."""
        salt = self._salt_of(state.request_id)
        blocks = self.group_cache_managers[0].block_table.get(state.request_id)
        if num_complete_blocks and self.use_prefix_sharing and blocks and salt is not None:
            # The newest token is known, but its keys and values are computed by the next step.
            computed = (state.initial_tokens + state.generated_tokens)[: state.position_offset]
            if self._hybrid is not None:
                self._hybrid.seal(state.request_id, computed, salt)
            else:
                self._kv.seal(computed, blocks, salt)
                self._kv.save(computed, num_complete_blocks, salt)
        for group in self._windowed:
            group.release(state.request_id, state.position_offset, self.blocks)
