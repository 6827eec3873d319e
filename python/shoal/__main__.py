"""The `shoal` command: `shoal serve`, `ps`, `wake`, `sleep`, `pin`, `doctor`."""

from __future__ import annotations

import os
import signal
import sys

import shoal


def main() -> int:
    """Run the command line with this process's arguments; gives the exit status."""
    # Python's handler would only note an interrupt for when Python code runs again: give it back to the program.
    signal.signal(signal.SIGINT, signal.SIG_DFL)
    # Workers run in this environment unless the configuration names another one.
    os.environ.setdefault("SHOAL_PYTHON", sys.executable)
    return shoal.main(["shoal", *sys.argv[1:]])


if __name__ == "__main__":
    sys.exit(main())
