"""Join the two halves of a request that a router sent to a prefill server and to a decode server.

Both servers answer one HTTP request each, with the same `X-Request-Id`, and bill it. Clients choose
that id and may choose it twice, so the id alone proves nothing. Two HTTP requests are halves of one
request if all of this holds:

- both have the id, and the same tenant;
- the engine requests of one are all `kv_producer`, those of the other all `kv_consumer`: their
  router or their servers' configuration said so;
- no engine run has a part of both;
- the tenant has no third HTTP request with that id.

Anything else stays apart: two requests, each with its own cost. Joining changes what an answer
shows together, and no bill, sum or report.

Invariant: an HTTP request is half of at most one request, and both halves are of one tenant.
"""

from collections.abc import Iterator, Mapping, Sequence
from typing import Any, NamedTuple

from sqlalchemy import ColumnElement, Select, null, select, union
from sqlalchemy.engine import Connection

from vllm_cost_meter.ledger.queries.open_requests import is_billed
from vllm_cost_meter.ledger.schema import http_requests, open_requests, requests
from vllm_cost_meter.records.requests import KV_CONSUMER, KV_PRODUCER

# An id with more HTTP requests is no router's.
_SAME_ID_MAX = 100

_h, _r, _o = http_requests.c, requests.c, open_requests.c


class _Row(NamedTuple):
    """What a row says of its HTTP request; a reply that stands alone has neither role nor run."""

    http_request_id: str
    x_request_id: str | None
    tenant: str
    is_part: bool
    kv_role: str | None
    run_id: str | None


class _Exchange(NamedTuple):
    """An HTTP request by all of its rows."""

    x_request_ids: frozenset[str]
    tenants: frozenset[str]
    roles: frozenset[str | None]
    run_ids: frozenset[str]

    @classmethod
    def of(cls, rows: Sequence[_Row]) -> "_Exchange":
        """Return the HTTP request that these rows are of."""
        return cls(
            frozenset(row.x_request_id for row in rows if row.x_request_id is not None),
            frozenset(row.tenant for row in rows),
            frozenset(row.kv_role for row in rows if row.is_part),
            frozenset(row.run_id for row in rows if row.run_id is not None),
        )

    @property
    def key(self) -> tuple[str, str] | None:
        """Return the id and the tenant; None unless both are known and the same in all rows."""
        if len(self.x_request_ids) != 1 or len(self.tenants) != 1:
            return None
        return next(iter(self.x_request_ids)), next(iter(self.tenants))


def prefill_halves(connection: Connection, http_request_ids: Sequence[str]) -> dict[str, str]:
    """Return, by the HTTP request of each decode half, that of its prefill half.

    They are the pairs that one of `http_request_ids` belongs to.
    """
    if not http_request_ids or not _any_is_half(connection, http_request_ids):
        return {}
    asked = _exchanges(connection, http_request_ids)
    keys = {one.key for one in asked.values() if one.key is not None}
    same_id = _with_ids(connection, sorted({x_request_id for x_request_id, _ in keys}))
    if len(same_id) > _SAME_ID_MAX:
        return {}
    by_key: dict[tuple[str, str], dict[str, _Exchange]] = {}
    for id, exchange in _exchanges(connection, same_id).items():
        if exchange.key is not None:
            by_key.setdefault(exchange.key, {})[id] = exchange
    pairs = (_pair(by_key[key]) for key in keys if key in by_key)
    return dict(pair for pair in pairs if pair is not None)


def _pair(exchanges: Mapping[str, _Exchange]) -> tuple[str, str] | None:
    """Return a decode half and its prefill half; None unless these are two halves."""
    by_role = {role: id for id, exchange in exchanges.items() for role in exchange.roles}
    if len(exchanges) != 2 or by_role.keys() != {KV_PRODUCER, KV_CONSUMER}:
        return None
    one, other = exchanges.values()
    if len(one.roles) != 1 or len(other.roles) != 1 or one.run_ids & other.run_ids:
        return None
    return by_role[KV_CONSUMER], by_role[KV_PRODUCER]


def _any_is_half(connection: Connection, http_request_ids: Sequence[str]) -> bool:
    """Return whether a part of these is a half. Most ledgers have none."""
    return any(
        connection.execute(
            select(of.http_request_id)
            .where(of.http_request_id.in_(http_request_ids), of.kv_role.is_not(None))
            .limit(1)
        ).first()
        for of in (_r, _o)
    )


def _with_ids(connection: Connection, x_request_ids: Sequence[str]) -> list[str]:
    """Return HTTP requests with one of these ids, and one too many if there are too many."""
    found = union(
        *(
            select(of.http_request_id).where(
                of.x_request_id.in_(x_request_ids), of.http_request_id.is_not(None)
            )
            for of in (_h, _r, _o)
        )
    )
    return [id for (id,) in connection.execute(found.limit(_SAME_ID_MAX + 1))]


def _exchanges(connection: Connection, http_request_ids: Sequence[str]) -> dict[str, _Exchange]:
    rows: dict[str, list[_Row]] = {}
    for row in _rows(connection, http_request_ids):
        rows.setdefault(row.http_request_id, []).append(row)
    return {id: _Exchange.of(of_one) for id, of_one in rows.items()}


def _rows(connection: Connection, http_request_ids: Sequence[str]) -> Iterator[_Row]:
    unknown: tuple[ColumnElement[Any], ...] = (null(), null())
    replies = select(_h.http_request_id, _h.x_request_id, _h.tenant, *unknown)
    bills = select(_r.http_request_id, _r.x_request_id, _r.tenant, _r.kv_role, _r.run_id)
    running = select(_o.http_request_id, _o.x_request_id, _o.tenant, _o.kv_role, null())
    sources: tuple[tuple[Select[Any], Any, bool], ...] = (
        (replies, _h, False),
        (bills, _r, True),
        (running.where(~is_billed()), _o, True),
    )
    for query, of, is_part in sources:
        mine = query.where(of.http_request_id.in_(http_request_ids))
        for id, x_request_id, tenant, kv_role, run_id in connection.execute(mine):
            yield _Row(id, x_request_id, tenant, is_part, kv_role, run_id)
