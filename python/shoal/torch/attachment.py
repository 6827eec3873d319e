"""A module that brings its own weights back: each call of one of its layers waits for that layer's bytes only.

The outermost call holds a guard of the region (I13), which starts the wake where something is missing; each layer's
call inside first waits on the host until its copies are queued, then makes the current stream wait for them. What is
used first is brought first: the first forward is watched operation by operation, and from then on the region has its
order. While everything is there, none of this waits, and a layer costs one Python call more; none where only the whole
module is called (`parts=False`): then its layers are hooked while a call has to wait for them, and no longer.
"""

from __future__ import annotations

import functools
import threading
import time
from typing import TYPE_CHECKING, Any, NoReturn

import torch
from torch.utils._python_dispatch import TorchDispatchMode

from shoal.errors import DeadlineError, RegionError, TransferError
from shoal.torch.layout import Layout, Span, address_of, blocks_of, join, plain_tensors
from shoal.torch.pools import live_spans
from shoal.torch.tensors import device_of
from shoal.wake import TIMEOUT_S

if TYPE_CHECKING:
    from collections.abc import Callable, Iterable

    from shoal.memory import Region
    from shoal.wake import RegionGuard, Transfer

__all__ = ["Attachment", "attach"]

_WHOLE_BYTES = 16 << 20
_COPIED_BY = ("__deepcopy__", "__reduce_ex__")
_LOOK_S = 0.1
_FIRST_CALLS = 3
"""How many forwards are watched at most: where one fails, or leaves the model's own call out, the next one is."""


def attach(
    model: torch.nn.Module,
    region: Region,
    *,
    whole_bytes: int = _WHOLE_BYTES,
    timeout_s: float = TIMEOUT_S,
    is_cancelled: Callable[[], bool] | None = None,
    parts: bool = True,
) -> Attachment:
    """Let a module's calls wake its region, and let its layers compute as their bytes arrive.

    Nothing is touched by this, so the region may be asleep. The first forward is watched, and a little slower: the
    order in which it uses its tensors becomes the region's, so that wakes bring what is used first, and evictions take
    what is used last. Until then it is the order of registration, embeddings first and the language model's head last.

    Parameters
    ----------
    model
        A module whose parameters and buffers lie in the region, all or some: made under
        :func:`shoal.torch.use_region`, or put there by :func:`shoal.torch.place`.
    region
        The region.
    whole_bytes
        Parts of the module of at most so many bytes are waited for as one.
    timeout_s
        How long a call may wait for its bytes, in seconds.
    is_cancelled
        Asked ten times a second while a call waits for bytes that are not there: where it says true, the call ends
        with a :class:`shoal.TransferError` of the kind ``"cancelled"``. The wake goes on.
    parts
        Whether parts of the module are called by themselves too, outside of any call of it. Where it is false, such a
        call has no guard, and calls of the module cost nothing for its layers while everything is there.

    Returns
    -------
    Attachment
        Its ``detach`` takes everything off again.

    Raises
    ------
    RegionError
        If nothing of the module lies in the region, or the module is attached already.
    TypeError
        If it is compiled: what runs there calls no layer.
    """
    return Attachment(model, region, whole_bytes, timeout_s, is_cancelled, parts=parts)


