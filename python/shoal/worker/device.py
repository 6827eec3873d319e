"""The worker's memory for real: Shoal's regions, guards and KV cache behind the engines' seam."""

from __future__ import annotations

import logging
import os
import time
from contextlib import contextmanager
from typing import TYPE_CHECKING, Any

import shoal.torch
from shoal import (
    DeadlineError,
    Error,
    KvGroupSpec,
    LeaseError,
    MemoryManager,
    OutOfMemoryError,
    RegionError,
    TransferError,
)

from .errors import LoadError
from .memory import ShortageError
from .price import MIB, FoundShare, PromptCost, rounded
from .tiers import KvBelow

if TYPE_CHECKING:
    from collections.abc import Callable, Iterator, Mapping, Sequence
    from pathlib import Path

    import torch

    from shoal import Loading, Prefetch, Region
    from shoal.kv_cache import Sealed

    from .kv import KvLayout
    from .overhead import Overhead
    from .spec import DiskShare, RemoteShare
    from .weights import WeightsAtRest

logger = logging.getLogger(__name__)

_KV_PATIENCE_S = 2.0  # how long one attempt to get KV memory may wait for what others give up
_SCATTERED_BYTES_MIN = 32 << 20  # less memory than this between blocks is not worth moving any
_SCATTERED_PART = 4  # nor what is less than this part of it
_MOVED_BYTES_MAX = 256 << 20  # what is copied at a time, so that the next step does not wait for long
_COMPACT_S = 1.0  # how long a compaction may wait
_BYTES_S = 60.0  # how long a layer may wait for its own bytes
_WHOLE = "SHOAL_WAIT_FOR_WHOLE_WAKES"  # set to 1: no step begins before all bytes are there, as a comparison


