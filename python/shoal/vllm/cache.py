"""Where vLLM's KV cache lies: one :class:`shoal.KvCache` whose block ids are vLLM's.

vLLM asks for one flat tensor of bytes a layer (or a group of layers that share one), cut into the same number of blocks
each, and zeroes all of them. Here each is a plane of a cache of ours, and only blocks that are out have memory.
"""

from __future__ import annotations

import contextlib
import math
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

from shoal.errors import DeadlineError, OutOfMemoryError, RegionError
from shoal.kv_cache import KvGroupSpec

if TYPE_CHECKING:
    import torch

    from shoal.memory import MemoryManager
    from shoal.vllm.transfers import Transfers

__all__ = ["ElasticCache", "Plan"]

PIECE_BYTES = 512 << 20
"""The most memory that comes or goes at a time, in all planes."""

HANDLE_BYTES = 256 << 20
"""The most in one plane: an extent is no longer, nor may a block of all planes be."""

PATIENCE_S = 0.02
"""How long a scheduling step waits for a lease that is refused."""


@dataclass(frozen=True)
class Plan:
    """What vLLM asks for.

    Parameters
    ----------
    blocks
        How many blocks there are.
    block_bytes
        Bytes of a block in one plane.
    planes
        For each plane, the layers whose tensor it is.
    """

    blocks: int
    block_bytes: int
    planes: tuple[tuple[str, ...], ...]

    @classmethod
    def of(cls, config: Any) -> Plan:
        """Read a ``KVCacheConfig``.

        Parameters
        ----------
        config
            vLLM's.

        Returns
        -------
        Plan
            One plane for each tensor that vLLM would allocate.

        Raises
        ------
        RegionError
            If its tensors are not all cut into as many blocks of one size; the message says what they are.
        """
        planes: list[list[str]] = []
        sizes: set[int] = set()
        packed: list[str] | None = None
        for tensor in config.kv_cache_tensors:
            sizes.add(tensor.size)
            if tensor.block_stride > 0:
                # Layers side by side in each block: they all name one tensor.
                if packed is None:
                    packed = []
                    planes.append(packed)
                packed.extend(tensor.shared_by)
            else:
                planes.append(list(tensor.shared_by))
        if not planes:
            raise RegionError("the model has no KV cache", kind="layout")
        if len(sizes) > 1 or (packed is not None and len(planes) > 1):
            found = ", ".join(map(str, sorted(sizes)))
            raise RegionError(
                f"the KV cache's tensors have {found} bytes; Shoal can make it elastic where all have the same number",
                kind="layout",
            )
        size, rest = divmod(sizes.pop(), config.num_blocks)
        if rest:
            raise RegionError(f"a KV cache tensor is not a whole number of {config.num_blocks} blocks", kind="layout")
        return cls(config.num_blocks, size, tuple(map(tuple, planes)))

    @property
    def nbytes(self) -> int:
        """Bytes of all blocks in all planes."""
        return self.blocks * self.block_bytes * len(self.planes)


