"""What came from outside cannot steer a terminal."""

import pytest

from vllm_cost_meter.units.text import plain


@pytest.mark.parametrize("text", ["", "alice", "naïve 東京 🦊", "a b", "it's [bold]"])
def test_what_can_be_printed_is_left_alone(text):
    assert plain(text) == text


@pytest.mark.parametrize(
    ("text", "shown"),
    [
        ("\x1b[2Jgone", r"\x1b[2Jgone"),
        ("two\nlines\r\t", r"two\nlines\r\t"),
        ("\x9b31m", r"\x9b31m"),
        ("\x00\x7f", r"\x00\x7f"),
        ("\u202egnp.exe", r"\u202egnp.exe"),
        ("\u200b\u2028", r"\u200b\u2028"),
        ("\ud800", r"\ud800"),
    ],
)
def test_what_steers_is_shown_as_an_escape(text, shown):
    assert plain(text) == shown
    assert plain(text).isprintable()
