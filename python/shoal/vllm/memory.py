"""The memory of one vLLM worker: a region for weights, one for CUDA graphs, and the KV cache."""

from __future__ import annotations

import contextlib
import time
from typing import TYPE_CHECKING, Any, Literal, TypeAlias

import torch

import shoal
from shoal import torch as shoal_torch
from shoal.vllm.cache import ElasticCache, Plan
from shoal.wake import TIMEOUT_S, Guard

if TYPE_CHECKING:
    from collections.abc import Iterator

    from shoal.memory import Region

__all__ = ["EngineMemory", "KvWhileAsleep"]

KvWhileAsleep: TypeAlias = Literal["keep", "forget"]
"""What becomes of cached blocks: kept in host memory, or forgotten."""


class EngineMemory:
    """A worker's memory.

    Parameters
    ----------
    device
        ``"cuda:N"``.

    Attributes
    ----------
    mem : MemoryManager
        All of it.
    cache : ElasticCache or None
        The KV cache, once vLLM has said how large it is.
    """

    def __init__(self, device: str) -> None:
        self.mem = shoal.MemoryManager(device)
        self._weights = self.mem.region("weights")
        self._graphs = self.mem.region("graphs")
        self.cache: ElasticCache | None = None
        self._graph_pool: Any = None
        self._is_asleep = False

    @property
    def is_asleep(self) -> bool:
        """Whether :meth:`sleep` was called last, and not :meth:`wake`."""
        return self._is_asleep

    def filling_weights(self) -> contextlib.AbstractContextManager[Any]:
        """Give a context in which what torch allocates on this thread lies in the region of weights."""
        return shoal_torch.use_region(self._weights)

    def graph_pool(self) -> Any:
        """Give the handle of the pool that CUDA graphs are captured into.

        Returns
        -------
        tuple of int
            What ``torch.cuda.graph`` takes.
        """
        if self._graph_pool is None:
            self._graph_pool = shoal_torch.pool(self._graphs)
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
        self.cache = ElasticCache(self.mem, Plan.of(config))
        return self.cache

    def freeze(self) -> None:
        """Declare that weights and graphs are in place: they are copied to the host in the background."""
        for region in (self._weights, self._graphs):
            if region.usage()["total"]:
                region.freeze()

    def guard(self) -> Guard:
        """Give a context in which all of it is there; entering it wakes what sleeps."""
        return self.mem.guard()

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
        torch.cuda.empty_cache()
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
    def step(self) -> Iterator[None]:
        """Hold everything while a step is launched, and mark the step when it was."""
        with self.guard():
            try:
                yield
            finally:
                if self.cache is not None and not torch.cuda.is_current_stream_capturing():
                    self.cache.kv.record_step(torch.cuda.current_stream())

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
        found["torch"] = {"allocated": torch.cuda.memory_allocated(), "reserved": torch.cuda.memory_reserved()}
        found["device"] = self.mem.device_memory()
        found["host"] = self.mem.host_memory()
        return found

    def _parts(self) -> list[tuple[str, Region]]:
        parts = [("weights", self._weights), ("graphs", self._graphs)]
        return parts if self.cache is None else [*parts, ("kv", self.cache.kv.region)]
