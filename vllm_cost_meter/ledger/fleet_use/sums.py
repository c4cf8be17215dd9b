"""What all senders of a fleet have used of each budget in its period, by source, kept up to date.

A look at budgets is made each second, and a fleet has many hours of many runs. So hours of one
price are added up once, and what is new is added to that. A budget whose period or prices have
changed is added up anew, from the kept figures. A rolling period loses an hour each hour, so its
hours are kept apart as well.

Invariant: the sums of a budget are what the kept figures have of it in its period.
"""

from bisect import bisect_right
from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field

from vllm_cost_meter.ledger.fleet_use.kept import KeptUse, Use
from vllm_cost_meter.ledger.fleet_use.running import OwnerTexts
from vllm_cost_meter.prices.cost import NO_QUANTITIES, Quantities
from vllm_cost_meter.records.owner import Owner
from vllm_cost_meter.tenants.budgets import Budget

# Of each source what was used, by hour or by the first hour of those of one price.
BySource = dict[int, dict[int, Quantities]]


@dataclass(eq=False)
class _Sums:
    """The sums of one budget: of its `hours` (first, hour after the last), between `changes`."""

    budget: Budget
    hours: tuple[int, int]
    changes: Sequence[int]
    # By hour, for a rolling period only.
    by_hour: BySource = field(default_factory=dict)
    # By stretch of one price: its first hour with any use, and the use.
    _stretches: dict[int, dict[int, tuple[int, Quantities]]] = field(default_factory=dict)

    def add(self, use: Use) -> None:
        first, after = self.hours
        is_rolling = self.budget.period == "rolling"
        # On a machine whose clock is ahead, it was used too.
        if use.hour < first or (use.hour >= after and not is_rolling):
            return
        used = Quantities(use.gpu_time_ns, use.kv_block_ms)
        self._add(use.source, use.hour, used)
        if is_rolling:
            hours = self.by_hour.setdefault(use.source, {})
            hours[use.hour] = hours.get(use.hour, NO_QUANTITIES) + used

    def _add(self, source: int, hour: int, used: Quantities) -> None:
        stretches = self._stretches.setdefault(source, {})
        stretch = bisect_right(self.changes, hour)
        first, before = stretches.get(stretch, (hour, NO_QUANTITIES))
        stretches[stretch] = min(first, hour), before + used

    def by_stretch(self) -> Iterator[tuple[int, dict[int, Quantities]]]:
        """Yield what each source has in the period, by the first hours of stretches."""
        for source, stretches in self._stretches.items():
            yield source, dict(stretches.values())

    def may_move(self, hours: tuple[int, int]) -> bool:
        """Return whether nothing that it lacks counts in these hours."""
        return self.budget.period == "rolling" and self.hours[0] <= hours[0] != self.hours[0]

    def move(self, hours: tuple[int, int]) -> None:
        """Have a rolling period begin later."""
        self.hours = hours
        by_hour, self.by_hour, self._stretches = self.by_hour, {}, {}
        for source, of_source in by_hour.items():
            left = {hour: used for hour, used in of_source.items() if hour >= hours[0]}
            self.by_hour[source] = left
            for hour, used in left.items():
                self._add(source, hour, used)


class FleetSums:
    """The sums of the budgets that were asked for last."""

    def __init__(self, kept: KeptUse) -> None:
        self._kept = kept
        self._sums: dict[Budget, _Sums] = {}
        # Which of them cover an owner, by the owner's number.
        self._covering: dict[int, list[_Sums]] = {}

    def add(self, uses: Iterable[Use] | None) -> None:
        """Add what a look added; None if it replaced what was there."""
        if uses is None:
            self._sums, self._covering = {}, {}
            return
        for use in uses:
            for sums in self._of_owner(use.owner):
                sums.add(use)

    def bring_up_to(
        self, budgets: Sequence[Budget], changes: Sequence[int], now_ns: int
    ) -> Mapping[Budget, _Sums]:
        """Return the sums of these budgets in their present periods. Raises LedgerError."""
        new = []
        found: dict[Budget, _Sums] = {}
        for budget in budgets:
            hours = budget.hours(now_ns)
            sums = self._sums.get(budget)
            if sums is not None and sums.may_move(hours):
                sums.move(hours)
            if sums is None or sums.changes != changes or sums.hours != hours:
                sums = _Sums(budget, hours, changes)
                new.append(sums)
            found[budget] = sums
        if found != self._sums or new:
            self._sums, self._covering = found, {}
        if new:
            self._add_up(new)
        return found

    def _add_up(self, new: Sequence[_Sums]) -> None:
        covering: dict[int, list[_Sums]] = {}
        for use in self._kept.uses(min(sums.hours[0] for sums in new)):
            if use.owner not in covering:
                covering[use.owner] = _covering(new, self._kept.owners[use.owner])
            for sums in covering[use.owner]:
                sums.add(use)

    def _of_owner(self, owner: int) -> list[_Sums]:
        if owner not in self._covering:
            self._covering[owner] = _covering(self._sums.values(), self._kept.owners[owner])
        return self._covering[owner]


def _covering(sums: Iterable[_Sums], texts: OwnerTexts) -> list[_Sums]:
    owner = Owner.stored(*texts)
    return [each for each in sums if each.budget.covers(owner)]