class Attachment:
    """What makes a module wait for its bytes. Made by :func:`attach`.

    A call of the module, or of a part of it, may run in any thread, with any stream as the current one. What lies in
    the region but belongs to no parameter or buffer of the module, and what the first forward used without a call of
    the layer that owns it, is waited for before anything runs.

    While attached the module refuses to be converted or moved, and to be copied or pickled.
    """

    def __init__(
        self,
        model: torch.nn.Module,
        region: Region,
        whole_bytes: int,
        timeout_s: float,
        is_cancelled: Callable[[], bool] | None = None,
        *,
        parts: bool = True,
    ) -> None:
        if hasattr(model, "_orig_mod") or getattr(model, "_compiled_call_impl", None) is not None:
            raise TypeError("a compiled module calls no layer: hold `region.guard()` around its calls instead")
        layout = Layout.read(model, region)
        if not layout.spans:
            raise RegionError(
                f"region {region.name!r}: no parameter or buffer of the module lies in it; make the module under "
                "shoal.torch.use_region, or put it there with shoal.torch.place",
                kind="state",
            )
        for part in model.modules():
            if isinstance(part.__dict__.get("_apply"), _Refuse) and part.__dict__["_apply"].attachment.is_attached:
                raise RegionError(f"region {region.name!r}: the module is attached already; detach it", kind="state")
        self._model = model
        self._region = region
        self._device = device_of(region)
        self._timeout_s = timeout_s
        self._is_cancelled = is_cancelled
        self._whole_bytes = whole_bytes
        self._local = _Local()
        self._lock = threading.Lock()
        self._early: tuple[str, ...] = ()
        self._order: tuple[str, ...] = ()
        self._watches = _FIRST_CALLS
        self._state = self._read(layout)
        self._inside = frozenset(layout.names.values())
        self._set_order(layout.spans)
        self.is_attached = True
        """Whether :meth:`detach` was not called yet."""
        self._parts = parts
        self._hooked: list[torch.nn.Module] = []
        self._hooking = 0
        self._hook([model, *self._state.waits] if parts else [model])
        for part in model.modules():
            part.__dict__["_apply"] = _Refuse(self, part)
            part.__dict__.update(dict.fromkeys(_COPIED_BY, _NoCopy(self)))

    @property
    def region(self) -> Region:
        """Where the module lies."""
        return self._region

    @property
    def order(self) -> tuple[str, ...]:
        """Names of its tensors in order of use, once a forward was watched; empty before."""
        return self._order

    @property
    def blocks(self) -> tuple[str, ...]:
        """Names of the parts whose calls wait, each for all that is in it."""
        names = {part: name for name, part in self._model.named_modules()}
        return tuple(names[part] for part in self._state.waits)

    def detach(self) -> None:
        """Make the module an ordinary one again. The region keeps its order. Calls that run end as they began."""
        with self._lock:
            self.is_attached = False
        for part in self._model.modules():
            for key in ("forward", "_apply", *_COPIED_BY):
                self._take_off(part, key)

    def _hook(self, parts: Iterable[torch.nn.Module]) -> list[torch.nn.Module]:
        """Let these calls wait for their bytes; gives those that did not before."""
        fresh = [part for part in dict.fromkeys(parts) if not self._is_ours(part.__dict__.get("forward"))]
        for part in fresh:
            part.forward = _Step(self, part)
        return fresh

    def _hook_for_a_call(self, state: _State) -> None:
        """Let the layers wait too, where they do not always, until :meth:`_unhook_after_a_call`."""
        with self._lock:
            self._hooking += 1
            if self.is_attached and not self._parts:
                self._hooked += self._hook(state.waits)

    def _unhook_after_a_call(self) -> None:
        with self._lock:
            self._hooking -= 1
            if not self._hooking:
                for part in self._hooked:
                    self._take_off(part, "forward")
                self._hooked.clear()

    def _is_ours(self, value: object) -> bool:
        return isinstance(value, _Step | _Refuse | _NoCopy) and value.attachment is self

    def _take_off(self, part: torch.nn.Module, key: str) -> None:
        """Where somebody wrapped it since, ours stays inside, and does nothing."""
        ours = part.__dict__.get(key)
        if self._is_ours(ours):
            del part.__dict__[key]
            if isinstance(ours, _Step) and ours.before is not None:
                part.forward = ours.before

    def __repr__(self) -> str:
        how = "attached" if self.is_attached else "detached"
        return f"<{type(self._model).__name__} {how} in region {self._region.name!r}, {len(self._state.waits)} blocks>"

    def _read(self, layout: Layout) -> _State:
        """Work out what each call waits for."""
        strays = layout.strays(live_spans(self._region))
        early = [span for span, name in layout.names.items() if name in self._early]
        return _State(
            layout, blocks_of(self._model, layout, self._whole_bytes), join([*strays, *early]), tuple(sorted(strays))
        )

    def _refresh(self) -> _State:
        """Look again where everything lies: a forward that runs beside a wake must know it."""
        layout = Layout.read(self._model, self._region)
        moved = sorted(self._inside & layout.outside)
        if moved:
            raise RegionError(
                f"region {self._region.name!r}: {moved[0]!r} does not lie in it any more, as it did when the "
                "module was attached: detach before you convert or move a module, and attach it again",
                kind="state",
            )
        self._state = self._read(layout)
        return self._state

    def _set_order(self, spans: Iterable[Span]) -> None:
        state = self._state
        early = [span for span, name in state.layout.names.items() if name in self._early]
        ranges = [(first, end - first) for first, end in (*state.strays, *early, *spans)]
        self._region.set_order(ranges)

    def _learn(self, watched: _Watch) -> None:
        """Take over what a whole forward did."""
        with self._lock:
            self._watches = 0
            names = watched.state.layout.names
            self._early = tuple(names[span] for span in watched.early)
            self._order = tuple(names[span] for span in watched.used)
            self._state = self._read(watched.state.layout)
            used = set(watched.used)
            self._set_order([*watched.used, *(span for span in self._state.layout.spans if span not in used)])


