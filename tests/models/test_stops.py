"""Stop strings: a text cut in any way into pieces ends where its definition says."""

import pytest
from hypothesis import given
from hypothesis import strategies as st

from turboquant_jax.models import stops

LETTERS = st.text("ab\n", max_size=4)


def cut(text, strings):
    """The definition, character by character: the first end of any, then the longest."""
    for end in range(1, len(text) + 1):
        ending = [s for s in strings if text[:end].endswith(s)]
        if ending:
            return text[: end - len(max(ending, key=len))]
    return text


@given(pieces=st.lists(LETTERS, max_size=12), strings=st.lists(LETTERS.filter(bool), max_size=3))
def test_pieces_end_where_the_text_does(pieces, strings):
    text = "".join(pieces)
    expected = cut(text, strings)
    assert "".join(stops.until(pieces, strings)) == expected
    end = stops.find(text, strings)
    assert (text if end is None else text[:end]) == expected


def test_what_cannot_become_a_stop_is_shown_at_once():
    pieces = iter(["one ", "<", "b", "<e", "nd", ">", "never asked for"])
    assert list(stops.until(pieces, ["<end>"])) == ["one ", "<b"]
    assert next(pieces) == "never asked for"


def test_an_empty_stop_is_refused():
    with pytest.raises(ValueError, match="expected none that is empty"):
        stops.until(["text"], ["a", ""])
