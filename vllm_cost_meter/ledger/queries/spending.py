"""The amount that each budget's tenants have used in its period, updated once a second.

Bills are added up as they come. A look reads only the bills that finished since a little before the
last look, and skips those that it has counted. At each new hour, and every `RECOUNT_NS`, everything
is counted anew: this corrects for bills that came very late, and for hours that left a period.

The usage of running requests at their engine's latest snapshot is added on top. All of it goes to
the present hour; the bill will later say which hours it was. An engine in a long step sends no
snapshot, but its requests still count as long as `alive` names its run.

Invariant: a request counts once: by its bill, or else by the snapshot of its engine.
"""

from collections.abc import Callable, Collection, Iterable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from decimal import Decimal
from fractions import Fraction
from itertools import islice
from typing import Any

from sqlalchemy import Engine, Select, and_, func, select
from sqlalchemy.engine import Connection

from vllm_cost_meter.ledger.database import open_database
from vllm_cost_meter.ledger.queries.open_requests import Living, is_billed
from vllm_cost_meter.ledger.rows import live_requests
from vllm_cost_meter.ledger.schema import (
    live_usage,
    open_requests,
    requests,
    snapshots,
    usage_pieces,
)
from vllm_cost_meter.prices.cost import cost_nanousd
from vllm_cost_meter.records.owner import Owner
from vllm_cost_meter.tenants.budgets import Budget, BudgetFigures, Standing
from vllm_cost_meter.units.time import NS_PER_HOUR, NS_PER_SECOND, rfc3339, unix_ns_of

# The next look sees a bill that is committed at most so long after its end.
LATE_NS = 20 * NS_PER_SECOND
RECOUNT_NS = 600 * NS_PER_SECOND
_IDS_AT_ONCE = 500

# GPU-nanoseconds by budget, then by run and UTC hour.
SpentNs = dict[str, dict[tuple[str, int], int]]
# Gives USD per GPU-hour from run_id and hour; None without a price.
PriceAt = Callable[[str, int], Decimal | Fraction | None]


