"""The object that everything is called on."""

from __future__ import annotations

import atexit
import contextlib
import os
import threading
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch

from shoal.compat.torch_memory_saver.groups import Backup, Generation, Group, Key
from shoal.compat.torch_memory_saver.settings import CpuBackupBackend, Settings, check_backend
from shoal.errors import DeadlineError, DeviceError, RegionError
from shoal.memory import MemoryManager, machine, parse_size
from shoal.torch import graphs, pools
from shoal.wake import TIMEOUT_S

if TYPE_CHECKING:
    from collections.abc import Iterator

__all__ = ["TorchMemorySaver"]

TAG_DEFAULT = "default"
HOST_SHARE = 0.8
"""The share of the available host memory that backups may take where no manager was given."""


class _Slot(pools._Entry):
    """Where a thread's allocations go inside one ``with region()``. A pause moves it to a fresh generation."""

    def __init__(self, group: Group) -> None:
        super().__init__(None, None)
        self.group = group
        self.filling: pools._Filling | None = None
        self.use: Any = None

    def acquire(self) -> None:
        filling = pools._filling(self.group.current().region)
        use = filling.native.begin_use(TIMEOUT_S)
        try:
            self.pool = filling.take()
        except BaseException:
            use.release()
            raise
        self.device, self.filling, self.use = filling.device, filling, use

    def release(self, *, for_good: bool = False) -> None:
        """Give the pool back; for good: with its memory, if nothing lives in it."""
        filling, used = self.filling, self.pool
        if filling is not None:
            if for_good and not any(segment["active_size"] for segment in pools._segments(used)):
                with filling.lock:
                    filling.users -= 1
                filling.end(used)
            else:
                filling.put(used)
            self.use.release()
        self.pool = self.filling = self.use = None


class _Thread(threading.local):
    def __init__(self) -> None:
        self.slots: list[_Slot] = []
        # What is set outside any region, by `enable_everywhere`.
        self.everywhere: _Slot | None = None


