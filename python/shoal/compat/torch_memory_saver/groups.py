"""What is paused and resumed together: the regions of one tag, one kind of backup and one device.

Usually that is one region. torch hands out cached blocks of a pool without asking, so a region that is paused must not
be allocated into: what is allocated under its tag meanwhile goes into a fresh one, a later *generation*, which is awake
until the tag is paused again.
"""

from __future__ import annotations

from typing import TYPE_CHECKING, Literal, NamedTuple, TypeAlias

import torch

from shoal.compat.torch_memory_saver.disk import Spill
from shoal.errors import Error, RegionError
from shoal.torch.pools import _Filling, _sweep

if TYPE_CHECKING:
    from shoal.compat.torch_memory_saver.settings import Settings
    from shoal.memory import MemoryManager, Region

__all__ = ["Backup", "Generation", "Group", "Key"]

Backup: TypeAlias = Literal["none", "cpu", "disk"]
"""Where bytes are while they are paused: nowhere, in host memory, or in files."""


class Key(NamedTuple):
    """What makes a group."""

    tag: str
    backup: Backup
    backend: str
    device: int


class Generation:
    """One region of a group.

    Parameters
    ----------
    key
        Its group's.
    mem
        Where the region is made.
    number
        Which generation, from 0.
    """

    def __init__(self, key: Key, mem: MemoryManager, number: int) -> None:
        self.key = key
        self.mem = mem
        name = key.tag if key.backup == "none" else f"{key.tag} ({key.backup} backup)"
        self.region: Region = mem.region(
            f"{name} #{number + 1}" if number else name, backing="keep" if key.backup == "cpu" else "discard"
        )
        # Whoever uses it holds no guard, so nothing but a pause may take its memory.
        self.region._native.set_yields(False)
        self.paused = False
        self.spill: Spill | None = None

    def has(self, address: int) -> bool:
        """Say whether an address lies in it."""
        return self.region.address <= address < self.region.address + self.region.bytes

    def is_empty(self) -> bool:
        """Say whether no tensor lies in it and nobody fills it."""
        filling = self.region._filling
        if not isinstance(filling, _Filling):
            return not self.region.usage()["total"]
        filling.end_graphs()
        return not (filling.users or filling.kept or filling.graphs or filling.live()[0])

    def pause(self, settings: Settings, timeout_s: float) -> bool:
        """Take its device memory; whether there was any. See :meth:`Group.pause`."""
        region = self.region
        if self.paused or not region.usage()["total"]:
            return False
        if self.key.backup == "cpu":
            region._native.record_checksums(timeout_s)
        elif self.key.backup == "disk":
            if settings.disk_dir is None:
                raise RegionError(
                    f"region {region.name!r} has a backup on disk, and no directory for it was named: call "
                    "torch_memory_saver.set_disk_backup_dir(path), or set TMS_DISK_BACKUP_DIR",
                    kind="state", region=region.name,
                )  # fmt: skip
            self.spill = Spill.write(region, settings.disk_dir, settings.chunk_bytes)
        try:
            region.sleep(timeout_s=timeout_s)
        except BaseException as error:
            self._undo(timeout_s, error)
            raise
        self.paused = True
        return True

    def resume(self, settings: Settings, timeout_s: float) -> bool:
        """Bring its device memory back; whether it was paused. See :meth:`Group.resume`."""
        if not self.paused:
            return False
        region = self.region
        region.wake(timeout_s=timeout_s)
        if self.spill is not None:
            try:
                self.spill.read_back(region)
            except BaseException:
                # The files are as they were: it stays paused, and may be resumed again.
                region.sleep(timeout_s=timeout_s)
                raise
            self.spill.remove()
            self.spill = None
        self.paused = False
        if self.key.backup == "cpu" and not settings.retain:
            region._native.forget_copies()
            if self.key.backend == "mmap":
                self.mem._native.trim_host()
        return True

    def cpu_backup(self, address: int, nbytes: int, zero_copy: bool) -> torch.Tensor | None:
        """Give the host copy of a range as bytes, or nothing where there is none."""
        if self.key.backup != "cpu":
            return None
        offset, end = address - self.region.address, address - self.region.address + nbytes
        found = self.region._native.host_view(offset, nbytes)
        if found is None:
            return None
        if zero_copy and found[1] == nbytes:
            return torch.from_dlpack(_Capsule(found[0]))
        whole = torch.empty(nbytes, dtype=torch.uint8)
        at = offset
        while found is not None:
            capsule, length = found
            whole[at - offset : at - offset + length].copy_(torch.from_dlpack(_Capsule(capsule)))
            at += length
            if at == end:
                return whole
            found = self.region._native.host_view(at, end - at)
        return None

    def _undo(self, timeout_s: float, error: BaseException) -> None:
        """Bring back what a pause that failed has taken; if that fails too, it counts as paused."""
        usage = self.region.usage()
        self.paused = usage["device"] < usage["total"]
        try:
            if self.paused:
                self.region.wake(timeout_s=timeout_s)
                if self.spill is not None:
                    self.spill.read_back(self.region)
        except Error as second:
            error.add_note(f"it could not be brought back either, so it is paused now: {second}")
            return
        self.paused = False
        if self.spill is not None:
            self.spill.remove()
            self.spill = None


