"""Text that came from outside, made safe to show on a terminal.

Invariant: what is returned has no control characters, so it cannot move a cursor or hide a line.
"""


def plain(text: str) -> str:
    """Return text with every non-printable character but spaces written as an escape."""
    if text.isprintable():
        return text
    return "".join(c if c.isprintable() else c.encode("unicode_escape").decode() for c in text)
