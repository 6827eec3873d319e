"""The witness itself can fail: a sample that breaks a bound, by what is mapped or by what is allocated, is told."""

from __future__ import annotations

from typing import TYPE_CHECKING, cast

import pytest

from tests.support.witness import Sample, Witness

if TYPE_CHECKING:
    from tests.support.server import Server

WITHIN = Sample({"a": 30, "b": 20}, {"a": 20, "b": 20}, {"a": 30, "b": 30})


def judge(sample: Sample) -> int:
    """Check one sample beside a good one, under a budget of 50 bytes."""
    return Witness(cast("Server", None), samples=[WITHIN, sample]).check(50, at_least=2)


def test_a_good_sample_passes_and_gives_the_most_mapped() -> None:
    """Up to the bound exactly."""
    assert judge(WITHIN) == 50


@pytest.mark.parametrize(
    ("mapped", "allocated", "said"),
    [
        (31, 0, "a maps 31, its lease is 30"),
        (0, 31, "a allocated 31"),
    ],
)
def test_more_than_the_lease_is_told(mapped: int, allocated: int, said: str) -> None:
    """One worker alone, with room in the budget."""
    with pytest.raises(AssertionError, match=said):
        judge(Sample({"a": mapped}, {"a": allocated}, {"a": 30}))


@pytest.mark.parametrize(
    ("mapped", "allocated", "said"),
    [
        (26, 25, "52 bytes are mapped, the budget is 50"),
        (25, 26, "52 bytes are held, the budget is 50"),
    ],
)
def test_more_than_the_budget_is_told(mapped: int, allocated: int, said: str) -> None:
    """Each within its lease, both together above the budget."""
    leased = {"a": 30, "b": 30}
    with pytest.raises(AssertionError, match=said):
        judge(Sample(dict.fromkeys(leased, mapped), dict.fromkeys(leased, allocated), leased))
