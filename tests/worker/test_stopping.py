"""Text out of tokens: split characters, stop strings over tokens, and no difference between one call and many."""

from __future__ import annotations

import pytest
from hypothesis import given
from hypothesis import strategies as st

from shoal.worker.stopping import Detokenizer, StopScanner, TextStream

from .conftest import byte_tokenizer

TOKENIZER = byte_tokenizer(chat=False)


def ids(text: str) -> list[int]:
    return TOKENIZER(text)["input_ids"]


def test_a_split_character_comes_out_whole_and_once():
    tokens = ids("a\u20acb\U0001f41f")
    assert len(tokens) == 9, "one token a byte"
    machine = Detokenizer(TOKENIZER)
    assert [machine.feed([token]) for token in tokens] == ["a", "", "", "\u20ac", "b", "", "", "", "\U0001f41f"]
    assert machine.finish() == ""


def test_half_a_character_at_the_end_is_given_out_at_the_end():
    machine = Detokenizer(TOKENIZER)
    assert machine.feed(ids("\u20ac")[:2]) == ""
    assert machine.finish() == "\ufffd"


def test_bytes_that_are_no_text_do_not_pile_up():
    machine = Detokenizer(TOKENIZER)
    lone = ids("\u20ac")[1]
    machine.feed([lone] * 1000)
    assert len(machine._tokens) - machine._read <= 9


def test_special_tokens_are_not_text():
    assert Detokenizer(TOKENIZER).feed([*ids("ab"), 0]) == "ab"


@given(st.text(max_size=40))
def test_feeding_gives_the_text(text):
    stream = TextStream(TOKENIZER, [])
    assert "".join(stream.feed([token]) for token in ids(text)) + stream.finish() == text
    assert stream.tokens == len(ids(text))


@given(st.lists(st.integers(0, 256), max_size=60), st.lists(st.text("abc", min_size=1, max_size=3), max_size=3))
def test_the_grouping_of_tokens_makes_no_difference(tokens, stops):
    one, many = TextStream(TOKENIZER, stops), TextStream(TOKENIZER, stops)
    together = one.feed(tokens) + one.finish()
    apart = "".join(many.feed([token]) for token in tokens) + many.finish()
    assert (together, one.stopped, one.tokens) == (apart, many.stopped, many.tokens)


@given(st.text("ab", max_size=30), st.lists(st.text("ab", min_size=1, max_size=4), max_size=3), st.data())
def test_a_stop_string_is_never_given_out(text, stops, data):
    scanner = StopScanner(stops)
    out, rest = "", text
    while rest:
        size = data.draw(st.integers(1, len(rest)))
        out, rest = out + scanner.feed(rest[:size]), rest[size:]
    out += scanner.finish()
    assert text.startswith(out)
    assert not any(stop in out for stop in stops)
    assert scanner.stopped == any(stop in text for stop in stops)
    if not scanner.stopped:
        assert out == text


@pytest.mark.parametrize(("pieces", "out"), [(["xa", "b", "c"], "x"), (["xa", "b", "d"], "xabd"), (["xab"], "xab")])
def test_what_may_begin_a_stop_string_is_held_back(pieces, out):
    scanner = StopScanner(["abc"])
    assert scanner.feed(pieces[0])[:2] == "x"
    assert "x" + "".join(map(scanner.feed, pieces[1:])) + scanner.finish() == out
