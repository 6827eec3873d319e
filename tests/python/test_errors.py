"""The tree of errors: catchable by kind, fields as attributes, intact through pickle."""

from __future__ import annotations

import pickle

import pytest

import shoal
from shoal import errors


@pytest.mark.parametrize("name", [name for name in errors.__all__ if name != "Error"])
def test_every_error_is_one_of_ours_and_a_runtime_error(name: str) -> None:
    cls = getattr(errors, name)
    assert issubclass(cls, shoal.Error)
    assert issubclass(cls, RuntimeError)
    assert getattr(shoal, name) is cls
    assert all(getattr(cls("x"), field) is None for field in cls._names)


def test_fields_are_attributes_and_survive_pickle() -> None:
    error = shoal.OutOfMemoryError("no room", tier="device", requested=4, free=2, capacity=8)
    again = pickle.loads(pickle.dumps(error))
    assert (str(again), again.tier, again.requested, again.free, again.capacity) == ("no room", "device", 4, 2, 8)
    assert isinstance(again, MemoryError)


def test_builtin_kinds() -> None:
    assert issubclass(shoal.DeadlineError, TimeoutError)
    assert issubclass(shoal.BrokerError, ConnectionError)
