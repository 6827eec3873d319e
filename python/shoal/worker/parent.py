"""A process that ends with the one that started it, however early that ends.

What a worker sees of its server later, the closed control socket, it does not see while it imports or loads. The server
is its :class:`Parent`, or, where a template forked it, whoever holds the other end of its :class:`Lifeline`.
"""

from __future__ import annotations

import ctypes
import fcntl
import os
import select
import signal
import sys

__all__ = ["Lifeline", "Parent", "end_with_parent", "outlive_parent"]

_PR_SET_PDEATHSIG = 1


def end_with_parent(expected: int | None = None) -> bool:
    """Ask to be killed when the parent ends.

    Parameters
    ----------
    expected
        The parent's process id. Without it: the server's, as ``SHOAL_SERVER_PID`` says.

    Returns
    -------
    bool
        False where it has ended already.
    """
    if sys.platform == "linux":
        libc = ctypes.CDLL(None, use_errno=True)
        if libc.prctl(_PR_SET_PDEATHSIG, signal.SIGKILL, 0, 0, 0) != 0:
            reason = os.strerror(ctypes.get_errno())
            sys.stderr.write(f"shoal.worker: no signal at the server's end ({reason})\n")
    # Whoever ended before the request for the signal causes none. In a container the server itself may be process 1.
    if expected is None:
        server = os.environ.get("SHOAL_SERVER_PID", "")
        expected = int(server) if server.isdecimal() else None
    return os.getppid() == expected if expected is not None else os.getppid() != 1


def outlive_parent() -> None:
    """Go on without the parent: what tells when to end is the control socket's closing, and the wait after it."""
    if sys.platform == "linux":
        ctypes.CDLL(None, use_errno=True).prctl(_PR_SET_PDEATHSIG, 0, 0, 0, 0)
    _ignore_hangup()


def _ignore_hangup() -> None:
    # The kernel hangs a group of processes up that is without its parent while one of it is stopped.
    signal.signal(signal.SIGHUP, signal.SIG_IGN)


class Parent:
    """The server as this process's parent."""

    def __init__(self) -> None:
        self._pid = os.getppid()

    def end_with_it(self) -> bool:
        """Ask to be killed when the server ends; False where it has ended already."""
        return end_with_parent()

    def is_gone(self) -> bool:
        """Whether it has ended."""
        return os.getppid() != self._pid

    def outlive(self) -> None:
        """Go on without it."""
        outlive_parent()


class Lifeline:
    """The server as the only process that has the other end of a pipe; this process's parent is another one.

    When that end closes, the kernel sends the signal, as it does at a parent's death: also to a process that is stopped
    or busy outside Python.

    Parameters
    ----------
    fd
        The end to read from. It belongs to this object from here on.
    """

    def __init__(self, fd: int) -> None:
        self._fd = fd

    def end_with_it(self) -> bool:
        """Ask to be killed when the server ends; False where it has ended already."""
        fcntl.fcntl(self._fd, fcntl.F_SETOWN, os.getpid())
        fcntl.fcntl(self._fd, fcntl.F_SETSIG, signal.SIGKILL)
        self._set_flags(self._flags() | os.O_ASYNC)
        _ignore_hangup()
        # Whoever closed it before causes no signal.
        return not self.is_gone()

    def is_gone(self) -> bool:
        """Whether it has ended."""
        poll = select.poll()
        poll.register(self._fd, 0)
        return bool(poll.poll(0))

    def outlive(self) -> None:
        """Go on without it."""
        self._set_flags(self._flags() & ~os.O_ASYNC)
        os.close(self._fd)
        outlive_parent()

    def _flags(self) -> int:
        return fcntl.fcntl(self._fd, fcntl.F_GETFL)

    def _set_flags(self, flags: int) -> None:
        fcntl.fcntl(self._fd, fcntl.F_SETFL, flags)
