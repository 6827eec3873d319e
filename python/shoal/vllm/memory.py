"""The memory of one vLLM worker: a region for weights, one for CUDA graphs, and the KV cache."""

from __future__ import annotations

import contextlib
import logging
import time
from typing import TYPE_CHECKING, Any, Literal, TypeAlias

import torch

import shoal
from shoal import torch as shoal_torch
from shoal.errors import DeadlineError, LeaseError, OutOfMemoryError
from shoal.vllm.cache import ElasticCache, Plan
from shoal.wake import TIMEOUT_S, Guard

if TYPE_CHECKING:
    from collections.abc import Callable, Iterator

    from shoal.memory import MemoryManager, Region

__all__ = ["EngineMemory", "KvWhileAsleep"]

KvWhileAsleep: TypeAlias = Literal["keep", "forget"]
"""What becomes of cached blocks: kept in host memory, or forgotten."""

logger = logging.getLogger("vllm.shoal")

GUARD_WAIT_S = 5.0
"""How long one attempt to have everything back may take."""

REFUSED_S = 0.02
"""How long it waits between two attempts."""

FORGET_AFTER = 2
"""Attempts after which cached blocks are forgotten, so that a step needs less."""


class EngineMemory:
    """A worker's memory.

    Parameters
    ----------
    device
        ``"cuda:N"``, or ``"sim"`` in tests.
    mem
        Where it lies, if a server has a say in it; else it is the process's own.

    Attributes
    ----------
    mem : MemoryManager
        All of it.
    cache : ElasticCache or None
        The KV cache, once vLLM has said how large it is.
    block_tokens : int
        Tokens of one of its blocks.
    tokens_per_mib : float
        Tokens whose KV is a MiB, if all groups of layers keep all of them. Those with windows or states keep less, so
        of a long prompt a MiB is more tokens than that.
    waiting
        Gives a context in which the engine's loop waits for memory.
    """

    def __init__(self, device: str, mem: MemoryManager | None = None) -> None:
        self.mem = shoal.MemoryManager(device) if mem is None else mem
        # Where others have a say, a step waits for its memory, and nothing of it is exempt.
        self.is_shared = mem is not None
        self._is_simulated = self.mem.device.startswith("sim")
        self._regions: dict[str, Region] = {}
        if not self._is_simulated:
            self._regions = {name: self.mem.region(name) for name in ("weights", "graphs")}
        self.cache: ElasticCache | None = None
        self.block_tokens = 0
        self.tokens_per_mib = 0.0
        self._graph_pool: Any = None
        self._is_asleep = False
        self._is_trimmed = True
        self.waiting: Callable[[], contextlib.AbstractContextManager[Any]] = contextlib.nullcontext

    @property
    def is_asleep(self) -> bool:
        """Whether :meth:`sleep` was called last, and not :meth:`wake`."""
        return self._is_asleep

    def filling_weights(self) -> contextlib.AbstractContextManager[Any]:
        """Give a context in which what torch allocates on this thread lies in the region of weights."""
        if self._is_simulated:
            return contextlib.nullcontext()
        return shoal_torch.use_region(self._regions["weights"])

    def place(self, model: Any) -> None:
        """Move weights into a region on a simulated device, where torch's allocator has no pools; nothing on a GPU.

        Parameters
        ----------
        model
            A module.
        """
        if self._is_simulated:
            self._regions["weights"] = shoal_torch.place(model, self.mem).region

    def graph_pool(self) -> Any:
        """Give the handle of the pool that CUDA graphs are captured into.

        Returns
        -------
        tuple of int
            What ``torch.cuda.graph`` takes.
        """
        if self._graph_pool is None:
            self._graph_pool = shoal_torch.pool(self._regions["graphs"])
        return self._graph_pool.id

    def make_cache(self, config: Any) -> ElasticCache:
        """Reserve the KV cache.

        Parameters
        ----------
        config
            vLLM's ``KVCacheConfig``.

        Returns
        -------
        ElasticCache
            It has no memory yet.

        Raises
        ------
        RegionError
            If it cannot be elastic.
        """
        self.cache = ElasticCache(self.mem, Plan.of(config), yields=self.is_shared)
        sizes = [group.kv_cache_spec.block_size for group in config.kv_cache_groups]
        self.block_tokens = max(sizes, default=0)
        per_token = sum(self.cache.plan.nbytes / self.cache.blocks / size for size in sizes)
        self.tokens_per_mib = (1 << 20) / per_token if per_token else 0.0
        return self.cache

    def freeze(self) -> None:
        """Declare that weights and graphs are in place: they are copied to the host in the background."""
        if not self._is_simulated:
            for region in self._regions.values():
                if region.usage()["total"]:
                    region.freeze()

    def guard(self) -> Guard:
        """Give a context in which all of it is there; entering it wakes what sleeps."""
        return self.mem.guard()

    def enter(self, patience_s: float) -> Guard:
        """Enter a guard, and wait for memory where others have it now.

        Cached blocks that nobody uses are forgotten where all of it does not come back: a step needs the rest.

        Parameters
        ----------
        patience_s
            How long, in seconds.

        Returns
        -------
        Guard
            Held; the caller lets it go.

        Raises
        ------
        LeaseError, OutOfMemoryError, DeadlineError
            It did not come in time.
        """
        deadline = time.monotonic() + patience_s
        tries = 0
        while True:
            guard = self.mem.guard(min(GUARD_WAIT_S, max(deadline - time.monotonic(), 0.1)))
            try:
                with self.waiting():
                    return guard.__enter__()
            except (LeaseError, OutOfMemoryError, DeadlineError) as error:
                if time.monotonic() >= deadline:
                    raise
                tries += 1
                if tries == 1 or tries % 10 == 0:
                    logger.warning("A step waits for its memory: %s", error)
                if tries >= FORGET_AFTER and self.cache is not None and self.cache.pool is not None:
                    self.cache.pool.forget()
                # What is refused at once is not asked for without end.
                time.sleep(REFUSED_S)

    def step_back(self) -> bool:
        """Give up the weights' device memory in the midst of a start; :meth:`wake` brings them back.

        Returns
        -------
        bool
            False if they do not fit into the host budget, or not in time: then some of them may have gone.
        """
        try:
            for region in self._regions.values():
                region.sleep(timeout_s=TIMEOUT_S)
        except (OutOfMemoryError, DeadlineError) as error:
            logger.warning("Weights cannot leave the device while the engine starts: %s", error)
            return False
        return True

    def sleep(self, kv: KvWhileAsleep = "keep", *, timeout_s: float = TIMEOUT_S) -> dict[str, Any]:
        """Give up all device memory. Nothing may be running.

        Parameters
        ----------
        kv
            What becomes of cached KV blocks.
        timeout_s
            How long each part may take, in seconds.

        Returns
        -------
        dict
            ``seconds``, and for each part ``freed`` and ``copied`` bytes and its ``seconds``.

        Raises
        ------
        OutOfMemoryError
            If what has changed does not fit into the host budget. What has gone stays gone; :meth:`wake` brings it.
        DeadlineError, TransferError, DeviceError
            Likewise.
        """
        began = time.perf_counter()
        parts: dict[str, Any] = {}
        self._is_asleep = True
        if self.cache is not None and kv == "forget":
            parts["forgotten"] = {"freed": self.cache.forget(), "copied": 0, "seconds": time.perf_counter() - began}
        for name, region in self._parts():
            report = region.sleep(timeout_s=timeout_s)
            parts[name] = {"freed": report.freed, "copied": report.copied, "seconds": report.duration_s}
        seconds = time.perf_counter() - began
        # What torch caches outside of regions is nobody's while this sleeps.
        self._empty_cache()
        return {"seconds": seconds, "cache_seconds": time.perf_counter() - began - seconds, **parts}

    def wake(self, *, timeout_s: float = TIMEOUT_S) -> dict[str, Any]:
        """Bring everything back, at the same addresses.

        Parameters
        ----------
        timeout_s
            How long it may take, in seconds.

        Returns
        -------
        dict
            ``seconds`` and ``restored`` bytes.

        Raises
        ------
        OutOfMemoryError, LeaseError, TransferError, DeadlineError
            If something could not be brought back; call it again.
        """
        began = time.perf_counter()
        before = sum(region.usage()["device"] for _, region in self._parts())
        for transfer in [region.wake(wait=False, timeout_s=timeout_s) for _, region in self._parts()]:
            transfer.wait(timeout_s)
        restored = sum(region.usage()["device"] for _, region in self._parts()) - before
        self._is_asleep = False
        return {"seconds": time.perf_counter() - began, "restored": restored}

    @contextlib.contextmanager
    def step(self, patience_s: float = TIMEOUT_S) -> Iterator[None]:
        """Hold everything while a step is launched, and mark the step when it was.

        Parameters
        ----------
        patience_s
            How long it may wait for its memory, in seconds.
        """
        guard = self.enter(patience_s) if self.is_shared else self.guard().__enter__()
        self._is_trimmed = False
        try:
            yield
        finally:
            try:
                if self.cache is not None and not self._is_simulated and not torch.cuda.is_current_stream_capturing():
                    self._mark(self.cache)
            finally:
                guard.__exit__(None, None, None)

    def _mark(self, cache: ElasticCache) -> None:
        """Say what has to end before memory goes that is free by now: this step, and copies of a connector."""
        cache.kv.record_step(torch.cuda.current_stream())
        if cache.transfers is not None:
            for stream in cache.transfers.streams():
                cache.kv.record_step(stream)

    def end_transfers(self) -> None:
        """Begin what a connector is to copy from the device, and wait for all of its copies."""
        transfers = None if self.cache is None else self.cache.transfers
        if transfers is None:
            return
        if transfers.has_waiting:
            with self.step():
                transfers.begin_waiting()
        self.synchronize()

    def synchronize(self) -> None:
        """Wait for what is queued on the device."""
        if not self._is_simulated:
            torch.cuda.synchronize()

    def beside_regions(self) -> int:
        """Give what torch has kept at most outside of regions since :meth:`forget_peak`.

        Returns
        -------
        int
            Bytes; 0 on a simulated device.
        """
        return self._beside(torch.cuda.max_memory_reserved)

    def beside_regions_now(self) -> int:
        """Give what torch keeps outside of regions at the moment.

        Returns
        -------
        int
            Bytes; 0 on a simulated device.
        """
        return self._beside(torch.cuda.memory_reserved)

    def _beside(self, reserved: Callable[[], int]) -> int:
        """Give what of torch's bytes is not in regions, which torch counts whole, asleep too."""
        if self._is_simulated:
            return 0
        regions = sum(region.usage()["total"] for region in self._regions.values())
        return max(reserved() - regions, 0)

    def forget_peak(self) -> None:
        """Begin to look for a new peak."""
        if not self._is_simulated:
            torch.cuda.empty_cache()
            torch.cuda.reset_peak_memory_stats()

    def weights_left(self) -> int | None:
        """Say whether weights were away: the number grows with each time that some of them leave.

        Returns
        -------
        int or None
            Bytes that have left the device so far; None while not all of them are there.
        """
        weights = self._regions["weights"].usage()
        return int(weights["left"]) if weights["device"] == weights["total"] else None

    def host_room(self) -> int:
        """Give host bytes that copies of KV could take, those set apart that weights still need."""
        host = self.mem.host_memory()
        lacking = sum(
            max(one["total"] - one["host"], 0) for one in (region.usage() for region in self._regions.values())
        )
        return max(host["budget"] - host["used"] - lacking, 0)

    def release_unused(self) -> None:
        """Give back what torch caches outside of regions, once after the weights have left."""
        if not self._is_trimmed and not self.mem.usage()["weights_device"]:
            self._is_trimmed = True
            self._empty_cache()

    def _empty_cache(self) -> None:
        if not self._is_simulated:
            torch.cuda.empty_cache()

    def usage(self) -> dict[str, Any]:
        """Give figures in bytes.

        Returns
        -------
        dict
            For ``weights``, ``graphs`` and ``kv`` their ``device``, ``host`` and ``total`` bytes; of the KV cache also
            ``mapped``, ``limit`` and ``reservation``; what ``torch`` has allocated and reserved; the ``device``'s own.
        """
        found: dict[str, Any] = {name: dict(region.usage()) for name, region in self._parts()}
        if self.cache is not None:
            kv = self.cache.kv.usage()
            found["kv"].update({name: kv[name] for name in ("mapped", "limit", "reservation", "live", "empty")})
        if not self._is_simulated:
            found["torch"] = {"allocated": torch.cuda.memory_allocated(), "reserved": torch.cuda.memory_reserved()}
        found["device"] = self.mem.device_memory()
        found["host"] = self.mem.host_memory()
        return found

    def _parts(self) -> list[tuple[str, Region]]:
        parts = list(self._regions.items())
        return parts if self.cache is None else [*parts, ("kv", self.cache.kv.region)]
