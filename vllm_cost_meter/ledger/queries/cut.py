"""The cut: every run at its latest snapshot, and the bills that belong to it.

A report compares the engines' own totals (snapshots) with the bills in the ledger, while new bills
keep coming. So the snapshots are read once, into a `Cut`, and bills count only up to the `last_seq`
of their run. A bill may reach the ledger a moment after the snapshot that counts it, because
another API server writes it. `ledger.settling` waits for such bills.

A dead run has no next snapshot that could count its last bills, so it is cut at the last one of
them: what it billed is in its tenants' rows (`ends.last_bills`). A run that has bills and no
snapshot is in the cut with what it billed (`ends.without_totals`).

Invariant: a cut gives the same figures whatever arrives after it was read. Only bills up to the cut
that were still on their way may be added. Every bill of a run that does not live is in the cut.
"""

import time
from collections.abc import Collection, Mapping, Sequence
from dataclasses import dataclass, field, replace
from typing import Any

from sqlalchemy import (
    CTE,
    BigInteger,
    ColumnElement,
    Table,
    Text,
    and_,
    select,
    true,
)
from sqlalchemy.engine import Connection

from vllm_cost_meter.ledger.ends.highest import highest_bills
from vllm_cost_meter.ledger.ends.last_bills import (
    NO_LAST_BILLS,
    LastBills,
    LastSnapshot,
    read_last_bills,
)
from vllm_cost_meter.ledger.ends.run_time import NO_TIME, RunTime, as_ended, by_hour
from vllm_cost_meter.ledger.ends.without_totals import BilledRun, read_billed_runs
from vllm_cost_meter.ledger.retention.known import kept_from_hour
from vllm_cost_meter.ledger.schema import (
    energy_hours,
    engine_hours,
    live_usage,
    prices,
    runs,
    snapshots,
)
from vllm_cost_meter.ledger.tables.given import given_rows
from vllm_cost_meter.prices.book import NO_PRICES, PriceBook, RunFacts
from vllm_cost_meter.prices.cost import Rates
from vllm_cost_meter.prices.run_prices import RunPrices, by_stretch
from vllm_cost_meter.records.energy import ENERGY_CLASSES
from vllm_cost_meter.records.owner import TenantScope
from vllm_cost_meter.records.snapshot import CLASSES
from vllm_cost_meter.reports.answers import Hours
from vllm_cost_meter.reports.engine_labels import ALL_ENGINES, EngineFilter
from vllm_cost_meter.units.calendar import FIRST_HOUR
from vllm_cost_meter.units.time import (
    NS_PER_HOUR,
    NS_PER_MS,
    NS_PER_SECOND,
    rfc3339,
    unix_ns_of,
)

# Engines are asked for a snapshot each second; one that has been silent this long is dead.
DEAD_AFTER_NS = 15 * NS_PER_SECOND
# How long an answer waits for bills that its cut counts and that are still on their way.
SETTLE_S = 2.0


@dataclass(frozen=True, slots=True)
class AsOf:
    """The instant of a question (None is now), and how long it may wait for late bills."""

    now_ns: int | None = None
    settle_s: float = SETTLE_S

    def instant_ns(self) -> int:
        """Return the instant, in ns since the epoch."""
        return time.time_ns() if self.now_ns is None else self.now_ns


NOW = AsOf()