class _State:
    """What calls wait for, at one moment. Never changed."""

    __slots__ = ("entry", "layout", "strays", "waits")

    def __init__(
        self,
        layout: Layout,
        waits: dict[torch.nn.Module, tuple[Span, ...]],
        entry: tuple[Span, ...],
        strays: tuple[Span, ...],
    ) -> None:
        self.layout = layout
        self.waits = waits
        self.entry = entry
        self.strays = strays


class _Local(threading.local):
    """The outermost call of a thread, while it runs."""

    running: _Running | None = None


class _Running:
    """One outermost call: the guard it holds, the wake it runs beside, and what has been waited for."""

    def __init__(self, attachment: Attachment, part: torch.nn.Module) -> None:
        self.attachment = attachment
        self.guard: RegionGuard = attachment._region.guard(in_order=True, timeout_s=attachment._timeout_s)
        self.wake: Transfer | None = None
        self.state = attachment._state
        self.watch: _Watch | None = None
        self._is_captured = False
        self._is_hooking = False
        self._is_whole = part is attachment._model
        self._done: set[tuple[torch.nn.Module | Span, int]] = set()

    def begin(self) -> None:
        """Enter the guard; start the wake where something is missing."""
        attachment = self.attachment
        self._is_captured = attachment._device.type == "cuda" and torch.cuda.is_current_stream_capturing()
        if self._is_captured:
            # So that no eviction elsewhere ends the capture.
            attachment._region._native.note_stream(self._stream())
        self.guard.__enter__()
        try:
            self.wake = self.guard.wake
            if self.wake is not None:
                self._begin_beside()
            watches = attachment._watches and self._is_whole and not self._is_captured
            if self.wake is not None or watches:
                self._is_hooking = True
                attachment._hook_for_a_call(self.state)
            if watches:
                self._begin_watching()
        except BaseException:
            self._leave()
            raise

    def _begin_beside(self) -> None:
        region = self.attachment._region
        if self._is_captured:
            raise RegionError(
                f"region {region.name!r} is not whole on the device while a graph is captured: wake it first",
                kind="state",
            )
        self.state = self.attachment._refresh()
        self.wait(self.state.entry)

    def _begin_watching(self) -> None:
        attachment = self.attachment
        with attachment._lock:
            if not attachment._watches:
                return
            attachment._watches -= 1
        self.watch = _Watch(self)
        self.watch.__enter__()

    def end(self, is_done: bool) -> None:
        """Leave the guard. What was launched may still run: whoever evicts waits for that too."""
        try:
            if self.watch is not None:
                self.watch.__exit__(None, None, None)
                if is_done:
                    self.attachment._learn(self.watch)
        finally:
            self._leave()

    def _leave(self) -> None:
        try:
            if self._is_hooking:
                self.attachment._unhook_after_a_call()
        finally:
            self.guard.__exit__(None, None, None)

    def enter(self, part: torch.nn.Module) -> None:
        """Wait for what a part needs."""
        if self.watch is not None:
            self.watch.entered(part)
        if self.wake is None:
            return
        spans = self.state.waits.get(part)
        if spans:
            stream = self._stream()
            if (part, stream) not in self._done:
                self.wait(spans)
                self._done.add((part, stream))

    def wait(self, spans: Iterable[Span]) -> None:
        """Make the current stream wait for these bytes, or this thread, where there are no streams."""
        if self.wake is None:
            return
        stream = self._stream()
        for first, end in spans:
            if ((first, end), stream) not in self._done:
                self._wait_for(self.wake, first, end - first, stream)
                self._done.add(((first, end), stream))

    def _wait_for(self, wake: Transfer, first: int, nbytes: int, stream: int) -> None:
        attachment = self.attachment
        deadline = time.monotonic() + attachment._timeout_s
        while True:
            left = max(0.0, deadline - time.monotonic())
            patience = left if attachment._is_cancelled is None else min(left, _LOOK_S)
            try:
                wake.wait_stream(first, nbytes, stream, timeout_s=patience)
            except DeadlineError:
                if patience >= left:
                    raise
            else:
                return
            if attachment._is_cancelled is not None and attachment._is_cancelled():
                raise TransferError(
                    f"region {attachment._region.name!r}: the call was cancelled while it waited for {nbytes} bytes "
                    f"at {first}",
                    kind="cancelled",
                )

    def _stream(self) -> int:
        device = self.attachment._device
        return torch.cuda.current_stream(device).cuda_stream if device.type == "cuda" else 0


