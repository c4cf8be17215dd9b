"""The change that an import makes: new facts, and the billed hours that follow from them.

A new line or reading re-splits the interval between two readings into which it falls, and the hours
in an interval are rounded together. So only hours between the last reading before the file's facts
and the first reading after them can change. They are computed from all facts that reach into them.
Lines cut the readings around them too, so the lines around those readings count as well.

Invariant: the hours equal, row for row, a computation from all facts in the ledger.
"""

from collections import defaultdict
from collections.abc import Iterable, Iterator, Mapping
from dataclasses import dataclass
from typing import Any, TypeVar

from sqlalchemy.engine import Connection

from vllm_cost_meter.invoices.files import InvoiceFile
from vllm_cost_meter.invoices.timeline import (
    BilledHour,
    InvoiceLine,
    Reading,
    Stretch,
    billed_hours,
    hours_between,
    hours_of,
    stretches,
)
from vllm_cost_meter.ledger.billing.facts import (
    BilledMeter,
    hours_in,
    kinds_read,
    lines_in,
    readings_in,
    spans_of,
    spans_of_hours,
    widened,
)
from vllm_cost_meter.units.money import format_usd
from vllm_cost_meter.units.time import rfc3339

# Limit per import: computing hours costs memory and time. No server waits for it.
HOURS_MAX = 1_000_000
# Limit per import on rows written or removed. A server's bills wait for them, about a second
# (benchmarks/bench_invoices.py).
ROWS_MAX = 200_000
# An import gives up after so many other imports came between.
ATTEMPTS = 10


@dataclass(frozen=True, slots=True)
class ImportLimits:
    """What one import may compute and write, and how often others may come between."""

    hours: int = HOURS_MAX
    rows: int = ROWS_MAX
    attempts: int = ATTEMPTS


LIMITS = ImportLimits()

Fact = TypeVar("Fact", Reading, InvoiceLine)
BilledHours = dict[BilledMeter, dict[int, BilledHour]]


@dataclass(frozen=True, slots=True)
class Change:
    """The change that an import makes: new facts, and hours that `come` and that are `gone`.

    `unobserved` lists the unobserved times in the computed hours.
    """

    readings: list[Reading]
    lines: list[InvoiceLine]
    gone: list[tuple[BilledMeter, BilledHour]]
    come: list[tuple[BilledMeter, BilledHour]]
    unobserved: list[dict[str, Any]]

    @property
    def rows(self) -> int:
        """The number of rows to write and to remove."""
        return len(self.readings) + len(self.lines) + len(self.gone) + len(self.come)


def change_of(
    connection: Connection, file: InvoiceFile, gap_ns: int, limits: ImportLimits = LIMITS
) -> Change:
    """Return the change that a file makes in a ledger. This writes nothing.

    Raises ValueError for a fact that contradicts the ledger, and for too many hours or rows.
    """
    spans = spans_of([*file.readings, *file.lines])
    _refuse_another_kind(file.readings, kinds_read(connection, spans))
    hours = {
        resource: hours_between(*span) for resource, span in widened(connection, spans).items()
    }
    around = widened(connection, spans_of_hours(hours))
    known_readings = {one.key: one for one in readings_in(connection, around)}
    known_lines = {one.key: one for one in lines_in(connection, around)}
    new_readings = _new(file.readings, known_readings)
    new_lines = _new(file.lines, known_lines)
    found = _stretches(
        [*known_readings.values(), *new_readings], [*known_lines.values(), *new_lines], gap_ns
    )
    _refuse_too_many(file.name, found, hours, limits.hours)
    computed: BilledHours = {
        meter: {hour.hour: hour for hour in billed_hours(pieces, hours[meter[0]])}
        for meter, pieces in found.items()
    }
    there: BilledHours = defaultdict(dict)
    for meter, hour in hours_in(connection, hours):
        there[meter][hour.hour] = hour
    change = Change(
        new_readings,
        new_lines,
        list(_only_in(there, computed)),
        list(_only_in(computed, there)),
        list(_unobserved(found, hours)),
    )
    if change.rows > limits.rows:
        raise _too_many(file.name, limits.rows, "rows of facts and of hours to write", change.rows)
    return change


def _only_in(some: BilledHours, others: BilledHours) -> Iterator[tuple[BilledMeter, BilledHour]]:
    """Yield, by key, the hours that the others lack or have with other amounts."""
    for meter, of in sorted(some.items()):
        known = others.get(meter, {})
        yield from ((meter, hour) for at, hour in sorted(of.items()) if known.get(at) != hour)


def _new(given: Mapping[Fact, str], known: Mapping[tuple[Any, ...], Fact]) -> list[Fact]:
    """Return the facts that the ledger lacks. Raises ValueError for one that contradicts it."""
    found = []
    for fact, where in given.items():
        there = known.get(fact.key)
        if there is None:
            found.append(fact)
        elif there != fact:
            raise ValueError(
                f"{where}: {fact.resource!r} at {rfc3339(fact.key[1])}: expected"
                f" {_amount(there)}, as the ledger has it, got {_amount(fact)}"
            )
    # Rows in key order let the table grow page by page.
    return sorted(found, key=lambda fact: fact.key)


def _amount(fact: Reading | InvoiceLine) -> str:
    if isinstance(fact, InvoiceLine):
        return f"{format_usd(fact.nanousd)} USD of {fact.kind}"
    if fact.cumulative_nanousd is not None:
        return f"{format_usd(fact.cumulative_nanousd)} USD of {fact.kind} so far"
    return f"{format_usd(fact.nanousd_per_hour)} USD of {fact.kind} per hour"


def _refuse_another_kind(given: Mapping[Reading, str], kinds: Mapping[str, str]) -> None:
    """Raise ValueError for a resource with readings of another kind: it would count twice."""
    for reading, where in given.items():
        if (kind := kinds.get(reading.resource, reading.kind)) != reading.kind:
            raise ValueError(
                f"{where}: kind of {reading.resource!r}: expected {kind}, as the ledger has it,"
                f" got {reading.kind}"
            )


def _stretches(
    readings: Iterable[Reading], lines: Iterable[InvoiceLine], gap_ns: int
) -> dict[BilledMeter, list[Stretch]]:
    facts: dict[BilledMeter, tuple[list[Reading], list[InvoiceLine]]]
    facts = defaultdict(lambda: ([], []))
    for reading in readings:
        facts[reading.resource, reading.kind][0].append(reading)
    for line in lines:
        facts[line.resource, line.kind][1].append(line)
    return {meter: stretches(*facts[meter], gap_ns) for meter in sorted(facts)}


def _refuse_too_many(
    name: str, found: Mapping[BilledMeter, list[Stretch]], hours: Mapping[str, range], most: int
) -> None:
    """Raise ValueError for more hours than one import may compute."""
    count = sum(
        len(hours_of(piece, hours[resource]))
        for (resource, _), pieces in found.items()
        for piece in pieces
    )
    if count > most:
        raise _too_many(name, most, "hours x charges to compute", count)


def _too_many(name: str, most: int, what: str, count: int) -> ValueError:
    return ValueError(
        f"{name}: expected at most {most:,} {what}, got {count:,}: ignore resources of other"
        " deployments, or import the file in parts"
    )


def _unobserved(
    found: Mapping[BilledMeter, list[Stretch]], hours: Mapping[str, range]
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
