"""The form in which a bill rides from its engine to its API server: one line of JSON text.

A bill is a named tuple, so its form is an array of its fields in their order, and both ends are of
one version. msgspec writes it in a tenth of the time that `json` takes, and checks what it reads.
It is written between two steps of the engine, for every request.

Invariant: `read_bill(write_bill(bill)) == bill`, and anything else is refused with a ValueError.
"""

import msgspec

from vllm_cost_meter.records import Bill

_encode = msgspec.json.Encoder().encode
_decode = msgspec.json.Decoder(Bill).decode


def write_bill(bill: Bill) -> str:
    """Return a bill as one line of JSON."""
    return _encode(bill).decode()


def read_bill(text: str) -> Bill:
    """Return the bill of `write_bill`'s text. Raises ValueError on anything else."""
    try:
        bill = _decode(text)
    except (msgspec.MsgspecError, UnicodeError) as error:
        raise ValueError(f"expected the text of a bill, got {text[:80]!r}: {error}") from None
    if bill.seq < 1:
        raise ValueError(f"a bill's seq starts at 1, got {bill.seq}")
    if any(amount < 0 for _, *amounts in bill.pieces for amount in amounts):
        raise ValueError(f"a bill's pieces cannot be negative, got {bill.pieces}")
    return bill
