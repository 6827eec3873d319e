"""Regions of device memory that keep their address while their bytes move.

A :class:`MemoryManager` owns one device's share of this process. A :class:`Region` is a range of addresses: reserved
once, backed by device memory while it is used, and asleep (its bytes in host memory, or in the file they came from)
while it is not. An address handed out stays reserved until the region and every buffer over it are gone.

Touching a region that is not resident faults, as any unmapped address does: do it inside ``with mem.guard():``, which
brings back what is missing and keeps it there.
"""

from __future__ import annotations

import asyncio
import os
import shutil
import tempfile
import weakref
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any, Literal, TypeAlias

from shoal import _native
from shoal._native import BrokerClient
from shoal.wake import TIMEOUT_S, Guard, RegionGuard, Report, Transfer

if TYPE_CHECKING:
    from collections.abc import Iterable

    from _typeshed import ReadableBuffer


__all__ = [
    "Backing",
    "BrokerClient",
    "Guard",
    "Kind",
    "MemoryManager",
    "Region",
    "RegionGuard",
    "Report",
    "Size",
    "SourcePiece",
    "Transfer",
    "parse_size",
]

Size: TypeAlias = int | str
"""Bytes, or a string such as ``"640MiB"`` or ``"1.5 GiB"``."""

Kind: TypeAlias = Literal["weights", "kv", "workspace"]
"""What a region is for: which lease pays for it, and in which order it yields."""

Backing: TypeAlias = Literal["keep", "discard"]
"""What happens to the bytes when device memory is taken away: copied first, or dropped."""

_SIM_BYTES_MAX = 1 << 30


def parse_size(size: Size) -> int:
    """Give a size in bytes.

    Parameters
    ----------
    size
        Bytes, or a string with a unit: ``"640MiB"``, ``"1.5 GiB"``, ``"2GB"``.

    Returns
    -------
    int
        Bytes.

    Raises
    ------
    ValueError
        If it is negative or cannot be read as a size.
    """
    if isinstance(size, str):
        return _native.parse_bytes(size)
    size = int(size)
    if size < 0:
        raise ValueError(f"a size cannot be negative: {size}")
    return size


@dataclass(frozen=True, slots=True)
class SourcePiece:
    """A place in a file that clean bytes can be read from again.

    Parameters
    ----------
    path
        The file.
    offset
        Where the piece starts in it, in bytes.
    nbytes
        How many bytes of the region it makes.
    conversion
        What is done to the file's bytes to get the region's: nothing, or widening bfloat16 to float32 (so that half as
        many bytes are read).
    """

    path: str | os.PathLike[str]
    offset: int
    nbytes: int
    conversion: Literal["bf16_to_f32"] | None = None


