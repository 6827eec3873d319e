"""What brings bytes back and what keeps them there: wakes under way, and guards.

A :class:`Transfer` is a wake that goes on by itself. A guard is what a step holds while it uses memory (I13):
:class:`Guard` for everything a manager has, :class:`RegionGuard` for one region, also while its bytes still come.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import TYPE_CHECKING, Self

if TYPE_CHECKING:
    from types import TracebackType

    from shoal import _native
    from shoal.errors import Error

__all__ = ["Guard", "RegionGuard", "Report", "Transfer"]

TIMEOUT_S = 60.0
"""How long a call waits, in seconds, where nothing else is said."""


@dataclass(frozen=True, slots=True)
class Report:
    """What an eviction or a restore did.

    Parameters
    ----------
    freed
        Device bytes given up.
    restored
        Bytes brought back to the device.
    copied
        Bytes that had to be copied for it.
    duration_s
        How long it took, in seconds.
    error
        What stood in the way of doing all of it.
    """

    freed: int = 0
    restored: int = 0
    copied: int = 0
    duration_s: float = 0.0
    error: Error | None = None

    @classmethod
    def _of(cls, outcome: tuple[int, int, int, float, Error | None], *, whole: bool) -> Report:
        """Read the native half's figures; raise what stood in the way if it was to be done whole."""
        report = cls(*outcome)
        if whole and report.error is not None:
            raise report.error
        return report


class Transfer:
    """A restore that is under way, or done. Made by :meth:`Region.wake`."""

    __slots__ = ("_native",)

    def __init__(self, native: _native.Transfer) -> None:
        self._native = native

    @property
    def done(self) -> bool:
        """Whether it has ended, well or not."""
        return self._native.done()

    def progress(self) -> tuple[int, int]:
        """Give bytes done and bytes in all.

        Returns
        -------
        tuple of (int, int)
            Never more done than there are in all.

        Raises
        ------
        ForkError
            In a process other than the one that made it.
        """
        return self._native.progress()

    def cancel(self) -> None:
        """Stop before the next extent. What came back so far stays; :meth:`wait` then raises :class:`TransferError`.

        Raises
        ------
        ForkError
            In a process other than the one that made it.
        """
        self._native.cancel()

    def wait_host(self, offset: int, nbytes: int, *, timeout_s: float = TIMEOUT_S) -> None:
        """Wait until the copies of a range are queued: before that there is nothing for a stream to wait for.

        Parameters
        ----------
        offset, nbytes
            The range of the region, in bytes.
        timeout_s
            The longest wait in seconds.

        Raises
        ------
        DeadlineError
            If its turn has not come in time.
        TransferError, OutOfMemoryError, LeaseError
            If the wake failed or was cancelled, and the range is not on the device.
        RegionError
            If the range lies outside, or this wake does not bring it.
        """
        self._native.wait_host(offset, nbytes, timeout_s)

    def wait_stream(self, offset: int, nbytes: int, stream: int = 0, *, timeout_s: float = TIMEOUT_S) -> None:
        """Make what is queued on a stream from now on wait for the bytes of a range.

        First waits as :meth:`wait_host` does. On a simulated device the calling thread waits for the bytes.

        Parameters
        ----------
        offset, nbytes
            The range of the region, in bytes.
        stream
            The stream's handle, as ``torch.cuda.Stream.cuda_stream`` says; 0 is the default stream. It must live as
            long as the process, as torch's streams do.
        timeout_s
            The longest wait in seconds.

        Raises
        ------
        DeadlineError, TransferError, OutOfMemoryError, LeaseError, RegionError
            As :meth:`wait_host`.
        DeviceError
            If a graph is being captured on that stream.
        """
        self._native.wait_stream(offset, nbytes, stream, timeout_s)

    def wait(self, timeout_s: float | None = None) -> Report:
        """Wait until it has ended.

        Parameters
        ----------
        timeout_s
            The longest wait in seconds. Without it: the deadline that the restore was begun with.

        Returns
        -------
        Report
            What it did.

        Raises
        ------
        DeadlineError
            If it has not ended in time. It goes on.
        OutOfMemoryError, LeaseError
            If there was no room for it. The region stays as it was.
        TransferError
            If a copy failed or was cancelled. The copy it was made from is still valid.
        """
        return Report._of(self._native.wait(timeout_s), whole=True)

    def __repr__(self) -> str:
        done, total = self.progress()
        return f"<Transfer {done} of {total} bytes>"


class Guard:
    """While it is held, everything of its manager is resident and stays so. Made by :meth:`MemoryManager.guard`.

    It is shared: many threads may hold one at a time. Eviction waits for all of them.
    """

    __slots__ = ("_held", "_in_order", "_manager", "_timeout_s", "_wake")

    def __init__(
        self, manager: _native.MemoryManager, timeout_s: float, in_order: _native.Region | None = None
    ) -> None:
        self._manager = manager
        self._timeout_s = timeout_s
        self._in_order = in_order
        self._held: _native.Guard | None = None
        self._wake: Transfer | None = None

    @property
    def wake(self) -> Transfer | None:
        """The wake that brings the rest of a region, while the guard is held and was entered beside one."""
        return self._wake

    def __enter__(self) -> Self:
        if self._held is not None:
            raise RuntimeError("this guard is already held; make another one")
        if self._in_order is None:
            self._held = self._manager.guard(self._timeout_s)
        else:
            self._held, wake = self._manager.guard_in_order(self._in_order, self._timeout_s)
            self._wake = None if wake is None else Transfer(wake)
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        held, self._held, self._wake = self._held, None, None
        if held is not None:
            held.release()


class RegionGuard:
    """While it is held, its region is resident and stays so. Made by :meth:`Region.guard`.

    Other regions are left alone. It is shared: many threads may hold one at a time. Evicting the region waits for all
    of them.
    """

    __slots__ = ("_held", "_in_order", "_region", "_timeout_s", "_wake")

    def __init__(self, region: _native.Region, in_order: bool, timeout_s: float) -> None:
        self._region = region
        self._in_order = in_order
        self._timeout_s = timeout_s
        self._held: _native.Guard | None = None
        self._wake: Transfer | None = None

    @property
    def wake(self) -> Transfer | None:
        """The wake that brings the rest, while the guard is held and was entered beside one."""
        return self._wake

    def __enter__(self) -> Self:
        if self._held is not None:
            raise RuntimeError("this guard is already held; make another one")
        self._held, wake = self._region.guard(self._in_order, self._timeout_s)
        self._wake = None if wake is None else Transfer(wake)
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        held, self._held, self._wake = self._held, None, None
        if held is not None:
            held.release()
