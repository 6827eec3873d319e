"""The three jobs, asked through the real ``openai`` client as any program would: chat, search, code completion."""

from __future__ import annotations

import math
import time
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from collections.abc import Callable, Sequence

CHAT_REFERENCE = "What is the capital of France? Answer in one short sentence."
CODE_REFERENCE = "def __init__(self, "

PASSAGES = (
    "Bread rises because yeast turns sugar into carbon dioxide, which the dough holds in bubbles.",
    "A lighthouse warns ships of rocks with a beam that turns and is seen for twenty miles.",
    "Photosynthesis lets plants make sugar out of sunlight, water and carbon dioxide.",
    "Virtual memory gives each program addresses of its own and decides what really lies in RAM.",
    "The violin has four strings, tuned in fifths, and is played with a bow of horsehair.",
    "Glaciers are rivers of ice that carve valleys as they slide slowly towards the sea.",
    "A librarian puts books that many people ask for on the shelf nearest to the door.",
    "Bees tell each other where flowers are by dancing on the honeycomb.",
)
QUESTIONS = (
    ("How does an operating system decide what is in memory?", 3),
    ("Why does dough get bigger before baking?", 0),
    ("How do insects share the way to food?", 7),
)
STORY = (
    "Tell me in two sentences what this is about. A harbour town had one crane and three merchants. "
    "Each wanted the crane for the whole day, so the harbour master gave it to whoever had a ship at the quay, "
    "and asked the others to wait where their crates stood. "
)


@dataclass(frozen=True)
class Outcome:
    """What came of one request."""

    model: str
    first_s: float
    total_s: float
    was_asleep: bool
    tokens: int
    text: str


class Jobs:
    """Asks one server for the three kinds of work."""

    def __init__(self, address: str, timeout_s: float = 180.0) -> None:
        from openai import OpenAI

        self._client: Any = OpenAI(base_url=f"{address}/v1", api_key="none-needed", max_retries=0, timeout=timeout_s)

    def close(self) -> None:
        """Close its connections."""
        self._client.close()

    def chat(self, text: str, tokens: int) -> Outcome:
        """Ask the chat model, greedily, and take the answer as it streams."""
        return self._stream(
            self._client.chat.completions.with_raw_response.create,
            "chat",
            lambda choice: choice.delta.content,
            messages=[{"role": "user", "content": text}],
            max_tokens=tokens,
            temperature=0,
        )

    def code(self, text: str, tokens: int) -> Outcome:
        """Let the code model go on from ``text``, greedily."""
        return self._stream(
            self._client.completions.with_raw_response.create,
            "code",
            lambda choice: choice.text,
            prompt=text,
            max_tokens=tokens,
            temperature=0,
        )

    def embed(self, texts: Sequence[str]) -> tuple[Outcome, list[list[float]]]:
        """Turn texts into vectors."""
        begun = time.monotonic()
        raw = self._client.embeddings.with_raw_response.create(
            model="documents", input=list(texts), encoding_format="float"
        )
        answer = raw.parse()
        took = time.monotonic() - begun
        vectors = [entry.embedding for entry in sorted(answer.data, key=lambda entry: entry.index)]
        outcome = Outcome(
            "documents", took, took, _was_asleep(raw), answer.usage.prompt_tokens, f"{len(texts)} vectors"
        )
        return outcome, vectors

    def _stream(
        self, create: Callable[..., Any], model: str, text_of: Callable[[Any], str | None], **asked: Any
    ) -> Outcome:
        begun = time.monotonic()
        raw = create(model=model, stream=True, stream_options={"include_usage": True}, **asked)
        first_s, tokens, pieces = None, 0, []
        for chunk in raw.parse():
            if chunk.usage is not None:
                tokens = chunk.usage.completion_tokens
            for choice in chunk.choices:
                if piece := text_of(choice):
                    if first_s is None:
                        first_s = time.monotonic() - begun
                    pieces.append(piece)
        total_s = time.monotonic() - begun
        return Outcome(
            model, total_s if first_s is None else first_s, total_s, _was_asleep(raw), tokens, "".join(pieces)
        )


def search(vectors: Sequence[Sequence[float]], asked: Sequence[float]) -> int:
    """Return the place of the vector nearest to ``asked`` by angle."""
    return max(range(len(vectors)), key=lambda place: cosine(vectors[place], asked))


def cosine(left: Sequence[float], right: Sequence[float]) -> float:
    """Return the cosine of the angle between two vectors."""
    product = sum(a * b for a, b in zip(left, right, strict=True))
    return product / (math.hypot(*left) * math.hypot(*right))


def _was_asleep(raw: Any) -> bool:
    # A stream whose wait was long begins before the way is known, so it has no such header.
    return bool(raw.headers.get("x-shoal-was-asleep", "true").lower() in ("true", "1", "yes"))