class ElasticCache:
    """vLLM's KV cache over memory that comes and goes.

    Parameters
    ----------
    mem
        Where it lies.
    plan
        What vLLM asks for.
    yields
        Whether contents may be copied to the host when others need memory, between two steps.

    Attributes
    ----------
    kv : KvCache
        The memory.
    blocks : int
        vLLM's number of blocks.
    block_bytes, unit_bytes : int
        Of a block and of the shortest piece of memory, in all planes. A block may lie in several units.
    units_per_piece : int
        Shortest pieces in a longest one.
    pool : ElasticBlockPool or None
        vLLM's pool over it, once there is one.
    transfers : Transfers or None
        What a connector copies, if there is one.
    """

    def __init__(self, mem: MemoryManager, plan: Plan, *, yields: bool = False) -> None:
        self.plan = plan
        self.blocks = plan.blocks
        # To vLLM a block of a layer is so many bytes; what is in them is the attention backend's business.
        spec = KvGroupSpec("vllm", layers=len(plan.planes), head_dim=plan.block_bytes, kind="state", dtype="int8")
        self.kv = mem.kv_cache(
            groups=[spec], layout="layer", max_bytes=plan.nbytes, eviction=None, granule_max=PIECE_BYTES,
            patience_s=PATIENCE_S, name="kv",
        )  # fmt: skip
        # A scheduler that counts on a block writes to it in the same step: it goes by anyone else's word only where a
        # step waits until it is back.
        self.kv.region._native.set_yields(yields)
        group = self.kv.groups[0]
        self.block_bytes, self.unit_bytes = group.block_bytes, group.granule_min
        self.units_per_piece = max(min(PIECE_BYTES, len(plan.planes) * HANDLE_BYTES) // group.granule_min, 1)
        self.pool: Any = None
        self.transfers: Transfers | None = None
        self._held: list[int] = []
        self._is_limited = False

    def tensors(self) -> dict[str, torch.Tensor]:
        """Make the tensors, without touching them.

        Returns
        -------
        dict of str to torch.Tensor
            For each layer the flat int8 tensor that vLLM cuts its cache from. Layers that share one have the same.
        """
        size = self.plan.blocks * self.plan.block_bytes
        flat = (tensor.view(-1)[:size] for tensor in self.kv.tensors())
        return {layer: tensor for layers, tensor in zip(self.plan.planes, flat, strict=True) for layer in layers}

    def hold(self, blocks: int) -> None:
        """Give the first blocks memory: what warms vLLM up writes to them without asking anyone.

        Parameters
        ----------
        blocks
            How many; all there are, if there are fewer.

        Raises
        ------
        OutOfMemoryError
            If there is not so much memory.
        """
        wanted = min(blocks, self.blocks)
        # vLLM's null block is never given back: in the shortest piece of memory, by itself, it keeps the least.
        held = set(self.kv.alloc(1) or ())
        missing = set(range(wanted)) - held
        while missing:
            unit = max(self.unit_bytes // self.block_bytes, 1)
            got = self.kv.alloc(min(max(len(missing), unit), max(self.kv.available(), 1)))
            if got is None:
                self.kv.free(sorted(held))
                raise OutOfMemoryError(
                    f"vLLM needs {wanted} KV blocks to start, {wanted * self.plan.nbytes // self.blocks} bytes, and "
                    f"there is no memory for {len(missing)} of them",
                    kind="out_of_memory", tier="device",
                )  # fmt: skip
            held.update(got)
            missing.difference_update(got)
        self.kv.free(sorted(number for number in held if number >= wanted))
        self._held = list(range(wanted))

    def release(self) -> None:
        """Give back what :meth:`hold` took, except the first block, which is vLLM's null block."""
        if self._held[1:]:
            self.kv.free(self._held[1:])
        self._held = self._held[:1]

    def bytes_of(self, blocks: int) -> int:
        """Say how much memory so many blocks take in whole pieces, the null block's own included.

        Parameters
        ----------
        blocks
            How many.

        Returns
        -------
        int
            Bytes.
        """
        unit = self.kv.groups[0].granule_min
        return (-(-blocks * (self.plan.nbytes // self.blocks) // unit) + 1) * unit

    def kept_bytes(self) -> int:
        """Say how much memory is there for blocks that are only cached.

        Returns
        -------
        int
            Bytes of these blocks by their number, less what cannot go because of the blocks in use, at the least.
        """
        queue = None if self.pool is None else self.pool.free_block_queue
        if queue is None or not queue.cached:
            return 0
        # Memory goes by whole units, and what is used, the null block too, lies in so many of them at least.
        usage = self.kv.usage()
        units_in_use = -(-queue.used * self.block_bytes // self.unit_bytes)
        could_go = usage["mapped"] - usage["empty"] - units_in_use * self.unit_bytes
        return max(min(queue.cached * (self.plan.nbytes // self.blocks), could_go), 0)

    def forget(self) -> int:
        """Let all cached blocks go, and their memory.

        Returns
        -------
        int
            Bytes of memory that went.
        """
        if self.pool is not None:
            self.pool.forget()
        return self.kv.trim().freed

    def shrink(self, nbytes: int) -> int:
        """Give memory back: what is empty, then what is only cached, by whole pieces, the longest unused first.

        Parameters
        ----------
        nbytes
            How many bytes.

        Returns
        -------
        int
            How many went: fewer, if the rest is in use.
        """
        freed = 0
        while freed < nbytes:
            usage = self.kv.usage()
            lack = nbytes - freed - usage["empty"]
            # Memory goes in pieces that may be longer than the shortest: what was forgotten may not empty one yet.
            gone = 0
            if lack > 0 and self.pool is not None:
                gone = self.pool.forget(math.ceil(lack / self.kv.groups[0].granule_min))
            now = self.kv.trim(nbytes - freed).freed
            freed += now
            if not gone and not now:
                break
        return freed

    def set_limit(self, nbytes: int) -> None:
        """Set the most memory that the cache may have; what is cached beyond it goes now, what is in use as it ends.

        Parameters
        ----------
        nbytes
            How many bytes; at least one piece of memory, for the null block.
        """
        unit = self.kv.groups[0].granule_min
        reservation = self.kv.usage()["reservation"]
        self.kv.set_limit(min(max(nbytes, unit), reservation))
        self._is_limited = nbytes < reservation
        self.keep_limit()

    def keep_limit(self) -> None:
        """Let what is cached beyond the limit go, if there is a limit."""
        if self._is_limited:
            usage = self.kv.usage()
            if usage["mapped"] > usage["limit"]:
                # A step that does not end in time: the cache's own thread frees what is empty, and the next call more.
                with contextlib.suppress(DeadlineError):
                    self.shrink(usage["mapped"] - usage["limit"])
