"""From tokens to text, piece by piece, up to a stop string.

Two small machines, used alike for streamed and whole answers, so that both give the same text.
"""

from __future__ import annotations

from bisect import bisect_left
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from collections.abc import Sequence

_REPLACEMENT = "\ufffd"
_HELD_TOKENS_MAX = 8  # a character is at most 4 bytes; more pending tokens than this is not a split character


class Detokenizer:
    """Text of a growing list of tokens; a character split over tokens comes out whole, once."""

    def __init__(self, tokenizer: Any) -> None:
        self._tokenizer = tokenizer
        self._tokens: list[int] = []
        self._prefix = 0  # tokens from here on are decoded together, because a token's text depends on its neighbours
        self._read = 0  # the text up to here was given out

    def feed(self, tokens: Sequence[int]) -> str:
        """Give the text that is certain after `tokens` more."""
        pieces = []
        for token in tokens:
            self._tokens.append(token)
            pieces.append(self._step(final=False))
        return "".join(pieces)

    def finish(self) -> str:
        """Give what was held back."""
        return self._step(final=True) if self._read < len(self._tokens) else ""

    def _step(self, *, final: bool) -> str:
        before = self._decode(self._tokens[self._prefix : self._read])
        text = self._decode(self._tokens[self._prefix :])
        held = len(self._tokens) - self._read
        if text.endswith(_REPLACEMENT) and not final and held <= _HELD_TOKENS_MAX:
            return ""
        self._prefix, self._read = self._read, len(self._tokens)
        return text[len(before) :]

    def _decode(self, tokens: list[int]) -> str:
        if not tokens:
            return ""
        text: str = self._tokenizer.decode(tokens, skip_special_tokens=True, clean_up_tokenization_spaces=False)
        return text


class StopScanner:
    """Passes text on until a stop string appears; the stop string and what follows are never given out."""

    def __init__(self, stops: Sequence[str]) -> None:
        self._stops = [stop for stop in stops if stop]
        self._held = ""
        self.stopped = False

    def feed(self, text: str) -> str:
        """Give the text that no stop string can begin in any more."""
        if self.stopped:
            return ""
        if not self._stops:
            return text
        text = self._held + text
        found = [at for at in (text.find(stop) for stop in self._stops) if at >= 0]
        if found:
            self.stopped, self._held = True, ""
            return text[: min(found)]
        keep = max(_overlap(text, stop) for stop in self._stops)
        self._held = text[len(text) - keep :]
        return text[: len(text) - keep]

    def finish(self) -> str:
        """Give what was held back, when no more text comes."""
        held, self._held = self._held, ""
        return "" if self.stopped else held


def _overlap(text: str, stop: str) -> int:
    """How long the longest end of `text` is that begins `stop`."""
    for length in range(min(len(text), len(stop) - 1), 0, -1):
        if text.endswith(stop[:length]):
            return length
    return 0


class TextStream:
    """Tokens in, text out, with stop strings.

    Attributes
    ----------
    tokens
        Tokens taken in up to the one that completed a stop string.
    starts
        Where in the text each of them begins, in characters; a token after half a character begins where that did.
    given
        Characters given out.
    """

    def __init__(self, tokenizer: Any, stops: Sequence[str]) -> None:
        self._detokenizer = Detokenizer(tokenizer)
        self._scanner = StopScanner(stops)
        self.tokens = 0
        self.starts: list[int] = []
        self.given = 0
        self._decoded = 0

    @property
    def shown(self) -> int:
        """How many tokens begin in the text that was given out."""
        return bisect_left(self.starts, self.given)

    @property
    def stopped(self) -> bool:
        """Whether a stop string was met."""
        return self._scanner.stopped

    def feed(self, tokens: Sequence[int]) -> str:
        """Give the text that is certain after these tokens; how they are grouped into calls makes no difference."""
        pieces = []
        for token in tokens:
            if self.stopped:
                break
            self.tokens += 1
            self.starts.append(self._decoded)
            text = self._detokenizer.feed([token])
            self._decoded += len(text)
            pieces.append(self._scanner.feed(text))
        return self._giving("".join(pieces))

    def finish(self) -> str:
        """Give the rest, after the last token."""
        rest = self._scanner.feed(self._detokenizer.finish())
        return self._giving(rest + self._scanner.finish())

    def _giving(self, text: str) -> str:
        self.given += len(text)
        return text
