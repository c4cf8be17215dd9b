"""What bills used hour by hour: the terms to select it by.

Nearly all bills are of one hour: `requests.hour` says which, and the bill's amounts are those of
that hour. Only a bill of several hours has rows in `usage_pieces`, one for each hour. So a query
joins both with `with_pieces` and takes its hours and amounts from here.

Invariant: a bill has an `hour`, or rows in `usage_pieces`, or neither if it used nothing; never
both.
"""

from sqlalchemy import ColumnElement, Join, and_, case, func

from vllm_cost_meter.ledger.schema import requests, usage_pieces

_r, _p = requests.c, usage_pieces.c

PIECES_OF_BILL = and_(_p.run_id == _r.run_id, _p.seq == _r.seq)
# NULL, as are the amounts, for a bill that used nothing.
PIECE_HOUR: ColumnElement[int] = func.coalesce(_p.hour, _r.hour)


def piece_amount(name: str) -> ColumnElement[int]:
    """Return the term of an amount in an hour of a bill."""
    return func.coalesce(_p[name], case((_r.hour.is_not(None), _r[name])))


PIECE_NS: ColumnElement[int] = piece_amount("prefill_ns") + piece_amount("decode_ns")


def with_pieces() -> Join:
    """Return all bills, each with every hour that it used something in, or once without any."""
    return requests.outerjoin(usage_pieces, PIECES_OF_BILL)