@dataclass(frozen=True, slots=True)
class Window:
    """Whole UTC hours [from_hour, to_hour), counted since the epoch; None is open."""

    from_hour: int | None = None
    to_hour: int | None = None

    def __post_init__(self) -> None:
        low, high = self.from_hour, self.to_hour
        if low is not None and high is not None and low > high:
            raise ValueError(f"expected from_hour <= to_hour, got {low} and {high}")

    @property
    def is_all(self) -> bool:
        return self.from_hour is None and self.to_hour is None

    def contains(self, hour: int) -> bool:
        after = self.from_hour is None or hour >= self.from_hour
        return after and (self.to_hour is None or hour < self.to_hour)

    def on_hours(self, hour: Any) -> ColumnElement[bool]:
        """Return the SQL condition on a column of hours."""
        return _between(hour, self.from_hour, self.to_hour)

    def on_instants(self, instant: Any) -> Any:
        """Return the SQL condition on a column of RFC 3339 instants."""
        return _between(instant, self._instant(self.from_hour), self._instant(self.to_hour))

    def as_dict(self) -> Hours:
        """Return the hours as an answer shows them."""
        return {
            "from": self._instant(self.from_hour),
            "to": self._instant(self.to_hour),
            "from_hour": self.from_hour,
            "to_hour": self.to_hour,
        }

    @staticmethod
    def _instant(hour: int | None) -> str | None:
        return None if hour is None else rfc3339(hour * NS_PER_HOUR)


def lifetime_of(row: Mapping[str, Any]) -> tuple[str, str]:
    """Return the first and the last instant that a clock may have shown while a run lived.

    `row` is a row of `runs` and `snapshots`. A clock that was set back or forward meanwhile has
    shown other instants at its end than at its beginning; `wall_ns` is the time in between on a
    clock that nobody sets.
    """
    began_ns, seen_ns = unix_ns_of(row["started_at"]), unix_ns_of(row["taken_at"])
    wall_ns = int(row["wall_ns"])
    return rfc3339(min(began_ns, seen_ns - wall_ns)), rfc3339(max(seen_ns, began_ns + wall_ns))


@dataclass(frozen=True, slots=True)
class RunCut(RunTime):
    """One run with a snapshot.

    For a dead run, time in flight counts as lost, because nobody will be billed for it, but for
    what its `last_bills` hold. `energy` has the mJ by class in the same way; None if no energy is
    known. `engine_hours` and `engine_energy` are what the engine told of each hour.
    """

    row: Mapping[str, Any]
    alive: bool
    engine_hours: Mapping[int, Mapping[str, int]]
    engine_energy: Mapping[int, Mapping[str, int]]
    last_bills: LastBills
    energy: Mapping[str, int] | None
    energy_stretches: Mapping[int, Mapping[str, int]]

    @property
    def snapshot_seq(self) -> int:
        """The number of the last bill that the latest snapshot counts."""
        return int(self.row["last_seq"])

    def heard_at(self) -> str:
        """Return the last instant at which the run is known to have lived."""
        return max(str(self.row["taken_at"]), self.last_bills.finished_at or "")

    def lifetime(self) -> tuple[str, str]:
        """Return when the run began and was last seen; see `lifetime_of`."""
        return lifetime_of(self.row)

    def used_mj(self, name: str | None = None) -> dict[int | None, int]:
        """Return the energy of a class, or of all, by span of hours; empty if it is unknown."""
        if self.energy is None:
            return {}
        total = sum(self.energy.values()) if name is None else self.energy.get(name, 0)
        return by_hour(self.energy_stretches, name, total)

    def state(self) -> dict[str, Any]:
        """Return the fields about the run in a summary."""
        names = ("run_id", "engine_index", "model", "gpus", "hardware", "parallelism", "precision")
        more = ("vllm_version", "method", "preemption_paid_by", "started_at", "taken_at")
        about = ("running", "waiting", "kv_cache_usage", "steps", "errors", "state")
        return {
            **{name: self.row[name] for name in (*names, *more, *about)},
            "labels": None if self.row["labels"] is None else dict(self.prices.labels),
            "alive": self.alive,
            "usd_per_gpu_hour": self.row["usd_per_gpu_hour"],
        }


@dataclass(frozen=True, slots=True)
class RunWithoutTotals(RunTime):
    """One run that has bills and no snapshot: all its time that is known is what it billed."""

    billed: BilledRun


