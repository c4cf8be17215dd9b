"""Adds up bills by budget, run and hour, each bill once, by its number within its run.

A count begins with the sums by hour, which hold all bills of the ledger, and goes on bill by bill:
so the first look takes as long after a year as after a day.

An engine numbers its bills from 1 without a gap. API servers commit them in any order, and the
bills of one that died never come. So a count keeps, for each run, up to which number it has looked,
and the numbers below that were missing. It looks at those again: a bill that is committed late
fills its gap, whenever that is. No clock takes part.

A run may have lost many bills. Each call looks at the gaps that were found last, and at some of the
others in turn, so that a call stays short however many there are.

Bills whose rows were dropped before they were looked at count by what they added up to, by hour and
group. A count that finds that others were dropped which it had not looked at begins again.

Invariant: a bill that is in the ledger and has time in or after the first hour is counted once.
"""

from collections.abc import Collection, Iterable, Mapping, Sequence
from typing import Any, NamedTuple

from sqlalchemy import BigInteger, Integer, Text, and_, bindparam, select
from sqlalchemy.engine import Connection

from vllm_cost_meter.ledger.ends.highest import highest_bills
from vllm_cost_meter.ledger.queries.missing import missing_numbers
from vllm_cost_meter.ledger.retention.known import dropped_by_run
from vllm_cost_meter.ledger.retention.ranges import DroppedNumbers, joined, without
from vllm_cost_meter.ledger.schema import (
    bill_sums,
    requests,
    rollup_groups,
    rollup_hours,
    usage_pieces,
)
from vllm_cost_meter.ledger.tables.given import GivenColumn, given_rows
from vllm_cost_meter.ledger.tables.pieces import (
    PIECE_HOUR,
    PIECE_NS,
    PIECES_OF_BILL,
    piece_amount,
    with_pieces,
)
from vllm_cost_meter.prices.cost import NO_QUANTITIES, Quantities
from vllm_cost_meter.records.owner import Owner
from vllm_cost_meter.tenants.budgets import Budget, BudgetScope

# Bills are read in such pieces: some 40 ms of work each.
_BILLS_AT_ONCE = 20_000
# At most so many gaps are looked at in one call, half of them the latest.
GAPS_AT_ONCE = 500
_OWNERS_KEPT = 100_000

# GPU time and KV residency by run and UTC hour.
Spent = dict[str, dict[int, Quantities]]


def added(one: Spent, other: Spent) -> Spent:
    """Return the sum of use by run and hour; both stay as they are."""
    summed = dict(one)
    for run_id, hours in other.items():
        of_run = dict(summed.get(run_id, {}))
        for hour, used in hours.items():
            of_run[hour] = of_run.get(hour, NO_QUANTITIES) + used
        summed[run_id] = of_run
    return summed


class _Gap(NamedTuple):
    """Numbers of a run's bills that were looked for in vain, both ends included."""

    run_id: str
    first: int
    last: int


