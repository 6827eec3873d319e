"""The server's own policies, to begin with: ask them, and change what they say."""

from __future__ import annotations

import json
from typing import TYPE_CHECKING

from shoal import _native
from shoal.policy.actions import Plan

if TYPE_CHECKING:
    from collections.abc import Callable

    from shoal.policy.state import Shelf


def builtin(name: str) -> Callable[[Shelf], Plan]:
    """Give the server's policy of that name (``"value"``, ``"lru"``) as a function.

    Raises
    ------
    ValueError
        There is none of that name.
    """
    if name not in _native.policies():
        raise ValueError(f"there is no policy {name!r}; there are {', '.join(_native.policies())}")

    def plan(shelf: Shelf) -> Plan:
        return Plan.read(json.loads(_native.policy_plan(name, json.dumps(shelf.written()), shelf.now_ms)))

    return plan
