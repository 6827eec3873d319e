"""What a policy decides from. The fields are those of the decision log (``decisions.ndjson``), by the same names."""

from __future__ import annotations

from dataclasses import asdict, dataclass, fields
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from collections.abc import Mapping


@dataclass(frozen=True)
class Model:
    """One model.

    Attributes
    ----------
    id, name
        Which; actions name it by `id`.
    ready
        Its worker lives and takes orders. Where not, what it holds is on its way back.
    weights_total
        Bytes of all its weights.
    weights_held, kv_held, overhead_held
        Its leases in bytes, by kind; overhead cannot be ordered back.
    overhead_lacking
        Bytes that its steps will take besides once it has weights, and that are not leased: a request for weights has
        them in it.
    overhead_leaves
        Bytes of its overhead that are free before long once it has no weights.
    kv_live
        Bytes of KV that some request uses.
    kv_cached
        Bytes of KV that no request uses and that hold a prefix of prompts.
    kv_min
        Bytes of KV without which it cannot run any request.
    ordered
        Bytes it was ordered to give back and has not yet.
    ordered_cached_last
        Of those, weights go before cached prefixes.
    pinned
        It is never evicted.
    is_rigid
        It gives up all that it holds or nothing.
    keeps_weights
        Only KV that it can do without is taken of it.
    min, max
        It is never evicted below so many bytes, nor leased more.
    priority
        Higher should yield later.
    active, parked
        Requests it works on, and requests that wait for it.
    last_used_ms
        When a request last began or ended.
    turn_since_ms
        When its turn began: wholly resident, with the KV of a request, and used.
    wanting_since_ms
        Since when it has had requests without being able to run them.
    rising_until_ms
        Its bytes are being brought back, until then at the latest.
    pause_ms
        How soon a request has lately followed the end of the one before.
    up
        All its weights are on the device and none were ordered away since.
    wake_ordered
        It was ordered to come back and has not answered yet.
    keep_alive_ms
        It is to be put to sleep after so long without requests.
    skip_until_ms
        It gave nothing when last asked; not to be asked again before this.
    restore_us_per_mib
        What bringing a MiB of its weights back takes (microseconds), as measured.
    kv_back_us_per_mib
        The same for KV that holds prefixes; 0 where nobody knows.
    kv_found_milli
        What part of its prefixes one use finds again, in thousandths; 0 where nobody knows.
    uses_milli, uses_window_ms
        How often somebody came, in thousandths (older times count less), and the time those are spread over.
    expected_ms
        When somebody is expected to come next, where uses come in rounds; None where nobody can tell.
    restored_ms
        When it was last wholly brought back.
    apart
        Ids of models that must have nothing on the device beside it.
    preload
        To be brought to the device without anybody asking, where nobody has to give anything up for it.
    """

    id: int
    name: str
    ready: bool = True
    weights_total: int = 0
    weights_held: int = 0
    kv_held: int = 0
    kv_live: int = 0
    kv_cached: int = 0
    kv_min: int = 0
    overhead_held: int = 0
    overhead_lacking: int = 0
    overhead_leaves: int = 0
    ordered: int = 0
    ordered_cached_last: bool = False
    pinned: bool = False
    is_rigid: bool = False
    keeps_weights: bool = False
    min: int = 0
    max: int | None = None
    priority: int = 0
    active: int = 0
    parked: int = 0
    last_used_ms: int = 0
    turn_since_ms: int | None = None
    wanting_since_ms: int | None = None
    rising_until_ms: int | None = None
    pause_ms: int | None = None
    up: bool = False
    wake_ordered: bool = False
    keep_alive_ms: int | None = None
    skip_until_ms: int = 0
    restore_us_per_mib: int = 0
    kv_back_us_per_mib: int = 0
    kv_found_milli: int = 0
    uses_milli: int = 0
    uses_window_ms: int = 0
    expected_ms: int | None = None
    restored_ms: int | None = None
    apart: tuple[int, ...] = ()
    preload: bool = False

    @property
    def held(self) -> int:
        """Bytes of all its leases."""
        return self.weights_held + self.kv_held + self.overhead_held

    @property
    def missing(self) -> int:
        """Bytes of its weights that it has no lease for; a request for them asks for `overhead_lacking` more."""
        return max(0, self.weights_total - self.weights_held)

    @property
    def is_busy(self) -> bool:
        """Whether somebody wants something of it."""
        return self.active > 0 or self.parked > 0


@dataclass(frozen=True)
class Request:
    """A request for device bytes that was not answered yet.

    Attributes
    ----------
    model, request
        Whose, and its number; actions name it by both.
    kind
        ``"weights"``, ``"kv"`` or ``"overhead"``.
    bytes, bytes_min
        How many more bytes are wanted, and the least that is of use.
    asked_ms, deadline_ms
        When it was asked, and when an answer is no longer of use.
    """

    model: int
    request: int
    kind: str
    bytes: int
    bytes_min: int
    asked_ms: int
    deadline_ms: int


@dataclass(frozen=True)
class Shelf:
    """Everything that a decision is made from.

    Attributes
    ----------
    now_ms
        The moment of the decision, on the clock of all times here.
    budget
        Bytes that may be leased in all.
    taken
        Bytes that other processes have of the device; not in the budget. What is leased beyond the budget because of
        them has to come back.
    falling
        Bytes leased for overhead of which less was measured lately: they come back before long.
    returning
        Bytes that processes had which are gone: they come back before long, and are granted to nobody until then. What
        the driver still shows after 2.5 seconds is in ``taken`` in their place.
    extent
        The unit in which bytes are ordered back.
    quantum_ms
        How long a busy model is to run before it yields.
    is_manual
        Nothing is to be evicted for others' sake (``evict = "never"``).
    models
        Those that make a difference; one that sleeps and that nobody wants is not among them.
    requests
        What is waiting for an answer. One that a plan does not name goes on waiting, until its deadline.
    """

    now_ms: int
    budget: int
    extent: int
    quantum_ms: int
    is_manual: bool = False
    taken: int = 0
    falling: int = 0
    returning: int = 0
    models: tuple[Model, ...] = ()
    requests: tuple[Request, ...] = ()

    @property
    def free(self) -> int:
        """Bytes that can be granted at once."""
        return max(0, self.budget - self.returning - sum(model.held for model in self.models))

    def model(self, number: int) -> Model:
        """Give the model with this id.

        Raises
        ------
        KeyError
            There is none.
        """
        for model in self.models:
            if model.id == number:
                return model
        raise KeyError(number)

    @classmethod
    def read(cls, state: Mapping[str, Any], now_ms: int) -> Shelf:
        """Read the state of a line of the decision log, or of a question; keys that are not known here are left out."""
        models = tuple(Model(**_known(Model, one) | {"apart": tuple(one.get("apart", ()))}) for one in state["models"])
        requests = tuple(Request(**_known(Request, one)) for one in state["requests"])
        return cls(**_known(cls, state) | {"now_ms": now_ms, "models": models, "requests": requests})

    def written(self) -> dict[str, Any]:
        """Give the state as :meth:`read` takes it."""
        state = asdict(self)
        del state["now_ms"]
        return state


def _known(kind: type, values: Mapping[str, Any]) -> dict[str, Any]:
    names = {field.name for field in fields(kind)}
    return {name: value for name, value in values.items() if name in names}
