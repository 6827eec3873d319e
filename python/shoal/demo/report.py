"""What is shown: events and answers as they happen, and at the end what it all came to."""

from __future__ import annotations

import re
import statistics
import threading
import time
from collections import Counter, defaultdict
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from collections.abc import Sequence

    from shoal.demo.jobs import Outcome
    from shoal.demo.management import Event

_MIB = 1 << 20
_TEXT_MAX = 60
_REASONS_MAX = 12


class Screen:
    """Lines with the time since the beginning; several threads may write."""

    def __init__(self) -> None:
        self._begun = time.monotonic()
        self._lock = threading.Lock()

    def line(self, model: str, text: str) -> None:
        """Write one line."""
        with self._lock:
            print(f"{time.monotonic() - self._begun:7.1f} s  {model:<10} {text}", flush=True)

    def title(self, text: str) -> None:
        """Write a headline."""
        with self._lock:
            print(f"\n{text}", flush=True)

    def event(self, event: Event) -> None:
        """Write an event that says who made room for whom; keep quiet about the others."""
        if text := event_text(event):
            self.line(event["model"] or "shoal", f"  {text}")

    def outcome(self, outcome: Outcome) -> None:
        """Write what a request came to."""
        found = "asleep" if outcome.was_asleep else "awake"
        text = " ".join(outcome.text.split())
        shown = text if len(text) <= _TEXT_MAX else text[: _TEXT_MAX - 3] + "..."
        self.line(outcome.model, f"answered after {outcome.first_s:.2f} s ({found}), {outcome.tokens} tokens: {shown}")


def event_text(event: Event) -> str | None:
    """Return an event in words, or None where it is no news to a person."""
    kind = event["kind"]
    if kind == "wake_started":
        return f"waking, {size(event['bytes'])} missing: {event['reason']}"
    if kind == "wake_done":
        return f"awake after {event['duration_ms']} ms, {size(event['bytes'])} brought back"
    if kind == "evict_started":
        return f"is to give up {size(event['bytes'])}: {event['reason']}"
    if kind == "evict_done":
        return f"gave up {size(event['bytes'])} in {event['duration_ms']} ms, {size(event['copied'])} copied first"
    if kind in ("wake_failed", "lease_denied", "model_failed", "evict_timed_out", "worker_exited"):
        return f"{kind.replace('_', ' ')}: {event.get('reason') or event.get('status') or ''}"
    return None


def size(count: int) -> str:
    """Return a number of bytes in MiB."""
    return f"{count / _MIB:.0f} MiB" if count >= 10 * _MIB or count == 0 else f"{count / _MIB:.1f} MiB"


def yielded_and_returned(events: Sequence[Event], model: str) -> bool:
    """Tell whether a model was made to give up memory and was woken again after that."""
    gave_up = False
    for event in events:
        if event["model"] != model:
            continue
        if event["kind"] == "evict_done" and event["bytes"] > 0:
            gave_up = True
        elif event["kind"] == "wake_done" and event["bytes"] > 0 and gave_up:
            return True
    return False


def summary(state: dict[str, Any], events: Sequence[Event], outcomes: Sequence[Outcome]) -> str:
    """Return the closing tables."""
    device = state["device"]
    weights = sum(model["bytes"]["weights_total"] for model in state["models"])
    lines = [
        (
            f"{device['name']}{' (simulated in RAM)' if device['simulated'] else ''}: "
            f"{size(weights)} of weights and their KV shared {size(device['budget'])}."
        ),
        "",
        *requests_table(state, outcomes),
        "",
        *memory_table(state),
        "",
        *evictions(events),
    ]
    return "\n".join(lines)


def requests_table(state: dict[str, Any], outcomes: Sequence[Outcome]) -> list[str]:
    """Return one row a model: what was asked of it and how soon it answered."""
    rows = [("model", "requests", "tokens", "first answer awake", "asleep", "wakes", "evictions", "given up")]
    for model in state["models"]:
        own = [outcome for outcome in outcomes if outcome.model == model["name"]]
        counts = model["counts"]
        rows.append(
            (
                model["name"],
                str(len(own)),
                str(sum(outcome.tokens for outcome in own)),
                median([outcome.first_s for outcome in own if not outcome.was_asleep]),
                median([outcome.first_s for outcome in own if outcome.was_asleep]),
                str(counts["wakes"]),
                str(counts["evictions"]),
                size(counts["evicted"]),
            )
        )
    return table(rows)


def memory_table(state: dict[str, Any]) -> list[str]:
    """Return where every model's bytes are now, tier by tier."""
    rows = [("bytes now", "status", "device: weights", "KV", "host", "source only")]
    for model in state["models"]:
        held = model["bytes"]
        weights = f"{size(held['weights_device'])} of {size(held['weights_total'])}"
        places = (weights, size(held["kv_device"]), size(held["host"]), size(held["source_only"]))
        rows.append((model["name"], model["status"], *places))
    return table(rows)


def evictions(events: Sequence[Event]) -> list[str]:
    """Return who had to give up memory, how often, and why."""
    counted: dict[str, Counter[str]] = defaultdict(Counter)
    examples: dict[str, str] = {}
    for event in events:
        if event["kind"] == "evict_started":
            # Reasons that differ in their numbers alone are one reason, shown as it was first given.
            form = re.sub(r"[0-9.]+", "N", event["reason"])
            examples.setdefault(form, event["reason"])
            counted[event["model"]][form] += 1
    lines = ["Evictions, with their reasons (numbers are those of the first of each kind):"]
    for model, reasons in counted.items():
        for form, times in reasons.most_common(_REASONS_MAX):
            lines.append(f"  {model:<10} {times:>3} x  {examples[form]}")
        left = len(reasons) - _REASONS_MAX
        if left > 0:
            lines.append(f"  {model:<10} and {left} other reasons, in the events at /api/v1/events")
    return lines if counted else ["No model had to give up memory."]


def median(seconds: Sequence[float]) -> str:
    """Return the median with how many there were."""
    return f"{statistics.median(seconds):.2f} s ({len(seconds)})" if seconds else "-"


def table(rows: Sequence[Sequence[str]]) -> list[str]:
    """Return rows with their columns lined up; the first is the head."""
    widths = [max(len(row[column]) for row in rows) for column in range(len(rows[0]))]
    lines = ["  ".join(cell.ljust(width) for cell, width in zip(row, widths, strict=True)).rstrip() for row in rows]
    return [lines[0], "-" * max(map(len, lines)), *lines[1:]]