class TorchMemorySaver:
    """Tensors whose memory is taken and given back by tag, at addresses that stay.

    Parameters
    ----------
    settings
        What holds until something else is said; the environment's, at first use, without it.
    timeout_s
        How long a pause or a resume may take in all, region by region, in seconds.
    """

    def __init__(self, settings: Settings | None = None, *, timeout_s: float = TIMEOUT_S) -> None:
        self.timeout_s = timeout_s
        self._given = settings
        self._settings: Settings | None = None
        self._hook_mode = "torch"
        self._margin = 0
        self._lock = threading.RLock()
        # A pause marks all work on the device, which would end a capture. Taken before the other.
        self._quiet = threading.RLock()
        self._thread = _Thread()
        self._managers: dict[int, MemoryManager] = {}
        self._groups: dict[Key, Group] = {}
        self._graph_pools: dict[tuple[Key, Any], tuple[Generation, Any]] = {}
        # Where tensors lie inside `disable`: in no tag's memory, so it is never paused.
        self._outside: dict[int, Group] = {}

    @contextlib.contextmanager
    def region(
        self,
        tag: str = TAG_DEFAULT,
        enable_cpu_backup: bool = False,
        enable_disk_backup: bool = False,
        cpu_backup_backend: CpuBackupBackend | None = None,
    ) -> Iterator[None]:
        """Let every CUDA tensor that this thread makes be pausable. May be nested: the innermost counts.

        Parameters
        ----------
        tag
            What :meth:`pause` and :meth:`resume` call it.
        enable_cpu_backup
            Keep its bytes in host memory while it is paused. Without a backup they are undefined after resuming.
        enable_disk_backup
            Keep them in files (see :meth:`set_disk_backup_dir`).
        cpu_backup_backend
            ``"pinned"``: host memory that a resume frees is kept for the next pause. ``"mmap"``: it is given back to
            the system.

        Raises
        ------
        ValueError
            If both backups are asked for, or a backend without a backup in host memory.
        RegionError
            If the manager given by :meth:`use_manager` has a simulated device.
        DeviceError
            If torch has no CUDA device.
        DeadlineError
            If a pause or a resume does not end.
        """
        key = self._key(tag, enable_cpu_backup, enable_disk_backup, cpu_backup_backend)
        with self._locked(self._lock):
            slot = _Slot(self._group(key))
            slot.acquire()
            try:
                pools._push(slot)
            except BaseException:
                slot.release()
                raise
        self._thread.slots.append(slot)
        try:
            yield
        except torch.OutOfMemoryError as error:
            _explain(slot, error)
            raise
        finally:
            self._thread.slots.remove(slot)
            try:
                pools._pop(slot)
            finally:
                slot.release()

    @contextlib.contextmanager
    def cuda_graph(  # noqa: PLR0917  (the other library's order)
        self,
        cuda_graph: torch.cuda.CUDAGraph,
        pool: Any = None,
        stream: Any = None,
        capture_error_mode: str = "global",
        tag: str = TAG_DEFAULT,
        enable_cpu_backup: bool = False,
        cpu_backup_backend: CpuBackupBackend | None = None,
    ) -> Iterator[None]:
        """Capture a graph whose own memory is pausable. Pauses and resumes of other threads wait for its end.

        Parameters
        ----------
        cuda_graph
            The graph.
        pool
            Graphs that were captured with the same one, under the same tag, share their memory: a handle, or what
            ``pool()`` of such a graph says. It stands for a pool of the tag's own; without it each graph has its own.
        stream, capture_error_mode
            As ``torch.cuda.graph`` has them.
        tag, enable_cpu_backup, cpu_backup_backend
            As :meth:`region` has them.

        Raises
        ------
        ValueError, RegionError, DeviceError, DeadlineError
            As :meth:`region`.
        """
        key = self._key(tag, enable_cpu_backup, False, cpu_backup_backend)
        with self._locked(self._quiet):
            with self._locked(self._lock):
                filling, own = self._graph_pool(key, pool)
                use = filling.native.begin_use(TIMEOUT_S)
            try:
                with graphs.capture(filling, own, cuda_graph, stream=stream, capture_error_mode=capture_error_mode):
                    yield
            finally:
                use.release()

    @contextlib.contextmanager
    def disable(self, dispose_mem_pool_after_use: bool = True) -> Iterator[None]:
        """Let tensors lie in memory of no tag, inside :meth:`region`; what is left of it goes back at the end.

        Parameters
        ----------
        dispose_mem_pool_after_use
            Only ``True`` is there, for those who say so.

        Raises
        ------
        ValueError
            If it is ``False``.
        """
        if not dispose_mem_pool_after_use:
            raise ValueError("disable() disposes of its pool; dispose_mem_pool_after_use=False is not supported")
        with self._locked(self._lock):
            slot = _Slot(self._outside_of(self._device()))
            slot.acquire()
            try:
                pools._push(slot)
            except BaseException:
                slot.release()
                raise
        try:
            yield
        finally:
            try:
                pools._pop(slot)
            finally:
                slot.release(for_good=True)

    def pause(self, tag: str | None = None) -> None:
        """Take the device memory of a tag, or of all. What is paused already stays so.

        Waits for everything that is queued on the device. Until :meth:`resume`, using its tensors faults; freeing them
        is fine, and what is allocated under the tag meanwhile is not paused.

        Parameters
        ----------
        tag
            The tag; all of them without it.

        Raises
        ------
        RegionError, OutOfMemoryError, TransferError, DeadlineError, DeviceError
            As :meth:`Group.pause`. What was paused before stays paused; the same call goes on from there.
        """
        self._each(tag, lambda group: group.pause(self.timeout_s))

    def resume(self, tag: str | None = None) -> None:
        """Bring the device memory of a tag, or of all, back at the same addresses. What is not paused stays so.

        Parameters
        ----------
        tag
            The tag; all of them without it.

        Raises
        ------
        OutOfMemoryError, LeaseError, TransferError, DeadlineError, DeviceError
            As :meth:`Group.resume`. What was resumed before stays; the same call goes on from there.
        """
        self._each(tag, lambda group: group.resume(self.timeout_s))

    def is_paused(self, tag: str | None = None) -> bool:
        """Say whether any memory of a tag, or any at all, is paused.

        Parameters
        ----------
        tag
            The tag; all of them without it.
        """
        with self._lock:
            return any(group.is_paused for group in self._matching(tag))

    def get_cpu_backup(self, x: torch.Tensor, zero_copy: bool = False) -> torch.Tensor | None:
        """Give what host memory has of a tensor, as a tensor of the CPU's.

        Parameters
        ----------
        x
            A contiguous tensor made in a :meth:`region`; its memory may be paused.
        zero_copy
            Give the backup itself where it lies in one piece, and a copy else. Do not write to it.

        Returns
        -------
        torch.Tensor or None
            ``None`` where there is no backup: without one, before the first pause, and after a resume that did not
            retain it.

        Raises
        ------
        ValueError
            If it is not contiguous.
        RegionError
            If it was not made in a region.
        """
        if not x.is_contiguous():
            raise ValueError(
                f"a backup is given of contiguous tensors, not of strides {x.stride()} for {tuple(x.shape)}"
            )
        with self._locked(self._lock):
            found = (group.find(x.data_ptr()) for group in self._groups.values())
            generation = next((one for one in found if one is not None), None)
            if generation is None:
                raise RegionError("the tensor was not made in a region of torch_memory_saver", kind="state")
            if not x.nbytes:
                return torch.empty_like(x, device="cpu")
            backup = generation.cpu_backup(x.data_ptr(), x.nbytes, zero_copy)
        return None if backup is None else backup.view(x.dtype).view(x.shape)

    def set_disk_backup_dir(self, path: str | os.PathLike[str]) -> None:
        """Say where backups on disk go from now on. It is made if it is not there.

        Parameters
        ----------
        path
            A directory. Its files are made at a pause, and removed at the resume, or when the process ends.

        Raises
        ------
        OSError
            If it cannot be made.
        """
        Path(path).mkdir(parents=True, exist_ok=True)
        self._ensure_initialized().disk_dir = os.fspath(path)

    def use_manager(self, mem: MemoryManager) -> None:
        """Make the regions of one device in a manager of yours, with its budgets, instead of in one made for this.

        Parameters
        ----------
        mem
            The manager.

        Raises
        ------
        RegionError
            If that device has regions already.
        """
        number = int(mem.device.rpartition(":")[2]) if ":" in mem.device else 0
        with self._locked(self._lock):
            if any(key.device == number and group.generations for key, group in self._groups.items()):
                raise RegionError(f"device {number} has regions already; say so before the first", kind="state")
            self._managers[number] = mem
            mem._native.set_margin(self._margin)

    def enable_everywhere(self) -> None:
        """Make everything that this thread allocates from now on pausable, as ``TMS_INIT_ENABLE=1`` asks for.

        Other threads' allocations stay outside, and so do those of the default tag inside :meth:`disable`.

        Raises
        ------
        DeviceError
            If torch has no CUDA device.
        """
        if self._thread.everywhere is not None:
            return
        settings = self._ensure_initialized()
        backup = settings.init_backup
        with self._locked(self._lock):
            backend = settings.backend if backup == "cpu" else ""
            slot = _Slot(self._group(Key(TAG_DEFAULT, backup, backend, self._device())))
            slot.acquire()
            pools._push(slot)
        self._thread.slots.append(slot)
        self._thread.everywhere = slot
        atexit.register(_leave, slot)

    @property
    def enabled(self) -> bool:
        """Whether it works: yes."""
        return True

    @property
    def hook_mode(self) -> str:
        """``"torch"`` or ``"preload"``: there is one way here, which does what both do."""
        return self._hook_mode

    @hook_mode.setter
    def hook_mode(self, hook_mode: str) -> None:
        if hook_mode not in {"torch", "preload"}:
            raise ValueError(f"hook_mode is 'torch' or 'preload', not {hook_mode!r}")
        self._hook_mode = hook_mode

    @property
    def memory_margin_bytes(self) -> int:
        """Bytes of the device that allocations in regions leave free: one that would not is out of memory."""
        return self._margin

    @memory_margin_bytes.setter
    def memory_margin_bytes(self, value: int) -> None:
        self._margin = parse_size(value)
        with self._lock:
            for mem in self._managers.values():
                mem._native.set_margin(self._margin)

    @property
    def retain_cpu_backup(self) -> bool:
        """Whether backups in host memory outlive a resume: the next pause then copies only what has changed."""
        return self._ensure_initialized().retain

    @retain_cpu_backup.setter
    def retain_cpu_backup(self, value: bool) -> None:
        self._ensure_initialized().retain = bool(value)

    def _ensure_initialized(self) -> Settings:
        with self._lock:
            if self._settings is None:
                self._settings = Settings.of(os.environ) if self._given is None else self._given
            return self._settings

    def _key(self, tag: str, cpu: bool, disk: bool, backend: str | None) -> Key:
        settings = self._ensure_initialized()
        if cpu and disk:
            raise ValueError("enable_cpu_backup and enable_disk_backup exclude one another")
        if backend is not None and not cpu:
            raise ValueError("cpu_backup_backend needs enable_cpu_backup=True")
        backup: Backup = "cpu" if cpu else "disk" if disk else "none"
        chosen = check_backend(backend or settings.backend) if cpu else ""
        return Key(tag, backup, chosen, self._device())

    def _device(self) -> int:
        if torch.cuda.is_available():
            return int(torch.cuda.current_device())
        if self._managers:
            return next(iter(self._managers))
        raise DeviceError(
            "torch has no CUDA device here, and what it allocates on the CPU cannot be paused; on a simulated device, "
            "shoal.torch.place and shoal.torch.tensor put tensors into regions",
            kind="unavailable",
        )

    def _group(self, key: Key) -> Group:
        group = self._groups.get(key)
        if group is None:
            group = Group(key, self._manager(key.device), self._ensure_initialized())
            self._groups[key] = group
        return group

    def _outside_of(self, device: int) -> Group:
        group = self._outside.get(device)
        if group is None:
            key = Key("outside of all tags", "none", "", device)
            group = self._outside[device] = Group(key, self._manager(device), self._ensure_initialized())
        return group

    def _manager(self, device: int) -> MemoryManager:
        mem = self._managers.get(device)
        if mem is None:
            # The driver says when the device is full, as it does where nobody keeps a budget.
            capacity = torch.cuda.get_device_properties(device).total_memory
            host = int(machine.host_budget_default() * 2 * HOST_SHARE)
            mem = MemoryManager(f"cuda:{device}", device_budget=capacity, host_budget=host)
            mem._native.set_margin(self._margin)
            self._managers[device] = mem
        return mem

    def _matching(self, tag: str | None) -> list[Group]:
        return [group for key, group in self._groups.items() if tag is None or key.tag == tag]

    def _each(self, tag: str | None, operation: Any) -> None:
        """Do something to the groups of a tag, with this thread's own allocations out of the way."""
        with self._locked(self._quiet), self._locked(self._lock):
            groups = self._matching(tag)
            slots = [slot for slot in self._thread.slots if slot.group in groups]
            begun = [slot for slot in slots if slot.begun is not None]
            for slot in begun:
                slot.end()
            for slot in slots:
                slot.release()
            try:
                for group in groups:
                    operation(group)
            finally:
                for slot in slots:
                    slot.acquire()
                for slot in begun:
                    slot.begin()

    def _graph_pool(self, key: Key, handle: Any) -> tuple[pools._Filling, Any]:
        """Give what a capture fills, and the pool that stands for its handle; no pool where it has its own."""
        generation = self._group(key).current()
        for group in self._groups.values():
            for home in group.generations:
                filling = home.region._filling
                if not isinstance(filling, pools._Filling):
                    continue
                filling.end_graphs()
                with filling.lock:
                    known = [*filling.kept, *(one.pool for one in filling.graphs if not one.is_released)]
                own = next((one for one in known if handle and tuple(one.id) == tuple(handle)), None)
                if own is not None and not home.paused:
                    return filling, own
        if handle is None:
            return pools._filling(generation.region), None
        found = self._graph_pools.get((key, tuple(handle)))
        if found is None or found[0].paused:
            found = generation, graphs.pool(generation.region)
            self._graph_pools[key, tuple(handle)] = found
        return pools._filling(found[0].region), found[1]

    @contextlib.contextmanager
    def _locked(self, lock: Any) -> Iterator[None]:
        if not lock.acquire(timeout=self.timeout_s):
            raise DeadlineError(
                f"another pause, resume or capture did not end within {self.timeout_s} s",
                kind="deadline", waited_s=self.timeout_s,
            )  # fmt: skip
        try:
            yield
        finally:
            lock.release()


def _explain(slot: _Slot, error: torch.OutOfMemoryError) -> None:
    """Add to torch's error why there was no memory."""
    why = None if slot.filling is None else slot.filling.native.last_error()
    if why is not None:
        error.add_note(f"Shoal had no memory for tag {slot.group.key.tag!r}: {why}")


def _leave(slot: _Slot) -> None:
    """End what was begun for the whole process, before the interpreter takes its objects apart."""
    if slot.begun is not None:
        slot.end()
    slot.release()
