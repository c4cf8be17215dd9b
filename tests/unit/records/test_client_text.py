"""Text that clients choose, as the ledger keeps it."""

import pytest
from hypothesis import given
from hypothesis import strategies as st

from vllm_cost_meter.records.client_text import STORED_CHARS_MAX, stored


@pytest.mark.parametrize("text", ["", "cmpl-1", "Größe 7", "x" * STORED_CHARS_MAX])
def test_a_short_printable_text_stays_as_it_is(text):
    assert stored(text) == text


@pytest.mark.parametrize(
    "text", ["a\0b", "line\nline", "\x1b[2J", "\ud800", "\u202e", "y" * 5_000_000]
)
def test_any_other_is_short_printable_and_keeps_its_beginning(text):
    kept = stored(text)
    assert len(kept) <= STORED_CHARS_MAX
    assert kept.isprintable()
    assert kept[0] == (text[0] if text[0].isprintable() else "?")


def test_texts_that_differ_after_the_limit_or_in_control_characters_stay_different():
    long = "z" * 10_000
    texts = [long, long + "a", "a\0", "a\1", "a?", "a\0" * 300, stored(long)]
    assert len({stored(text) for text in texts}) == len(texts)


@given(st.text(alphabet=st.characters(), max_size=600))
def test_no_text_breaks_an_index_or_a_line(text):
    kept = stored(text)
    assert len(kept.encode()) <= 4 * STORED_CHARS_MAX
    assert kept.isprintable()
    assert stored(text) == kept
