"""The cut: every run at its latest snapshot, and the bills that belong to it.

A report compares the engines' own totals (snapshots) with the bills in the ledger, while new bills
keep coming. So the snapshots are read once, into a `Cut`, and bills count only up to the `last_seq`
of their run. A bill may reach the ledger a moment after the snapshot that counts it, because
another API server writes it. `settle` waits for such bills.

Invariant: a cut gives the same figures whatever arrives after it was read. Only bills up to the cut
that were still on their way may be added.
"""

import json
import time
from collections.abc import Callable, Collection, Mapping, Sequence
from contextlib import AbstractContextManager
from dataclasses import dataclass, field
from typing import Any

from sqlalchemy import (
    CTE,
    BigInteger,
    ColumnElement,
    Table,
    Text,
    and_,
    case,
    column,
    func,
    select,
    true,
    values,
)
from sqlalchemy.engine import Connection

from vllm_cost_meter.ledger.schema import (
    energy_hours,
    engine_hours,
    live_usage,
    prices,
    requests,
    runs,
    snapshots,
)
from vllm_cost_meter.prices.book import (
    NO_PRICES,
    PriceBook,
)
from vllm_cost_meter.prices.run_prices import RunPrices, by_stretch
from vllm_cost_meter.records.energy import ENERGY_CLASSES
from vllm_cost_meter.records.owner import TenantScope
from vllm_cost_meter.records.snapshot import CLASSES
from vllm_cost_meter.reports.answers import Hours
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
SETTLE_POLL_S = 0.02
# So many bills of a run may come late: some seconds of a busy server.
ON_THEIR_WAY_MAX = 20_000


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

    def on_hours(self, hour: Any) -> Any:
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
class RunCut:
    """One run at the cut, in the window.

    `classes` has the GPU-ns by class. For a dead run, time in flight counts as lost, because nobody
    will be billed for it. `energy` has the mJ by class in the same way; None if no energy is known.
    `stretches` and `energy_stretches` divide both by spans of hours at one price (see
    `prices.run_prices`). `wall_gpu_ns` is wall time x GPUs.
    """

    run_id: str
    row: Mapping[str, Any]
    alive: bool
    classes: Mapping[str, int]
    hours: Mapping[int, Mapping[str, int]]
    prices: RunPrices
    wall_gpu_ns: int
    stretches: Mapping[int, Mapping[str, int]]
    energy: Mapping[str, int] | None = None
    energy_stretches: Mapping[int, Mapping[str, int]] = field(default_factory=dict)

    @property
    def last_seq(self) -> int:
        return int(self.row["last_seq"])

    def lifetime(self) -> tuple[str, str]:
        """Return when the run began and was last seen; see `lifetime_of`."""
        return lifetime_of(self.row)

    def total_ns(self) -> int:
        return sum(self.classes.values())

    def used_ns(self, name: str | None = None) -> dict[int | None, int]:
        """Return the GPU time of a class, or of all, by span of hours at one price."""
        total = self.wall_gpu_ns if name is None else self.classes[name]
        return _by_hour(self.stretches, name, total)

    def used_mj(self, name: str | None = None) -> dict[int | None, int]:
        """Return the energy of a class, or of all, by span of hours; empty if it is unknown."""
        if self.energy is None:
            return {}
        total = sum(self.energy.values()) if name is None else self.energy.get(name, 0)
        return _by_hour(self.energy_stretches, name, total)

    def classes_in(self, hour: int) -> Mapping[str, int]:
        """Return the classes of one hour, as `classes` counts them."""
        return self.hours[hour] if self.alive else _as_lost(self.hours[hour])

    def state(self) -> dict[str, Any]:
        """Return the fields about the run in a summary."""
        names = ("run_id", "engine_index", "model", "gpus", "hardware", "parallelism", "precision")
        more = ("vllm_version", "method", "started_at", "taken_at")
        about = ("running", "waiting", "kv_cache_usage", "steps", "errors", "state")
        return {
            **{name: self.row[name] for name in (*names, *more, *about)},
            "labels": None if self.row["labels"] is None else json.loads(self.row["labels"]),
            "alive": self.alive,
            "usd_per_gpu_hour": self.row["usd_per_gpu_hour"],
        }


