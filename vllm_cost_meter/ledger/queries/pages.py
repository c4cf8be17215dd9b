"""Pages of exchanges, the newest first, by key and not by offset.

A page continues after the key (finished_at, id) of the last row on the previous page, so new rows
shift nothing. Exchanges without an HTTP row (not written yet, or lost in a crash) are listed by
their parts. The query looks for them only in the time that the page spans, so a page costs the
same at any depth.

Invariant: whoever goes through all pages sees each exchange that was there at the start once.
"""

import base64
import binascii
import json
from collections.abc import Sequence
from dataclasses import dataclass

from sqlalchemy import Text, and_, cast, func, or_, select, tuple_
from sqlalchemy.engine import Connection

from vllm_cost_meter.ledger.coverage import is_shown
from vllm_cost_meter.ledger.queries.energy import select_parts
from vllm_cost_meter.ledger.queries.open_requests import Living, open_parts
from vllm_cost_meter.ledger.queries.own_bills import bills_of, may_be_of
from vllm_cost_meter.ledger.schema import open_requests, requests
from vllm_cost_meter.ledger.tables.packed import order_of_id
from vllm_cost_meter.ledger.tables.replies import is_replied, replies
from vllm_cost_meter.prices.book import PriceBook
from vllm_cost_meter.records.owner import TenantScope
from vllm_cost_meter.reports.request_answers import RequestRow
from vllm_cost_meter.reports.request_row import LedgerRow, exchange
from vllm_cost_meter.units.text import quoted


@dataclass(frozen=True, slots=True)
class PageKey:
    """An exchange's place in the order. A part without an exchange has `run_id` and `seq`."""

    finished_at: str
    id: str
    run_id: str | None = None
    seq: int | None = None

    def token(self) -> str:
        """Return the opaque token for `next`, to continue after this key."""
        text = json.dumps([self.finished_at, self.id])
        return base64.urlsafe_b64encode(text.encode()).decode()

    @classmethod
    def from_token(cls, token: str) -> "PageKey":
        """Parse a token. Raises ValueError for any other text."""
        try:
            finished_at, id = json.loads(base64.b64decode(token, altchars=b"-_", validate=True))
        except (binascii.Error, ValueError, TypeError, RecursionError):
            finished_at = id = None
        if not (isinstance(finished_at, str) and isinstance(id, str)):
            raise ValueError(f"expected the `next` of an earlier page, got {quoted(token)}")
        return cls(finished_at, id)


def page_of_keys(
    connection: Connection,
    limit: int,
    before: PageKey | None,
    asked: TenantScope | None = None,
    asker: TenantScope | None = None,
) -> list[PageKey]:
    """Return the keys of at most `limit` exchanges, the newest before `before` first.

    They are of the tenant asked for, as far as they are shown to the one that asks.
    """
    h = replies.c
    first = select(h.finished_at, h.http_request_id).where(
        may_be_of(h.tenant, asked or asker), is_shown(h, asked, asker)
    )
    if before is not None:
        key = tuple_(h.finished_at, h.http_request_id)
        first = first.where(key < (before.finished_at, before.id))
    first = first.order_by(h.finished_at.desc(), h.http_request_id.desc()).limit(limit)
    keys = [PageKey(*row) for row in connection.execute(first)]
    since = keys[-1].finished_at if len(keys) == limit else None
    keys += _untold_keys(connection, limit, before, since, asked, asker)
    dialect = connection.dialect
    keys.sort(key=lambda key: (key.finished_at, order_of_id(key.id, dialect)), reverse=True)
    return keys[:limit]


def _untold_keys(
    connection: Connection,
    limit: int,
    before: PageKey | None,
    since: str | None,
    asked: TenantScope | None,
    asker: TenantScope | None,
) -> list[PageKey]:
    """Return the keys of exchanges without a reply, each at the end of its last part."""
    bills = bills_of(asked or asker, since)
    r = bills.c
    own = func.coalesce(r.http_request_id, r.run_id + "/" + cast(r.seq, Text))
    other = requests.alias()
    last = select(func.max(other.c.ended_at)).where(other.c.http_request_id == r.http_request_id)
    query = (
        select(r.ended_at, own, r.http_request_id, func.min(r.run_id), func.min(r.seq))
        .select_from(bills)
        .where(r.reply_status.is_(None), ~is_replied(r.http_request_id))
        .where(or_(r.http_request_id.is_(None), r.ended_at == last.scalar_subquery()))
        .where(is_shown(r, asked, asker))
        .group_by(r.ended_at, own, r.http_request_id)
        .order_by(r.ended_at.desc(), own.desc())
        .limit(limit)
    )
    if since is not None:
        query = query.where(r.ended_at >= since)
    if before is not None:
        earlier = and_(r.ended_at == before.finished_at, own < before.id)
        query = query.where(r.ended_at <= before.finished_at)
        query = query.where(or_(r.ended_at < before.finished_at, earlier))
    return [
        PageKey(at, id) if http_id is not None else PageKey(at, id, run_id, seq)
        for at, id, http_id, run_id, seq in connection.execute(query)
    ]


def exchanges(
    connection: Connection, keys: Sequence[PageKey], living: Living, book: PriceBook
) -> list[RequestRow]:
    """Return the request rows of a page, with their parts that still run."""
    h, r = replies.c, requests.c
    ids = [key.id for key in keys if key.run_id is None]
    rows = connection.execute(select(replies).where(h.http_request_id.in_(ids)))
    http = {row.http_request_id: row._asdict() for row in rows}
    parts: dict[str, list[LedgerRow]] = {}
    for row in connection.execute(select_parts().where(r.http_request_id.in_(ids))):
        parts.setdefault(row.http_request_id, []).append(row._asdict())
    for part in open_parts(connection, open_requests.c.http_request_id.in_(ids), living, book):
        parts.setdefault(part["http_request_id"], []).append(part)
    for key in keys:
        if key.run_id is not None:
            alone = select_parts().where(r.run_id == key.run_id, r.seq == key.seq)
            parts[key.id] = [row._asdict() for row in connection.execute(alone)]
    return [exchange(http.get(key.id), parts.get(key.id, [])) for key in keys]


def rows_of_parts(parts: Sequence[LedgerRow]) -> list[RequestRow]:
    """Return the request rows of exchanges that only have these parts, in their order."""
    grouped: dict[tuple[str | None, str | None], list[LedgerRow]] = {}
    for part in parts:
        http_id = part["http_request_id"]
        alone = part["request_id"] if http_id is None else None
        grouped.setdefault((http_id, alone), []).append(part)
    return [exchange(None, group) for group in grouped.values()]
