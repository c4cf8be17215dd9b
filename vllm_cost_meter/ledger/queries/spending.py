"""What budgets' tenants have used so far in each period, kept up to date at each look.

Bills are counted once each, by their numbers (`bill_count.py`), and summed by run and hour, so that
a new hour, price or limit needs no count. What requests that still run had used at their engine's
latest snapshot is added on top, in full to the present hour; their bills say later which hours it
was. Budgets that count other tenants, or earlier hours, need a new count, which reads sums by hour.

Money is computed as reports compute it: each hour of each run by `RunPrices`, rounded once.

Invariant: a request counts once: by its bill, in the ledger or on its way there, or else by the
snapshot of the engine it runs in.
"""

import time
from collections.abc import Callable, Collection, Iterator, Mapping, Sequence
from contextlib import contextmanager, nullcontext
from typing import Any

from sqlalchemy import Engine, select
from sqlalchemy.engine import Connection
from sqlalchemy.exc import SQLAlchemyError

from vllm_cost_meter.errors import LedgerError
from vllm_cost_meter.ledger.database import cause_of, open_to_read
from vllm_cost_meter.ledger.fleet_use.others import NO_OTHERS, FleetUse, OthersUse, OwnRuns
from vllm_cost_meter.ledger.fleet_use.running import latest_snapshots, running_use
from vllm_cost_meter.ledger.queries.bill_count import BillCount, Spent, added
from vllm_cost_meter.ledger.queries.costs import RUN_COLUMNS
from vllm_cost_meter.ledger.queries.heard import Heard, Instant, LatestSnapshot
from vllm_cost_meter.ledger.queries.standings import FleetPart, OwnUse, Priced, standing_of
from vllm_cost_meter.ledger.schema import bill_sums, prices, runs, snapshots
from vllm_cost_meter.prices.book import NO_PRICES, PriceBook, RunFacts
from vllm_cost_meter.prices.cost import NO_QUANTITIES, Quantities
from vllm_cost_meter.prices.run_prices import RunPrices
from vllm_cost_meter.records.pending import PendingBill
from vllm_cost_meter.tenants.budgets import Budget, BudgetFigures, BudgetScope
from vllm_cost_meter.units.time import unix_ns_of

_IDS_AT_ONCE = 500
# Hours before all periods that stay counted, so that a clock may be set back without a new count.
_HOURS_KEPT = 48


