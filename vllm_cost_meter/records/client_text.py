"""Text that a client chooses, such as X-Request-Id, as the ledger keeps it: short and printable.

Ids of requests come from clients, in a header or in the body, and vLLM builds its own ids around
them. A text of megabytes would fill the ledger, one of a few kilobytes does not fit an index of
PostgreSQL, and PostgreSQL takes no NUL at all. So every such text is stored in this form, by the
engine as by the API server, and what somebody looks up is brought into this form first.

Invariant: equal texts have equal forms, and different texts different ones.
"""

import hashlib

STORED_CHARS_MAX = 256
_DIGEST_CHARS = 32
_MARK = "~sha256:"
_BEGINNING_CHARS = STORED_CHARS_MAX - len(_MARK) - _DIGEST_CHARS


def stored(text: str) -> str:
    """Return a text as it is if it is printable and has at most STORED_CHARS_MAX characters.

    Of any other, return the beginning, with ? for what is not printable, and a digest of the whole.
    """
    if len(text) <= STORED_CHARS_MAX and text.isprintable() and _MARK not in text:
        return text
    beginning = "".join(c if c.isprintable() else "?" for c in text[:_BEGINNING_CHARS])
    digest = hashlib.sha256(text.encode("utf-8", "surrogatepass")).hexdigest()
    return f"{beginning}{_MARK}{digest[:_DIGEST_CHARS]}"


def forms_to_find(text: str) -> list[str]:
    """Return the stored forms that somebody may mean by a text: its own, or that which it is."""
    is_short = len(text) <= STORED_CHARS_MAX and text.isprintable()
    return sorted({stored(text), text}) if is_short else [stored(text)]


def stored_or_none(text: str | None) -> str | None:
    """Return `stored` of a text, None for None."""
    return None if text is None else stored(text)