class BillCount:
    """What the bills of a ledger add up to for some budgets, from an hour on."""

    def __init__(self, budgets: Iterable[Budget], first_hour: int) -> None:
        """`first_hour` is the earliest hour, since the epoch, that any of the budgets counts."""
        self.first_hour = first_hour
        self._budgets = {budget.scope: budget for budget in budgets}
        self._sums: dict[BudgetScope, Spent] = {scope: {} for scope in self._budgets}
        # Up to which number the bills of a run were looked for; None before the first call.
        self._upto: dict[str, int] | None = None
        # In the order in which they were found.
        self._gaps: list[_Gap] = []
        self._turn = 0
        # Which bills were dropped, as of the latest look.
        self._dropped: dict[str, DroppedNumbers] = {}
        self._scopes_of: dict[tuple[str, str | None, str | None], tuple[BudgetScope, ...]] = {}

    def serves(self, budgets: Iterable[Budget], first_hour: int) -> bool:
        """Tell whether all that these budgets need from an hour on is counted."""
        scopes = (budget.scope for budget in budgets)
        return first_hour >= self.first_hour and all(scope in self._budgets for scope in scopes)

    def run_ids(self) -> Collection[str]:
        """Return the runs with bills that were looked at."""
        return (self._upto or {}).keys()

    def of(self, budget: Budget) -> Spent:
        """Return what a budget's bills are charged for. The caller must not change it."""
        return self._sums.get(budget.scope, {})

    def has(self, run_id: str, seq: int) -> bool:
        """Return whether a bill was counted, or lies before all that counts."""
        if not self._budgets:
            return True
        if self._upto is None or seq > self._upto.get(run_id, 0):
            return False
        return not any(
            gap.run_id == run_id and gap.first <= seq <= gap.last for gap in reversed(self._gaps)
        )

    def covering(self, owner: Owner) -> tuple[BudgetScope, ...]:
        """Return what an owner's use counts for."""
        return tuple(scope for scope, budget in self._budgets.items() if budget.covers(owner))

    def scopes_of(
        self, tenant: str, above: str | None, tags: str | None
    ) -> tuple[BudgetScope, ...]:
        """Return what an owner's use counts for, by the texts of its row."""
        key = (tenant, above, tags)
        found = self._scopes_of.get(key)
        if found is None:
            if len(self._scopes_of) >= _OWNERS_KEPT:
                self._scopes_of.clear()
            found = self.covering(Owner.stored(tenant, above, tags))
            self._scopes_of[key] = found
        return found

    def forget_before(self, hour: int) -> None:
        """Drop the hours before this one, which no period needs any more."""
        if hour <= self.first_hour:
            return
        self.first_hour = hour
        for by_run in self._sums.values():
            for run_id, hours in list(by_run.items()):
                left = {each: used for each, used in hours.items() if each >= hour}
                if left:
                    by_run[run_id] = left
                else:
                    del by_run[run_id]

    def advance(self, connection: Connection) -> None:
        """Count the bills that are new.

        The connection must see one state of the ledger throughout.
        """
        if not self._budgets:
            return
        highest = highest_bills(connection)
        dropped = dropped_by_run(connection)
        if self._upto is None or self._missed(self._upto, dropped):
            self._begin(connection, highest)
            self._dropped = dropped
            return
        self._dropped = dropped
        for run_id, top in highest.items():
            upto = self._upto.get(run_id, 0)
            while upto < top:
                last = min(top, upto + _BILLS_AT_ONCE)
                self._count(connection, run_id, upto + 1, last)
                self._upto[run_id] = upto = last
        self._look_into_gaps(connection)

    def _missed(self, upto: Mapping[str, int], dropped: Mapping[str, DroppedNumbers]) -> bool:
        """Return whether a bill was dropped before it was counted."""
        for run_id, numbers in dropped.items():
            before = self._dropped.get(run_id, DroppedNumbers())
            if numbers == before:
                continue
            if numbers.last_seq > max(upto.get(run_id, 0), before.last_seq):
                return True
            new = without(numbers.ranges(), before.ranges())
            gaps = joined((gap.first, gap.last) for gap in self._gaps if gap.run_id == run_id)
            if without(new, gaps) != new:
                return True
        return False

    def _begin(self, connection: Connection, highest: Mapping[str, int]) -> None:
        """Take what the sums by hour have, which is that of all bills up to the highest ones.

        A number that is missing before those is a gap only if its run has time in the hours that
        count: a bill that comes late was used no later than those with higher numbers.
        """
        g, h = rollup_groups.c, rollup_hours.c
        scopes_of, run_of = {}, {}
        for id, run_id, *owner in connection.execute(
            select(g.group_id, g.run_id, g.tenant, g.tenant_above, g.tags)
        ):
            run_of[id], scopes_of[id] = run_id, self.scopes_of(*owner)
        sums: dict[BudgetScope, Spent] = {scope: {} for scope in self._budgets}
        used = select(h.group_id, h.hour, h.prefill_ns + h.decode_ns, h.kv_block_ms)
        used = used.join(rollup_groups, g.group_id == h.group_id)
        recent = set()
        for id, hour, ns, block_ms in connection.execute(used.where(h.hour >= self.first_hour)):
            run_id = run_of[id]
            recent.add(run_id)
            for scope in scopes_of[id]:
                hours = sums[scope].setdefault(run_id, {})
                hours[hour] = hours.get(hour, NO_QUANTITIES) + Quantities(ns, block_ms)
        gaps = [
            _Gap(run_id, *numbers)
            for run_id in _runs_with_gaps(connection)
            if run_id in recent
            for numbers in missing_numbers(connection, run_id, highest[run_id])
        ]
        self._sums, self._gaps, self._upto = sums, gaps, dict(highest)

    def _count(self, connection: Connection, run_id: str, first: int, last: int) -> None:
        """Count the bills of a run in a range of numbers; what is missing there becomes gaps."""
        expected = first
        bounds = {"run_id": run_id, "first": first, "last": last}
        # All rows are read before the first is added: a read that fails half way adds nothing.
        for seq, *rest in connection.execute(_BILLS, bounds).all():
            if seq > expected:
                self._gaps.append(_Gap(run_id, expected, seq - 1))
            expected = seq + 1
            self._add(run_id, *rest)
        if expected <= last:
            self._gaps.append(_Gap(run_id, expected, last))

    def _look_into_gaps(self, connection: Connection) -> None:
        places = self._places_to_look_at()
        if not places:
            return
        found: dict[int, set[int]] = {}
        rows = [(place, *self._gaps[place]) for place in places]
        for place, seq, *rest in connection.execute(_bills_in(rows)).all():
            if seq is not None:
                found.setdefault(place, set()).add(seq)
                self._add(self._gaps[place].run_id, *rest)
        if found:
            self._gaps = [
                left
                for place, gap in enumerate(self._gaps)
                for left in (_without(gap, sorted(found[place])) if place in found else (gap,))
            ]

    def _places_to_look_at(self) -> Sequence[int]:
        """Return the places of the gaps to look at in this call."""
        count = len(self._gaps)
        if count <= GAPS_AT_ONCE:
            return range(count)
        older = count - GAPS_AT_ONCE // 2
        start = self._turn % older
        some = [(start + n) % older for n in range(min(GAPS_AT_ONCE // 2, older))]
        self._turn = start + len(some)
        return [*some, *range(older, count)]

    def _add(
        self,
        run_id: str,
        tenant: str,
        above: str | None,
        tags: str | None,
        hour: int | None,
        gpu_time_ns: int | None,
        kv_block_ms: int | None,
    ) -> None:
        """Add one piece of a bill; a bill without a piece has neither an hour nor amounts."""
        if hour is None or gpu_time_ns is None or kv_block_ms is None or hour < self.first_hour:
            return
        used = Quantities(gpu_time_ns, kv_block_ms)
        for scope in self.scopes_of(tenant, above, tags):
            hours = self._sums[scope].setdefault(run_id, {})
            hours[hour] = hours.get(hour, NO_QUANTITIES) + used


_r = requests.c
_PIECE = (_r.tenant, _r.tenant_above, _r.tags, PIECE_HOUR, PIECE_NS, piece_amount("kv_block_ms"))
_BILLS = (
    select(_r.seq, *_PIECE)
    .select_from(with_pieces())
    .where(
        _r.run_id == bindparam("run_id", type_=Text),
        _r.seq.between(bindparam("first", type_=BigInteger), bindparam("last", type_=BigInteger)),
    )
    .order_by(_r.seq)
)


def _bills_in(rows: Sequence[tuple[int, str, int, int]]) -> Any:
    """Return the query for the bills in gaps, each with the place of its gap.

    The outer join has every gap looked up in the key of the bills, and none of the bills read
    otherwise. A gap without a bill has a row without a number.
    """
    columns: list[GivenColumn] = [("place", Integer()), ("run_id", Text())]
    columns += [("first", BigInteger()), ("last", BigInteger())]
    at = given_rows("gap", columns, rows).c
    inside = and_(_r.run_id == at.run_id, _r.seq.between(at.first, at.last))
    return (
        select(at.place, _r.seq, *_PIECE)
        .join(requests, inside, isouter=True)
        .join(usage_pieces, PIECES_OF_BILL, isouter=True)
    )


def _runs_with_gaps(connection: Connection) -> list[str]:
    """Return the runs that have fewer bills than their highest number says."""
    s = bill_sums.c
    return list(connection.execute(select(s.run_id).where(s.bills < s.last_seq)).scalars())


def _without(gap: _Gap, found: Sequence[int]) -> Iterable[_Gap]:
    """Yield what is left of a gap in which these numbers, in order, were found."""
    first = gap.first
    for seq in found:
        if seq > first:
            yield gap._replace(first=first, last=seq - 1)
        first = seq + 1
    if first <= gap.last:
        yield gap._replace(first=first)
