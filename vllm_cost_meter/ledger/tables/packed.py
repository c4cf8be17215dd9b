"""Columns that take few bytes in the ledger and are text in Python: instants and ids.

Most of a ledger are rows of requests, and most of a row was text: an instant took 27 bytes and
vLLM's ids 33, in the row and in each index. An instant is stored as an integer. On SQLite, an id
with hexadecimal digits is stored as bytes: the digits as the bytes that they stand for, and a known
beginning before them as one. Any other id is stored as it is, and so is every id in PostgreSQL.

Invariant: a text has one stored form, so equal texts are equal in the database; stored instants
order as their texts do.
"""

import re
import sys
from functools import lru_cache
from typing import Any, Final

from sqlalchemy import BigInteger, Dialect
from sqlalchemy.types import TypeDecorator

from vllm_cost_meter.ledger.tables.base import KeyText
from vllm_cost_meter.units.time import NS_PER_US, rfc3339, unix_ns_of

# The beginnings of ids: the meter's own, and those of vLLM's APIs. Never change a number.
_BEGINNINGS: Final = (
    *("cost-", "cmpl-", "chatcmpl-", "resp_", "msg_", "embd-", "pool-", "classify-"),
    *("score-", "rerank-", "trsc-", "trsl-", "generative-scoring-"),
)
_CODES: Final = {text: bytes([number]) for number, text in enumerate(_BEGINNINGS, 1)}
_DECODED: Final = dict(enumerate(_BEGINNINGS, 1))
# A byte above this one begins digits: so many bytes of them come next.
_NO_DIGITS = 0x80
_MAX_BYTES = 0x7F
_DIGITS_MIN = 6
# An id with more is taken apart at once.
_DASHES_MAX = 8
_LENGTHS: Final = [bytes([_NO_DIGITS + length]) for length in range(_MAX_BYTES + 1)]
_DIGITS = re.compile(rf"((?:[0-9a-f]{{2}}){{3,{_MAX_BYTES}}})")


# An id is in several columns and two tables, and vLLM makes others of it, with a dash and more.
@lru_cache(maxsize=4096)
def pack_id(text: str) -> bytes | str:
    """Return an id's stored form in SQLite: shorter bytes, or the text if it has no digits to pack.

    So is an id with a slash: SQL makes "RUN/NUMBER" for a bill without an id.

    >>> pack_id("cmpl-0123456789abcdef-0").hex()
    '02880123456789abcdef2d30'
    """
    before, dash, after = text.rpartition("-")
    # No run of digits has a dash, so what comes after one is packed by itself.
    digits = _only_digits(after)
    if dash and digits is not None and (beginning := _CODES.get(before + dash)) is not None:
        return beginning + digits
    rest = after.encode() if len(after) < _DIGITS_MIN and after.isalnum() else digits
    if dash and rest is not None and text.isascii() and before.count(dash) < _DASHES_MAX:
        packed = pack_id(before)
        if isinstance(packed, bytes):
            return packed + b"-" + rest
    return _packed(text)


def _only_digits(text: str) -> bytes | None:
    """Return the stored form of a text that is a run of digits and nothing else."""
    if not _DIGITS_MIN <= len(text) <= 2 * _MAX_BYTES:
        return None
    try:
        found = bytes.fromhex(text)
    except ValueError:
        return None
    return _LENGTHS[len(found)] + found if found.hex() == text else None


def _packed(text: str) -> bytes | str:
    pieces = _DIGITS.split(text)
    if len(pieces) == 1 or not (text.isascii() and text.isprintable()) or "/" in text:
        return text
    beginning = pieces[0]
    packed = [_CODES.get(beginning) or beginning.encode()]
    for digits, between in zip(pieces[1::2], pieces[2::2], strict=True):
        found = bytes.fromhex(digits)
        packed += (_LENGTHS[len(found)], found, between.encode())
    return b"".join(packed)


def unpack_id(stored: bytes | str) -> str:
    """Return the id of a stored form."""
    if isinstance(stored, str):
        return stored
    found, at = [], 0
    while at < len(stored):
        code = stored[at]
        at += 1
        if code > _NO_DIGITS:
            end = at + code - _NO_DIGITS
            found.append(stored[at:end].hex())
            at = end
        else:
            found.append(_DECODED.get(code) or chr(code))
    return "".join(found)


def order_of_id(id: str, dialect: Dialect) -> tuple[bool, bytes]:
    """Return what orders ids in Python as the database orders their stored forms."""
    stored = pack_id(id) if dialect.name == "sqlite" else id
    # SQLite has texts before bytes.
    return (False, stored.encode()) if isinstance(stored, str) else (True, stored)


def range_of_beginning(id: str, dialect: Dialect) -> tuple[bytes | str, bytes | str]:
    """Return a range [low, high) of stored forms: those that begin with that of an id.

    An id that begins with this one and is stored otherwise is outside: a text whose continuation
    is packed.
    """
    stored = pack_id(id) if dialect.name == "sqlite" else id
    if isinstance(stored, str):
        return stored, stored + chr(sys.maxunicode)
    return stored, stored + b"\xff" * _MAX_BYTES


def is_packed_id(stored: bytes) -> bool:
    """Return whether bytes are the stored form of an id."""
    return pack_id(unpack_id(stored)) == stored


def instant_us(text: str) -> int:
    """Return an RFC 3339 instant as microseconds since the epoch. Raises as `unix_ns_of`."""
    return unix_ns_of(text) // NS_PER_US


class InstantColumn(TypeDecorator[Any]):
    """An instant: RFC 3339 text in Python, microseconds since the epoch in the database.

    An integer that is given is taken as microseconds.
    """

    impl = BigInteger
    cache_ok = True

    def process_bind_param(self, value: Any, dialect: Dialect) -> Any:
        return instant_us(value) if isinstance(value, str) else value

    def process_result_value(self, value: Any, dialect: Dialect) -> Any:
        return None if value is None else rfc3339(value * NS_PER_US)


class PackedId(TypeDecorator[Any]):
    """An id: text in Python, and in SQLite its shorter form, which a column of texts keeps."""

    impl = KeyText
    cache_ok = True

    def process_bind_param(self, value: Any, dialect: Dialect) -> Any:
        is_packed = dialect.name == "sqlite" and isinstance(value, str)
        return pack_id(value) if is_packed else value

    def process_result_value(self, value: Any, dialect: Dialect) -> Any:
        return None if value is None else unpack_id(value)
