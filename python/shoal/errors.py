"""What can go wrong, as types.

Every error of this package is an :class:`Error`. The fields that its message names are attributes too, so that a
program never has to read a sentence. The classes are plain Python: the native half raises these very objects.
"""

from __future__ import annotations

from typing import Any, ClassVar

__all__ = [
    "BrokerError",
    "DeadlineError",
    "DeviceError",
    "Error",
    "ForkError",
    "LeaseError",
    "OutOfMemoryError",
    "RegionError",
    "TierError",
    "TransferError",
]


class Error(RuntimeError):
    """Base of everything this package raises by itself.

    Parameters
    ----------
    message
        What happened, as a sentence with its numbers.
    **fields
        The same facts as attributes of the error. Every class declares the ones it may have; those that are not given
        are ``None``.

    Attributes
    ----------
    kind : str or None
        The kind of the native error, in snake case, such as ``"out_of_memory"``.
    fields : dict of str to Any
        What was given, for logs.
    """

    _names: ClassVar[tuple[str, ...]] = ("kind",)

    kind: str | None

    def __init__(self, message: str = "", /, **fields: Any) -> None:
        super().__init__(message)
        self.fields: dict[str, Any] = fields
        for name in self._names:
            setattr(self, name, fields.get(name))

    def __reduce__(self) -> tuple[Any, ...]:
        return (_restore, (type(self), str(self), self.fields))


def _restore(cls: type[Error], message: str, fields: dict[str, Any]) -> Error:
    return cls(message, **fields)


class OutOfMemoryError(Error, MemoryError):
    """A tier has no room for what was asked.

    It is a :class:`MemoryError` too. Nothing has changed: what was resident still is, and what was not still has its
    copy.

    Attributes
    ----------
    tier : str or None
        ``"device"`` or ``"host"``.
    requested : int or None
        Bytes asked for.
    free : int or None
        Bytes that were free.
    capacity : int or None
        Bytes there are in all: the device's capacity, or the budget.
    """

    _names: ClassVar[tuple[str, ...]] = ("kind", "tier", "requested", "free", "capacity")

    tier: str | None
    requested: int | None
    free: int | None
    capacity: int | None


class DeadlineError(Error, TimeoutError):
    """A wait reached its deadline. It is a :class:`TimeoutError` too.

    Attributes
    ----------
    waited_s : float or None
        How long was waited, in seconds.
    """

    _names: ClassVar[tuple[str, ...]] = ("kind", "waited_s")

    waited_s: float | None


class LeaseError(Error):
    """The right to device bytes was refused by the budget or by the server's broker.

    Attributes
    ----------
    lease : str or None
        What the bytes were for: ``"weights"``, ``"kv"`` or ``"overhead"``.
    requested : int or None
        Bytes asked for beyond what was held.
    reason : str or None
        The refusal in words.
    """

    _names: ClassVar[tuple[str, ...]] = ("kind", "lease", "requested", "reason")

    lease: str | None
    requested: int | None
    reason: str | None


class RegionError(Error):
    """A region was used in a way it does not allow: past its end, unsealed, sealed, or of another kind.

    Attributes
    ----------
    region : str or None
        The region's name.
    """

    _names: ClassVar[tuple[str, ...]] = ("kind", "region")

    region: str | None


class TierError(Error):
    """A tier below the device could not be opened as it was configured.

    Attributes
    ----------
    path : str or None
        The directory.
    wait_s : float or None
        After how long it is worth another try, where that is known.
    """

    _names: ClassVar[tuple[str, ...]] = ("kind", "path", "wait_s")

    path: str | None
    wait_s: float | None


class TransferError(Error):
    """A copy between tiers failed or was cancelled. The copy it was made from is still valid (I6).

    Attributes
    ----------
    path : str or None
        The file, if bytes were to be read from one and it has changed or cannot be read.
    """

    _names: ClassVar[tuple[str, ...]] = ("kind", "path")

    path: str | None


class DeviceError(Error):
    """A call on the device failed for a reason other than memory.

    Attributes
    ----------
    device : str or None
        The device, such as ``"sim:0"``.
    call : str or None
        The call that failed.
    """

    _names: ClassVar[tuple[str, ...]] = ("kind", "device", "call")

    device: str | None
    call: str | None


class BrokerError(Error, ConnectionError):
    """The server's control socket could not be reached, closed, or said what this version does not understand.

    It is a :class:`ConnectionError` too.

    Attributes
    ----------
    path : str or None
        The socket.
    """

    _names: ClassVar[tuple[str, ...]] = ("kind", "path")

    path: str | None


class ForkError(Error):
    """A handle was used in a process other than the one that made it.

    A device context does not survive ``fork``. Start a fresh process (``multiprocessing`` with ``"spawn"``) or make the
    handles after forking.

    Attributes
    ----------
    owner : int or None
        The process that made the handle.
    pid : int or None
        The process that used it.
    """

    _names: ClassVar[tuple[str, ...]] = ("kind", "owner", "pid")

    owner: int | None
    pid: int | None
