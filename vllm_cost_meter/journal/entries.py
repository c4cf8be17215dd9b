"""Entries of a journal: a record of the ledger as the payload of a frame, and back.

The first byte says which kind of record it is, and the rest is MessagePack. Fields are written by
name, so another version of the meter can read them: it passes over a field that it does not know,
and takes the default for one that is not there.

Invariant: `read_entry(write_entry(record)) == record`; any other payload raises a ValueError.
"""

import msgspec

from vllm_cost_meter.records.requests import EngineRequest, HttpRequest, OpenRequest
from vllm_cost_meter.records.snapshot import Snapshot

Record = EngineRequest | HttpRequest | OpenRequest | Snapshot

# The numbers stay what they are: journals of an older version have them.
KINDS: dict[int, type[Record]] = {
    1: EngineRequest,
    2: HttpRequest,
    3: OpenRequest,
    4: Snapshot,
}
_MARKS = {kind: bytes([number]) for number, kind in KINDS.items()}
_encode = msgspec.msgpack.Encoder().encode
_decoders = {number: msgspec.msgpack.Decoder(kind) for number, kind in KINDS.items()}


def write_entry(record: Record) -> bytes:
    """Return a record as a payload. Raises ValueError or TypeError if it can be none."""
    mark = _MARKS.get(type(record))
    if mark is None:
        raise TypeError(f"expected {Record}, got {type(record).__name__}")
    try:
        return mark + _encode(record)
    except OverflowError as error:
        raise ValueError(str(error)) from None


def read_entry(payload: bytes) -> Record:
    """Return the record of a payload. Raises ValueError for any other payload."""
    decoder = _decoders.get(payload[0]) if payload else None
    if decoder is None:
        raise ValueError(f"expected a record of a kind from 1 to {max(KINDS)}, got {payload[:1]!r}")
    try:
        return decoder.decode(payload[1:])
    except msgspec.MsgspecError as error:
        raise ValueError(f"a {KINDS[payload[0]].__name__} that cannot be read: {error}") from None
