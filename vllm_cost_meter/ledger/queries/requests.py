"""Find one request by any of its ids; read its row, its parts and the explanation of its bill.

Invariant: a request with a bill is shown by its bill, whatever other rows there are.
"""

from collections.abc import Collection, Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from sqlalchemy import Column, ColumnElement, Dialect, and_, null, or_, select, tuple_
from sqlalchemy.engine import Connection

from vllm_cost_meter.ledger.coverage import is_shown
from vllm_cost_meter.ledger.fleet.halves import prefill_halves
from vllm_cost_meter.ledger.queries.cost_models import models
from vllm_cost_meter.ledger.queries.costs import RUN_COLUMNS
from vllm_cost_meter.ledger.queries.energy import select_parts
from vllm_cost_meter.ledger.queries.open_requests import Living, is_billed, open_parts
from vllm_cost_meter.ledger.schema import (
    http_requests,
    not_derived,
    open_requests,
    prices,
    requests,
    runs,
)
from vllm_cost_meter.ledger.tables.packed import range_of_beginning
from vllm_cost_meter.ledger.tables.pieces import PIECE_HOUR, PIECE_NS, piece_amount, with_pieces
from vllm_cost_meter.ledger.tables.replies import replies
from vllm_cost_meter.prices.book import PriceBook, RunFacts
from vllm_cost_meter.prices.cost import Quantities
from vllm_cost_meter.prices.run_prices import RunPrices
from vllm_cost_meter.records.client_text import forms_to_find
from vllm_cost_meter.records.owner import TenantScope
from vllm_cost_meter.reports.explanation import explained
from vllm_cost_meter.reports.request_answers import Explanation, RequestWithParts
from vllm_cost_meter.reports.request_row import (
    RUNNING,
    LedgerRow,
    exchange,
    exchange_of_halves,
    ordered,
    shown_part,
)

MAX_MATCHES = 100


@dataclass(frozen=True, slots=True)
class Match:
    """The request that an id means: an HTTP exchange, or an engine request without one.

    An engine request with a bill has `run_id` and `seq`; an open one has its internal `request_id`.
    `prefill_http_request_id` is the HTTP request of a prefill server that is the other half.
    """

    http_request_id: str | None
    run_id: str | None = None
    seq: int | None = None
    request_id: str | None = None
    prefill_http_request_id: str | None = None


def find(connection: Connection, id: str, only: TenantScope | None = None) -> list[Match]:
    """Return what an id means, at most MAX_MATCHES, of the tenant that is meant by `only`.

    The meter's own and vLLM's internal ids come first, as no client chooses them: a request is
    found by these whoever else uses the same text. Then come response ids, X-Request-Ids and the
    engine's external ids. Within each the newest comes first. The halves of a request that a
    router has split are one match by an id that both have, and two by the ids of their own.
    """
    forms = forms_to_find(id)
    h, r, o = http_requests.c, requests.c, open_requests.c
    answered = select(h.http_request_id, h.finished_at)
    part = select(r.http_request_id, r.ended_at, r.run_id, r.seq)
    nothing = (null(), null())  # An open request has no bill, so no key of one.
    running = select(o.http_request_id, o.started_at, *nothing, o.request_id)
    running = running.where(~is_billed())
    # A reply beside a bill has the bill's ids, and one more.
    chosen_part = [r.x_request_id.in_(forms)] + [
        condition
        for id_column in (r.response_id, r.external_id)
        for condition in _chosen_ids(id_column, forms, connection.dialect)
    ]
    sources = (
        (
            answered,
            h,
            h.finished_at,
            (h.http_request_id,),
            _any_of(forms, h.response_id, h.x_request_id),
        ),
        (part, r, r.ended_at, (r.http_request_id, r.request_id), chosen_part),
        (
            running,
            o,
            o.started_at,
            (o.http_request_id, o.request_id),
            _any_of(forms, o.response_id, o.x_request_id, o.external_id),
        ),
    )
    found: dict[Match, tuple[bool, str]] = {}
    for query, of, at, own_ids, chosen in sources:
        query = query.where(is_shown(of, only))
        conditions = [(own, True) for own in _any_of(forms, *own_ids)]
        for condition, is_own in (*conditions, *((one, False) for one in chosen)):
            newest = query.where(condition).order_by(at.desc()).limit(MAX_MATCHES)
            for http_id, when, *key in connection.execute(newest):
                match = Match(None, *key) if http_id is None else Match(http_id)
                found[match] = max(found.get(match, (False, "")), (is_own, when))
    matches = sorted(found, key=lambda match: found[match], reverse=True)[:MAX_MATCHES]
    own = {match for match in matches if found[match][0]}
    return _joined(connection, matches, own)


def _joined(
    connection: Connection, matches: Sequence[Match], own: Collection[Match]
) -> list[Match]:
    """Return matches with the halves of one request as one; those found by own ids stay."""
    chosen = [match for match in matches if match not in own]
    ids = [match.http_request_id for match in chosen if match.http_request_id is not None]
    prefills = prefill_halves(connection, ids)
    if not prefills:
        return [*matches]
    decodes = {prefill: decode for decode, prefill in prefills.items()}
    joined: dict[Match, None] = {}
    for match in matches:
        id = match.http_request_id
        if match in own or id is None or not (id in prefills or id in decodes):
            joined[match] = None
        else:
            decode = decodes.get(id, id)
            joined[Match(decode, prefill_http_request_id=prefills[decode])] = None
    return [*joined]


