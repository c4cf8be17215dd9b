"""Requests without a bill: their tenant, and the GPU time they had used at the last snapshot.

Two tables are joined by vLLM's internal request id. `open_requests` comes from the API server and
has the tenant. `live_usage` comes from the engine and has the usage. It is one sum over all hours,
so the price of the snapshot's hour applies to all of it.

A request is *running* as long as an engine may bill it. It is *lost* if none can, because its run
is dead or its meter switched itself off. A running request that no snapshot has shown yet has used
nothing so far. If such a request is lost, its usage is unknown.

Invariant: a request with a bill is never shown here, even if its rows were left behind.
"""

from collections.abc import Collection, Sequence
from dataclasses import dataclass
from typing import Any

from sqlalchemy import ColumnElement, and_, exists, or_, select
from sqlalchemy.engine import Connection

from vllm_cost_meter.ledger.coverage import is_shown
from vllm_cost_meter.ledger.queries.costs import RUN_COLUMNS
from vllm_cost_meter.ledger.queries.cut import DEAD_AFTER_NS, lifetime_of
from vllm_cost_meter.ledger.queries.energy import PENDING
from vllm_cost_meter.ledger.rows import live_requests
from vllm_cost_meter.ledger.schema import (
    http_requests,
    live_usage,
    open_requests,
    prices,
    requests,
    runs,
    snapshots,
)
from vllm_cost_meter.prices.book import PriceBook, total_nanousd
from vllm_cost_meter.prices.cost import Quantities, cost_nanousd
from vllm_cost_meter.prices.run_prices import RunPrices
from vllm_cost_meter.records.accrued import Accrued
from vllm_cost_meter.records.owner import TenantScope
from vllm_cost_meter.reports.request_row import LOST, PART_COLUMNS, RUNNING, LedgerRow
from vllm_cost_meter.units.time import NS_PER_MS, hour_of, rfc3339


@dataclass(frozen=True, slots=True)
class Living:
    """The engine runs that live: those with a recent snapshot, and those in `alive`."""

    now_ns: int
    alive: Collection[str] = ()

    def is_up(self) -> ColumnElement[bool]:
        """Return the SQL condition on a row of `snapshots`: the engine of the run lives."""
        # A snapshot from the future says as little of now as one from the past. This is no BETWEEN:
        # PostgreSQL takes no collation in one, and SQLAlchemy gives it that of the column.
        taken_at = snapshots.c.taken_at
        earliest = taken_at >= rfc3339(self.now_ns - DEAD_AFTER_NS)
        latest = taken_at <= rfc3339(self.now_ns + DEAD_AFTER_NS)
        return or_(and_(earliest, latest), snapshots.c.run_id.in_(self.alive))

    def condition(self) -> ColumnElement[bool]:
        """Return the SQL condition on a row of `snapshots`: the run may still write bills."""
        return and_(snapshots.c.state == "on", self.is_up())


@dataclass(frozen=True, slots=True)
class _Run:
    """An engine run that a request may be in."""

    row: LedgerRow
    used: dict[str, Accrued]
    prices: RunPrices

    @property
    def bills(self) -> bool:
        return bool(self.row["bills"])

    @property
    def began_at(self) -> str:
        return lifetime_of(self.row)[0]


def is_billed() -> ColumnElement[bool]:
    """Return the SQL condition on a row of `open_requests`: the ledger has its bill."""
    r, o = requests.c, open_requests.c
    # The wall clock may have been set back between arrival and bill, or the API server may have
    # forgotten the arrival.
    same = or_(r.started_at == o.started_at, r.finished_at >= o.started_at)
    return exists().where(r.request_id == o.request_id, same)


def open_parts(
    connection: Connection,
    mine: ColumnElement[bool],
    living: Living,
    book: PriceBook,
    limit: int | None = None,
) -> list[dict[str, Any]]:
    """Return the open requests that meet a condition as parts, the newest first."""
    wanted = select(open_requests).where(mine, ~is_billed())
    wanted = wanted.order_by(open_requests.c.started_at.desc(), open_requests.c.request_id)
    rows = [row._asdict() for row in connection.execute(wanted.limit(limit))]
    if not rows:
        return []
    candidates = _runs(connection, rows[-1]["started_at"], rows[0]["started_at"], living, book)
    return [_part(row, candidates) for row in rows]


