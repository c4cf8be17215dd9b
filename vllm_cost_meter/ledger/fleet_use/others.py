"""What runs elsewhere have used, for the budgets of one server: a fleet's figures, as last known.

A thread of its own reads the fleet's database, and the looks at budgets take what it has read. So
no look waits for a network. Of a run that more than one has, the one with most of its bills counts:
this server's own ledger, or one of the senders. What runs counts by the latest snapshot. So a run
of the own ledger counts by that alone, unless the ledger was restored or lost: then the fleet has
more of it.

Figures are stale once the database could not be read for some time. They are also stale once it has
not got for that time what this server's own ledger had: other servers do not count that. So a
server that is cut off knows it, whatever the others know.

Invariant: what others have used is never less than it was at the last look, until the next one.
"""

import threading
import time
from collections import deque
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from sqlalchemy import Engine
from sqlalchemy.exc import SQLAlchemyError

from vllm_cost_meter.errors import LedgerError
from vllm_cost_meter.ledger.database import cause_of, open_to_read
from vllm_cost_meter.ledger.fleet import outbox
from vllm_cost_meter.ledger.fleet.opening import parse_fleet_url
from vllm_cost_meter.ledger.fleet_use.kept import KeptUse
from vllm_cost_meter.ledger.fleet_use.reading import FleetReader
from vllm_cost_meter.ledger.fleet_use.running import ToldUse, told_use
from vllm_cost_meter.ledger.fleet_use.sums import FleetSums
from vllm_cost_meter.ledger.queries.bill_count import Spent, added
from vllm_cost_meter.prices.cost import NO_QUANTITIES, Quantities
from vllm_cost_meter.records.owner import Owner
from vllm_cost_meter.tenants.budgets import Budget
from vllm_cost_meter.units.time import NS_PER_SECOND

# Hours before all periods that stay kept, so that a clock may be set back.
_HOURS_KEPT = 48
# Figures are stale after so many intervals, but not before `FRESH_S_MIN`. What this server has used
# is sent within one interval and seen within another.
INTERVALS_MISSED_MAX = 5
FRESH_S_MIN = 10.0
# So many instants of an outage are remembered, the latest ones.
_HAD_MAX = 10_000


@dataclass(frozen=True, slots=True)
class OwnRuns:
    """What a server's own ledger has of runs: how many bills, and the latest snapshot's number."""

    bills: Mapping[str, int]
    snapshots: Mapping[str, int]


@dataclass(frozen=True, slots=True)
class OthersUse:
    """What runs that count by the fleet have used of each budget in its present period.

    Hours of one price are summed under the first of them; `by_hour` has them apart, for rolling
    periods. `billed` and `running` name runs of the own ledger that count by the fleet.
    """

    used: Mapping[Budget, Spent]
    by_hour: Mapping[Budget, Spent]
    billed: frozenset[str]
    running: frozenset[str]
    facts: Mapping[str, Mapping[str, Any]]

    def run_ids(self) -> set[str]:
        """Return the runs that have used anything."""
        return {run_id for spent in self.used.values() for run_id in spent}


NO_OTHERS = OthersUse({}, {}, frozenset(), frozenset(), {})