def _any_of(forms: Sequence[str], *columns: ColumnElement[Any]) -> list[ColumnElement[bool]]:
    """Return the conditions that a column has one of these forms of an id."""
    return [column.in_(forms) for column in columns]


def _chosen_ids(
    column: Column[Any], forms: Sequence[str], dialect: Dialect
) -> Iterator[ColumnElement[bool]]:
    """Yield the conditions that a bill has one of these forms of an id, one for each index.

    vLLM's internal id mostly begins with the id; then it is not in an index of its own.
    """
    for form in forms:
        low, high = range_of_beginning(form, dialect)
        yield and_(requests.c.request_id >= low, requests.c.request_id < high, column == form)
    yield and_(column.in_(forms), not_derived(column.name))


def request_row(
    connection: Connection, match: Match, living: Living, book: PriceBook
) -> RequestWithParts | None:
    """Return the request row of one match, with its `parts`; None if there is none."""
    http, parts = _rows_of(connection, match, living, book)
    if http is None and not parts:
        return None
    if match.prefill_http_request_id is None:
        row = exchange(http, parts)
    else:
        half = _rows_of(connection, Match(match.prefill_http_request_id), living, book)
        row = exchange_of_halves(http, parts, *half)
        parts = [*half[1], *parts]
    return {**row, "parts": [shown_part(part) for part in ordered(parts)]}


def _rows_of(
    connection: Connection, match: Match, living: Living, book: PriceBook
) -> tuple[LedgerRow | None, list[LedgerRow]]:
    """Return the reply and the parts of one HTTP request, or of an engine request without one."""
    h, r, o = replies.c, requests.c, open_requests.c
    http = None
    if match.http_request_id is not None:
        answered = select(replies).where(h.http_request_id == match.http_request_id)
        http = connection.execute(answered).first()
        billed = r.http_request_id == match.http_request_id
        opened = o.http_request_id == match.http_request_id
    else:
        key = and_(r.run_id == match.run_id, r.seq == match.seq)
        # The bill may have come since the request was found.
        billed = or_(key, and_(r.request_id == match.request_id, r.http_request_id.is_(None)))
        opened = and_(o.request_id == match.request_id, o.http_request_id.is_(None))
    parts: list[LedgerRow] = [
        row._asdict() for row in connection.execute(select_parts().where(billed))
    ]
    parts += open_parts(connection, opened, living, book)
    return http._asdict() if http else None, parts


def is_unseen(row: Mapping[str, Any]) -> bool:
    """Return whether a running part is in no snapshot: it has not begun, or has just ended."""
    return any(part["state"] == RUNNING and part["run_id"] is None for part in row["parts"])


def explain(connection: Connection, request: Mapping[str, Any], book: PriceBook) -> Explanation:
    """Explain the bills of a request row that has its `parts`.

    Only parts with a bill are explained. A request that never reached an engine has no parts.
    """
    run_ids = {part["run_id"] for part in request["parts"] if part["run_id"]}
    priced = (
        select(*RUN_COLUMNS, runs.c.preemption_paid_by)
        .join(prices, prices.c.price_id == runs.c.price_id, isouter=True)
        .where(runs.c.run_id.in_(run_ids))
    )
    r = requests.c
    keys = [(part["run_id"], part["seq"]) for part in request["parts"] if part["seq"]]
    amounts = (PIECE_NS, piece_amount("kv_block_ms"))
    pieces = select(r.run_id, r.seq, PIECE_HOUR, *amounts).select_from(with_pieces())
    pieces = pieces.where(tuple_(r.run_id, r.seq).in_(keys), PIECE_HOUR.is_not(None))
    known = {run_id: RunPrices(run_id, RunFacts(), book) for run_id in run_ids}
    payers: dict[str, str] = {}
    for row in connection.execute(priced):
        known[row.run_id] = RunPrices.of(row._asdict(), book)
        payers[row.run_id] = row.preemption_paid_by
    spent: dict[tuple[str, int], list[tuple[int, Quantities]]] = {}
    for run_id, seq, hour, ns, block_ms in connection.execute(pieces.order_by(PIECE_HOUR)):
        spent.setdefault((run_id, seq), []).append((hour, Quantities(ns, block_ms)))
    used = [model for run_id in run_ids for model in models(connection, run_id)]
    return explained(request, known, spent, used, payers)


def latest_run(connection: Connection, book: PriceBook) -> RunFacts | None:
    """Return the facts about the latest run that its price depends on; None without a run."""
    latest = (
        select(*RUN_COLUMNS)
        .join(prices, prices.c.price_id == runs.c.price_id, isouter=True)
        .order_by(runs.c.started_at.desc(), runs.c.run_id)
        .limit(1)
    )
    row = connection.execute(latest).first()
    return None if row is None else RunPrices.of(row._asdict(), book).facts
