"""Totals per meter in a ledger: time span, number of facts, total billed.

An import shows its result before it writes anything: it adds its change to the totals in the
ledger.

Invariant: these totals equal the ledger's totals after the import.
"""

from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from typing import Any

from sqlalchemy import func, select
from sqlalchemy.engine import Connection

from vllm_cost_meter.invoices.timeline import BilledHour, InvoiceLine, Reading
from vllm_cost_meter.ledger import schema
from vllm_cost_meter.ledger.billing.comparison import is_known
from vllm_cost_meter.ledger.billing.facts import BilledMeter, span_of
from vllm_cost_meter.units.money import format_usd
from vllm_cost_meter.units.time import NS_PER_HOUR, rfc3339

# Resources per query: SQLite takes 32,766 values.
_CHUNK = 5_000


@dataclass(slots=True)
class MeterTotals:
    """A meter's span (RFC 3339), facts and hours; `known` counts hours with known time or money."""

    begin: str
    end: str
    readings: int = 0
    lines: int = 0
    nanousd: int = 0
    known: int = 0
    unobserved_ns: int = 0
    resets: int = 0

    def add_hour(self, hour: BilledHour, sign: int = 1) -> None:
        """Add an hour's amounts; a sign of -1 takes them away."""
        self.nanousd += sign * hour.nanousd
        self.known += sign * (hour.covered_ns > 0 or hour.nanousd != 0)
        self.unobserved_ns += sign * hour.unobserved_ns
        self.resets += sign * hour.resets

    def as_row(self, meter: BilledMeter) -> dict[str, Any]:
        """Return the totals as answers show them."""
        nanousd = self.nanousd if self.known else None
        return {
            "resource": meter[0],
            "kind": meter[1],
            "from": self.begin,
            "to": self.end,
            "snapshots": self.readings,
            "lines": self.lines,
            "billed_nanousd": nanousd,
            "billed_usd": format_usd(nanousd),
            "unobserved_hours": self.unobserved_ns / NS_PER_HOUR,
            "resets": self.resets,
        }


def meters(connection: Connection) -> list[dict[str, Any]]:
    """Return span, facts and total for each resource and kind, ready for JSON."""
    return shown(_totals(connection, None))


def totals_of(connection: Connection, resources: Sequence[str]) -> dict[BilledMeter, MeterTotals]:
    """Return the totals for the meters of these resources."""
    found: dict[BilledMeter, MeterTotals] = {}
    for start in range(0, len(resources), _CHUNK):
        found |= _totals(connection, resources[start : start + _CHUNK])
    return found


def add_facts(
    found: dict[BilledMeter, MeterTotals], facts: Iterable[Reading | InvoiceLine]
) -> None:
    """Add new facts to the totals in `found`."""
    for fact in facts:
        is_line = isinstance(fact, InvoiceLine)
        begin, end = map(rfc3339, span_of(fact))
        known = found.setdefault((fact.resource, fact.kind), MeterTotals(begin, end))
        known.begin, known.end = min(known.begin, begin), max(known.end, end)
        known.lines += is_line
        known.readings += not is_line


def shown(found: dict[BilledMeter, MeterTotals]) -> list[dict[str, Any]]:
    """Return the meters' totals as answers show them, by meter."""
    return [known.as_row(meter) for meter, known in sorted(found.items())]


def _totals(
    connection: Connection, resources: Sequence[str] | None
) -> dict[BilledMeter, MeterTotals]:
    s, i, h = (
        table.c for table in (schema.billing_snapshots, schema.invoice_lines, schema.billed_hours)
    )
    count = func.count()
    found: dict[BilledMeter, MeterTotals] = {}

    def ask(table: Any, *figures: Any) -> Any:
        asked = select(table.resource, table.kind, *figures)
        if resources is not None:
            asked = asked.where(table.resource.in_(resources))
        return connection.execute(asked.group_by(table.resource, table.kind))

    for *meter, begin, end, rows in ask(s, func.min(s.taken_at), func.max(s.taken_at), count):
        found[*meter,] = MeterTotals(begin, end, readings=int(rows))
    for *meter, begin, end, rows in ask(i, func.min(i.begins_at), func.max(i.ends_at), count):
        known = found.setdefault((*meter,), MeterTotals(begin, end))
        known.begin, known.end = min(known.begin, begin), max(known.end, end)
        known.lines = int(rows)
    for *meter, nanousd, hours, unobserved_ns, resets in ask(
        h, func.sum(h.nanousd), is_known(), func.sum(h.unobserved_ns), func.sum(h.resets)
    ):
        known = found[*meter,]  # Hours follow from facts, so the meter is known.
        known.nanousd, known.known = int(nanousd), int(hours)
        known.unobserved_ns, known.resets = int(unobserved_ns), int(resets)
    return found