class _Watch(TorchDispatchMode):
    """Sees every operation of one forward: which tensors of the region it uses, in order, and who called for them."""

    def __init__(self, running: _Running) -> None:
        super().__init__()
        self.state = running.state
        self.used: dict[Span, None] = {}
        self.early: list[Span] = []
        self._running = running
        self._covered: list[Span] = []
        self._base = running.attachment._region.address
        self._end = self._base + running.attachment._region.bytes

    def entered(self, part: torch.nn.Module) -> None:
        self._covered += self.state.waits.get(part, ())

    def _see(self, value: Any) -> None:
        if isinstance(value, torch.Tensor):
            for plain in plain_tensors(value):
                self._see_plain(plain)
        elif isinstance(value, list | tuple):
            for one in value:
                self._see(one)

    def _see_plain(self, value: torch.Tensor) -> None:
        address = address_of(value)
        if address is None or not self._base <= address[0] < self._end:
            return
        span = self.state.layout.find(address[0] - self._base)
        if span is None or span in self.used:
            return
        self.used[span] = None
        if not any(first <= span[0] and span[1] <= end for first, end in self._covered):
            # No call of a block asked for it: from now on it is waited for before anything runs.
            self.early.append(span)
        self._running.wait([span])

    def __torch_dispatch__(
        self, func: Any, types: Any, args: tuple[Any, ...] = (), kwargs: dict[str, Any] | None = None
    ) -> Any:
        kwargs = kwargs or {}
        for value in args:
            self._see(value)
        for value in kwargs.values():
            self._see(value)
        return func(*args, **kwargs)


class _Step:
    """Stands for a part's ``forward`` while it is attached."""

    def __init__(self, attachment: Attachment, part: torch.nn.Module) -> None:
        self.before: Callable[..., Any] | None = part.__dict__.get("forward")
        inner = part.forward
        functools.update_wrapper(self, inner, updated=())
        self.inner = inner
        self.attachment = attachment
        self.part = part

    def __call__(self, *args: Any, **kwargs: Any) -> Any:
        attachment = self.attachment
        local = attachment._local
        running = local.running
        if running is not None:
            running.enter(self.part)
            return self.inner(*args, **kwargs)
        if not attachment.is_attached:
            return self.inner(*args, **kwargs)
        running = _Running(attachment, self.part)
        running.begin()
        is_done = False
        try:
            local.running = running
            running.enter(self.part)
            result = self.inner(*args, **kwargs)
            is_done = True
        finally:
            local.running = None
            running.end(is_done)
        return result


class _Refuse:
    """Stands for a part's ``_apply`` (what ``to``, ``half`` and ``cuda`` call) while it is attached."""

    def __init__(self, attachment: Attachment, part: torch.nn.Module) -> None:
        self.attachment = attachment
        self.part = part

    def __call__(self, fn: Callable[[torch.Tensor], torch.Tensor], recurse: bool = True) -> torch.nn.Module:
        attachment, part = self.attachment, self.part
        if attachment.is_attached and not self._keeps(fn, recurse):
            raise RegionError(
                f"region {attachment._region.name!r}: converting or moving {type(part).__name__} would take its "
                "weights out of the region; detach it first, and attach it again where it lies in one",
                kind="state",
            )
        return type(part)._apply(part, fn, recurse)

    def _keeps(self, fn: Callable[[torch.Tensor], torch.Tensor], recurse: bool) -> bool:
        """Try it on one element of each sort: whether it gives back what it was given."""
        parts = self.part.modules() if recurse else [self.part]
        sorts = {
            (value.dtype, value.device)
            for part in parts
            for value in (*part._parameters.values(), *part._buffers.values())
            if value is not None
        }
        for dtype, device in sorts:
            probe = torch.empty(1, dtype=dtype, device=device)
            tried = fn(probe)
            if tried.dtype != dtype or tried.device != device or tried.data_ptr() != probe.data_ptr():
                return False
        return True


class _NoCopy:
    """Stands for how a part is copied and pickled while it is attached: its weights may be asleep."""

    def __init__(self, attachment: Attachment) -> None:
        self.attachment = attachment

    def __call__(self, *_arguments: object) -> NoReturn:
        raise RegionError(
            f"region {self.attachment._region.name!r}: a module that is attached cannot be copied or pickled; detach "
            "it, or take its state_dict() under a guard",
            kind="state",
        )
