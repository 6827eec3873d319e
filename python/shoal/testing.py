"""A simulated device for the tests of those who build on shoal.

The device is host memory that behaves as a device: it has a capacity, its frames are zeroed and indivisible, and what
is not mapped faults when it is touched. Each one made here is alone in its own runtime directory, which is removed
after.
"""

from __future__ import annotations

import contextlib
import tempfile
from pathlib import Path
from typing import TYPE_CHECKING

from shoal.memory import MemoryManager, Size

if TYPE_CHECKING:
    from collections.abc import Iterator

__all__ = ["SimulatedMachine", "simulated_machine", "simulated_memory"]


class SimulatedMachine:
    """A machine with one simulated device. Made by :func:`simulated_machine`.

    Managers made from one machine share its device, in this process and in others that are given ``runtime_dir``.

    Parameters
    ----------
    runtime_dir
        The directory that the device's processes share.
    capacity
        Bytes of the device.
    """

    def __init__(self, runtime_dir: Path, capacity: Size) -> None:
        self.runtime_dir = runtime_dir
        self.capacity = capacity

    def manager(self, *, device_budget: Size | None = None, host_budget: Size = "256MiB") -> MemoryManager:
        """Open the device.

        Parameters
        ----------
        device_budget
            The most device bytes the manager may hold; the capacity without it.
        host_budget
            The most host bytes that copies may take.

        Returns
        -------
        MemoryManager
            A manager of this machine's device.

        Raises
        ------
        DeviceError
            If the device cannot be opened.
        """
        return MemoryManager(
            "sim",
            device_capacity=self.capacity,
            device_budget=device_budget,
            host_budget=host_budget,
            runtime_dir=self.runtime_dir,
        )


@contextlib.contextmanager
def simulated_machine(capacity: Size = "64MiB") -> Iterator[SimulatedMachine]:
    """Make a machine with one simulated device.

    Parameters
    ----------
    capacity
        Bytes of the device.

    Yields
    ------
    SimulatedMachine
        Its directory is removed at the end.

    Raises
    ------
    OSError
        If no temporary directory can be made.
    """
    with tempfile.TemporaryDirectory(prefix="shoal-test-") as directory:
        yield SimulatedMachine(Path(directory), capacity)


@contextlib.contextmanager
def simulated_memory(
    device_budget: Size = "64MiB", *, host_budget: Size = "256MiB", capacity: Size | None = None
) -> Iterator[MemoryManager]:
    """Make a simulated device and a manager of it.

    Parameters
    ----------
    device_budget
        The most device bytes the manager may hold.
    host_budget
        The most host bytes that copies may take.
    capacity
        Bytes of the device; the budget without it.

    Yields
    ------
    MemoryManager
        A manager of a device that nobody else has.

    Raises
    ------
    DeviceError
        If the device cannot be opened.
    """
    with simulated_machine(device_budget if capacity is None else capacity) as machine:
        yield machine.manager(device_budget=device_budget, host_budget=host_budget)