@dataclass(frozen=True, slots=True)
class Cut:
    """All runs of a ledger: those with a snapshot at the latest one, and those without totals.

    With `whose`, questions about bills read those of that tenant only, or of all below it too. With
    `engines`, only runs with these labels are in the cut. Rows of requests that ended before the
    hour `kept_from` may have been dropped; None if none were.
    """

    runs: tuple[RunCut, ...]
    window: Window = field(default_factory=Window)
    book: PriceBook = NO_PRICES
    whose: TenantScope | None = None
    without_totals: tuple[RunWithoutTotals, ...] = ()
    kept_from: int | None = None
    engines: EngineFilter = ALL_ENGINES

    def of_engines(self, engines: EngineFilter) -> "Cut":
        """Return the cut of these engines alone.

        Snapshots tell labels, so a run without totals is among those without the label.
        """
        if engines.is_all:
            return self
        return replace(
            self,
            runs=tuple(run for run in self.runs if engines.fits(run.prices.labels)),
            without_totals=self.without_totals if engines.fits({}) else (),
            engines=engines,
        )

    def has_run(self, run_id: ColumnElement[str]) -> ColumnElement[bool]:
        """Return the SQL condition that a row is of a run in the cut."""
        if self.engines.is_all:
            return true()
        ids = [[run.run_id] for run in self.all_runs]
        return run_id.in_(select(given_rows("chosen", [("run_id", Text())], ids).c.run_id))

    @property
    def has_all_rows(self) -> bool:
        """Whether no row of a request that ended in the window was dropped."""
        first = self.window.from_hour
        return self.kept_from is None or (first is not None and first >= self.kept_from)

    @property
    def all_runs(self) -> tuple[RunTime, ...]:
        return (*self.runs, *self.without_totals)

    def prices_of(self) -> dict[str, RunPrices]:
        return {run.run_id: run.prices for run in self.all_runs}

    def runs_by_price(self) -> dict[str, str]:
        """Return for each run one that has the same price at every hour, to add them up under.

        A run without a price at some hour stands for itself: a report names it.
        """
        changes = self.book.price_changes()
        stands_for: dict[tuple[Rates, ...], str] = {}
        found = {}
        for run in self.all_runs:
            ever = [run.prices.at(hour) for hour in (FIRST_HOUR, *changes)]
            known = tuple(price.rates for price in ever if price is not None)
            is_whole = len(known) == len(ever)
            found[run.run_id] = stands_for.setdefault(known, run.run_id) if is_whole else run.run_id
        return found

    def wall_gpu_ns(self) -> int:
        """Return wall time x GPUs over all runs; in a window, the time in its engine hours."""
        return sum(run.wall_gpu_ns for run in self.all_runs)

    def without_totals_ns(self) -> int:
        """Return the GPU time in the window of runs whose other time is unknown."""
        return sum(run.wall_gpu_ns for run in self.without_totals)

    def used_ns(self, name: str | None = None) -> dict[str, dict[int | None, int]]:
        """Return the GPU time of a class, or of all, by run and by span of hours at one price."""
        return {run.run_id: run.used_ns(name) for run in self.all_runs}

    def used_mj(self, name: str | None = None) -> dict[str, dict[int | None, int]]:
        """Return the energy of a class, or of all, by run and by span of hours at one price."""
        return {run.run_id: run.used_mj(name) for run in self.runs}

    def kv_cache_block_ms(self) -> float | None:
        """Return blocks x ms of all runs' KV caches; None if the size of one is unknown."""
        if self.without_totals_ns():
            return None
        block_ms = 0.0
        for run in self.runs:
            if run.row["kv_blocks"] is None:
                return None
            wall_ms = run.total_ns() / (int(run.row["gpus"]) * NS_PER_MS)
            block_ms += int(run.row["kv_blocks"]) * wall_ms
        return block_ms

    def at(self) -> str | None:
        """Return the instant of the latest snapshot, of a living engine if one lives."""
        return max((run.row["taken_at"] for run in self._latest()), default=None)

    def gpus(self) -> int:
        """Return the number of GPUs of engines that were up at the latest snapshot."""
        at = self.at()
        since = None if at is None else rfc3339(unix_ns_of(at) - DEAD_AFTER_NS)
        return sum(int(run.row["gpus"]) for run in self._latest() if run.row["taken_at"] >= since)

    def _latest(self) -> Sequence[RunCut]:
        # A clock that was set back leaves dead runs whose snapshots are later than any other.
        return [run for run in self.runs if run.alive] or self.runs

    def own_time(self) -> dict[str, Any]:
        """Return the wall time of the meter's own hooks, and its part of the engines' busy time."""
        busy_ns = sum(int(run.row["busy_ns"]) for run in self.runs)
        own_ns = sum(int(run.row["own_ns"]) for run in self.runs)
        share = own_ns / busy_ns if busy_ns else None
        return {"busy_ns": busy_ns, "own_ns": own_ns, "own_time_share": share}

    def last_bills(self) -> dict[str, int]:
        """Return the number of the last bill that counts, by run."""
        return {run.run_id: run.last_seq for run in self.all_runs}


