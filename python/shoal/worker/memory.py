"""The seam between the engines and Shoal's memory.

The engines see only :class:`Memory` and :class:`KvBlocks`: enter a guard, place weights once, take and free KV blocks.
Apart, so that an engine reads (and is tested) without knowing how bytes move between tiers.

Invariants: I13 (a forward runs inside a guard; eviction never happens inside one).
"""

from __future__ import annotations

from typing import TYPE_CHECKING, Any, Protocol

if TYPE_CHECKING:
    from collections.abc import Callable, Sequence
    from contextlib import AbstractContextManager

    import torch

    from .kv import KvLayout


class ShortageError(Exception):
    """Device memory could not be had in time; what asked may ask again later."""


class Ahead(Protocol):
    """What is brought up ahead of its request."""

    def cancel(self) -> None:
        """Go no further."""


class Loading(Protocol):
    """Blocks on their way from tiers below the device. Gone, it goes no further, and owns nothing."""

    @property
    def done(self) -> bool:
        """Whether what comes has come."""

    def wait(self, timeout_s: float) -> bool:
        """Wait until it is done; whether it is."""

    def take(self) -> list[int] | None:
        """Take the blocks that have come, sealed, in the caller's hands; None while it is under way."""

    def cancel(self) -> None:
        """Go no further, and give back what has come."""


class KvBlocks(Protocol):
    """Blocks of KV memory: what is allocated has memory, and what was sealed is found again until it is evicted.

    What nobody owns any more is free, or cached if it was sealed; what is cached goes when memory is short.
    """

    def tensor(self) -> torch.Tensor:
        """Make a tensor over all blocks, shape [blocks, tokens of a block, elements of a token]; touches nothing."""

    def alloc(self, count: int) -> list[int] | None:
        """Take blocks, all or none; None where memory for them cannot be had now."""

    def free(self, blocks: Sequence[int]) -> None:
        """Take one owner from each block; those of a sequence in its order."""

    def available(self) -> int:
        """How many blocks the limit allows."""

    def ready(self) -> int:
        """How many blocks can be had without more memory: free ones that have it, and cached ones."""

    def cached_blocks(self) -> int:
        """How many blocks are nobody's and may be found."""

    def match(self, tokens: Sequence[int], salt: str) -> list[int]:
        """Find the longest prefix that is sealed under this salt, and own its blocks too."""

    def may_load(self, tokens: Sequence[int], held: int, salt: str) -> bool:
        """Whether tiers below may have more of a prompt than the `held` blocks that were found, as far as they know."""

    def begin_load(self, tokens: Sequence[int], held: int, salt: str) -> Loading | None:
        """Begin to bring back from tiers below the blocks of a prompt that follow the `held` ones that were found.

        Steps may run meanwhile. None where there is nothing that is worth it.
        """

    def looked(self, cached: int, found: int) -> None:
        """Say that a request has come, once for each: of `cached` blocks it found so many, with `match` or its like.

        What was somebody's already does not count, nor what a load brought.
        """

    def prefetch(self, tokens: Sequence[int], salt: str) -> Ahead | None:
        """Begin to bring what slow tiers have of a prompt nearer, ahead of its `match`; from any thread, at once."""

    def seal(self, tokens: Sequence[int], blocks: list[int], salt: str) -> None:
        """Let the full blocks of a sequence be found; what was there already takes a copy's place in `blocks`."""

    def match_keys(self, keys: Sequence[bytes], salt: str) -> list[int]:
        """Find the longest run of these keys, from the first, that were sealed under this salt; own its blocks too."""

    def seal_keys(self, keys: Sequence[bytes], blocks: list[int], salt: str, after: bytes | None) -> None:
        """Let blocks be found by keys, as `seal`; `after` is the key of the block without which they are of no use."""

    def save(self, tokens: Sequence[int], new: int, salt: str) -> None:
        """Let the last `new` full blocks of a sealed sequence be kept on a tier below the device too."""

    def computed(self, tokens: int, seconds: float, requests: int) -> None:
        """Say how long a step took that computed so many tokens for so many requests.

        By that it is decided whether what tiers below have of a prompt is loaded, and what cached blocks are worth.
        """

    def forget_all(self) -> None:
        """Let nothing be found any more."""

    def hint(self, blocks: int) -> None:
        """Say how many blocks the next step will take, so that they have memory when it asks."""

    def compact(self) -> dict[int, int]:
        """Move blocks together where few of them keep much memory; says where each that moved went. Between steps."""

    def record_step(self, stream: Any) -> None:
        """Say that a step was launched on this stream, before blocks that it uses are freed."""

    @property
    def back_us_per_mib(self) -> int:
        """What bringing a MiB of cached blocks back takes, or computing it again (microseconds); 0: not known."""

    @property
    def found_milli(self) -> int:
        """What part of all cached blocks one use of the model finds again, in thousandths; 0: not known."""

    @property
    def mapped_bytes(self) -> int:
        """Device bytes, whole pages, cached ones included."""

    @property
    def live_bytes(self) -> int:
        """Bytes of the blocks that have an owner."""


class Memory(Protocol):
    """Device memory of one worker."""

    def guard(
        self, timeout_s: float, is_wanted: Callable[[], bool] | None = None, *, tokens: int = 0
    ) -> AbstractContextManager[bool]:
        """Keep everything resident while inside; entering brings back what is missing.

        The bytes of weights may still be coming when it is entered: then each layer's call waits for its own, and what
        entering gives is true.

        Parameters
        ----------
        timeout_s
            How long entering may take.
        is_wanted
            Asked while a layer waits for its bytes; where it says no, the step ends with a `ShortageError`.
        tokens
            How many the step computes: what steps of that size take beside the regions is leased before.

        Raises
        ------
        ShortageError
            What is missing could not be brought back in time. From inside as well: the step may be run again.
        """

    @property
    def steps_in_order(self) -> bool:
        """Whether a step may begin while the bytes of its weights are still coming."""

    def kv(self, layout: KvLayout, blocks: int, *, is_caching: bool) -> KvBlocks:
        """Reserve address space for `blocks` KV blocks or more; `is_caching`: what is sealed is found again."""

    def overhead_peak(self) -> int | None:
        """Device bytes that the process has taken at most beside its regions; None where there is nothing to count."""

    def overhead(self) -> int | None:
        """Device bytes that it has taken at most since this was last called; None where there is nothing to count."""

    def trim(self, *, cached: bool = False) -> None:
        """Give back device memory that nothing uses now; with `cached`, also that of blocks that nobody owns."""

    def tiers(self) -> list[dict[str, Any]]:
        """Give what each tier below the device did for the KV cache, as the server is told."""

    def weights_at_rest(self) -> dict[str, Any] | None:
        """Give how the weights at rest are, as the server is told; None where they are not kept."""

    def store_weights(self) -> None:
        """Begin to store the weights where they are kept at rest, once the model serves; from any thread, at once."""

    def close(self) -> None:
        """Write out what tiers below the device have not written yet, within a few seconds."""
