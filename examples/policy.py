"""A policy of one's own: the server's, but the models of the day are not put to sleep while it is day.

In ``shoal.toml``, with this file beside it::

    [server]
    policy = "python:policy:plan"    # or: shadow = "python:policy:plan", to see first what it would do

Run it by itself to see a decision: ``python examples/policy.py``.
"""

from __future__ import annotations

import time
from dataclasses import replace

from shoal.policy import Evict, Model, Plan, Request, Shelf, Wait, builtin

DAY = range(8, 20)
BY_DAY = {"chat"}

value = builtin("value")


def plan(shelf: Shelf, hour: int | None = None) -> Plan:
    """Decide as the server would, and take nothing from the models of the day while it is day."""
    said = value(shelf)
    if (time.localtime().tm_hour if hour is None else hour) not in DAY:
        return said
    spared = {model.id for model in shelf.models if model.name in BY_DAY}
    kept_back = [action for action in said.actions if isinstance(action, Evict) and action.model in spared]
    # Whoever was to have what is not taken waits: say what for.
    asking = {action.requester for action in kept_back}
    reason = f"{', '.join(sorted(BY_DAY))} stays on the device by day"
    actions = [
        replace(action, reason=reason) if isinstance(action, Wait) and action.model in asking else action
        for action in said.actions
        if action not in kept_back
    ]
    return replace(said, actions=actions)


def main() -> None:
    """Show one decision by day and by night."""
    mib = 1 << 20
    chat = Model(id=0, name="chat", weights_total=60 * mib, weights_held=60 * mib, up=True, restore_us_per_mib=50)
    code = Model(id=1, name="code", weights_total=80 * mib, parked=1, wake_ordered=True, wanting_since_ms=9_000)
    asked = Request(1, 7, "weights", 80 * mib, 80 * mib, asked_ms=9_000, deadline_ms=60_000)
    shelf = Shelf(10_000, 100 * mib, 2 * mib, 3_000, models=(chat, code), requests=(asked,))
    for hour in (12, 23):
        for action in plan(shelf, hour).actions:
            print(f"{hour} h: {type(action).__name__.lower()}: {action.reason}")


if __name__ == "__main__":
    main()