class Region:
    """A range of addresses with a name. Made by :meth:`MemoryManager.region`.

    Its address is fixed for its life. Its bytes are on the device, on the host or in the file they came from, extent by
    extent.
    """

    __slots__ = ("__weakref__", "_native")

    def __init__(self, native: _native.Region) -> None:
        self._native = native

    @property
    def name(self) -> str:
        """The name it was made with."""
        return self._native.name

    @property
    def device(self) -> str:
        """The device it lies on: ``"sim:N"`` or ``"cuda:N"``."""
        return self._native.device

    @property
    def address(self) -> int:
        """The address of its first byte. It never changes."""
        return self._native.address

    @property
    def bytes(self) -> int:
        """Its length in bytes, rounded up to whole pages."""
        return self._native.bytes

    def __len__(self) -> int:
        return self.bytes

    def usage(self) -> dict[str, Any]:
        """Give where its bytes are.

        Returns
        -------
        dict
            Bytes by place: ``device`` (committed), ``host`` (copies), ``source_only`` (nowhere but in their file) and
            ``total``.

        Raises
        ------
        ForkError
            In a process other than the one that made it.
        """
        return self._native.usage()

    def stage(self, offset: int, data: ReadableBuffer, source: SourcePiece | None = None) -> None:
        """Give bytes their place, without any device memory.

        They are copied to host memory. With a ``source``, they may be left where they are if the host budget is short:
        then they are compared with the file first.

        Parameters
        ----------
        offset
            Where in the region, in bytes.
        data
            Any object with a contiguous buffer. It must not be written to meanwhile.
        source
            Where the same bytes can be read again.

        Raises
        ------
        RegionError
            If it does not fit, or the region is sealed.
        OutOfMemoryError
            If the host budget is short and there is no source.
        TransferError
            If the source does not hold these bytes.
        """
        piece = None if source is None else (os.fspath(source.path), source.offset, source.nbytes, source.conversion)
        # A memoryview has strides even where its object has none to show, as ctypes arrays have not.
        self._native.stage(offset, memoryview(data), piece)

    def seal(self) -> None:
        """Declare that all bytes are in place: each extent's checksum is recorded, and it is clean from here on.

        Raises
        ------
        RegionError
            If it is sealed already.
        """
        self._native.seal()

    def commit(self, offset: int, nbytes: int) -> None:
        """Give a range zeroed device memory now. Pages that have it keep it.

        Parameters
        ----------
        offset, nbytes
            The range, in bytes.

        Raises
        ------
        RegionError
            If it lies outside.
        LeaseError, OutOfMemoryError
            If there is no room for it. Nothing has changed then.
        """
        self._native.commit(offset, nbytes)

    def decommit(self, offset: int, nbytes: int) -> None:
        """Take the device memory of a range away, and its bytes with it.

        Parameters
        ----------
        offset, nbytes
            The range, in bytes. Only extents that lie in it wholly are taken.

        Raises
        ------
        RegionError
            If it lies outside, or its bytes are to be kept.
        """
        self._native.decommit(offset, nbytes)

    def sleep(self, keep: float = 0.0, *, trust_clean: bool = False, timeout_s: float = TIMEOUT_S) -> Report:
        """Give up device memory; the address stays.

        Clean extents are unmapped without a copy. Waits for guards that are held.

        Parameters
        ----------
        keep
            The share that may stay resident, 0 to 1, from the front of the region; whole extents, so rather less.
        trust_clean
            Do not check by hash that sealed extents were not written to: what was written since is then lost.
        timeout_s
            How long it may wait for guards and copies, in seconds.

        Returns
        -------
        Report
            What was freed and copied.

        Raises
        ------
        ValueError
            If ``keep`` is not in 0..1.
        OutOfMemoryError
            If what must be copied does not fit into the host budget. It stays resident then.
        DeadlineError
            If guards were held, or copies ran, for longer than ``timeout_s``. What was freed stays freed.
        """
        return Report._of(self._native.sleep(keep, trust_clean, timeout_s), whole=True)

    def evict(self, nbytes: Size, *, timeout_s: float = TIMEOUT_S) -> Report:
        """Give up at least so many bytes of device memory, from the last extent backwards.

        Parameters
        ----------
        nbytes
            How many; all there are, if there are fewer.
        timeout_s
            How long it may wait for guards and copies, in seconds.

        Returns
        -------
        Report
            What was freed and copied.

        Raises
        ------
        OutOfMemoryError
            If what must be copied does not fit into the host budget. It stays resident then.
        DeadlineError
            If guards were held, or copies ran, for longer than ``timeout_s``. What was freed stays freed.
        """
        return Report._of(self._native.evict(parse_size(nbytes), timeout_s), whole=True)

    def wake(self, wait: bool = True, timeout_s: float | None = None) -> Transfer:
        """Bring back what is missing, at the same address.

        Parameters
        ----------
        wait
            Whether to return only when it is done. Otherwise :meth:`Transfer.wait` does.
        timeout_s
            How long it may take in all, in seconds; 60 without it.

        Returns
        -------
        Transfer
            Its progress, and its outcome.

        Raises
        ------
        OutOfMemoryError, LeaseError
            If there is no room for it. The region stays as it was.
        TransferError
            If a copy failed. The copy it was made from is still valid.
        DeadlineError
            If it took longer than ``timeout_s``.
        """
        transfer = Transfer(self._native.wake(TIMEOUT_S if timeout_s is None else timeout_s))
        if wait:
            transfer.wait(timeout_s)
        return transfer

    async def wake_async(self, timeout_s: float | None = None) -> Transfer:
        """Bring back what is missing, without holding up the event loop.

        A task that is cancelled meanwhile cancels the wake; what came back so far stays.

        Parameters
        ----------
        timeout_s
            How long it may take in all, in seconds; 60 without it.

        Returns
        -------
        Transfer
            It has ended.

        Raises
        ------
        OutOfMemoryError, LeaseError, TransferError, DeadlineError
            As :meth:`wake`.
        """
        transfer = self.wake(wait=False, timeout_s=timeout_s)
        try:
            await asyncio.to_thread(transfer.wait, timeout_s)
        except asyncio.CancelledError:
            transfer.cancel()
            raise
        return transfer

    @property
    def waking(self) -> Transfer | None:
        """The wake that is under way, if one was started by :meth:`wake` or by a guard in order."""
        native = self._native.waking
        return None if native is None else Transfer(native)

    def set_order(self, ranges: Iterable[tuple[int, int]]) -> None:
        """Set the order in which its bytes are used: wakes bring what is used first, evictions take what is used last.

        Parameters
        ----------
        ranges
            Offset and length in bytes, in order of use. What is in none of them comes last, by address; without any,
            all comes by address.

        Raises
        ------
        RegionError
            If one lies outside. Nothing has changed then.
        """
        self._native.set_order(list(ranges))

    def guard(self, *, in_order: bool = False, timeout_s: float = TIMEOUT_S) -> RegionGuard:
        """Give a context in which this region is resident and stays so.

        Entering it brings back what is missing. Graphs are captured under :meth:`MemoryManager.guard`: beside
        this one other regions are evicted.

        Parameters
        ----------
        in_order
            Enter as soon as a wake has all of its memory, while its bytes still come: the body uses a range only after
            ``guard.wake.wait_stream(offset, nbytes, stream)``, if there is a :attr:`RegionGuard.wake`. Starts the wake
            if none is under way. Until the guard is left, nothing that came is taken away, also if the wake fails.
        timeout_s
            How long entering may take, in seconds.

        Returns
        -------
        RegionGuard
            For one ``with`` statement. It raises, on entering: :class:`OutOfMemoryError` or :class:`LeaseError` if
            there is no room, :class:`TransferError` if a copy failed, :class:`DeadlineError` if it took too long.

        Raises
        ------
        ForkError
            In a process other than the one that made it.
        """
        return RegionGuard(self._native, in_order, timeout_s)

    def buffer(self, offset: int = 0, nbytes: int | None = None) -> _native.RegionBuffer:
        """Give a range of addresses as an object that speaks DLPack and, on a simulated device, has a writable buffer.

        Nothing is touched by this, so the range need not be resident. The object, and whatever is made of it, keeps the
        address reserved. A GPU's memory has no buffer of the CPU's: ``memoryview`` of it raises :class:`BufferError`.

        Parameters
        ----------
        offset
            Where it starts, in bytes.
        nbytes
            How long it is; up to the end, without it.

        Returns
        -------
        RegionBuffer
            Read it and write it only under a guard: it faults where nothing is mapped.

        Raises
        ------
        RegionError
            If it lies outside.
        """
        return self._native.buffer(offset, self.bytes - offset if nbytes is None else nbytes)

    def __repr__(self) -> str:
        return f"<Region {self.name!r} of {self.bytes} bytes at {self.address:#x}>"


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
        self.device = _choose_device(device)
        budget = None if device_budget is None else parse_size(device_budget)
        host = _host_budget_default() if host_budget is None else parse_size(host_budget)
        if device_capacity is not None:
            capacity = parse_size(device_capacity)
        else:
            capacity = budget if budget is not None else min(_SIM_BYTES_MAX, _host_budget_default())
        own_dir = None
        if runtime_dir is None:
            runtime_dir = own_dir = tempfile.mkdtemp(prefix="shoal-")
        # The directory's files are open as long as the device is: removing their names takes nothing from it.
        if own_dir is not None:
            weakref.finalize(self, _remove, own_dir, os.getpid())
        self._native = _native.MemoryManager(
            self.device,
            capacity,
            budget,
            host,
            os.fspath(runtime_dir),
            broker,
            0 if overhead is None else parse_size(overhead),
        )

    def region(self, name: str, nbytes: Size, *, kind: Kind = "weights", backing: Backing | None = None) -> Region:
        """Reserve a range of addresses. It takes no memory.

        Parameters
        ----------
        name
            For messages and reports.
        nbytes
            How long it is; rounded up to whole pages.
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
        return Region(self._native.region(name, parse_size(nbytes), kind, backing))

    def guard(self, timeout_s: float = TIMEOUT_S) -> Guard:
        """Give a context in which every region is resident and stays so.

        Entering it brings back what is missing. No forward may run without one (I13). Do not ask for memory inside
        (``commit``, ``KvBacking.back``): whoever gives memory up waits for this guard to end. A guard inside a guard
        brings nothing back: where something is missing it raises at once.

        Parameters
        ----------
        timeout_s
            How long entering may take, in seconds.

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
        return Guard(self._native, timeout_s)

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
            If what must be copied does not fit into the host budget; nothing has moved then. Or if the device is full.
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

    def usage(self) -> dict[str, Any]:
        """Give bytes by kind and place.

        Returns
        -------
        dict
            ``weights_device``, ``weights_total``, ``kv_device``, ``kv_live``, ``overhead_device``, ``host``,
            ``source_only``, and since the start ``onboarded`` and ``evicted``.

        Raises
        ------
        ForkError
            In a process other than the one that made the manager.
        """
        return self._native.usage()

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


def _choose_device(device: str) -> str:
    """Resolve ``"auto"``; never to a simulation where a real device exists, so that opening that one says why not."""
    if device != "auto":
        return device
    return "cuda:0" if _has_nvidia_device() else "sim"


def _has_nvidia_device() -> bool:
    """Say whether the machine shows an NVIDIA device, whether or not it can be used."""
    if Path("/proc/driver/nvidia/version").exists() or Path("/usr/lib/wsl/lib/libcuda.so.1").exists():
        return True
    return any(path.name[6:].isdigit() for path in Path("/dev").glob("nvidia[0-9]*"))


def _host_budget_default() -> int:
    """Half of the smaller of what is available and what the control group still allows, in bytes."""
    available = None
    for line in Path("/proc/meminfo").read_text(encoding="ascii").splitlines():
        if line.startswith("MemAvailable:"):
            available = int(line.split()[1]) * 1024
    limits = [] if available is None else [available]
    for limit in ("/sys/fs/cgroup/memory.max", "/sys/fs/cgroup/memory/memory.limit_in_bytes"):
        try:
            limits.append(int(Path(limit).read_text(encoding="ascii")))
        except (OSError, ValueError):
            continue
    return min(limits, default=_SIM_BYTES_MAX) // 2