def bills_up_to(last: Mapping[str, int]) -> CTE:
    """Return these runs' last bills as rows (run_id, last_seq), to be joined with bills."""
    return given_rows("cut", [("run_id", Text()), ("last_seq", BigInteger())], last.items())


def read_cut(
    connection: Connection,
    window: Window,
    *,
    alive: Collection[str],
    now_ns: int,
    book: PriceBook = NO_PRICES,
) -> Cut:
    """Read the snapshots and hours of all runs; both must come from one transaction.

    `with_ends` adds what runs have billed that no snapshot counts.
    """
    hours = _by_run_and_hour(connection, engine_hours, CLASSES, "ns")
    energies = _by_run_and_hour(connection, energy_hours, ENERGY_CLASSES, "mj")
    joined = (
        select(
            runs,
            *(c for c in snapshots.c if c.name != "run_id"),
            prices.c.usd_per_gpu_hour,
            prices.c.usd_per_kv_block_hour,
            prices.c.source.label("price_source"),
            live_usage.c.live_ns,
            live_usage.c.step_ns,
        )
        .join(snapshots, snapshots.c.run_id == runs.c.run_id)
        .join(live_usage, live_usage.c.run_id == runs.c.run_id, isouter=True)
        .join(prices, prices.c.price_id == runs.c.price_id, isouter=True)
        .order_by(runs.c.started_at, runs.c.run_id)
    )
    cuts = []
    for each in connection.execute(joined):
        row = each._asdict()
        run_id, age_ns = row["run_id"], now_ns - unix_ns_of(row["taken_at"])
        # A snapshot from the future says as little of now as one from the past.
        up = run_id in alive or abs(age_ns) <= DEAD_AFTER_NS
        ours = hours.get(run_id, {}), energies.get(run_id, {})
        cuts.append(_run_cut(row, window, up, RunPrices.of(row, book), *ours))
    return Cut(tuple(cuts), window, book)


def _by_run_and_hour(
    connection: Connection, table: Table, names: Sequence[str], unit: str
) -> dict[str, dict[int, Mapping[str, int]]]:
    """Return the amounts of these classes of each hour of each run."""
    amounts = (table.c[f"{name}_{unit}"] for name in names)
    found: dict[str, dict[int, Mapping[str, int]]] = {}
    for run_id, hour, *of_hour in connection.execute(
        select(table.c.run_id, table.c.hour, *amounts)
    ):
        found.setdefault(run_id, {})[hour] = dict(zip(names, of_hour, strict=True))
    return found


def with_ends(connection: Connection, cut: Cut) -> Cut:
    """Return a cut with the last bills of dead runs, and with the runs without totals.

    The bills that a report counts must come from the same transaction, because a bill of a dead run
    may still arrive.
    """
    highest = highest_bills(connection)
    dead = {
        run.run_id: LastSnapshot(
            int(run.row["number"]),
            run.snapshot_seq,
            {hour: classes["in_flight"] for hour, classes in run.engine_hours.items()},
        )
        for run in cut.runs
        if not run.alive
    }
    last = read_last_bills(connection, dead, highest)
    billed = read_billed_runs(connection, highest.keys() - {run.run_id for run in cut.runs})
    return replace(
        cut,
        runs=tuple(
            _ended(run, cut.window, last[run.run_id]) if run.run_id in last else run
            for run in cut.runs
        ),
        without_totals=tuple(_without_totals(run, cut) for run in billed),
        kept_from=kept_from_hour(connection),
    )


