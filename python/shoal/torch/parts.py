"""What a module consists of: its tensors by the memory they stand for, and the order of their use."""

from __future__ import annotations

from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

import torch

if TYPE_CHECKING:
    from collections.abc import Callable

__all__ = ["Entry", "collect", "order_of_use", "rank"]


@dataclass(slots=True)
class Entry:
    """One stretch of memory of the module: its names, and every tensor object that stands for it."""

    names: list[str]
    tensors: list[torch.Tensor]
    offset: int = 0

    @property
    def one(self) -> torch.Tensor:
        """One of its tensors; the others look the same."""
        return self.tensors[0]

    @property
    def nbytes(self) -> int:
        """Its length in bytes."""
        return self.one.numel() * self.one.element_size()


def collect(module: torch.nn.Module, used: list[torch.nn.Module] | None) -> tuple[list[Entry], list[str]]:
    """Give what is to be placed, in order, and the names of what is not."""
    entries: dict[tuple[Any, ...], Entry] = {}
    left_out: list[str] = []
    parts = list(module.named_modules(remove_duplicate=True))
    if used is None:
        parts.sort(key=lambda part: rank(module, *part))
    else:
        place_of = {id(part): index for index, part in enumerate(used)}
        parts.sort(key=lambda part: place_of.get(id(part[1]), len(used)))
    seen: set[int] = set()
    names = _all_names(module)
    for prefix, part in parts:
        dot = f"{prefix}." if prefix else ""
        here: list[tuple[str, torch.Tensor | None]] = [(dot + key, value) for key, value in part._parameters.items()]
        for key, buffer in part._buffers.items():
            if key in part._non_persistent_buffers_set:
                left_out.append(dot + key)
            else:
                here.append((dot + key, buffer))
        for full, value in here:
            if value is None or id(value) in seen:
                continue
            seen.add(id(value))
            entry = entries.setdefault(_key(value), Entry([], []))
            entry.names += names.get(id(value), [full])
            entry.tensors.append(value)
    return list(entries.values()), left_out


def _all_names(module: torch.nn.Module) -> dict[int, list[str]]:
    """Give every name of every tensor, by the object's identity: tied weights have several."""
    names: dict[int, list[str]] = {}
    for prefix, part in module.named_modules(remove_duplicate=False):
        dot = f"{prefix}." if prefix else ""
        for key, value in (*part._parameters.items(), *part._buffers.items()):
            if value is not None:
                names.setdefault(id(value), []).append(dot + key)
    return names


def rank(module: torch.nn.Module, name: str, part: torch.nn.Module) -> int:
    """Sort parts that are used first to the front and the head to the end; sorting is stable."""
    get_head = getattr(module, "get_output_embeddings", None)
    head = get_head() if callable(get_head) else None
    if (head is not None and part is head) or name.rpartition(".")[2] == "lm_head":
        return 2
    return 0 if isinstance(part, torch.nn.Embedding) else 1


def order_of_use(module: torch.nn.Module, example: Callable[[torch.nn.Module], Any]) -> list[torch.nn.Module]:
    """Run the module once and give its parts in the order in which they were entered."""
    used: dict[int, torch.nn.Module] = {}

    def enter(part: torch.nn.Module, _arguments: Any) -> None:
        used.setdefault(id(part), part)

    hooks = [part.register_forward_pre_hook(enter) for part in module.modules()]
    try:
        with torch.no_grad():
            example(module)
    finally:
        for hook in hooks:
            hook.remove()
    return list(used.values())


def _key(value: torch.Tensor) -> tuple[Any, ...]:
    """Name the memory a tensor stands for: two tensors with one key are tied."""
    if value.numel() == 0:
        return (id(value),)
    return (
        value.untyped_storage().data_ptr(), value.storage_offset(), tuple(value.shape), value.stride(), value.dtype,
    )  # fmt: skip
