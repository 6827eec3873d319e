"""One device's memory in this process."""

from __future__ import annotations

import atexit
import os
import shutil
import tempfile
from pathlib import Path
from typing import TYPE_CHECKING, Any, Literal

from shoal import _native
from shoal.kv_cache import KvCache, KvGroupSpec
from shoal.memory import machine
from shoal.memory.region import Backing, Kind, Region
from shoal.memory.sizes import Size, parse_size
from shoal.wake import TIMEOUT_S, Guard, Report

if TYPE_CHECKING:
    from collections.abc import Sequence

    from shoal._native import BrokerClient

__all__ = ["MemoryManager"]


class MemoryManager:
    """One device's memory in this process.

    Parameters
    ----------
    device
        ``"sim"`` (host memory that behaves as a device), ``"cuda:N"`` (a GPU, numbered as the process sees them), or
        ``"auto"``. ``"auto"`` takes the first GPU, and the simulated device only where there is no NVIDIA device.
    device_budget
        The most device bytes its regions may hold. By default: what is free, less 1 GiB; for a simulated device, its
        capacity. With a broker, the broker decides.
    host_budget
        The most host bytes that copies may take. By default: half of what is available.
    broker
        The server's control connection, in a worker.
    device_capacity
        Bytes of the simulated device; by default, ``device_budget`` or at most 1 GiB.
    runtime_dir
        The directory that makes simulated devices of several processes one. By default: the broker's, else one for this
        manager alone.

    overhead
        With a broker: what the process takes on the device besides its regions (context, libraries, torch's own pool).
        It is leased before the device is opened, and held until the process ends.

    Raises
    ------
    LeaseError, DeadlineError
        If the broker has no room for the overhead.
    DeviceError
        If the device cannot be used; the message says why and what would help. Where a real one exists, ``"auto"`` says
        so too, instead of simulating one.
    ValueError
        If a size cannot be read.
    """

    __slots__ = ("__weakref__", "_native", "device")

    def __init__(
        self,
        device: str = "auto",
        *,
        device_budget: Size | None = None,
        host_budget: Size | None = None,
        broker: BrokerClient | None = None,
        device_capacity: Size | None = None,
        runtime_dir: str | os.PathLike[str] | None = None,
        overhead: Size | None = None,
    ) -> None:
        welcome = None if broker is None else broker.welcome
        if welcome is not None:
            if device == "auto":
                device = welcome["device"]
            device_capacity = welcome["device_bytes"] if device_capacity is None else device_capacity
            host_budget = welcome["host_budget"] if host_budget is None else host_budget
            runtime_dir = Path(broker.path).parent if broker is not None and runtime_dir is None else runtime_dir
        self.device = machine.choose_device(device)
        budget = None if device_budget is None else parse_size(device_budget)
        host = machine.host_budget_default() if host_budget is None else parse_size(host_budget)
        if device_capacity is not None:
            capacity = parse_size(device_capacity)
        else:
            capacity = budget if budget is not None else min(machine.SIM_BYTES_MAX, machine.host_budget_default())
        own_dir = None
        if runtime_dir is None:
            runtime_dir = own_dir = tempfile.mkdtemp(prefix="shoal-")
        # Regions and caches outlive their manager, and their device finds its ledger by name: it stays to the end.
        if own_dir is not None:
            atexit.register(_remove, own_dir, os.getpid())
        self._native = _native.MemoryManager(
            self.device,
            capacity,
            budget,
            host,
            os.fspath(runtime_dir),
            broker,
            0 if overhead is None else parse_size(overhead),
        )

    def region(
        self, name: str, nbytes: Size | None = None, *, kind: Kind = "weights", backing: Backing | None = None
    ) -> Region:
        """Reserve a range of addresses. It takes no memory.

        Parameters
        ----------
        name
            For messages and reports.
        nbytes
            How long it is; rounded up to whole pages. Without it the region grows: torch fills it, inside
            :func:`shoal.torch.use_region`.
        kind
            What it is for. Under pressure, KV memory that no block uses yields first, then regions whose bytes may be
            discarded, then ``"weights"`` from the last extent backwards, then KV that is used.
        backing
            Whether its bytes are kept when device memory is taken away. By default they are, except a workspace's.

        Returns
        -------
        Region
            Its address stays the same for its life.

        Raises
        ------
        DeviceError
            If the range cannot be reserved.
        ValueError
            If ``kind`` or ``backing`` is unknown, or ``nbytes`` is 0.
        """
        if backing is None:
            backing = "discard" if kind == "workspace" else "keep"
        length = None if nbytes is None else parse_size(nbytes)
        return Region(self._native.region(name, length, kind, backing), self._native)

    def kv_cache(
        self,
        *,
        max_bytes: Size,
        layers: int | None = None,
        kv_heads: int | None = None,
        head_dim: int | None = None,
        dtype: Any = "bfloat16",
        block_tokens: int = 16,
        groups: Sequence[KvGroupSpec] | None = None,
        layout: Literal["block", "layer"] = "block",
        name: str = "kv",
        granule_max: Size | None = None,
        spare_max: Size | None = None,
        patience_s: float = 0.1,
        eviction: Literal["lru", "s3fifo", "cost"] | None = "lru",
        events_max: int = 4096,
        seed: int = 0,
        debug: bool = False,
    ) -> KvCache:
        """Reserve addresses for a cache of KV blocks. It takes no memory yet, and starts one thread.

        Parameters
        ----------
        max_bytes
            The most memory it may ever have, over all groups; rounded up to whole granules.
        layers, kv_heads, head_dim, dtype, block_tokens
            One group of full attention named ``"full"``. Or give ``groups``.
        groups
            Layers with blocks of their own: sliding windows, latent attention, recurrent states. They share
            ``max_bytes``; which of them takes it is decided while it runs.
        layout
            ``"block"``: all layers of a block side by side, so that one piece of memory serves whole blocks.
            ``"layer"``: a plane for each layer, for engines that insist; growing takes as many driver calls as there
            are layers.
        name
            For messages and reports.
        granule_max
            The most memory that comes or goes at a time. How much does is decided by demand, from one page (2 MiB, in
            each plane) up. By default 256 MiB, and 512 MiB for ``"layer"``.
        spare_max
            The most memory kept mapped ahead of need by what demand foretells; by default an eighth of ``max_bytes``,
            at most 2 GiB. What is hinted (:meth:`KvCache.hint`) comes whatever is said here.
        patience_s
            How long an allocation that has to map may wait for a lease, in seconds.
        eviction
            Which cached blocks go first: those unused for longest, by three queues (S3-FIFO), or those that are
            cheapest to compute again. None: nothing is found again, as it is where there are only states. Groups whose
            blocks have different tokens need None: no step along a sequence is a block of each.
        events_max
            How many events are kept for routers.
        seed
            Of the keys in events; equal seeds give equal keys in every process.
        debug
            Fill what is freed with NaN, and look for writes to what nobody owns (:meth:`KvCache.strays`). Every call
            then waits for the device.

        Returns
        -------
        KvCache
            Its tensors are valid for as long as anything holds them.

        Raises
        ------
        ValueError
            If the sizes are no layout, ``seed`` is no integer from 0 to 2^64 - 1, or prefixes shall be found in groups
            whose blocks have different tokens; the message says which.
        DeviceError
            If the range cannot be reserved.
        """
        if groups is None:
            if layers is None or kv_heads is None or head_dim is None:
                raise ValueError("a KV cache needs layers, kv_heads and head_dim, or groups")
            groups = [KvGroupSpec("full", layers, head_dim, "full", kv_heads, block_tokens, dtype=dtype)]
        elif not (layers is None and kv_heads is None and head_dim is None):
            raise ValueError("give groups, or layers, kv_heads and head_dim, not both")
        elif wrong := [spec for spec in groups if not isinstance(spec, KvGroupSpec)]:
            raise TypeError(f"groups must be KvGroupSpecs, not {type(wrong[0]).__name__}")
        if not (isinstance(seed, int) and 0 <= seed < 1 << 64):
            raise ValueError(f"seed must be an integer from 0 to 2^64 - 1, not {seed!r}")
        if granule_max is None:
            granule_max = "512MiB" if layout == "layer" else "256MiB"
        return KvCache(
            self._native,
            name,
            groups,
            layout=layout,
            max_bytes=parse_size(max_bytes),
            granule_max=parse_size(granule_max),
            spare_max=None if spare_max is None else parse_size(spare_max),
            patience_s=patience_s,
            eviction=eviction,
            seed=seed,
            events_max=events_max,
            debug=debug,
        )

    def guard(self, timeout_s: float = TIMEOUT_S, *, in_order: Region | None = None) -> Guard:
        """Give a context in which every region is resident and stays so.

        Entering it brings back what is missing. No forward may run without one (I13). Do not ask for memory inside
        (``commit``, ``KvBacking.back``): whoever gives memory up waits for this guard to end. A guard inside a guard
        brings nothing back: where something is missing it raises at once.

        Parameters
        ----------
        timeout_s
            How long entering may take, in seconds.
        in_order
            A region whose bytes may still be coming: enter as soon as a wake of it has all of its memory, as
            :meth:`Region.guard` does with its own ``in_order``. The body then uses a range of it only after
            ``guard.wake.wait_stream(offset, nbytes, stream)``, if there is a :attr:`Guard.wake`; modules that
            :func:`shoal.torch.attach` was called for do that by themselves. All other regions are resident.

        Returns
        -------
        Guard
            For one ``with`` statement. It raises, on entering: :class:`OutOfMemoryError` or :class:`LeaseError` if
            there is no room, :class:`TransferError` if a copy failed, :class:`DeadlineError` if it took too long.

        Raises
        ------
        ForkError
            In a process other than the one that made the manager.
        """
        return Guard(self._native, timeout_s, None if in_order is None else in_order._native)

    def swap(
        self, out: Region, into: Region, *, trust_clean: bool = False, timeout_s: float = TIMEOUT_S
    ) -> tuple[Report, Report]:
        """Take one region off the device and bring another there, both ways at once, in the room of the first.

        Waits for the guards of both; steps on other regions go on.

        Parameters
        ----------
        out
            What leaves: without a copy where it is clean, else to the host.
        into
            What comes, whole. What it needs beyond the room of the first is leased before anything moves.
        trust_clean
            As for :meth:`Region.sleep`.
        timeout_s
            How long it may take in all, in seconds.

        Returns
        -------
        tuple of (Report, Report)
            What left, and what came.

        Raises
        ------
        RegionError
            If the regions are of two kinds or managers, or the same. Nothing has moved then.
        LeaseError
            If ``into`` needs more than there is. Nothing has moved then.
        OutOfMemoryError
            If what must be copied does not fit into the host budget: nothing has moved then, unless what was believed
            to be clean turns out to be written while it leaves. Or if the device is full. The same call goes on.
        TransferError, DeadlineError
            If a copy failed, or it took too long. What had left is on the host and what had come is on the device;
            the same call goes on from there.
        """
        left, came = self._native.swap(out._native, into._native, trust_clean, timeout_s)
        return Report._of(left, whole=True), Report._of(came, whole=True)

    def reclaim(self, nbytes: Size, *, timeout_s: float = TIMEOUT_S, reason: str = "asked for") -> Report:
        """Give up device memory, in the order in which it is missed least.

        KV memory that no block uses, then what may be discarded, then weights from the last extent backwards, then KV
        that is used (copied to the host first).

        Parameters
        ----------
        nbytes
            How many bytes; all there are, if there are fewer.
        timeout_s
            How long it may wait for guards, in seconds.
        reason
            Why, in a sentence, for logs.

        Returns
        -------
        Report
            What was freed: less than was asked if there was not more, or if something stood in the way of it (see
            :attr:`Report.error`), such as a host budget that what must be copied does not fit into.

        Raises
        ------
        DeadlineError
            If running steps did not let go of their guards in time. Nothing was freed.
        """
        return Report._of(self._native.reclaim(parse_size(nbytes), timeout_s, reason), whole=False)

    def lease_ahead(self, kind: Kind, nbytes: Size, *, timeout_s: float = TIMEOUT_S, reason: str = "a start") -> None:
        """Lease device memory for regions that will be filled, before it is needed piece by piece.

        Parameters
        ----------
        kind
            What it is for; what regions of this kind commit comes out of it first.
        nbytes
            How many bytes.
        timeout_s
            How long it may wait for others to give memory up, in seconds.
        reason
            Why, in a sentence, for people.

        Raises
        ------
        LeaseError
            If it cannot be had in time. Nothing was leased.
        """
        self._native.lease_ahead(kind, parse_size(nbytes), timeout_s, reason)

    def give_up_leases(self) -> int:
        """Give back what :meth:`lease_ahead` leased and no region has needed.

        Returns
        -------
        int
            How many bytes.

        Raises
        ------
        Error
            If the manager is closed.
        """
        return self._native.give_up_leases()

    def set_overhead(self, nbytes: Size, *, timeout_s: float = TIMEOUT_S) -> None:
        """Make the lease for what the process takes besides its regions smaller or larger.

        Parameters
        ----------
        nbytes
            How many bytes it is to be: context, libraries, activations.
        timeout_s
            How long a larger one may wait for others to give memory up, in seconds.

        Raises
        ------
        LeaseError
            If it cannot be had in time. The lease is as it was.
        """
        self._native.set_overhead(parse_size(nbytes), timeout_s)

    def usage(self) -> dict[str, Any]:
        """Give bytes by kind and place.

        Returns
        -------
        dict
            ``weights_device``, ``weights_total``, ``kv_device``, ``kv_live``, ``kv_cached`` (prefixes that no request
            uses), ``kv_back_us_per_mib`` and ``kv_found_milli`` (always 0 here: a worker says them to its server),
            ``overhead_device``, ``pooled`` (given up by regions, and kept leased for a moment for the next growth),
            ``host``, ``source_only``, and since the start ``onboarded`` and ``evicted``.

        Raises
        ------
        ForkError
            In a process other than the one that made the manager.
        """
        return self._native.usage()

    def host_memory(self) -> dict[str, Any]:
        """Give how much memory for host copies there is, and why it is as it is.

        Returns
        -------
        dict
            In bytes: ``budget``, ``used`` (by copies), ``made`` (for copies that are there and for those to come),
            ``locked`` (made and page-locked) and ``spare`` (made and free). ``reasons`` is a list of sentences: what
            the memory is made of and why, and why something is not as fast as it could be.

        Raises
        ------
        ForkError
            In a process other than the one that made the manager.
        """
        return self._native.host_memory()

    def device_memory(self) -> dict[str, int]:
        """Give the device's own figures.

        Returns
        -------
        dict
            ``total``, ``free`` and ``used_by_this_process``, in bytes.

        Raises
        ------
        DeviceError
            If the device cannot be asked.
        """
        return self._native.device_memory()

    def __repr__(self) -> str:
        return f"<MemoryManager on {self.device}>"


def _remove(directory: str, owner: int) -> None:
    """Remove a manager's own directory, unless this process is a fork of the one that made it."""
    if os.getpid() == owner:
        shutil.rmtree(directory, ignore_errors=True)
