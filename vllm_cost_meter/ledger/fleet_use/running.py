"""What running requests have used, added up by run and owner; and how a fleet is told of it.

A request counts by its bill or by what runs, so both must be of one state of the ledger. Only the
ledger has the rows to see which requests are billed. So the sender reads what runs as it reads its
outbox, and tells the fleet sums: whoever reads them needs no row of a request. Each time it tells
all that runs at its server, so what is not there any more has ended.

Invariant: what is told of a ledger and the bills that it had then count no request twice.
"""

import time
from collections.abc import Collection, Iterable, Iterator
from itertools import islice
from typing import Any, NamedTuple

import orjson
from sqlalchemy import select
from sqlalchemy.engine import Connection

from vllm_cost_meter.ledger.queries.heard import Heard, Instant, LatestSnapshot
from vllm_cost_meter.ledger.queries.open_requests import is_billed
from vllm_cost_meter.ledger.rows import live_requests
from vllm_cost_meter.ledger.schema import live_usage, open_requests, snapshots
from vllm_cost_meter.prices.cost import NO_QUANTITIES, Quantities
from vllm_cost_meter.units.time import NS_PER_HOUR, NS_PER_MS

_IDS_AT_ONCE = 500
# In place of what runs: nothing does.
NOTHING_RUNS = "[]"


class OwnerTexts(NamedTuple):
    """An owner as rows of the ledger have it."""

    tenant: str
    above: str | None
    tags: str | None


class RunningUse(NamedTuple):
    """What an owner's requests without a bill had used in a run, at a snapshot of that number."""

    run_id: str
    number: int
    owner: OwnerTexts
    used: Quantities


class ToldUse(NamedTuple):
    """What a fleet is told: a `RunningUse`, and the hour at its server when it was told."""

    run_id: str
    number: int
    hour: int
    tenant: str
    above: str | None
    tags: str | None
    gpu_time_ns: int
    kv_block_ms: int


def running_use(
    connection: Connection, run_ids: Collection[str], billed: Collection[str] = ()
) -> Iterator[RunningUse]:
    """Yield what the requests of these runs that have no bill had used, by run and owner.

    `billed` are ids of requests that are left out: their bills are counted otherwise.
    """
    u = live_usage.c
    told = select(u.run_id, u.number, u.requests).where(u.run_id.in_(run_ids))
    for run_id, number, text in connection.execute(told):
        used = {
            id: Quantities(accrued.gpu_time_ns, accrued.kv_block_ns // NS_PER_MS)
            for id, accrued in live_requests(text).items()
            if id not in billed
        }
        sums: dict[OwnerTexts, Quantities] = {}
        for request_id, *texts in _owners(connection, used):
            owner = OwnerTexts(*texts)
            sums[owner] = sums.get(owner, NO_QUANTITIES) + used[request_id]
        for owner, of_owner in sums.items():
            yield RunningUse(run_id, number, owner, of_owner)


def _owners(connection: Connection, ids: Collection[str]) -> Iterator[Any]:
    """Yield whose these requests are, of those that have no bill."""
    left = iter(ids)
    o = open_requests.c
    while some := list(islice(left, _IDS_AT_ONCE)):
        owners = select(o.request_id, o.tenant, o.tenant_above, o.tags)
        yield from connection.execute(owners.where(o.request_id.in_(some), ~is_billed()))


def latest_snapshots(connection: Connection) -> list[LatestSnapshot]:
    """Return what the latest snapshot of each run says of it."""
    s = snapshots.c
    told = connection.execute(select(s.run_id, s.number, s.taken_at, s.state))
    return [LatestSnapshot(*row) for row in told]


class RunningHere:
    """What runs at one server, as a fleet is told of it. Used by one thread."""

    def __init__(self) -> None:
        self._heard = Heard()

    def told(self, connection: Connection, now_ns: int | None = None) -> str:
        """Return what runs at the server of a ledger, in the state that the connection sees."""
        now_ns = time.time_ns() if now_ns is None else now_ns
        at = Instant(now_ns, time.monotonic_ns())
        living = self._heard.look(latest_snapshots(connection), at)
        running = running_use(connection, [run.told.run_id for run in living])
        return _packed(running, now_ns // NS_PER_HOUR)


def _packed(running: Iterable[RunningUse], hour: int) -> str:
    rows = [
        ToldUse(each.run_id, each.number, hour, *each.owner, used.gpu_time_ns, used.kv_block_ms)
        for each in running
        if (used := each.used)
    ]
    return orjson.dumps([list(row) for row in rows]).decode()


def told_use(content: str) -> list[ToldUse]:
    """Return what a fleet was told."""
    return [ToldUse(*row) for row in orjson.loads(content)]