def _ended(run: RunCut, window: Window, last_bills: LastBills) -> RunCut:
    told = run.engine_hours, run.engine_energy
    return _run_cut(run.row, window, run.alive, run.prices, *told, last_bills)


def _run_cut(
    row: Mapping[str, Any],
    window: Window,
    alive: bool,
    prices: RunPrices,
    hours: Mapping[int, Mapping[str, int]],
    energies: Mapping[int, Mapping[str, int]],
    last_bills: LastBills = NO_LAST_BILLS,
) -> RunCut:
    shown_hours, shown_energies = hours, energies
    classes: Mapping[str, int] = _classes(row)
    energy: Mapping[str, int] | None = None if row["energy_mj"] is None else _energy(row)
    if not alive:
        billed, in_flight = last_bills.billed, last_bills.in_flight
        shown_hours = {
            hour: as_ended(hours.get(hour, NO_TIME), billed.get(hour, 0), in_flight.get(hour, 0))
            for hour in sorted(hours.keys() | billed.keys())
        }
        # No snapshot told which requests used the energy after the last one.
        shown_energies = {hour: as_ended(used) for hour, used in energies.items()}
        classes = as_ended(classes, last_bills.billed_ns, last_bills.in_flight_ns)
        energy = None if energy is None else as_ended(energy)
    used = _stretches(shown_hours, window, prices.book.price_changes())
    energy_used = _stretches(shown_energies, window, prices.book.energy_price_changes())
    wall_gpu_ns = int(row["wall_ns"]) * int(row["gpus"])
    wall_gpu_ns += last_bills.billed_ns - last_bills.in_flight_ns
    if not window.is_all:
        classes = _sums(used, CLASSES)
        energy = _sums(energy_used, ENERGY_CLASSES) if energy_used else None
        wall_gpu_ns = sum(classes.values())
    return RunCut(
        run_id=row["run_id"],
        last_seq=max(int(row["last_seq"]), last_bills.last_seq),
        prices=prices,
        classes=classes,
        hours=shown_hours,
        stretches=used,
        wall_gpu_ns=wall_gpu_ns,
        row=row,
        alive=alive,
        engine_hours=hours,
        engine_energy=energies,
        last_bills=last_bills,
        energy=energy,
        energy_stretches=energy_used,
    )


def _without_totals(billed: BilledRun, cut: Cut) -> RunWithoutTotals:
    prices = RunPrices(billed.run_id, RunFacts(), cut.book)
    hours = {hour: {**NO_TIME, "requests": ns} for hour, ns in billed.hours.items()}
    used = _stretches(hours, cut.window, cut.book.price_changes())
    classes = _sums(used, CLASSES)
    total = sum(classes.values())
    return RunWithoutTotals(
        billed.run_id, billed.last_seq, prices, classes, hours, used, total, billed
    )


def _stretches(
    of: Mapping[int, Mapping[str, int]], window: Window, changes: Sequence[int]
) -> dict[int, dict[str, int]]:
    inside = {hour: classes for hour, classes in of.items() if window.contains(hour)}
    return by_stretch(inside, changes)


def _between(of: Any, low: Any, high: Any) -> ColumnElement[bool]:
    conditions = [true()]
    if low is not None:
        conditions.append(of >= low)
    if high is not None:
        conditions.append(of < high)
    return and_(*conditions)


def _classes(row: Mapping[str, Any]) -> dict[str, int]:
    return {name: int(row[f"{name}_ns"]) for name in CLASSES}


def _energy(row: Mapping[str, Any]) -> dict[str, int]:
    return {name: int(row[f"{name}_mj"]) for name in ENERGY_CLASSES}


def _sums(stretches: Mapping[int, Mapping[str, int]], names: Collection[str]) -> dict[str, int]:
    return {name: sum(classes[name] for classes in stretches.values()) for name in names}