class Spending:
    """Follows the spending against budgets. Methods block; one thread at a time may use it."""

    def __init__(
        self,
        url: str,
        *,
        create: bool = True,
        alive: Callable[[], Collection[str]] = tuple,
    ) -> None:
        """`alive` returns engine runs that live, though they send no snapshot.

        The first look opens the ledger. It raises LedgerError if that fails, also if there is no
        ledger and `create` is not set.
        """
        self._alive = alive
        self._url = url
        self._create = create
        self._engine: Engine | None = None
        self._budgets: Sequence[Budget] = ()
        self._billed: SpentNs = {}
        self._counted_at_ns = 0
        # The bills that are counted already, and that the next look will read again.
        self._seen: dict[tuple[str, int], str] = {}

    def close(self) -> None:
        """Close the connections."""
        if self._engine is not None:
            self._engine.dispose()

    def latest_snapshots(self) -> list[tuple[str, int]]:
        """Return (run, number) of the latest snapshots: a cheap test whether a look is due."""
        with self._read() as connection:
            found = connection.execute(select(snapshots.c.run_id, snapshots.c.number))
            return [(run_id, number) for run_id, number in found]

    def look(self, budgets: Sequence[Budget], price_of: PriceAt, now_ns: int) -> BudgetFigures:
        """Return the use of each budget.

        Raises LedgerError or SQLAlchemyError if the ledger cannot be opened or read.
        """
        hour = now_ns // NS_PER_HOUR
        with self._read() as connection:
            if (
                budgets != self._budgets
                or hour != self._counted_at_ns // NS_PER_HOUR
                or not 0 <= now_ns - self._counted_at_ns < RECOUNT_NS
            ):
                self._recount(connection, budgets, now_ns)
            else:
                self._count_new(connection, now_ns)
            living = _living(connection, Living(now_ns, frozenset(self._alive())))
            running = self._running(connection, [run.run_id for run in living], hour)
        standings = [
            self._standing(budget, running.get(budget.name, {}), price_of, now_ns)
            for budget in budgets
        ]
        off = [run.run_id for run in living if run.state != "on"]
        return BudgetFigures(
            standings=standings,
            as_of_ns=min((unix_ns_of(run.taken_at) for run in living), default=None),
            broken=f"the meter of engine run {off[0]} is off" if off else None,
        )

    @contextmanager
    def _read(self) -> Iterator[Connection]:
        if self._engine is None:
            self._engine = open_database(self._url, create=self._create)
        with self._engine.connect() as connection, connection.begin():
            yield connection

    def _recount(self, connection: Connection, budgets: Sequence[Budget], now_ns: int) -> None:
        self._budgets, self._billed, self._counted_at_ns = budgets, {}, now_ns
        if not budgets:
            return
        first = min(budget.hours(now_ns)[0] for budget in budgets)
        r, p = requests.c, usage_pieces.c
        used = (
            select(
                p.run_id,
                p.hour,
                *(r[name] for name in _OWNER),
                func.sum(p.prefill_ns + p.decode_ns).label("gpu_time_ns"),
            )
            .join(requests, and_(r.run_id == p.run_id, r.seq == p.seq))
            .where(p.hour >= first)
            .group_by(p.run_id, p.hour, *(r[name] for name in _OWNER))
        )
        self._add(connection.execute(used))
        late = connection.execute(_finished_since(rfc3339(now_ns - LATE_NS)))
        self._seen = {(row.run_id, row.seq): row.finished_at for row in late}

    def _count_new(self, connection: Connection, now_ns: int) -> None:
        since = rfc3339(now_ns - LATE_NS)
        r, p = requests.c, usage_pieces.c
        new = (
            select(
                *(r.run_id, r.seq, r.finished_at, p.hour),
                *(r[name] for name in _OWNER),
                (p.prefill_ns + p.decode_ns).label("gpu_time_ns"),
            )
            .join(usage_pieces, and_(r.run_id == p.run_id, r.seq == p.seq))
            .where(r.finished_at >= since)
        )
        rows = [row for row in connection.execute(new) if (row.run_id, row.seq) not in self._seen]
        self._add(rows)
        self._seen = {key: at for key, at in self._seen.items() if at >= since}
        self._seen |= {(row.run_id, row.seq): row.finished_at for row in rows}

    def _add(self, rows: Iterable[Any]) -> None:
        for row in rows:
            _add_to(self._billed, self._budgets, row, row.hour, int(row.gpu_time_ns))

    def _running(self, connection: Connection, run_ids: Collection[str], hour: int) -> SpentNs:
        """Return the usage of requests without a bill in these runs."""
        sums: SpentNs = {}
        told = select(live_usage.c.run_id, live_usage.c.requests)
        for run_id, text in connection.execute(told.where(live_usage.c.run_id.in_(run_ids))):
            used = {id: used.gpu_time_ns for id, used in live_requests(text).items()}
            for row in _owners(connection, used):
                _add_to(sums, self._budgets, row, hour, used[row.request_id], run_id)
        return sums

    def _standing(
        self,
        budget: Budget,
        running: Mapping[tuple[str, int], int],
        price_of: PriceAt,
        now_ns: int,
    ) -> Standing:
        first, after = budget.hours(now_ns)
        gpu_ns = dict(self._billed.get(budget.name, {}))
        for key, ns in running.items():
            gpu_ns[key] = gpu_ns.get(key, 0) + ns
        used: dict[int, int] = {}
        for (run_id, hour), ns in gpu_ns.items():
            if not first <= hour < after:
                continue
            amount: int | None = ns
            if budget.unit == "usd":
                amount = cost_nanousd(ns, price_of(run_id, hour))
            if amount is None:
                return Standing(budget, None, now_ns)
            used[hour] = used.get(hour, 0) + amount
        return Standing(budget, used, now_ns)


_OWNER = ("tenant", "tenant_parent", "tags")


def _finished_since(since: str) -> Select[Any]:
    r = requests.c
    return select(r.run_id, r.seq, r.finished_at).where(r.finished_at >= since)


def _living(connection: Connection, living: Living) -> Sequence[Any]:
    s = snapshots.c
    return connection.execute(select(s.run_id, s.taken_at, s.state).where(living.is_up())).all()


def _owners(connection: Connection, ids: Collection[str]) -> Iterator[Any]:
    """Yield the owner columns of those requests that have no bill."""
    left = iter(ids)
    o = open_requests.c
    while some := list(islice(left, _IDS_AT_ONCE)):
        owners = select(o.request_id, *(o[name] for name in _OWNER))
        yield from connection.execute(owners.where(o.request_id.in_(some), ~is_billed()))


def _add_to(
    sums: SpentNs,
    budgets: Sequence[Budget],
    owner: Any,
    hour: int,
    gpu_ns: int,
    run_id: str | None = None,
) -> None:
    of = Owner.stored(owner.tenant, owner.tenant_parent, owner.tags)
    key = (owner.run_id if run_id is None else run_id, hour)
    for budget in budgets:
        if budget.covers(of):
            of_budget = sums.setdefault(budget.name, {})
            of_budget[key] = of_budget.get(key, 0) + gpu_ns
