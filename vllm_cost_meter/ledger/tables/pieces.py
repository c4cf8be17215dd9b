"""What bills used hour by hour: the terms to select it by.

Nearly all bills are of one hour: `requests.hour` says which, and the bill's amounts are those of
that hour. Only a bill of several hours has rows in `usage_pieces`, one for each hour. So a query
joins both with `with_pieces` and takes its hours and amounts from here.

Invariant: a bill has an `hour`, or rows in `usage_pieces`, or neither if it used nothing; never
both.
"""

from sqlalchemy import ColumnElement, Join, and_, case, func, or_

from vllm_cost_meter.ledger.schema import PIECE_AMOUNTS, requests, usage_pieces

_r, _p = requests.c, usage_pieces.c

# What the engine requests of one prompt have in common.
PROMPT_GROUP: ColumnElement[str] = func.coalesce(func.nullif(_r.prompt_group, ""), _r.request_id)
PIECES_OF_BILL = and_(_p.run_id == _r.run_id, _p.seq == _r.seq)
# NULL, as are the amounts, for a bill that used nothing.
PIECE_HOUR: ColumnElement[int] = func.coalesce(_p.hour, _r.hour)


def piece_amount(name: str) -> ColumnElement[int]:
    """Return the term of an amount in an hour of a bill."""
    return func.coalesce(_p[name], case((_r.hour.is_not(None), _r[name])))


PIECE_NS: ColumnElement[int] = piece_amount("prefill_ns") + piece_amount("decode_ns")


# How much of a piece's time may belong to other requests; NULL where that is unknown.
PIECE_ERROR_NS: ColumnElement[int] = piece_amount("charge_error_ns")


def summed_amount(name: str) -> ColumnElement[int]:
    """Return the term of an amount of sums: each is known, or NULL for a bill without a piece."""
    if name == "charge_known_ns":
        return case((PIECE_ERROR_NS.is_not(None), PIECE_NS), (PIECE_HOUR.is_not(None), 0))
    if name == "charge_error_ns":
        return func.coalesce(PIECE_ERROR_NS, case((PIECE_HOUR.is_not(None), 0)))
    return piece_amount(name)


# The columns of a bill that its pieces add up to, and whether they do not: for a query that groups
# `with_pieces` by the bill and these.
BILL_AMOUNTS = [_r[name] for name in (*PIECE_AMOUNTS, "charge_error_ns", "gpu_time_ns")]
IS_UNEVEN: ColumnElement[bool] = or_(
    _r.gpu_time_ns != func.coalesce(func.sum(PIECE_NS), 0),
    *(_r[name] != func.coalesce(func.sum(piece_amount(name)), 0) for name in PIECE_AMOUNTS),
    # An error is unknown of all pieces or of none.
    func.coalesce(_r.charge_error_ns, -1) != func.coalesce(func.sum(PIECE_ERROR_NS), -1),
    and_(_r.charge_error_ns.is_not(None), func.count() != func.count(PIECE_ERROR_NS)),
)


def with_pieces() -> Join:
    """Return all bills, each with every hour that it used something in, or once without any."""
    return requests.outerjoin(usage_pieces, PIECES_OF_BILL)
