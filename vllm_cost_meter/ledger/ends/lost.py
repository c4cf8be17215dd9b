"""Which requests were lost with a dead engine, as far as the ledger knows them.

- Its last snapshot has those that had used something; `open_requests` has their tenants.
- Those that waited then, or came after it, are known if their API server announced them. What they
  had used is unknown. Where several engines died, each of them may have held such a request.
- A reply that ended as the engine died, and has no bill, is known by its HTTP record. Nothing in it
  says which engine served it.

How many requests ran and waited at the last snapshot stands beside them, so a reader sees whether
some have no name.

Invariant: a request with a bill is never here, nor one that a living engine may still bill.
"""

from bisect import bisect_left, bisect_right
from collections.abc import Iterator, Mapping, Sequence
from itertools import islice
from typing import Any, NamedTuple

from sqlalchemy import BigInteger, Text, and_, exists, select, true
from sqlalchemy.engine import Connection

from vllm_cost_meter.ledger.queries.answers import LostRequest, UnbilledReply
from vllm_cost_meter.ledger.queries.cut import DEAD_AFTER_NS, Cut, RunCut
from vllm_cost_meter.ledger.queries.open_requests import is_billed
from vllm_cost_meter.ledger.retention.known import kept_from_hour
from vllm_cost_meter.ledger.rows import live_requests
from vllm_cost_meter.ledger.schema import http_requests, live_usage, open_requests, requests
from vllm_cost_meter.ledger.tables.given import GivenColumn, given_rows
from vllm_cost_meter.ledger.tables.packed import instant_us
from vllm_cost_meter.units.time import NS_PER_US, instant_of

# An audit lists at most so many lost requests and replies of a run; their sum covers all.
MAX_LOST = 1000
_RUNS_AT_ONCE = 1_000


class Lost(NamedTuple):
    """What a dead run lost: its requests, the most GPU time first, and replies, oldest first."""

    requests: Sequence[LostRequest] = ()
    replies: Sequence[UnbilledReply] = ()


class _Live(NamedTuple):
    """The GPU-ns that requests had used at a run's last snapshot, and its instant."""

    used: Mapping[str, int]
    taken_at: str


def lost_by_run(connection: Connection, cut: Cut) -> dict[str, Lost]:
    """Return what each dead run lost."""
    dead = [run for run in cut.runs if not run.alive]
    if not dead:
        return {}
    live = _live(connection, dead)
    began = min(run.lifetime()[0] for run in dead)
    announced = _announced(connection, began)
    of_the_living = [run.lifetime()[0] for run in cut.runs if _may_bill(run)]
    # A request that came while another engine lived may be on its way to that one's bill.
    certain_until = min(of_the_living, default=None)
    seen = {request_id for each in live.values() for request_id in each.used}
    found = {}
    for run in dead:
        mine = list(_while_alive(run, announced))
        lost = list(_seen(run, live.get(run.run_id), mine)) + [
            _unseen(row)
            for row in mine
            if row["request_id"] not in seen
            and (certain_until is None or row["started_at"] < certain_until)
        ]
        lost.sort(key=lambda one: (-(one["gpu_time_ns"] or 0), one["request_id"]))
        found[run.run_id] = lost
    replies = _replies(connection, dead)
    return {
        run_id: Lost(lost, _without(replies.get(run_id, ()), lost))
        for run_id, lost in found.items()
    }


def _may_bill(run: RunCut) -> bool:
    return run.alive and run.row["state"] == "on"


def _live(connection: Connection, dead: Sequence[RunCut]) -> dict[str, _Live]:
    u = live_usage.c
    numbers = {run.run_id: run.row["number"] for run in dead}
    found: dict[str, _Live] = {}
    left = iter(numbers)
    while some := list(islice(left, _RUNS_AT_ONCE)):
        asked = select(u.run_id, u.number, u.taken_at, u.requests).where(u.run_id.in_(some))
        for run_id, number, taken_at, text in connection.execute(asked):
            if number == numbers[run_id]:
                used = {id: of.gpu_time_ns for id, of in live_requests(text).items()}
                found[run_id] = _Live(used, taken_at)
    return found


