"""Where a module's tensors lie in a region, and which call of which part uses them.

A part whose tensors are all waited for when it is called is a *block*: a layer, an embedding, a head. Parts are taken
apart only where the module keeps a list of them, since that is where they are called one by one; inside a layer, code
often reaches for the weights of a part without calling it (``torch.nn.MultiheadAttention`` does).
"""

from __future__ import annotations

from bisect import bisect_right
from dataclasses import dataclass, field
from typing import TYPE_CHECKING

import torch

from shoal.torch.parts import rank

if TYPE_CHECKING:
    from collections.abc import Iterable, Iterator

    from shoal.memory import Region

__all__ = ["Layout", "Span", "address_of", "blocks_of", "join", "plain_tensors"]

_LISTS = (torch.nn.ModuleList, torch.nn.ModuleDict, torch.nn.Sequential)
_NEVER_CALLED = (torch.nn.ModuleList, torch.nn.ModuleDict, torch.nn.ParameterList, torch.nn.ParameterDict)

Span = tuple[int, int]
"""First byte in the region, and byte after the last."""

_GAP_BYTES = 256 << 10
"""Spans that are so near to each other are waited for as one: they share an extent, or nearly so."""


def join(spans: Iterable[Span], gap: int = _GAP_BYTES) -> tuple[Span, ...]:
    """Join spans that touch or nearly so, by address."""
    joined: list[Span] = []
    for first, end in sorted(spans):
        if joined and first <= joined[-1][1] + gap:
            joined[-1] = (joined[-1][0], max(joined[-1][1], end))
        else:
            joined.append((first, end))
    return tuple(joined)


def plain_tensors(value: torch.Tensor) -> Iterator[torch.Tensor]:
    """Give the plain tensors that a tensor consists of: those of a quantized or distributed one lie inside it."""
    flatten = getattr(value, "__tensor_flatten__", None)
    if flatten is None or type(value) in {torch.Tensor, torch.nn.Parameter}:
        yield value
        return
    names, _ = flatten()
    for name in names:
        yield from plain_tensors(getattr(value, name))


def address_of(value: torch.Tensor) -> Span | None:
    """Give the addresses that a plain tensor takes; `None` for one of no elements or without memory."""
    if value.numel() == 0 or value.layout is not torch.strided:
        return None
    try:
        first = value.data_ptr()
    except RuntimeError:
        return None
    last = sum((size - 1) * step for size, step in zip(value.shape, value.stride(), strict=True))
    return (first, first + (last + 1) * value.element_size()) if first else None


@dataclass
class Layout:
    """The spans of a module's tensors in a region at this moment.

    Parameters
    ----------
    names
        First name of each tensor that lies in the region, by its span.
    by_part
        Spans of each part's own tensors, by the part's identity.
    spans
        All of them, in the order in which they are expected to be used.
    outside
        Names of tensors that do not lie there.
    """

    names: dict[Span, str] = field(default_factory=dict)
    by_part: dict[int, list[Span]] = field(default_factory=dict)
    spans: list[Span] = field(default_factory=list)
    outside: set[str] = field(default_factory=set)
    _starts: list[int] = field(default_factory=list)
    _sorted: list[Span] = field(default_factory=list)

    @classmethod
    def read(cls, model: torch.nn.Module, region: Region) -> Layout:
        """Look where everything lies, without touching it."""
        made = cls()
        base, end = region.address, region.address + region.bytes
        parts = sorted(model.named_modules(), key=lambda part: rank(model, *part))
        for prefix, part in parts:
            dot = f"{prefix}." if prefix else ""
            own = made.by_part.setdefault(id(part), [])
            for key, value in (*part._parameters.items(), *part._buffers.items()):
                if value is None:
                    continue
                for plain in plain_tensors(value):
                    address = address_of(plain)
                    if address is None or not (base <= address[0] and address[1] <= end):
                        made.outside.add(dot + key)
                        continue
                    span = (address[0] - base, address[1] - base)
                    own.append(span)
                    if span not in made.names:
                        made.names[span] = dot + key
                        made.spans.append(span)
        made._sorted = sorted(made.spans)
        made._starts = [first for first, _ in made._sorted]
        return made

    def find(self, offset: int) -> Span | None:
        """Give the tensor that a byte lies in."""
        at = bisect_right(self._starts, offset) - 1
        # Views of one memory may lie inside one another: look back a little.
        for index in range(at, max(at - 4, -1), -1):
            if offset < self._sorted[index][1]:
                return self._sorted[index]
        return None

    def strays(self, live: Iterable[Span], gap: int = 4096) -> list[Span]:
        """Give what of these live spans belongs to no tensor of the module."""
        strays: list[Span] = []
        known = join(self._sorted, 0)
        for first, end in sorted(live):
            at = first
            for left, right in known:
                if right <= at:
                    continue
                if left >= end:
                    break
                if left - at > gap:
                    strays.append((at, left))
                at = max(at, right)
            if end - at > gap or at == first:
                strays.append((at, end))
        return [span for span in strays if span[0] < span[1]]


def blocks_of(model: torch.nn.Module, layout: Layout, whole_bytes: int) -> dict[torch.nn.Module, tuple[Span, ...]]:
    """Give the parts whose calls wait, each with what it waits for.

    Parameters
    ----------
    model
        The module.
    layout
        Where its tensors lie.
    whole_bytes
        A part of at most so many bytes is not taken apart.
    """
    blocks: dict[torch.nn.Module, list[Span]] = {}

    def all_of(part: torch.nn.Module) -> list[Span]:
        return [span for one in part.modules() for span in layout.by_part.get(id(one), [])]

    def visit(part: torch.nn.Module, caller: torch.nn.Module) -> None:
        spans = all_of(part)
        if not spans or part in blocks:
            return
        if not isinstance(part, _NEVER_CALLED):
            caller = part
        parts = any(isinstance(one, _LISTS) and len(one) for one in part.modules())
        if caller is part and (not parts or sum(end - first for first, end in join(spans, 0)) <= whole_bytes):
            blocks[part] = spans
            return
        # What belongs to a list itself is used by whoever has the list.
        own = layout.by_part.get(id(part), [])
        if own or caller is part:
            blocks.setdefault(caller, []).extend(own)
        for child in part.children():
            visit(child, caller)

    visit(model, model)
    return {part: join(spans) for part, spans in blocks.items() if spans}