def running_parts(
    connection: Connection,
    asked: TenantScope | None,
    asker: TenantScope | None,
    living: Living,
    limit: int,
    book: PriceBook,
) -> list[dict[str, Any]]:
    """Return the newest running parts that are shown, in exchanges where no part ended."""
    o = open_requests.c
    engines = select(runs.c.started_at, snapshots.c.taken_at, snapshots.c.wall_ns)
    engines = engines.join(snapshots, snapshots.c.run_id == runs.c.run_id)
    found = connection.execute(engines.where(living.condition()))
    began_at = [lifetime_of(row._asdict())[0] for row in found]
    if not began_at:
        return []
    mine = [
        # Older requests cannot be running: earlier engines lost them.
        o.started_at >= min(began_at),
        ~exists().where(http_requests.c.http_request_id == o.http_request_id),
        ~exists().where(requests.c.http_request_id == o.http_request_id),
        is_shown(o, asked, asker),
    ]
    parts = open_parts(connection, and_(*mine), living, book, limit)
    return [part for part in parts if part["state"] == RUNNING]


def _runs(
    connection: Connection, oldest: str, newest: str, living: Living, book: PriceBook
) -> list[_Run]:
    """Return the runs that may hold requests from between two instants, the newest first."""
    bills = living.condition()
    found = (
        select(
            *RUN_COLUMNS,
            runs.c.started_at,
            runs.c.method,
            snapshots.c.taken_at,
            snapshots.c.wall_ns,
            bills.label("bills"),
            live_usage.c.requests,
        )
        .join(snapshots, snapshots.c.run_id == runs.c.run_id)
        .join(live_usage, live_usage.c.run_id == runs.c.run_id, isouter=True)
        .join(prices, prices.c.price_id == runs.c.price_id, isouter=True)
        .where(
            # The clock of a run that is said to have been seen before it began was set back.
            or_(runs.c.started_at <= newest, snapshots.c.taken_at < runs.c.started_at, bills),
            or_(snapshots.c.taken_at >= oldest, bills),
        )
        .order_by(runs.c.started_at.desc(), runs.c.run_id)
    )
    rows = [row._asdict() for row in connection.execute(found)]
    return [
        _Run(
            row,
            live_requests(row["requests"]) if row["requests"] else {},
            RunPrices.of(row, book),
        )
        for row in rows
    ]


def _part(row: LedgerRow, candidates: Sequence[_Run]) -> dict[str, Any]:
    """Return an open request as a part; columns that only a bill has are null."""
    mine = [run for run in candidates if run.began_at <= row["started_at"]]
    seen = [run for run in mine if row["request_id"] in run.used]
    # Until a snapshot shows the request, any of several data-parallel engines may hold it.
    bills = [run for run in seen or mine if run.bills]
    part = {
        **dict.fromkeys(PART_COLUMNS),
        **row,
        "state": RUNNING if bills else LOST,
        "energy_reason": PENDING,
        "as_of": min((run.row["taken_at"] for run in bills or seen), default=None),
    }
    if seen:
        run = (bills or seen)[0]
        part |= {"run_id": run.row["run_id"], "method": run.row["method"]}
        return part | _amounts(run.used[row["request_id"]], run)
    return part | (_amounts(Accrued(), bills[0]) if bills else {})


def _amounts(used: Accrued, run: _Run) -> dict[str, Any]:
    hour = hour_of(run.row["taken_at"])
    price = run.prices.at(hour)
    usd = None if price is None else price.usd_per_gpu_hour
    block_ms = used.kv_block_ns // NS_PER_MS
    charged = Quantities(used.gpu_time_ns, block_ms)
    cost = None if price is None else total_nanousd({price: charged})
    return {
        **{name: amount for name, amount in used._asdict().items() if name in PART_COLUMNS},
        "kv_block_ms": block_ms,
        "gpu_time_ns": used.gpu_time_ns,
        "cost_nanousd": cost,
        "cost_reason": run.prices.why_none(hour) if price is None else None,
        "marginal_cost_nanousd": cost_nanousd(used.marginal_ns, usd),
    }