def _announced(connection: Connection, since: str) -> list[Mapping[str, Any]]:
    """Return the open requests without a bill that came since an instant, the oldest first."""
    o = open_requests.c
    asked = select(o.request_id, o.started_at, o.http_request_id, o.tenant)
    asked = asked.where(o.started_at >= since, ~is_billed()).order_by(o.started_at)
    return [row._asdict() for row in connection.execute(asked)]


def _while_alive(
    run: RunCut, announced: Sequence[Mapping[str, Any]]
) -> Iterator[Mapping[str, Any]]:
    """Yield the requests that came while a run lived, for all that is known."""
    began_at, seen_at = run.lifetime()
    low = bisect_left(announced, began_at, key=_started_at)
    high = bisect_right(announced, max(seen_at, run.heard_at()), key=_started_at)
    yield from announced[low:high]


def _started_at(row: Mapping[str, Any]) -> str:
    return str(row["started_at"])


def _seen(
    run: RunCut, live: _Live | None, mine: Sequence[Mapping[str, Any]]
) -> Iterator[LostRequest]:
    """Yield the requests without a bill that the last snapshot had."""
    if live is None:
        return
    whose = {row["request_id"]: row for row in mine}
    for request_id in live.used.keys() - run.last_bills.request_ids:
        row = whose.get(request_id)
        yield {
            "request_id": request_id,
            "http_request_id": row["http_request_id"] if row else None,
            "tenant": row["tenant"] if row else None,
            "gpu_time_ns": live.used[request_id],
            "as_of": live.taken_at,
        }


def _unseen(row: Mapping[str, Any]) -> LostRequest:
    return {
        "request_id": row["request_id"],
        "http_request_id": row["http_request_id"],
        "tenant": row["tenant"],
        "gpu_time_ns": None,
        "as_of": None,
    }


def _replies(connection: Connection, dead: Sequence[RunCut]) -> dict[str, list[UnbilledReply]]:
    """Return the replies without a bill that ended as a run died, by run, the oldest first."""
    found: dict[str, list[UnbilledReply]] = {}
    columns: list[GivenColumn] = [
        *(("run_id", Text()), ("since", BigInteger()), ("until", BigInteger()))
    ]
    spans = [(run.run_id, instant_us(run.row["taken_at"]), _until_us(run)) for run in dead]
    # Of an older reply the bill may have been dropped.
    kept_from = instant_of(kept_from_hour(connection))
    deaths, h, r = given_rows("deaths", columns, spans).c, http_requests.c, requests.c
    is_kept = true() if kept_from is None else h.finished_at >= kept_from
    ended = and_(h.finished_at.between(deaths.since, deaths.until))
    billed = exists().where(r.http_request_id == h.http_request_id)
    # The outer join has each span of time looked up in the index of the ends.
    asked = (
        select(
            *(deaths.run_id, h.http_request_id, h.tenant, h.route, h.status),
            *(h.gpu_time_ns, h.started_at, h.finished_at),
        )
        .select_from(deaths.run_id.table)
        .join(http_requests, ended, isouter=True)
        .where(h.http_request_id.is_not(None), is_kept, ~billed)
        .order_by(h.finished_at, h.http_request_id)
    )
    for run_id, *row in connection.execute(asked):
        found.setdefault(run_id, []).append(_reply(*row))
    return found


def _reply(*row: Any) -> UnbilledReply:
    http_request_id, tenant, route, status, gpu_time_ns, started_at, finished_at = row
    return {
        "http_request_id": http_request_id,
        "tenant": tenant,
        "route": route,
        "status": status,
        "gpu_time_ns": gpu_time_ns,
        "started_at": started_at,
        "finished_at": finished_at,
    }


def _until_us(run: RunCut) -> int:
    """Return the instant by which a dead run's API servers had ended what it served."""
    return instant_us(run.heard_at()) + DEAD_AFTER_NS // NS_PER_US


def _without(replies: Sequence[UnbilledReply], lost: Sequence[LostRequest]) -> list[UnbilledReply]:
    """Return the replies to requests that are not among the lost."""
    named = {one["http_request_id"] for one in lost}
    return [reply for reply in replies if reply["http_request_id"] not in named]
