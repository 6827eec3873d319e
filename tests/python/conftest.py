"""A simulated device for each test, through the module that users have for theirs."""

from __future__ import annotations

from typing import TYPE_CHECKING

import pytest

from shoal import testing

if TYPE_CHECKING:
    from collections.abc import Iterator

    from shoal import MemoryManager


@pytest.fixture
def machine() -> Iterator[testing.SimulatedMachine]:
    with testing.simulated_machine("64MiB") as made:
        yield made


@pytest.fixture
def mem(machine: testing.SimulatedMachine) -> MemoryManager:
    return machine.manager(device_budget="64MiB", host_budget="256MiB")