class Spending:
    """Follows what is spent. Blocks, and is used by one thread at a time."""

    def __init__(
        self,
        url: str,
        *,
        wait_s: float = 0.0,
        alive: Callable[[], Collection[str]] = tuple,
        fleet: FleetUse | None = None,
    ) -> None:
        """`alive` names engine runs that are known to live though they are silent.

        With a `fleet` budgets count what other servers have used, as it was read last.

        The ledger is opened at the first look, which waits for it for `wait_s`, and raises
        LedgerError if it cannot be opened.
        """
        self._alive = alive
        self._url = url
        self._wait_s = wait_s
        self._engine: Engine | None = None
        self._fleet = fleet
        self._heard = Heard()
        # The pending bills of the latest look that the ledger lacks.
        self.pending: Sequence[PendingBill] = ()
        # The budgets that are served, and their bills.
        self._budgets: Sequence[Budget] = ()
        self._count: BillCount | None = None
        # The latest instant for whose periods everything is counted.
        self._counted_ns = 0
        # Each run's facts, and the prices made of them by this book.
        self._facts: dict[str, Mapping[str, Any]] = {}
        self._prices: dict[str, RunPrices] = {}
        # Of the runs that only the fleet knows.
        self._elsewhere: dict[str, RunPrices] = {}
        self._book: PriceBook = NO_PRICES

    def close(self) -> None:
        """Close the connections."""
        if self._engine is not None:
            self._engine.dispose()

    def latest_snapshots(self) -> list[tuple[str, int]]:
        """Return (run, number) of the latest snapshots: cheap, to see whether a look is due."""
        with self._read() as connection:
            found = connection.execute(select(snapshots.c.run_id, snapshots.c.number))
            return [(run_id, number) for run_id, number in found]

    def look(
        self,
        budgets: Sequence[Budget],
        book: PriceBook,
        now_ns: int,
        monotonic_ns: int | None = None,
        pending: Sequence[PendingBill] = (),
    ) -> BudgetFigures:
        """Return where the budgets stand.

        Of the `pending` bills those count that the ledger lacks; `self.pending` has them then.

        Raises LedgerError if the ledger cannot be opened or read.
        """
        at = Instant(now_ns, time.monotonic_ns() if monotonic_ns is None else monotonic_ns)
        # What is read of the fleet meanwhile may have more of this ledger than is seen here.
        with nullcontext() if self._fleet is None else self._fleet.holding():
            return self._look(budgets, book, at, pending)

    def _look(
        self,
        budgets: Sequence[Budget],
        book: PriceBook,
        at: Instant,
        pending: Sequence[PendingBill],
    ) -> BudgetFigures:
        with self._read() as connection:
            told = latest_snapshots(connection)
            living = self._heard.look(told, at, frozenset(self._alive()))
            count = self._bring_up_to_date(connection, budgets, at.unix_ns)
            self.pending = [bill for bill in pending if not count.has(bill.run_id, bill.seq)]
            others = self._others(connection, told, book)
            run_ids = [run.told.run_id for run in living]
            own = set(run_ids) - others.running
            running = _running(connection, own, count, {b.request_id for b in self.pending})
            self._learn_prices(connection, book)
        for run_id in others.run_ids() & others.facts.keys() - self._elsewhere.keys():
            self._elsewhere[run_id] = RunPrices.of(others.facts[run_id], book)
        all_prices = self._elsewhere | self._prices
        # A run that has bills and no snapshot has a price if that depends on no fact of the run.
        bare = {*count.run_ids(), *(b.run_id for b in self.pending), *others.run_ids()}
        bare -= all_prices.keys()
        all_prices |= {id: RunPrices(id, RunFacts(), book) for id in bare}
        priced = Priced(all_prices, book, run_ids, self._counted_ns)
        billed = self._billed(count, others.billed)
        standings = [
            standing_of(
                budget,
                OwnUse(billed[budget.scope], running.get(budget.scope, {})),
                priced,
                self._of_fleet(budget, others, at),
            )
            for budget in self._budgets
        ]
        off = [run.told.run_id for run in living if run.told.state != "on"]
        return BudgetFigures(
            standings=standings,
            as_of_ns=min((unix_ns_of(run.told.taken_at) for run in living), default=None),
            heard_ns=min((run.heard_ns for run in living), default=None),
            broken=f"the meter of engine run {off[0]} is off" if off else None,
        )

    def _others(
        self, connection: Connection, told: Sequence[LatestSnapshot], book: PriceBook
    ) -> OthersUse:
        """Return what counts by the fleet; nothing without one."""
        over_fleet = [budget for budget in self._budgets if not budget.each_server]
        if self._fleet is None or not over_fleet:
            return NO_OTHERS
        bills = connection.execute(select(bill_sums.c.run_id, bill_sums.c.bills))
        own = OwnRuns(
            bills={run_id: int(number) for run_id, number in bills},
            snapshots={each.run_id: each.number for each in told},
        )
        return self._fleet.others(over_fleet, book.price_changes(), own, self._counted_ns)

    def _of_fleet(self, budget: Budget, others: OthersUse, at: Instant) -> FleetPart | None:
        """Return the fleet's part of a budget; None for one that counts this server alone."""
        fleet = self._fleet
        if fleet is None or budget.each_server:
            return None
        return FleetPart(
            used=others.used.get(budget, {}),
            by_hour=others.by_hour.get(budget, {}),
            age_ns=fleet.age_ns(at.monotonic_ns),
            stale=fleet.stale(at.monotonic_ns),
            is_counted=fleet.has(budget, at.unix_ns),
        )

    def _billed(self, count: BillCount, elsewhere: Collection[str]) -> dict[BudgetScope, Spent]:
        """Return the use of the counted bills and the pending ones, by what they count for.

        The bills of the runs `elsewhere` count by the fleet.
        """
        billed = {budget.scope: count.of(budget) for budget in self._budgets}
        if elsewhere:
            billed = {
                scope: {id: hours for id, hours in of_scope.items() if id not in elsewhere}
                for scope, of_scope in billed.items()
            }
        waiting: dict[BudgetScope, Spent] = {}
        for bill in self.pending:
            for scope in count.covering(bill.owner):
                hours = waiting.setdefault(scope, {}).setdefault(bill.run_id, {})
                for hour, ns in bill.gpu_time_ns.items():
                    used = Quantities(ns, bill.kv_block_ms.get(hour, 0))
                    hours[hour] = hours.get(hour, NO_QUANTITIES) + used
        for scope, runs_ in waiting.items():
            if scope in billed:
                billed[scope] = added(billed[scope], runs_)
        return billed

    @contextmanager
    def _read(self) -> Iterator[Connection]:
        if self._engine is None:
            self._engine = open_to_read(self._url, wait_s=self._wait_s)
        try:
            with self._engine.connect() as connection, connection.begin():
                yield connection
        except SQLAlchemyError as error:
            shown = self._engine.url.render_as_string(hide_password=True)
            raise LedgerError(f"ledger {shown}: cannot be read: {cause_of(error)}") from error

    # -- counting ---------------------------------------------------------------------------

    def _bring_up_to_date(
        self, connection: Connection, budgets: Sequence[Budget], now_ns: int
    ) -> BillCount:
        """Return the count of all bills for these budgets; a new one if it is needed."""
        first_hour = min((budget.hours(now_ns)[0] for budget in budgets), default=0)
        count = self._count
        if count is None or not count.serves(budgets, first_hour):
            count = BillCount(budgets, first_hour)
        count.advance(connection)
        self._count, self._budgets, self._counted_ns = count, budgets, now_ns
        if budgets:
            count.forget_before(first_hour - _HOURS_KEPT)
        return count

    # -- prices -----------------------------------------------------------------------------

    def _learn_prices(self, connection: Connection, book: PriceBook) -> None:
        """Make the prices of all runs by a book. What a run began with never changes."""
        known = connection.execute(select(runs.c.run_id)).scalars().all()
        if new := [run_id for run_id in known if run_id not in self._facts]:
            priced = select(*RUN_COLUMNS).join(
                prices, prices.c.price_id == runs.c.price_id, isouter=True
            )
            # After a while only few are new, at the start all are.
            if len(new) <= _IDS_AT_ONCE:
                priced = priced.where(runs.c.run_id.in_(new))
            rows = (row._asdict() for row in connection.execute(priced))
            self._facts |= {row["run_id"]: row for row in rows}
        if new or book is not self._book:
            self._prices = {id: RunPrices.of(row, book) for id, row in self._facts.items()}
        if book is not self._book:
            self._elsewhere = {}
            self._book = book


def _running(
    connection: Connection, run_ids: Collection[str], count: BillCount, pending: Collection[str]
) -> dict[BudgetScope, dict[str, Quantities]]:
    """Return what the requests of these runs that have no bill had used, by scope and run.

    Those of pending bills are left out.
    """
    sums: dict[BudgetScope, dict[str, Quantities]] = {}
    for run_id, _, owner, used in running_use(connection, run_ids, pending):
        for scope in count.scopes_of(*owner):
            of_scope = sums.setdefault(scope, {})
            of_scope[run_id] = of_scope.get(run_id, NO_QUANTITIES) + used
    return sums
