"""Layers that share block ids: what they are, and their blocks."""

from __future__ import annotations

from dataclasses import dataclass
from typing import TYPE_CHECKING, Any, Literal, SupportsIndex, TypeAlias

from shoal.wake import TIMEOUT_S

if TYPE_CHECKING:
    from collections.abc import Callable, Iterable

    from _typeshed import ReadableBuffer, WriteableBuffer

    from shoal import _native
    from shoal.memory.region import Region
    from shoal.torch.kv import Tensor

__all__ = ["GroupKind", "KvGroup", "KvGroupSpec"]

GroupKind: TypeAlias = Literal["full", "window", "latent", "state"]
"""What a block of a group holds: keys and values of full or of sliding window attention, the one buffer of latent
attention, or the state of a recurrent layer."""

ELEMENT_BYTES = {
    "float64": 8,
    "float32": 4,
    "int32": 4,
    "float16": 2,
    "bfloat16": 2,
    "int8": 1,
    "uint8": 1,
    "float8_e4m3fn": 1,
    "float8_e5m2": 1,
    "float8_e4m3fnuz": 1,
    "float8_e5m2fnuz": 1,
}
"""Bytes of an element, by the name of its type."""

# What debug mode fills with: bytes that are NaN. In all others that have one, bytes of ones are.
_FILLS = {"float8_e4m3fnuz": 0x80, "float8_e5m2fnuz": 0x80}


def dtype_name(dtype: Any) -> str:
    """Give the name of an element type.

    Parameters
    ----------
    dtype
        Its name, or torch's or numpy's object for it.

    Returns
    -------
    str
        Such as ``"bfloat16"``.

    Raises
    ------
    ValueError
        If its size is not known here.
    """
    name = dtype.__name__ if isinstance(dtype, type) else str(dtype).removeprefix("torch.")
    if name not in ELEMENT_BYTES:
        raise ValueError(f"dtype must be one of {', '.join(sorted(ELEMENT_BYTES))}, not {name!r}")
    return name


@dataclass(frozen=True, slots=True)
class KvGroupSpec:
    """Layers that share block ids.

    Parameters
    ----------
    name
        Its name.
    layers
        How many layers.
    kind
        What a block holds. ``"full"`` and ``"window"``: ``[2, block_tokens, kv_heads, head_dim]`` a layer (keys, then
        values). ``"latent"``: ``[block_tokens, head_dim]``, rotary part included. ``"state"``: ``[head_dim]``, where
        ``head_dim`` stands for all elements of the state.
    head_dim
        Elements of a head, of a latent token, or of a state.
    kv_heads
        Heads with keys and values of their own, for attention.
    block_tokens
        Tokens of a block; none for a state.
    window
        How many tokens a token attends to, for ``"window"``.
    dtype
        Element type: its name, or torch's.
    """

    name: str
    layers: int
    head_dim: int
    kind: GroupKind = "full"
    kv_heads: int | None = None
    block_tokens: int | None = None
    window: int | None = None
    dtype: Any = "bfloat16"

    def _words(self) -> dict[str, Any]:
        sizes = {what: self._size(what) for what in ("layers", "head_dim", "kv_heads", "block_tokens", "window")}
        if (self.kind == "window") != (self.window is not None):
            raise ValueError(f"group {self.name!r}: a window goes with kind 'window', and with no other")
        if self.kind in ("latent", "state") and self.kv_heads is not None:
            raise ValueError(f"group {self.name!r}: kind {self.kind!r} has no kv_heads; head_dim counts all elements")
        if self.kind == "state" and self.block_tokens is not None:
            raise ValueError(f"group {self.name!r}: kind 'state' has no block_tokens: a state stands for all before it")
        return {
            "name": self.name,
            "kind": self.kind,
            "layers": sizes["layers"],
            "tokens": sizes["block_tokens"],
            "kv_heads": sizes["kv_heads"],
            "elements": sizes["head_dim"],
            "window": sizes["window"],
            "element_bytes": ELEMENT_BYTES[dtype_name(self.dtype)],
            "fill": _FILLS.get(dtype_name(self.dtype), 0xFF),
        }

    def _size(self, what: str) -> int | None:
        value = getattr(self, what)
        if value is None and what not in ("layers", "head_dim"):
            return None
        if isinstance(value, SupportsIndex) and not isinstance(value, bool) and 1 <= value.__index__() < 1 << 32:
            return value.__index__()
        raise ValueError(f"group {self.name!r}: {what} must be 1 or more, an integer below 2^32, not {value!r}")


