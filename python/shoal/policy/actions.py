"""What a policy can have done. Every action says why, in a sentence that people will read."""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from collections.abc import Mapping, Sequence


@dataclass(frozen=True)
class Evict:
    """Order `model` to give `bytes` back; `requester` is the model that needs them, if one does.

    Memory that nobody uses goes first, then cached prefixes, then weights, then what requests use; with `cached_last`
    the prefixes go after the weights.
    """

    model: int
    bytes: int
    reason: str
    requester: int | None = None
    cached_last: bool = False

    def written(self) -> dict[str, Any]:
        """Give the action as it stands in the decision log."""
        said = {"do": "evict", "model": self.model, "requester": self.requester, "bytes": self.bytes}
        return said | {"cached_last": self.cached_last} | _why(self)


@dataclass(frozen=True)
class Restore:
    """Order `model` to bring its missing weights back; it will ask for the lease that it lacks."""

    model: int
    reason: str

    def written(self) -> dict[str, Any]:
        """Give the action as it stands in the decision log."""
        return {"do": "restore", "model": self.model, "bytes": 0} | _why(self)


@dataclass(frozen=True)
class Grant:
    """Grant a request `bytes`, at least what is of use to it, out of what is free."""

    model: int
    request: int
    bytes: int
    reason: str

    def written(self) -> dict[str, Any]:
        """Give the action as it stands in the decision log."""
        return {"do": "grant", "model": self.model, "request": self.request, "bytes": self.bytes} | _why(self)


@dataclass(frozen=True)
class Deny:
    """Turn a request down; `never`: asking again is of no use."""

    model: int
    request: int
    reason: str
    never: bool = False

    def written(self) -> dict[str, Any]:
        """Give the action as it stands in the decision log."""
        return {"do": "deny", "model": self.model, "request": self.request, "never": self.never} | _why(self)


@dataclass(frozen=True)
class Wait:
    """Let a request wait, and say what for; `until_ms`: when something may change by itself."""

    model: int
    request: int
    reason: str
    until_ms: int = 0

    def written(self) -> dict[str, Any]:
        """Give the action as it stands in the decision log."""
        return {"do": "wait", "model": self.model, "request": self.request, "until_ms": self.until_ms} | _why(self)


Action = Evict | Restore | Grant | Deny | Wait
_KINDS: dict[str, type[Evict | Restore | Grant | Deny | Wait]] = {
    "evict": Evict,
    "restore": Restore,
    "grant": Grant,
    "deny": Deny,
    "wait": Wait,
}


@dataclass(frozen=True)
class Plan:
    """What to do, in order.

    Attributes
    ----------
    actions
        The actions.
    again_at_ms
        When to ask again though nothing has changed; None: when something changes.
    """

    actions: Sequence[Action] = field(default_factory=tuple)
    again_at_ms: int | None = None

    @classmethod
    def of(cls, said: object) -> Plan:
        """Take what a policy gave back.

        Raises
        ------
        TypeError
            It is neither a plan nor a list of actions, a number in it is not a whole one, or what is true or false is
            something else.
        ValueError
            A number in it is below 0 or too large.
        """
        plan = said if isinstance(said, Plan) else cls(said) if isinstance(said, list | tuple) else None
        if plan is None:
            raise TypeError(f"the policy gave {said!r}; it must give a list of actions or a Plan")
        for action in plan.actions:
            if not isinstance(action, Action):
                raise TypeError(f"the policy gave {action!r} among its actions")
            for name, value in action.written().items():
                if name in _EITHER and not isinstance(value, bool):
                    raise TypeError(f"the policy gave {value!r} as {name} of {action!r}; it must be True or False")
                if name not in _WORDS and not (name == "requester" and value is None):
                    _number(value, f"{name} of {action!r}")
        if plan.again_at_ms is not None:
            _number(plan.again_at_ms, "again_at_ms")
        return plan

    @classmethod
    def read(cls, plan: Mapping[str, Any]) -> Plan:
        """Read the plan of a line of the decision log."""
        actions = []
        for one in plan["actions"]:
            kind = _KINDS[one["do"]]
            names = kind.__dataclass_fields__
            actions.append(kind(**{name: value for name, value in one.items() if name in names}))
        return cls(tuple(actions), plan.get("again_at_ms"))

    def written(self) -> dict[str, Any]:
        """Give the plan as it stands in the decision log."""
        return {"actions": [action.written() for action in self.actions], "again_at_ms": self.again_at_ms}


_EITHER = ("never", "cached_last")
_WORDS = ("do", "reason", *_EITHER)


def _number(value: object, what: str) -> None:
    if not isinstance(value, int) or isinstance(value, bool):
        raise TypeError(f"the policy gave {value!r} as {what}; it must be a whole number")
    if not 0 <= value < 1 << 64:
        raise ValueError(f"the policy gave {value} as {what}; it must be from 0 to 2**64 - 1")


def _why(action: Action) -> dict[str, str]:
    return {"reason": str(action.reason)}
