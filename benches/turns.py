"""Conversations that take turns, for benches that count how many are held: what is asked of whom, in which order.

Apart because it is asked of a small engine on two cores and of an 8B on a GPU, and both shall ask alike.
"""

from __future__ import annotations

import asyncio
import random
from typing import TYPE_CHECKING

from benches.results import percentile

if TYPE_CHECKING:
    from collections.abc import Iterator

WORDS = 32
"""Tokens that are new in each turn. Its length stays the same: what was said last is taken back."""
BESIDE = 2
"""How many ask at a time."""


class Turns:
    """Conversations of one length with an engine; how it is asked is up to the one who has it."""

    def __init__(self, tokens: int, vocabulary: int, seed: str) -> None:
        self.tokens, self.vocabulary = tokens, vocabulary
        self.draw = random.Random(seed)  # noqa: S311 - made-up prompts
        self.prompts: list[list[int]] = []

    async def ask(self, prompt: list[int]) -> tuple[float, int]:
        """Ask for a token; its seconds, and how much of the prompt was found."""
        raise NotImplementedError

    def saved(self) -> None:
        """Wait until what was computed is kept below, where there is a tier."""
        raise NotImplementedError

    def words(self, count: int) -> list[int]:
        """Make up some tokens."""
        return [self.draw.randrange(1, self.vocabulary) for _ in range(count)]

    async def more(self, count: int) -> None:
        """Begin conversations until there are so many."""
        while len(self.prompts) < count:
            self.prompts.append(self.words(self.tokens))
            await self.ask(self.prompts[-1])
            self.saved()

    async def turn(self, number: int) -> tuple[float, int]:
        """Go on with one."""
        return await self.ask([*self.prompts[number][: self.tokens - WORDS], *self.words(WORDS)])

    async def slowest(self, count: int, rounds: int) -> tuple[float, float, int]:
        """Let so many take turns in a random order; the 99th percentile of first tokens, their median, and how many."""
        await self.more(count)
        taken: list[float] = []
        for _ in range(rounds):
            order = list(range(count))
            self.draw.shuffle(order)

            async def some(numbers: Iterator[int]) -> None:
                for number in numbers:
                    seconds, _ = await self.turn(number)
                    taken.append(seconds)

            numbers = iter(order)
            await asyncio.gather(*(some(numbers) for _ in range(BESIDE)))
        return percentile(taken, 0.99), percentile(taken, 0.5), len(taken)
