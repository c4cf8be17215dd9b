"""Which requests an id means.

A client knows the id of its reply, a gateway its X-Request-Id, a log the internal id of an engine:
all of them are looked up, in requests that have ended and in those that still run.

Invariant: a request has one match, however many of its ids are the one that is looked up.
"""

from dataclasses import dataclass

from sqlalchemy import null, select
from sqlalchemy.engine import Connection

from vllm_cost_meter.ledger.queries.open_requests import is_billed
from vllm_cost_meter.ledger.schema import http_requests, open_requests, requests

MAX_MATCHES = 100


@dataclass(frozen=True, slots=True)
class Match:
    """What an id stands for: an HTTP exchange, or an engine request that belongs to none.

    Such a one has a bill, or else is open and known by its internal id.
    """

    http_request_id: str | None
    run_id: str | None = None
    seq: int | None = None
    request_id: str | None = None


def find(connection: Connection, id: str) -> list[Match]:
    """Return what an id means, the newest first, at most MAX_MATCHES.

    It may be an HTTP record's own id, a response id, an X-Request-Id, or the internal or external
    id of an engine request.
    """
    h, r, o = http_requests.c, requests.c, open_requests.c
    told = select(h.http_request_id, h.finished_at)
    part = select(r.http_request_id, r.finished_at, r.run_id, r.seq)
    nothing = (null(), null())  # in place of a bill's key
    running = select(o.http_request_id, o.started_at, *nothing, o.request_id)
    running = running.where(~is_billed())
    queries = [
        query.where(column == id).order_by(at.desc()).limit(MAX_MATCHES)
        for query, at, columns in (
            (told, h.finished_at, (h.http_request_id, h.response_id, h.x_request_id)),
            (part, r.finished_at, (r.http_request_id, r.response_id)),
            (part, r.finished_at, (r.request_id, r.external_id)),
            (running, o.started_at, (o.http_request_id, o.response_id, o.x_request_id)),
            (running, o.started_at, (o.request_id, o.external_id)),
        )
        for column in columns
    ]
    found: dict[Match, str] = {}
    for query in queries:
        for http_id, at, *key in connection.execute(query):
            match = Match(None, *key) if http_id is None else Match(http_id)
            found.setdefault(match, at)
    return sorted(found, key=lambda match: found[match], reverse=True)[:MAX_MATCHES]
