"""What of a freeze goes on in the background: bytes that lie only on the device are copied to the host."""

from __future__ import annotations

from dataclasses import dataclass
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from shoal import _native
    from shoal.errors import Error

__all__ = ["Flush", "FlushReport"]


@dataclass(frozen=True, slots=True)
class FlushReport:
    """What a freeze did.

    Parameters
    ----------
    sealed
        Bytes that were sealed by it.
    copied
        Bytes that have a copy on the host now and had none anywhere before.
    dirty
        Bytes that still lie only on the device: sleeping copies them.
    duration_s
        How long the copying took, in seconds.
    error
        Why bytes stayed dirty: the host budget has no room. Without it, they were being written.
    """

    sealed: int = 0
    copied: int = 0
    dirty: int = 0
    duration_s: float = 0.0
    error: Error | None = None


class Flush:
    """The copying that a freeze has begun, or that is done. Made by :meth:`Region.freeze`.

    It holds up nobody: wakes, sleeps and allocations go before it. Letting go of it stops nothing.
    """

    __slots__ = ("_native",)

    def __init__(self, native: _native.Flush) -> None:
        self._native = native

    @property
    def sealed(self) -> int:
        """Bytes that were sealed and were not before."""
        return self._native.sealed

    @property
    def done(self) -> bool:
        """Whether it has ended, well or not."""
        return self._native.done()

    def progress(self) -> tuple[int, int]:
        """Give bytes that are clean now, and bytes that were not when it began.

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
        """Stop soon. What was copied counts; :meth:`wait` then raises :class:`TransferError`.

        Raises
        ------
        ForkError
            In a process other than the one that made it.
        """
        self._native.cancel()

    def wait(self, timeout_s: float | None = None) -> FlushReport:
        """Wait until it has ended.

        Parameters
        ----------
        timeout_s
            The longest wait in seconds. Without it: what the freeze was given.

        Returns
        -------
        FlushReport
            What it did. Bytes for which the host budget has no room are ``dirty``, which is no error.

        Raises
        ------
        DeadlineError
            If it has not ended in time. It goes on.
        TransferError
            If it was cancelled.
        DeviceError
            If a copy failed. Nothing is lost: what was not copied stays dirty.
        """
        return FlushReport(*self._native.wait(timeout_s))

    def __repr__(self) -> str:
        done, total = self.progress()
        return f"<Flush {done} of {total} bytes>"