@dataclass(frozen=True, slots=True)
class Cut:
    """All runs of a ledger at their latest snapshots.

    With `whose`, questions about bills read those of that tenant only, or of all below it too.
    """

    runs: tuple[RunCut, ...]
    window: Window = field(default_factory=Window)
    book: PriceBook = NO_PRICES
    whose: TenantScope | None = None

    def prices_of(self) -> dict[str, RunPrices]:
        return {run.run_id: run.prices for run in self.runs}

    def wall_gpu_ns(self) -> int:
        """Return wall time x GPUs over all runs; in a window, the time in its engine hours."""
        return sum(run.wall_gpu_ns for run in self.runs)

    def used_ns(self, name: str | None = None) -> dict[str, dict[int | None, int]]:
        """Return the GPU time of a class, or of all, by run and by span of hours at one price."""
        return {run.run_id: run.used_ns(name) for run in self.runs}

    def used_mj(self, name: str | None = None) -> dict[str, dict[int | None, int]]:
        """Return the energy of a class, or of all, by run and by span of hours at one price."""
        return {run.run_id: run.used_mj(name) for run in self.runs}

    def kv_cache_block_ms(self) -> float | None:
        """Return blocks x ms of all runs' KV caches; None if the size of one is unknown."""
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

    def cte(self) -> CTE:
        """Return the cut as rows (run_id, last_seq), to be joined with bills."""
        rows = [(run.run_id, run.last_seq) for run in self.runs]
        table = values(column("run_id", Text), column("last_seq", BigInteger), name="cut")
        return table.data(rows).cte()


