"""A process that ends with the one that started it, however early that ends.

What a worker sees of its server later, the closed control socket, it does not see while it imports or loads.
"""

from __future__ import annotations

import ctypes
import os
import signal
import sys

__all__ = ["end_with_parent", "outlive_parent"]

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
    # The kernel hangs a group of processes up that is without its parent while one of it is stopped.
    signal.signal(signal.SIGHUP, signal.SIG_IGN)
