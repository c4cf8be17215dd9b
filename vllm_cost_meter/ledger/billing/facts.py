"""Facts of a provider's bills as rows of the ledger, read for the time that an import touches.

What a file names is little beside what years of imports left, so nothing here reads all facts of a
resource: each is asked for the span of time that matters, by the index of its key. `Spans` has such
a span, [low, high] in nanoseconds since the epoch, for each resource.

Invariant: a fact that was written is read as it was; all that lies in a span is read.
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
    column,
    func,
    select,
    values,
)
from sqlalchemy.engine import Connection

from vllm_cost_meter.invoices.timeline import BilledHour, BillingSnapshot, InvoiceLine
from vllm_cost_meter.ledger import schema
from vllm_cost_meter.units.time import NS_PER_HOUR, rfc3339, unix_ns_of

Meter = tuple[str, str]
Spans = Mapping[str, tuple[int, int]]
# Resources that are asked for at once: SQLite takes 32,766 values, three for each.
_CHUNK = 2_000

_SAME_NAMES = ("invoice", "item", "charge_class", "kind", "nanousd")


def span_of(fact: BillingSnapshot | InvoiceLine) -> tuple[int, int]:
    """Return from when to when a fact is; of a reading both are its instant."""
    if isinstance(fact, InvoiceLine):
        return fact.from_ns, fact.to_ns
    return fact.at_ns, fact.at_ns


def spans_of(facts: Iterable[BillingSnapshot | InvoiceLine]) -> Spans:
    """Return from when to when there are facts, by resource."""
    found: dict[str, tuple[int, int]] = {}
    for fact in facts:
        low, high = span_of(fact)
        known = found.get(fact.resource, (low, high))
        found[fact.resource] = min(known[0], low), max(known[1], high)
    return found


def spans_of_hours(hours: Mapping[str, range]) -> Spans:
    """Return the time that hours take, by resource."""
    return {
        resource: (of.start * NS_PER_HOUR, of.stop * NS_PER_HOUR) for resource, of in hours.items()
    }


def widened(connection: Connection, spans: Spans) -> Spans:
    """Return each span from the last reading before it to the first one after it, if any."""
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
    """Return the kind of which each resource's counter is; resources without one are left out."""
    s = schema.billing_snapshots.c
    found: dict[str, str] = {}
    for of in _tables(_texts(spans)):
        # Imports see to it that a resource has readings of one kind: any will do.
        kind = select(s.kind).where(s.resource == of.c.resource).limit(1).scalar_subquery()
        told = connection.execute(select(of.c.resource, kind))
        found |= {resource: its for resource, its in told if its is not None}
    return found


def snapshots_in(connection: Connection, spans: Spans) -> Iterator[BillingSnapshot]:
    """Yield the readings in these spans, both ends included."""
    table = schema.billing_snapshots
    s = table.c
    for of in _tables(_texts(spans)):
        lies_in = (s.resource == of.c.resource, s.taken_at >= of.c.low, s.taken_at <= of.c.high)
        for row in connection.execute(_joined(of, table, lies_in)):
            amounts = (row.cumulative_nanousd, row.nanousd_per_hour)
            yield BillingSnapshot(row.resource, row.kind, unix_ns_of(row.taken_at), *amounts)


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
) -> Iterator[tuple[Meter, BilledHour]]:
    """Yield what is billed in these hours of each resource."""
    table = schema.billed_hours
    b = table.c
    bounds = {resource: (of.start, of.stop) for resource, of in hours.items()}
    for of in _tables(bounds, BigInteger()):
        lies_in = (b.resource == of.c.resource, b.hour >= of.c.low, b.hour < of.c.high)
        for resource, kind, *told in connection.execute(_joined(of, table, lies_in)):
            yield (resource, kind), BilledHour(*told)


def snapshot_row(snapshot: BillingSnapshot) -> dict[str, Any]:
    """Return the row of a reading, without what is told of its import."""
    return {
        "resource": snapshot.resource,
        "taken_at": rfc3339(snapshot.at_ns),
        "kind": snapshot.kind,
        "cumulative_nanousd": snapshot.cumulative_nanousd,
        "nanousd_per_hour": snapshot.nanousd_per_hour,
    }


def line_row(line: InvoiceLine) -> dict[str, Any]:
    """Return the row of a line, without what is told of its import."""
    return {
        "resource": line.resource,
        "begins_at": rfc3339(line.from_ns),
        "ends_at": rfc3339(line.to_ns),
        **{name: getattr(line, name) for name in _SAME_NAMES},
    }


def hour_row(meter: Meter, hour: BilledHour) -> dict[str, Any]:
    """Return the row of an hour of a meter."""
    return {"resource": meter[0], "kind": meter[1], **hour._asdict()}


def _texts(spans: Spans) -> dict[str, tuple[str, str]]:
    return {resource: (rfc3339(low), rfc3339(high)) for resource, (low, high) in spans.items()}


def _tables(
    bounds: Mapping[str, tuple[Any, Any]], of_type: Text | BigInteger | None = None
) -> Iterator[CTE]:
    """Yield the bounds as tables of (resource, low, high), to be joined with."""
    of_type = of_type or Text()
    columns = (column("resource", Text), column("low", of_type), column("high", of_type))
    rows = ((resource, low, high) for resource, (low, high) in bounds.items())
    while chunk := list(islice(rows, _CHUNK)):
        yield values(*columns, name="asked").data(chunk).cte()


def _joined(of: CTE, table: Table, those: Sequence[ColumnElement[bool]]) -> Select[Any]:
    return select(table).join_from(of, table, and_(*those))
