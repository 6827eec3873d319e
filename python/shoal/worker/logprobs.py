"""How likely each token was, in the two forms that OpenAI gives it.

The numbers are those of the model itself: before temperature, penalties and biases, so they do not depend on how a
token was chosen, and a greedy answer tells the same as a sampled one.
"""

from __future__ import annotations

import re
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

import torch

if TYPE_CHECKING:
    from collections.abc import Sequence

LEAST = -9999.0
"""What stands for a token that cannot come at all (JSON has no infinity)."""
_REPLACEMENT = "\ufffd"
_BYTE_PIECE = re.compile(r"<0x([0-9A-Fa-f]{2})>")


@dataclass(frozen=True)
class TokenLogprob:
    """One token of an answer.

    Attributes
    ----------
    top
        The likeliest tokens in its place with their logarithms, best first; it need not be among them.
    """

    token: int
    logprob: float
    top: tuple[tuple[int, float], ...] = ()

    @classmethod
    def of(cls, row: torch.Tensor, token: int, count: int) -> TokenLogprob:
        """Read a row of logarithms of probabilities, of which `token` was taken."""
        best = torch.topk(row, min(count, row.numel()))
        values = [max(float(value), LEAST) for value in best.values.tolist()]
        return cls(token, max(float(row[token]), LEAST), tuple(zip(best.indices.tolist(), values, strict=True)))


def _byte_alphabet() -> dict[str, int]:
    """Give the characters that byte-level tokenizers write bytes as."""
    kept = [*range(ord("!"), ord("~") + 1), *range(0xA1, 0xAD), *range(0xAE, 0x100)]
    others = [byte for byte in range(256) if byte not in kept]
    return {chr(byte): byte for byte in kept} | {chr(256 + i): byte for i, byte in enumerate(others)}


class Words:
    """What single tokens look like."""

    def __init__(self, tokenizer: Any) -> None:
        self._tokenizer = tokenizer
        self._alphabet = _byte_alphabet()

    def text(self, token: int) -> str:
        """Give the text of one token by itself; half a character is a replacement character."""
        text: str = self._tokenizer.decode([token], skip_special_tokens=False, clean_up_tokenization_spaces=False)
        piece = self._tokenizer.convert_ids_to_tokens(token)
        # Where a space is written as a mark, decoding drops it from the first token.
        return " " + text if isinstance(piece, str) and piece.startswith("\u2581") and text[:1] != " " else text

    def bytes(self, token: int) -> list[int] | None:
        """Give the bytes of one token; None where they cannot be told."""
        text = self.text(token)
        if _REPLACEMENT not in text:
            return list(text.encode())
        piece = self._tokenizer.convert_ids_to_tokens(token)
        if not isinstance(piece, str):
            return None
        if match := _BYTE_PIECE.fullmatch(piece):
            return [int(match[1], 16)]
        known = [self._alphabet.get(character) for character in piece]
        return None if None in known else [byte for byte in known if byte is not None]

    def name(self, token: int) -> str:
        """Give a text that tells tokens of half characters apart."""
        text, raw = self.text(token), self.bytes(token)
        if _REPLACEMENT in text and raw is not None:
            return "bytes:" + "".join(f"\\x{byte:02x}" for byte in raw)
        return text


def chat_form(words: Words, entries: Sequence[TokenLogprob]) -> dict[str, Any]:
    """Give the `logprobs` of a choice of a chat completion."""

    def one(token: int, logprob: float) -> dict[str, Any]:
        return {"token": words.text(token), "logprob": logprob, "bytes": words.bytes(token)}

    content = [
        one(entry.token, entry.logprob) | {"top_logprobs": [one(token, logprob) for token, logprob in entry.top]}
        for entry in entries
    ]
    return {"content": content, "refusal": None}


def text_form(words: Words, entries: Sequence[TokenLogprob], starts: Sequence[int]) -> dict[str, Any]:
    """Give the `logprobs` of a choice of a text completion.

    Parameters
    ----------
    starts
        Where in the choice's text each token begins, in characters.
    """
    tops = []
    for entry in entries:
        top: dict[str, float] = {}
        for token, logprob in (*entry.top, (entry.token, entry.logprob)):  # OpenAI always tells the token taken, too
            top.setdefault(words.name(token), logprob)
        tops.append(top)
    return {
        "tokens": [words.name(entry.token) for entry in entries],
        "token_logprobs": [entry.logprob for entry in entries],
        "top_logprobs": tops,
        "text_offset": list(starts),
    }