class FleetUse:
    """Follows what the servers of a fleet have used. One thread looks, another one takes."""

    def __init__(
        self, ledger_url: str, fleet_url: str, interval_s: float, path: Path | None = None
    ) -> None:
        """Open the kept figures at `path`, or keep them in memory. Raises LedgerError."""
        shown = parse_fleet_url(fleet_url).render_as_string(hide_password=True)
        self._ledger_url = ledger_url
        self._ledger: Engine | None = None
        self._reader = FleetReader(fleet_url)
        self._fresh_ns = int(max(interval_s * INTERVALS_MISSED_MAX, FRESH_S_MIN) * NS_PER_SECOND)
        self._lock = threading.RLock()
        self._kept = KeptUse(path, shown)
        self._sums = FleetSums(self._kept)
        self._running: dict[str, tuple[int, list[ToldUse]]] = {}
        now_ns = time.monotonic_ns()
        # On the monotonic clock: the last look, and when the ledger had what the fleet has now.
        silent_ns = max(time.time_ns() - self._kept.read_at_ns, 0)
        self._read_ns = now_ns - silent_ns if self._kept.looks else None
        self._sent_ns = now_ns
        # What the ledger had: instants, its name and its last number.
        self._had: deque[tuple[int, str, int]] = deque(maxlen=_HAD_MAX)
        self._take_running()

    @property
    def looks(self) -> int:
        """How many looks were kept: it grows with each one that is new."""
        return self._kept.looks

    @contextmanager
    def holding(self) -> Iterator[None]:
        """Have the figures stay as they are inside."""
        with self._lock:
            yield

    def look(self, budgets: Sequence[Budget], now_ns: int) -> None:
        """Read what is new for these budgets. Blocks for as long as the network does.

        Raises LedgerError if the fleet, the own ledger or the kept figures cannot be read.
        """
        if not budgets:
            return
        first_hour = min(budget.hours(now_ns)[0] for budget in budgets) - _HOURS_KEPT
        self._note_own()
        began_ns = time.monotonic_ns()
        with self._lock:
            self._refresh()
            known = self._kept.known(first_hour)
        found = self._reader.look(known)
        with self._lock:
            try:
                self._sums.add(self._kept.take(found, first_hour))
            except LedgerError:
                self._sums.add(None)
                raise
            self._take_running()
            self._read_ns = began_ns
            self._note_sent(found.sent)

    def stale(self, monotonic_ns: int) -> str | None:
        """Return why the figures cannot be trusted now, or None if they can."""
        with self._lock:
            read_ns, sent_ns = self._read_ns, self._sent_ns
        if read_ns is None:
            return "the figures of the fleet were not read yet"
        if (age_ns := monotonic_ns - read_ns) > self._fresh_ns:
            return f"the figures of the fleet are {age_ns / NS_PER_SECOND:.0f} s old"
        if (age_ns := monotonic_ns - sent_ns) > self._fresh_ns:
            return (
                "the fleet lacks what this server has used in the last"
                f" {age_ns / NS_PER_SECOND:.0f} s"
            )
        return None

    def age_ns(self, monotonic_ns: int) -> int | None:
        """Return how long ago the fleet was read last; None if it never was."""
        with self._lock:
            return None if self._read_ns is None else max(monotonic_ns - self._read_ns, 0)

    def has(self, budget: Budget, now_ns: int) -> bool:
        """Return whether the present period of a budget was read, at any time."""
        return self._kept.has(budget.hours(now_ns)[0])

    def others(
        self, budgets: Sequence[Budget], changes: Sequence[int], own: OwnRuns, now_ns: int
    ) -> OthersUse:
        """Return what counts by the fleet, beside what this server's own ledger has.

        `changes` are the hours at which prices may change. Raises LedgerError if the kept figures
        cannot be read.
        """
        with self._lock:
            self._refresh()
            sums = self._sums.bring_up_to(budgets, changes, now_ns)
            counted = self._counted(own.bills)
            running = [
                told
                for run_id, (number, of_run) in self._running.items()
                if number > own.snapshots.get(run_id, -1)
                for told in of_run
            ]
            used: dict[Budget, Spent] = {}
            by_hour: dict[Budget, Spent] = {}
            for budget, of_budget in sums.items():
                now_running = _of_budget(budget, running, now_ns)
                of_runs = {
                    run: hours for s, hours in of_budget.by_stretch() if (run := counted.get(s))
                }
                used[budget] = added(of_runs, now_running)
                if budget.period == "rolling":
                    hours_of = of_budget.by_hour.items()
                    of_runs = {run: hours for s, hours in hours_of if (run := counted.get(s))}
                    by_hour[budget] = added(of_runs, now_running)
            return OthersUse(
                used=used,
                by_hour=by_hour,
                billed=frozenset(counted.values()) & own.bills.keys(),
                running=frozenset(told.run_id for told in running) & own.snapshots.keys(),
                facts=self._kept.runs,
            )

    def close(self) -> None:
        """Close the connections and the file."""
        self._reader.close()
        if self._ledger is not None:
            self._ledger.dispose()
        self._kept.close()

    def _counted(self, own: Mapping[str, int]) -> dict[int, str]:
        """Return the sources that count, each with its run: of a run the one with most bills."""
        best: dict[str, tuple[int, str, int]] = {}
        for number, source in self._kept.sources.items():
            # Of equals the first by name, as in the fleet's own views.
            rank = (-source.bills, source.sender_id, number)
            if source.bills > own.get(source.run_id, 0):
                best[source.run_id] = min(best.get(source.run_id, rank), rank)
        return {number: run_id for run_id, (_, _, number) in best.items()}

    def _refresh(self) -> None:
        """Go on from what another process with the same file has kept: one may be ending."""
        if self._kept.refresh():
            self._sums.add(None)
            self._take_running()

    def _take_running(self) -> None:
        """Take what each sender told last: of a run the one that saw it latest."""
        latest: dict[str, tuple[int, list[ToldUse]]] = {}
        for content in self._kept.running.values():
            of_sender: dict[str, list[ToldUse]] = {}
            for told in told_use(content):
                of_sender.setdefault(told.run_id, []).append(told)
            for run_id, of_run in of_sender.items():
                number = of_run[0].number
                if run_id not in latest or latest[run_id][0] < number:
                    latest[run_id] = number, of_run
        self._running = latest

    def _note_own(self) -> None:
        """Note how far the own ledger is, before the fleet is asked how far that is there."""
        now_ns = time.monotonic_ns()
        try:
            if self._ledger is None:
                self._ledger = open_to_read(self._ledger_url)
            with self._ledger.connect() as connection:
                sender = outbox.read_sender(connection)
        except SQLAlchemyError as error:
            raise LedgerError(f"ledger: its outbox cannot be read: {cause_of(error)}") from error
        if sender is not None:
            self._had.append((now_ns, sender.sender_id, sender.last_number))

    def _note_sent(self, sent: Mapping[str, int]) -> None:
        """Note since when the fleet has what the own ledger had; the lock is held."""
        while self._had:
            at_ns, sender_id, number = self._had[0]
            if sent.get(sender_id, -1) < number and sender_id == self._had[-1][1]:
                break
            if sender_id == self._had[-1][1]:
                self._sent_ns = at_ns
            self._had.popleft()


def _of_budget(budget: Budget, running: Sequence[ToldUse], now_ns: int) -> Spent:
    """Return what runs elsewhere and counts for a budget, in the hours when it was told."""
    first, after = budget.hours(now_ns)
    found: Spent = {}
    for told in running:
        is_inside = first <= told.hour and (told.hour < after or budget.period == "rolling")
        if is_inside and budget.covers(Owner.stored(told.tenant, told.above, told.tags)):
            hours = found.setdefault(told.run_id, {})
            used = Quantities(told.gpu_time_ns, told.kv_block_ms)
            hours[told.hour] = hours.get(told.hour, NO_QUANTITIES) + used
    return found