class _Capsule:
    """Bytes of the host as what ``torch.from_dlpack`` takes."""

    def __init__(self, capsule: object) -> None:
        self.capsule = capsule

    def __dlpack_device__(self) -> tuple[int, int]:
        return 1, 0

    def __dlpack__(self, **_: object) -> object:
        return self.capsule


class Group:
    """The generations of one tag, backup and device.

    Parameters
    ----------
    key
        Which.
    mem
        Where its regions are made.
    settings
        The process's.
    """

    def __init__(self, key: Key, mem: MemoryManager, settings: Settings) -> None:
        self.key = key
        self.mem = mem
        self.settings = settings
        self.generations: list[Generation] = []
        self.made = 0

    @property
    def is_paused(self) -> bool:
        """Whether any of it is paused."""
        return any(generation.paused for generation in self.generations)

    def current(self) -> Generation:
        """Give the generation to allocate into: the first that is not paused, else a fresh one."""
        for generation in self.generations:
            if not generation.paused:
                return generation
        made = Generation(self.key, self.mem, self.made)
        self.made += 1
        self.generations.append(made)
        return made

    def find(self, address: int) -> Generation | None:
        """Give the generation in which an address lies."""
        return next((generation for generation in self.generations if generation.has(address)), None)

    def pause(self, timeout_s: float) -> bool:
        """Take the device memory of all of it. What is paused already stays so.

        Parameters
        ----------
        timeout_s
            How long each region may take, in seconds.

        Returns
        -------
        bool
            Whether anything was taken.

        Raises
        ------
        RegionError
            If another thread allocates into it at this moment, or its directory was not named.
        OutOfMemoryError, TransferError, DeadlineError, DeviceError
            If its bytes cannot be kept. The region that failed is as before, those before it are paused.
        """
        taken = [generation.pause(self.settings, timeout_s) for generation in self.generations]
        return any(taken)

    def resume(self, timeout_s: float) -> bool:
        """Bring the device memory of all of it back. What is not paused stays so.

        Parameters
        ----------
        timeout_s
            How long each region may take, in seconds.

        Returns
        -------
        bool
            Whether anything was brought.

        Raises
        ------
        OutOfMemoryError, LeaseError, TransferError, DeadlineError, DeviceError
            If there is no room, or its bytes cannot be had. The region that failed is still paused.
        """
        brought = [generation.resume(self.settings, timeout_s) for generation in self.generations]
        # The first stays, also empty: what torch caches of it is used again.
        kept = [later for later in self.generations[1:] if not later.is_empty()]
        if len(kept) < len(self.generations) - 1:
            self.generations[1:] = kept
            _sweep()
        return any(brought)
