"""A policy of your own: who gives device memory up for whom, as a function of Python.

``policy = "python:my_policy:plan"`` under ``[server]`` has the server ask ``plan`` of ``my_policy.py`` (beside the
configuration, or anywhere on the path) each time that somebody needs memory; ``shadow = "python:my_policy:plan"`` lets
it watch and be compared. The function runs in a process of its own, gets the whole :class:`Shelf` and gives back what
to do, each action with its reason in words::

    from shoal.policy import Plan, Shelf, builtin

    value = builtin("value")


    def plan(shelf: Shelf) -> Plan:
        return value(shelf)

What it says is checked before it is done: a budget, a pin, a minimum cannot be broken by it. Where it is late
(``policy_wait``), raises, or plans what must not be, ``value`` decides in its place, and ``shoal why`` and the events
say so.

The function should be pure: the same shelf gives the same plan. It is called from one thread, one call at a time. What
it prints goes to ``policy.out`` (``policy-shadow.out`` where it only watches) beside the workers' logs. Byte counts are
ints, times are milliseconds on the server's clock.
"""

from __future__ import annotations

from shoal.policy.actions import Action, Deny, Evict, Grant, Plan, Restore, Wait
from shoal.policy.builtin import builtin
from shoal.policy.state import Model, Request, Shelf

__all__ = [
    "Action",
    "Deny",
    "Evict",
    "Grant",
    "Model",
    "Plan",
    "Request",
    "Restore",
    "Shelf",
    "Wait",
    "builtin",
]
