"""What an import changes: the facts that are new, and the hours that follow from them.

A new line or reading re-splits the interval between two readings that it falls into, and the hours
of an interval are rounded together. So of a resource those hours can change which lie between the
last reading before the file's facts and the first after them, and no other: they are computed from
all facts that reach into them. Readings around them are cut by lines on both sides as ever, so the
lines around these count too.

Invariant: the hours are those that a computation from all facts gives, row for row.
"""

from collections import defaultdict
from collections.abc import Iterable, Iterator, Mapping
from dataclasses import dataclass
from typing import Any, TypeVar

from sqlalchemy.engine import Connection

from vllm_cost_meter.invoices.files import InvoiceFile
from vllm_cost_meter.invoices.timeline import (
    BilledHour,
    BillingSnapshot,
    InvoiceLine,
    Stretch,
    billed_hours,
    hours_between,
    hours_of,
    stretches,
)
from vllm_cost_meter.ledger.billing.facts import (
    Meter,
    hours_in,
    kinds_read,
    lines_in,
    snapshots_in,
    spans_of,
    spans_of_hours,
    widened,
)
from vllm_cost_meter.units.money import format_usd
from vllm_cost_meter.units.time import rfc3339

# Of one import. What is computed takes time and memory, and nobody waits for it.
HOURS_MAX = 1_000_000
# What is written or removed: for these a server's bills wait, about a second; measured by
# benchmarks/bench_invoices.py.
ROWS_MAX = 200_000

Fact = TypeVar("Fact", BillingSnapshot, InvoiceLine)
Hours = dict[Meter, dict[int, BilledHour]]


@dataclass(frozen=True, slots=True)
class Change:
    """What an import brings into a ledger: facts, and hours in place of those that are `gone`.

    `unobserved` are the times that nobody observed in the hours that were computed.
    """

    snapshots: list[BillingSnapshot]
    lines: list[InvoiceLine]
    gone: list[tuple[Meter, BilledHour]]
    come: list[tuple[Meter, BilledHour]]
    unobserved: list[dict[str, Any]]

    @property
    def rows(self) -> int:
        """How many rows are written or removed."""
        return len(self.snapshots) + len(self.lines) + len(self.gone) + len(self.come)


def change_of(connection: Connection, file: InvoiceFile, gap_ns: int) -> Change:
    """Return what a file changes in a ledger; nothing is written.

    Raises ValueError for a fact that contradicts the ledger and for too many hours.
    """
    spans = spans_of([*file.snapshots, *file.lines])
    _refuse_another_kind(file.snapshots, kinds_read(connection, spans))
    hours = {
        resource: hours_between(*span) for resource, span in widened(connection, spans).items()
    }
    around = widened(connection, spans_of_hours(hours))
    known_snapshots = {one.key: one for one in snapshots_in(connection, around)}
    known_lines = {one.key: one for one in lines_in(connection, around)}
    new_snapshots = _new(file.snapshots, known_snapshots)
    new_lines = _new(file.lines, known_lines)
    found = _stretches(
        [*known_snapshots.values(), *new_snapshots], [*known_lines.values(), *new_lines], gap_ns
    )
    _refuse_too_many(file.name, found, hours)
    computed: Hours = {
        meter: {hour.hour: hour for hour in billed_hours(pieces, hours[meter[0]])}
        for meter, pieces in found.items()
    }
    there: Hours = defaultdict(dict)
    for meter, hour in hours_in(connection, hours):
        there[meter][hour.hour] = hour
    change = Change(
        new_snapshots,
        new_lines,
        list(_only_in(there, computed)),
        list(_only_in(computed, there)),
        list(_unobserved(found, hours)),
    )
    if change.rows > ROWS_MAX:
        raise _too_many(file.name, ROWS_MAX, "rows of facts and of hours to write", change.rows)
    return change


def _only_in(some: Hours, others: Hours) -> Iterator[tuple[Meter, BilledHour]]:
    """Yield the hours that the others do not have, or have otherwise, in the order of their key."""
    for meter, of in sorted(some.items()):
        known = others.get(meter, {})
        yield from ((meter, hour) for at, hour in sorted(of.items()) if known.get(at) != hour)


def _new(told: Mapping[Fact, str], known: Mapping[tuple[Any, ...], Fact]) -> list[Fact]:
    """Return the facts that are not there yet. Raises ValueError for one that is otherwise."""
    found = []
    for fact, where in told.items():
        there = known.get(fact.key)
        if there is None:
            found.append(fact)
        elif there != fact:
            raise ValueError(
                f"{where}: {fact.resource!r} at {rfc3339(fact.key[1])}: expected"
                f" {_amount(there)}, as the ledger has it, got {_amount(fact)}"
            )
    # In the order of the key a table grows page by page.
    return sorted(found, key=lambda fact: fact.key)


def _amount(fact: BillingSnapshot | InvoiceLine) -> str:
    if isinstance(fact, InvoiceLine):
        return f"{format_usd(fact.nanousd)} USD of {fact.kind}"
    if fact.cumulative_nanousd is not None:
        return f"{format_usd(fact.cumulative_nanousd)} USD of {fact.kind} so far"
    return f"{format_usd(fact.nanousd_per_hour)} USD of {fact.kind} per hour"


def _refuse_another_kind(told: Mapping[BillingSnapshot, str], kinds: Mapping[str, str]) -> None:
    """Raise ValueError for a counter that was one of another kind: it would count twice."""
    for snapshot, where in told.items():
        if (kind := kinds.get(snapshot.resource, snapshot.kind)) != snapshot.kind:
            raise ValueError(
                f"{where}: kind of {snapshot.resource!r}: expected {kind}, as the ledger has it,"
                f" got {snapshot.kind}"
            )


def _stretches(
    snapshots: Iterable[BillingSnapshot], lines: Iterable[InvoiceLine], gap_ns: int
) -> dict[Meter, list[Stretch]]:
    facts: dict[Meter, tuple[list[BillingSnapshot], list[InvoiceLine]]]
    facts = defaultdict(lambda: ([], []))
    for snapshot in snapshots:
        facts[snapshot.resource, snapshot.kind][0].append(snapshot)
    for line in lines:
        facts[line.resource, line.kind][1].append(line)
    return {meter: stretches(*facts[meter], gap_ns) for meter in sorted(facts)}


def _refuse_too_many(
    name: str, found: Mapping[Meter, list[Stretch]], hours: Mapping[str, range]
) -> None:
    """Raise ValueError for more hours than may be computed at once."""
    count = sum(
        len(hours_of(piece, hours[resource]))
        for (resource, _), pieces in found.items()
        for piece in pieces
    )
    if count > HOURS_MAX:
        raise _too_many(name, HOURS_MAX, "hours x charges to compute", count)


def _too_many(name: str, most: int, what: str, count: int) -> ValueError:
    return ValueError(
        f"{name}: expected at most {most:,} {what}, got {count:,}: ignore what is not of this"
        " deployment, or import it in parts"
    )


def _unobserved(
    found: Mapping[Meter, list[Stretch]], hours: Mapping[str, range]
) -> Iterator[dict[str, Any]]:
    for (resource, kind), pieces in found.items():
        for piece in pieces:
            if piece.unobserved is not None and hours_of(piece, hours[resource]):
                yield {
                    "resource": resource,
                    "kind": kind,
                    "from": rfc3339(piece.from_ns),
                    "to": rfc3339(piece.to_ns),
                    "reason": piece.unobserved,
                }