def read_cut(
    connection: Connection,
    window: Window,
    *,
    alive: Collection[str],
    now_ns: int,
    book: PriceBook = NO_PRICES,
) -> Cut:
    """Read the snapshots and hours of all runs; both must come from one transaction."""
    hours: dict[str, dict[int, Mapping[str, int]]] = {}
    for hour in connection.execute(select(engine_hours)):
        hours.setdefault(hour.run_id, {})[hour.hour] = _classes(hour._asdict())
    energies: dict[str, dict[int, Mapping[str, int]]] = {}
    for hour in connection.execute(select(energy_hours)):
        energies.setdefault(hour.run_id, {})[hour.hour] = _energy(hour._asdict())
    joined = (
        select(
            runs,
            *(c for c in snapshots.c if c.name != "run_id"),
            prices.c.usd_per_gpu_hour,
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


def _run_cut(
    row: Mapping[str, Any],
    window: Window,
    alive: bool,
    prices: RunPrices,
    hours: Mapping[int, Mapping[str, int]],
    energies: Mapping[int, Mapping[str, int]],
) -> RunCut:
    def shown(by_class: Mapping[str, int]) -> Mapping[str, int]:
        return by_class if alive else _as_lost(by_class)

    def stretches(
        of: Mapping[int, Mapping[str, int]], changes: list[int]
    ) -> dict[int, Mapping[str, int]]:
        inside = {hour: classes for hour, classes in of.items() if window.contains(hour)}
        return {hour: shown(sums) for hour, sums in by_stretch(inside, changes).items()}

    used = stretches(hours, prices.book.price_changes())
    energy_used = stretches(energies, prices.book.energy_price_changes())
    wall_gpu_ns = int(row["wall_ns"]) * int(row["gpus"])
    classes, energy = shown(_classes(row)), None
    if row["energy_mj"] is not None:
        energy = shown(_energy(row))
    if not window.is_all:
        classes = _sums(used, CLASSES)
        energy = _sums(energy_used, ENERGY_CLASSES) if energy_used else None
        wall_gpu_ns = sum(classes.values())
    return RunCut(
        run_id=row["run_id"],
        row=row,
        alive=alive,
        classes=classes,
        hours=hours,
        prices=prices,
        wall_gpu_ns=wall_gpu_ns,
        stretches=used,
        energy=energy,
        energy_stretches=energy_used,
    )


def count_bills(connection: Connection, cut: Cut) -> dict[str, int]:
    """Return the number of bills in the ledger up to the cut, by run."""
    return total_by_run(connection, cut, requests, func.count())


def total_by_run(
    connection: Connection, cut: Cut, bills: Table, total: ColumnElement[Any]
) -> dict[str, int]:
    """Return a total over the rows of bills up to the cut, run by run; 0 where all is unknown.

    `bills` has a row, or several, for each bill: `requests`, or what was told of them since.
    """
    if not cut.runs:
        return {}
    at, b = cut.cte(), bills.c
    totals = (
        select(b.run_id, total)
        .join(at, and_(b.run_id == at.c.run_id, b.seq <= at.c.last_seq))
        .group_by(b.run_id)
    )
    return {run_id: int(amount or 0) for run_id, amount in connection.execute(totals)}


def settle(
    read: Callable[[], AbstractContextManager[Connection]],
    cut: Cut,
    settle_s: float,
    settled: dict[str, int],
) -> None:
    """Wait until each living run has all its bills up to the cut, for at most `settle_s`.

    `settled` is the number of the last bill, by run, up to which earlier calls have waited, in vain
    or not: no call counts those again. Bills that are on their way are among the newest, so of a
    run that is seen for the first time only these are counted.
    """
    last = {run.run_id: run.last_seq for run in cut.runs if run.alive}
    since = {
        run_id: max(settled.get(run_id, 0), seq - ON_THEIR_WAY_MAX) for run_id, seq in last.items()
    }
    ranges = {run_id: (low, last[run_id]) for run_id, low in since.items() if low < last[run_id]}
    deadline = time.monotonic() + settle_s
    while ranges:
        with read() as connection:
            held = _held(connection, ranges)
        is_whole = all(held[run_id] >= high - low for run_id, (low, high) in ranges.items())
        if is_whole or time.monotonic() >= deadline:
            break
        time.sleep(SETTLE_POLL_S)
    settled.update(last)


def _held(connection: Connection, ranges: Mapping[str, tuple[int, int]]) -> dict[str, int]:
    """Return how many bills of a range of numbers (low, high] the ledger holds, by run."""
    b = requests.c
    held = {}
    for run_id, (low, high) in ranges.items():
        counted = select(func.count()).where(b.run_id == run_id, b.seq > low, b.seq <= high)
        held[run_id] = int(connection.execute(counted).scalar_one())
    return held


def _between(of: Any, low: Any, high: Any) -> Any:
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


def _by_hour(
    stretches: Mapping[int, Mapping[str, int]], name: str | None, total: int
) -> dict[int | None, int]:
    """Return a class, or all, by span of hours; None has the part of `total` in no span."""
    used: dict[int | None, int] = {
        hour: sum(classes.values()) if name is None else classes.get(name, 0)
        for hour, classes in stretches.items()
    }
    rest = total - sum(used.values())
    return {**used, None: rest} if rest else used


def _as_lost(classes: Mapping[str, int]) -> dict[str, int]:
    lost = classes["lost"] + classes["in_flight"]
    return {**classes, "in_flight": 0, "lost": lost}


# The columns that the price of a run depends on, in `runs` joined with `prices`.
RUN_COLUMNS = (
    runs.c.run_id,
    runs.c.gpus,
    runs.c.model,
    runs.c.hardware,
    runs.c.host,
    prices.c.usd_per_gpu_hour,
    prices.c.source.label("price_source"),
)


def stretch(hour: ColumnElement[int], changes: Sequence[int]) -> list[ColumnElement[Any]]:
    """Return the SQL terms to group by, so that all hours in a group have one price."""
    if not changes:
        return []
    return [case(*((hour < at, place) for place, at in enumerate(changes)), else_=len(changes))]
