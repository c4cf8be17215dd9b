"""Count the requests that ended and their tokens, by tenant, model, hour and other columns.

An HTTP exchange counts once, with the tokens that its client was told. If the reply did not say,
the tokens of its parts count; a prompt that several parts share counts once. Parts without an HTTP
row add their tokens, but no request. An exchange has one tenant. If its parts differ in model,
adapter, route, tags, label or end status, it counts under the first value by name.

Invariant: each exchange, and each part without one, is in exactly one group. So all groupings have
the same totals.
"""

from collections.abc import Sequence
from typing import Any

from sqlalchemy import ColumnElement, Select, Text, cast, func, literal, select
from sqlalchemy.engine import Connection

from vllm_cost_meter.ledger.coverage import is_shown, told
from vllm_cost_meter.ledger.queries.cut import Window
from vllm_cost_meter.ledger.queries.own_bills import bills_of, may_be_of
from vllm_cost_meter.ledger.schema import http_requests, requests, runs
from vllm_cost_meter.records.owner import TenantScope
from vllm_cost_meter.reports.facts import COUNTS
from vllm_cost_meter.reports.grammar import COVERED, Question

TOKENS = COUNTS[1:]
# The length of "2027-01-15T08": the UTC hour at the start of an RFC 3339 instant.
HOUR_CHARS = 13
EVERYTHING = Question()
Counts = tuple[int, int, int, int]


def count_ended(
    connection: Connection,
    window: Window,
    by: Sequence[str] = ("tenant",),
    question: Question = EVERYTHING,
    whose: TenantScope | None = None,
) -> dict[tuple[Any, ...], Counts]:
    """Return the number of requests that ended in the window and their tokens, by group.

    `by` names columns of `requests`, `labels` for those of the run, `hour` for the UTC hour in
    which a request ended, and `COVERED` for whether it is of the tenants that the question means.
    With `whose` only requests of those tenants are read.
    """
    found: dict[tuple[Any, ...], Counts] = {}
    for query in (_told(window, by, question, whose), _untold(window, by, question, whose)):
        for row in connection.execute(query):
            key, counts = tuple(row[: len(by)]), row[len(by) :]
            known = found.get(key, (0, 0, 0, 0))
            sums = (a + int(b) for a, b in zip(known, counts, strict=True))
            found[key] = tuple(sums)  # type: ignore[assignment]
    return found


def _told(
    window: Window, by: Sequence[str], question: Question, whose: TenantScope | None
) -> Select[Any]:
    """Count exchanges that have an HTTP row and at least one part."""
    h, r = http_requests.c, requests.c
    own = {
        "tenant": h.tenant,
        "hour": func.substr(h.finished_at, 1, HOUR_CHARS),
        "labels": func.min(labels_of(r.run_id)),
        COVERED: told(h, question),
    }
    prompts = (
        select(
            h.http_request_id,
            *((own[name] if name in own else func.min(r[name])).label(name) for name in by),
            *(h[name].label(f"told_{name}") for name in TOKENS),
            *_prompt_tokens(r),
        )
        .join(requests, r.http_request_id == h.http_request_id)
        .where(window.on_instants(h.finished_at), may_be_of(h.tenant, whose), is_shown(h, whose))
        .group_by(h.http_request_id, r.prompt_group)
        .subquery()
    )
    p = prompts.c
    exchanges = (
        select(
            *(func.min(p[name]).label(name) for name in by),
            *(
                func.coalesce(func.max(p[f"told_{name}"]), func.sum(p[name])).label(name)
                for name in TOKENS
            ),
        )
        .group_by(p.http_request_id)
        .subquery()
    )
    e = exchanges.c
    keys = [e[name] for name in by]
    return select(*keys, func.count(), *(func.sum(e[name]) for name in TOKENS)).group_by(*keys)


def _untold(
    window: Window, by: Sequence[str], question: Question, whose: TenantScope | None
) -> Select[Any]:
    """Count the tokens of parts without an HTTP row; they add no request."""
    bills = bills_of(whose)
    h, r = http_requests.c, bills.c
    exchange = func.coalesce(r.http_request_id, r.run_id + "/" + cast(r.seq, Text))
    own = {
        "tenant": r.tenant,
        "hour": func.max(func.substr(r.finished_at, 1, HOUR_CHARS)),
        "labels": func.min(labels_of(r.run_id)),
        COVERED: func.min(told(r, question)),
    }
    prompts = (
        select(
            *((own[name] if name in own else func.min(r[name])).label(name) for name in by),
            *_prompt_tokens(r),
        )
        .select_from(bills)
        .join(http_requests, h.http_request_id == r.http_request_id, isouter=True)
        .where(h.http_request_id.is_(None), window.on_instants(r.finished_at))
        .group_by(r.tenant, exchange, r.prompt_group)
        .subquery()
    )
    p = prompts.c
    keys = [p[name] for name in by]
    return select(*keys, literal(0), *(func.sum(p[name]) for name in TOKENS)).group_by(*keys)


def labels_of(run_id: ColumnElement[str]) -> ColumnElement[Any]:
    """Return the SQL for the labels of the run in this column."""
    return select(runs.c.labels).where(runs.c.run_id == run_id).scalar_subquery()


def _prompt_tokens(r: Any) -> list[ColumnElement[Any]]:
    """Return the SQL for the tokens of one prompt's parts: the prompt once, all outputs added."""
    return [
        func.max(r.prompt_tokens).label("prompt_tokens"),
        func.max(r.cached_tokens).label("cached_tokens"),
        func.sum(r.output_tokens).label("output_tokens"),
    ]