class DeviceKv:
    """KV blocks in Shoal's own cache: one group, in which a token's keys and values of all layers lie together."""

    def __init__(self, mem: MemoryManager, layout: KvLayout, blocks: int, *, is_caching: bool) -> None:
        dtype = str(layout.dtype).removeprefix("torch.")
        spec = KvGroupSpec("kv", 1, layout.token_elements, "latent", block_tokens=layout.block_tokens, dtype=dtype)
        self.cache = mem.kv_cache(
            groups=[spec],
            max_bytes=blocks * layout.block_bytes,
            # What the next step will take is hinted; nothing is kept ahead of that, as others may need it.
            spare_max=0,
            patience_s=_KV_PATIENCE_S,
            eviction="lru" if is_caching else None,
        )
        self._group = self.cache.groups[0]
        self._hinted = 0
        self._block_tokens = layout.block_tokens
        self._tokens_per_mib = MIB * layout.block_tokens / (layout.groups * layout.block_bytes)
        self._prompts = PromptCost()
        self._finds = FoundShare()
        self.is_caching = is_caching
        self.is_uniform = layout.is_uniform
        self.below: KvBelow | None = None

    def tensor(self) -> torch.Tensor:
        """Make a tensor over all blocks."""
        return self.cache.tensors()[0]

    def alloc(self, count: int) -> list[int] | None:
        """Take blocks; None where memory for them cannot be had now."""
        return self._group.alloc(count)

    def free(self, blocks: Sequence[int]) -> None:
        """Take one owner from each block."""
        self._group.free(blocks)

    def available(self) -> int:
        """How many blocks the limit allows."""
        return self._group.available()

    def ready(self) -> int:
        """How many blocks can be had without more memory."""
        (figures,) = self.cache.usage()["groups"]
        return figures["free_mapped_blocks"] + figures["cached_blocks"]

    def cached_blocks(self) -> int:
        """How many blocks are nobody's and may be found."""
        return self.cache.usage()["groups"][0]["cached_blocks"]

    def match(self, tokens: Sequence[int], salt: str) -> list[int]:
        """Find the longest sealed prefix, and own its blocks."""
        return self.cache.match(tokens, salt=salt)[1]

    def may_load(self, tokens: Sequence[int], held: int, salt: str) -> bool:
        """Whether there may be something to load after the first `held` blocks."""
        return self.below is not None and self.below.may_load(tokens, held, salt)

    def begin_load(self, tokens: Sequence[int], held: int, salt: str) -> Loading | None:
        """Begin to bring back what the device has forgotten, after the `held` blocks that it has."""
        if self.below is None:
            return None
        # What was refused before may be taken now.
        self.below.save(tokens[: held * self._block_tokens], 0, salt)
        return self.below.begin_load(tokens, held, salt)

    def looked(self, cached: int, found: int) -> None:
        """Say what a request found that came just now."""
        self._finds.looked(cached, found, time.monotonic())

    def prefetch(self, tokens: Sequence[int], salt: str) -> Prefetch | None:
        """Begin to bring what only slow tiers have of a prompt to host memory, ahead of its `match`."""
        return None if self.below is None else self.below.prefetch(tokens, salt)

    def seal(self, tokens: Sequence[int], blocks: list[int], salt: str) -> None:
        """Let the full blocks of a sequence be found."""
        self._exchange(self.cache.seal(tokens, blocks, salt=salt), blocks)

    def match_keys(self, keys: Sequence[bytes], salt: str) -> list[int]:
        """Find the longest run of keys from the first, and own its blocks."""
        return self.cache.match_keys(keys, salt=salt)[1]

    def seal_keys(self, keys: Sequence[bytes], blocks: list[int], salt: str, after: bytes | None) -> None:
        """Let blocks be found by keys."""
        self._exchange(self.cache.seal_keys(keys, blocks, after=after, salt=salt), blocks)

    def _exchange(self, sealed: Sealed, blocks: list[int]) -> None:
        """Put what was there already into the place of copies."""
        for _, place, own, found in sealed.duplicates:
            try:
                self._group.fork([found])
            except RegionError:
                continue  # nobody owns it: it may be evicted at any moment
            self._group.free([own])
            blocks[place] = found

    def save(self, tokens: Sequence[int], new: int, salt: str) -> None:
        """Let the last `new` full blocks of a sealed sequence be kept below the device."""
        if self.below is not None:
            self.below.save(tokens, max(0, len(tokens) // self._block_tokens - new), salt)

    def computed(self, tokens: int, seconds: float, requests: int) -> None:
        """Say how long a step took that computed so many tokens for so many requests."""
        if self._prompts.saw(tokens, seconds, requests) and self.below is not None:
            self.below.computed(tokens, seconds)

    @property
    def back_us_per_mib(self) -> int:
        """What a MiB of a prefix takes to come back (microseconds); 0 while nobody knows.

        It is computed again, or comes from below where that was measured to be faster.
        """
        ways = []
        if self._prompts.us_per_token is not None:
            ways.append(self._prompts.us_per_token * self._tokens_per_mib)
        if self.below is not None and (load_us := self.below.load_us_per_mib()) is not None:
            ways.append(load_us)
        return rounded(min(ways)) if ways else 0

    @property
    def found_milli(self) -> int:
        """What part of what is cached one use finds again, in thousandths."""
        return max(1, round(self._finds.share * 1_000))

    def forget_all(self) -> None:
        """Let nothing be found any more; what was saved before is what it was."""
        if self.below is not None:
            self.below.discard_queued()
        self.cache.forget_all()

    def hint(self, blocks: int) -> None:
        """Let the cache's thread map what the next step will take, while this one is computed."""
        if blocks or self._hinted:
            self._group.hint(blocks)
        self._hinted = blocks

    def compact(self) -> dict[int, int]:
        """Move blocks together where a good part of the memory lies idle between them."""
        usage = self.cache.usage()
        scattered = usage["mapped"] - usage["empty"] - usage["live"] - usage["cached"]
        if scattered < max(_SCATTERED_BYTES_MIN, usage["mapped"] // _SCATTERED_PART):
            return {}
        most = max(1, _MOVED_BYTES_MAX // self._group.block_bytes)
        try:
            moves = dict(self._group.compact(apply=True, moves_max=most, timeout_s=_COMPACT_S))
        except Error as error:  # nothing has moved: something is on the host, or another operation runs
            logger.info("KV blocks stay where they are for now: %s", error)
            return {}
        if moves:
            after = self.cache.usage()
            logger.debug("%d KV blocks moved together; %d bytes between them before", len(moves), scattered)
            logger.debug("%d bytes are empty now, %d were", after["empty"], usage["empty"])
        return moves

    def record_step(self, stream: Any) -> None:
        """Say that a step was launched."""
        self.cache.record_step(stream)

    def trim(self, *, cached: bool) -> None:
        """Give back the memory in which nothing lies, or nothing that somebody owns."""
        usage = self.cache.usage()
        if usage["empty"] or (cached and usage["cached"]):
            self.cache.trim(cached=cached)

    @property
    def mapped_bytes(self) -> int:
        """Device bytes, whole pages (after a reclaim, their contents may lie on the host)."""
        return self.cache.usage()["mapped"]

    @property
    def live_bytes(self) -> int:
        """Bytes of the blocks that have an owner."""
        return self.cache.usage()["live"]


class DeviceMemory:
    """One worker's share of a device.

    Parameters
    ----------
    mem
        The process's memory manager.
    overhead
        On a GPU: what the process takes beside its regions.
    """

    def __init__(self, mem: MemoryManager, overhead: Overhead | None = None) -> None:
        self._mem = mem
        self._overhead = overhead
        self._kv: DeviceKv | None = None
        self._weights: Region | None = None  # where steps run beside its wakes
        self._is_wanted: Callable[[], bool] | None = None
        self._at_rest: WeightsAtRest | None = None

    def warm_up(self, dtype: torch.dtype) -> None:
        """Load what the first step would load: libraries, kernels, workspaces. Needs no weights."""
        if self._overhead is not None:
            self._overhead.warm_up(dtype)

    def overhead_peak(self) -> int | None:
        """Device bytes that the process has taken at most beside its regions."""
        return None if self._overhead is None else self._overhead.peak()

    def overhead(self) -> int | None:
        """Device bytes that it has taken at most since this was last called."""
        return None if self._overhead is None else self._overhead.measured()

    @property
    def steps_in_order(self) -> bool:
        """Whether a step may begin while the bytes of its weights are still coming."""
        return self._weights is not None

    @contextmanager
    def guard(
        self, timeout_s: float, is_wanted: Callable[[], bool] | None = None, *, tokens: int = 0
    ) -> Iterator[bool]:
        """Keep everything resident while inside; the weights' bytes may still be coming, and layers wait for theirs.

        Raises
        ------
        ShortageError
            What is missing could not be brought back in time, also while inside: then the step may be run again.
        """
        if self._overhead is not None:
            # Outside: whoever has to give memory up for it may wait for this guard. Both share one deadline.
            deadline = time.monotonic() + timeout_s
            self._overhead.begin_step(tokens, timeout_s)
            timeout_s = max(deadline - time.monotonic(), 0.0)
        guard = self._mem.guard(timeout_s=timeout_s, in_order=self._weights)
        try:
            guard.__enter__()
        except (OutOfMemoryError, LeaseError, DeadlineError, TransferError) as error:
            if self._overhead is not None:
                self._overhead.leave_step()
            raise ShortageError(str(error)) from error
        is_beside = guard.wake is not None
        self._is_wanted = is_wanted
        try:
            yield is_beside
        except Error as error:
            if not is_beside:
                raise
            raise ShortageError(f"the rest of a wake did not come: {error}") from error
        finally:
            self._is_wanted = None
            guard.__exit__(None, None, None)
            if self._overhead is not None:
                self._overhead.end_step(tokens)

    def _is_cancelled(self) -> bool:
        return self._is_wanted is not None and not self._is_wanted()

    def place(
        self,
        module: torch.nn.Module,
        files: Path | None = None,
        progress: Callable[[int, int], None] | None = None,
        at_rest: WeightsAtRest | None = None,
    ) -> int:
        """Move the parameters of `module` into a region; returns its bytes. Needs no device memory.

        Parameters
        ----------
        module
            On the CPU.
        files
            The directory it was loaded from: what is there need not be kept in host memory as well.
        progress
            Told bytes placed and bytes in all.
        at_rest
            Where the weights are stored, or will be. Where they are, `module` may be blank.

        Raises
        ------
        LoadError
            The host budget is too small, or the files changed while they were read.
        TierError
            What is stored cannot be used. It is found no more.
        """
        stored = None if at_rest is None else at_rest.stored
        try:
            placement = shoal.torch.place(
                module,
                self._mem,
                # Compared byte by byte: not where it is known already.
                sources=None if files is None else lambda: shoal.torch.safetensors_sources(files, module),
                stored=stored,
                directory=files or "",
                is_blank=stored is not None,
                release_early=True,
                progress=progress,
            )
        except OutOfMemoryError as error:
            raise LoadError("host_budget", f"the weights do not fit into the host budget: {error}") from error
        except TransferError as error:
            raise LoadError("model_corrupt", f"{files}: the files changed while they were read: {error}") from error
        if at_rest is not None:
            self._at_rest = at_rest
            at_rest.place(placement)
        for reason in self._mem.host_memory()["reasons"]:
            logger.info("memory for host copies: %s", reason)
        if os.environ.get(_WHOLE) != "1":
            # The engines call the whole model, under a guard of everything.
            shoal.torch.attach(
                module, placement.region, timeout_s=_BYTES_S, is_cancelled=self._is_cancelled, parts=False
            )
            self._weights = placement.region
        return placement.region.bytes

    def kv(self, layout: KvLayout, blocks: int, *, is_caching: bool) -> DeviceKv:
        """Reserve address space for `blocks` KV blocks or more."""
        self._kv = DeviceKv(self._mem, layout, blocks, is_caching=is_caching)
        return self._kv

    def keep_below(
        self,
        host_bytes: int,
        disks: Sequence[DiskShare],
        facts: Callable[[], Mapping[str, str]],
        wait_s: float = 1.0,
        *,
        chooses: bool = False,
        idle_s: float | None = None,
        key_file: str | None = None,
        remote: RemoteShare | None = None,
    ) -> None:
        """Keep the KV cache's prefixes in tiers below the device as well, where there is a cache that finds them again.

        Parameters
        ----------
        host_bytes
            How much memory keeps them; 0 for none.
        disks
            Where on disk.
        facts
            Gives what they depend on beside their tokens; called in the background.
        wait_s
            How long a prompt waits for what is there of it.
        chooses
            Whether what is computed faster than loaded is computed.
        idle_s
            How long a conversation stays on the device unused once it is kept below; None for as long as there is room.
        key_file
            The key that what is on disk is encrypted with; None where it is not.
        remote
            What several servers keep KV in together; None for nothing.
        """
        if not (host_bytes or disks or remote) or self._kv is None or not self._kv.is_caching:
            return
        if not self._kv.is_uniform:
            logger.info("KV is kept on the device only: tiers below it take no model with sliding window layers yet")
        else:
            self._kv.below = KvBelow(
                self._kv.cache,
                host_bytes,
                disks,
                facts,
                wait_s,
                chooses=chooses,
                idle_s=idle_s,
                memory=self._mem,
                key_file=key_file,
                remote=remote,
            )

    def tiers(self) -> list[dict[str, Any]]:
        """Give what the tiers below the device did for the KV cache."""
        return [] if self._kv is None or self._kv.below is None else self._kv.below.figures()

    def weights_at_rest(self) -> dict[str, Any] | None:
        """Give how the weights at rest are; None where they are not kept."""
        return None if self._at_rest is None else self._at_rest.figures()

    def store_weights(self) -> None:
        """Begin to store the weights where they are kept at rest, if they are not there; once the model serves."""
        if self._at_rest is not None:
            self._at_rest.fill()

    def close(self) -> None:
        """Write out what is not on disk yet, within a few seconds."""
        if self._at_rest is not None:
            self._at_rest.close()
        if self._kv is not None and self._kv.below is not None:
            self._kv.below.close()

    def trim(self, *, cached: bool = False) -> None:
        """Give back KV memory in which nothing lies, or, with `cached`, nothing that somebody owns."""
        if self._kv is not None:
            try:
                self._kv.trim(cached=cached)
            except Error as error:  # a reclaim finds this memory first anyway
                logger.warning("KV memory without an owner stays for now: %s", error)
        if self._overhead is not None:
            self._overhead.release_cached()