class KvGroup:
    """The blocks of one group. Made with its :class:`KvCache`.

    Attributes
    ----------
    alloc_into : callable
        ``alloc_into(buffer) -> int`` fills a contiguous, writable buffer of 32 or 64 bit integers (a numpy array, an
        ``array.array``, a memoryview; a CPU tensor of torch works too, a microsecond slower) with blocks, each owned
        once, and returns how many: all that the buffer takes, or 0, which takes none. 0 means *not now*: the limit or
        the lease has no room, or not in time, and what is cached would not make up for it; what is cached stays then.
        (Only where it could not be known beforehand that evicting is not enough, some may be gone: blocks straddle
        granules, or memory of other groups that was evicted cannot leave or is taken by others.) Where memory has to
        be mapped first it is, by this thread; it is zero where it is new. Call it outside of guards.
    free_from : callable
        ``free_from(buffer)`` takes one owner from each block in such a buffer. Give the blocks of a sequence in its
        order. Raises :class:`RegionError` for a block that nobody owns, or that is named more often than it is owned;
        nothing has changed then.
    """

    __slots__ = ("_native", "_region", "alloc_into", "free_from", "spec")

    alloc_into: Callable[[WriteableBuffer], int]
    free_from: Callable[[ReadableBuffer], None]

    def __init__(self, native: _native.KvGroup, spec: KvGroupSpec, region: Region) -> None:
        self._native = native
        self._region = region
        self.spec = spec
        self.alloc_into = native.alloc_into
        self.free_from = native.free_from

    def __repr__(self) -> str:
        return f"KvGroup({self.spec.name!r}, {self.blocks} blocks of {self.block_bytes} bytes)"

    @property
    def blocks(self) -> int:
        """How many blocks there are addresses for: ids are below this."""
        return self._native.blocks

    @property
    def block_bytes(self) -> int:
        """Bytes of one block in all layers."""
        return self._native.block_bytes

    @property
    def granule_min(self) -> int:
        """The least memory that comes and goes at a time, in bytes."""
        return self._native.granule_min

    def alloc(self, n: int) -> list[int] | None:
        """Take blocks as a list.

        Parameters
        ----------
        n
            How many.

        Returns
        -------
        list of int or None
            The blocks; None if so many cannot be had now, as 0 of :attr:`alloc_into`.

        Raises
        ------
        DeviceError
            If the device fails. No block is taken.
        ForkError
            In a process other than the one that made the cache.
        """
        return self._native.alloc(n)

    def free(self, ids: Iterable[int]) -> None:
        """Take one owner from each block; an id that is named twice is taken from twice.

        Parameters
        ----------
        ids
            The blocks; those of a sequence in its order.

        Raises
        ------
        RegionError
            For a block that does not exist or that nobody owns. Nothing has changed then.
        """
        self._native.free(ids)

    def fork(self, ids: Iterable[int]) -> None:
        """Make each block owned once more: each is given back as often as it is owned.

        Parameters
        ----------
        ids
            The blocks.

        Raises
        ------
        RegionError
            For a block that does not exist or that nobody owns. Nothing has changed then.
        """
        self._native.fork(ids)

    def available(self) -> int:
        """Say how many more blocks the limit and the addresses allow; what is cached counts, as it would be evicted.

        Returns
        -------
        int
            Exactly so many where blocks do not straddle granules, at most so many where they do. With several groups,
            what another group would give up is counted: each says so of the same memory. The lease is asked only when
            memory is needed.

        Raises
        ------
        ForkError
            In a process other than the one that made the cache.
        """
        return self._native.available()

    def hint(self, blocks: int) -> None:
        """Say that the next step will take so many blocks, so that they are mapped before it asks.

        Parameters
        ----------
        blocks
            How many.

        Raises
        ------
        ValueError
            If ``blocks`` is negative, or 2^32 or more.
        ForkError
            In a process other than the one that made the cache.
        """
        self._native.hint(blocks)

    def owners(self, block: int) -> int | None:
        """Say who has a block.

        Parameters
        ----------
        block
            Its id.

        Returns
        -------
        int or None
            How many own it; 0 if it is only cached; None if it is free.

        Raises
        ------
        RegionError
            If it does not exist.
        """
        return self._native.owners(block)

    def forget(self, block: int) -> bool:
        """Let what a block holds not be found any more.

        Parameters
        ----------
        block
            Its id.

        Returns
        -------
        bool
            Whether it could be found.

        Raises
        ------
        RegionError
            If there is no such block.
        ForkError
            In a process other than the one that made the cache.
        """
        return self._native.forget(block)

    def compact(
        self, *, apply: bool = False, moves_max: int | None = None, timeout_s: float = TIMEOUT_S
    ) -> list[tuple[int, int]]:
        """Move blocks out of the emptiest memory, so that it can go back.

        Parameters
        ----------
        apply
            Whether to carry it out: it waits until no step runs, copies on the device and renumbers. From then on
            what was in the first block of a pair is in the second, with its owners and its place in the index: write
            the new numbers into every table before anything else is asked of the cache. Otherwise it is a plan, for
            an engine that copies by itself and says :meth:`moved`.
        moves_max
            The most moves; without it as many as are of use.
        timeout_s
            How long it may wait for steps and copies, in seconds.

        Returns
        -------
        list of tuple of int
            Pairs of the block that moves and where to.

        Raises
        ------
        DeadlineError, DeviceError, RegionError
            If a step did not end, a copy failed, or something of the cache is on the host. No block has moved then.
        """
        return self._native.compact(apply, moves_max, timeout_s)

    def moved(self, moves: Iterable[tuple[int, int]]) -> None:
        """Say that blocks were copied, from the first to the second of each pair.

        Parameters
        ----------
        moves
            The pairs.

        Raises
        ------
        RegionError
            If a block does not exist, a first one holds nothing or a second one is not free. Nothing has changed then.
        """
        self._native.moved(list(moves))

    def tensors(self) -> list[Tensor]:
        """Make a tensor for each layer over all of the group's addresses, without touching them.

        Returns
        -------
        list of torch.Tensor
            Blocks first, then a block's own dimensions (:class:`KvGroupSpec`). Only blocks that are allocated have
            memory: touching another faults, on a GPU as an illegal address. They stay valid for ever; inside a guard
            what is allocated is there.

        Raises
        ------
        ForkError
            In a process other than the one that made the cache.
        """
        from shoal.torch.kv import layer_tensors

        views = (self._native.view(layer) for layer in range(self.spec.layers))
        return layer_tensors(self._region, [view for view in views if view is not None], dtype_name(self.spec.dtype))
