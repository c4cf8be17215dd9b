"""Read and write a provider's readings, invoice lines and billed hours as ledger rows.

A file names little beside the facts that years of imports left. So nothing here reads all facts for
a resource: each query takes a span of time, and the index on the key finds it. `Spans` holds such a
span for each resource: [low, high] in nanoseconds since the epoch.

Invariant: a fact is read as it was written, and every fact in a span is read.
"""

from collections.abc import Iterable, Iterator, Mapping, Sequence
from itertools import islice
from typing import Any

from sqlalchemy import (
    CTE,
    BigInteger,
    ColumnElement,
    Select,
    Table,
    Text,
    and_,
    func,
    select,
)
from sqlalchemy.engine import Connection

from vllm_cost_meter.invoices.timeline import BilledHour, InvoiceLine, Reading
from vllm_cost_meter.ledger import schema
from vllm_cost_meter.ledger.tables.given import given_rows
from vllm_cost_meter.units.time import NS_PER_HOUR, rfc3339, unix_ns_of

BilledMeter = tuple[str, str]
Spans = Mapping[str, tuple[int, int]]
# Resources per query: SQLite takes 32,766 values, and each resource needs three.
_CHUNK = 2_000

_SAME_NAMES = ("invoice", "item", "charge_class", "kind", "nanousd")


def span_of(fact: Reading | InvoiceLine) -> tuple[int, int]:
    """Return a fact's first and last instant in ns; for a reading both are its instant."""
    if isinstance(fact, InvoiceLine):
        return fact.from_ns, fact.to_ns
    return fact.at_ns, fact.at_ns


def spans_of(facts: Iterable[Reading | InvoiceLine]) -> Spans:
    """Return, by resource, the span that its facts take."""
    found: dict[str, tuple[int, int]] = {}
    for fact in facts:
        low, high = span_of(fact)
        known = found.get(fact.resource, (low, high))
        found[fact.resource] = min(known[0], low), max(known[1], high)
    return found


def spans_of_hours(hours: Mapping[str, range]) -> Spans:
    """Return, by resource, the span that its hours take."""
    return {
        resource: (of.start * NS_PER_HOUR, of.stop * NS_PER_HOUR) for resource, of in hours.items()
    }


def widened(connection: Connection, spans: Spans) -> Spans:
    """Return each span, widened to the last reading before it and the first one after it."""
    s = schema.billing_snapshots.c
    found = {}
    for of in _tables(_texts(spans)):
        is_its = s.resource == of.c.resource
        before = select(func.max(s.taken_at)).where(is_its, s.taken_at < of.c.low)
        after = select(func.min(s.taken_at)).where(is_its, s.taken_at > of.c.high)
        asked = select(
            of.c.resource,
            func.coalesce(before.scalar_subquery(), of.c.low),
            func.coalesce(after.scalar_subquery(), of.c.high),
        )
        for resource, low, high in connection.execute(asked):
            found[resource] = unix_ns_of(low), unix_ns_of(high)
    return found


def kinds_read(connection: Connection, spans: Spans) -> dict[str, str]:
    """Return each resource's kind as its readings say; a resource without readings is left out."""
    s = schema.billing_snapshots.c
    found: dict[str, str] = {}
    for of in _tables(_texts(spans)):
        # Imports refuse a second kind for a resource, so any reading will do.
        kind = select(s.kind).where(s.resource == of.c.resource).limit(1).scalar_subquery()
        rows = connection.execute(select(of.c.resource, kind))
        found |= {resource: its for resource, its in rows if its is not None}
    return found


def readings_in(connection: Connection, spans: Spans) -> Iterator[Reading]:
    """Yield the readings in these spans, both ends included."""
    table = schema.billing_snapshots
    s = table.c
    for of in _tables(_texts(spans)):
        lies_in = (s.resource == of.c.resource, s.taken_at >= of.c.low, s.taken_at <= of.c.high)
        for row in connection.execute(_joined(of, table, lies_in)):
            amounts = (row.cumulative_nanousd, row.nanousd_per_hour)
            yield Reading(row.resource, row.kind, unix_ns_of(row.taken_at), *amounts)


def lines_in(connection: Connection, spans: Spans) -> Iterator[InvoiceLine]:
    """Yield the lines that overlap these spans."""
    table = schema.invoice_lines
    i = table.c
    for of in _tables(_texts(spans)):
        overlaps = (i.resource == of.c.resource, i.begins_at < of.c.high, i.ends_at > of.c.low)
        for row in connection.execute(_joined(of, table, overlaps)):
            yield InvoiceLine(
                *(row.resource, row.kind, unix_ns_of(row.begins_at), unix_ns_of(row.ends_at)),
                *(row.nanousd, row.invoice, row.item, row.charge_class),
            )


def hours_in(
    connection: Connection, hours: Mapping[str, range]
) -> Iterator[tuple[BilledMeter, BilledHour]]:
    """Yield the billed hours among these hours, each with its meter."""
    table = schema.billed_hours
    b = table.c
    bounds = {resource: (of.start, of.stop) for resource, of in hours.items()}
    for of in _tables(bounds, BigInteger()):
        lies_in = (b.resource == of.c.resource, b.hour >= of.c.low, b.hour < of.c.high)
        for resource, kind, *amounts in connection.execute(_joined(of, table, lies_in)):
            yield (resource, kind), BilledHour(*amounts)


def reading_row(reading: Reading) -> dict[str, Any]:
    """Return the ledger row for a reading, without the columns about its import."""
    return {
        "resource": reading.resource,
        "taken_at": rfc3339(reading.at_ns),
        "kind": reading.kind,
        "cumulative_nanousd": reading.cumulative_nanousd,
        "nanousd_per_hour": reading.nanousd_per_hour,
    }


def line_row(line: InvoiceLine) -> dict[str, Any]:
    """Return the ledger row for an invoice line, without the columns about its import."""
    return {
        "resource": line.resource,
        "begins_at": rfc3339(line.from_ns),
        "ends_at": rfc3339(line.to_ns),
        **{name: getattr(line, name) for name in _SAME_NAMES},
    }


def hour_row(meter: BilledMeter, hour: BilledHour) -> dict[str, Any]:
    """Return the ledger row for a meter's billed hour."""
    return {"resource": meter[0], "kind": meter[1], **hour._asdict()}


def _texts(spans: Spans) -> dict[str, tuple[str, str]]:
    return {resource: (rfc3339(low), rfc3339(high)) for resource, (low, high) in spans.items()}


def _tables(
    bounds: Mapping[str, tuple[Any, Any]], of_type: Text | BigInteger | None = None
) -> Iterator[CTE]:
    """Yield the bounds as tables (resource, low, high) for a join."""
    of_type = of_type or Text()
    columns = [("resource", Text()), ("low", of_type), ("high", of_type)]
    rows = ((resource, low, high) for resource, (low, high) in bounds.items())
    while chunk := list(islice(rows, _CHUNK)):
        yield given_rows("asked", columns, chunk)


def _joined(of: CTE, table: Table, those: Sequence[ColumnElement[bool]]) -> Select[Any]:
    return select(table).join_from(of, table, and_(*those))
