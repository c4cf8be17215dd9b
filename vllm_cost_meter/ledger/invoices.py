"""Bills of a provider in the ledger: facts by key, and the hours that follow from them.

An import is one transaction. Facts are written once by key: the same file again changes nothing,
and a fact that says otherwise than the ledger is refused with all of its file, because one of the
two is wrong and a report could not say which. The hours of the resources in the file are computed
anew from all their facts. A server that runs writes to the same file, so the transaction is short:
how much of it may be written at once is bounded.

Invariant: `billed_hours` is what the facts in the ledger say, by the gap of the last import that
named the resource.
"""

from collections import defaultdict
from collections.abc import Iterable, Iterator, Mapping, Sequence
from typing import Any, TypeVar

from sqlalchemy import Table, delete, func, insert, select, text
from sqlalchemy.engine import Connection
from sqlalchemy.exc import SQLAlchemyError

from vllm_cost_meter.errors import LedgerError
from vllm_cost_meter.invoice_files import InvoiceFile
from vllm_cost_meter.invoices import (
    BillingSnapshot,
    InvoiceLine,
    Stretch,
    billed_hours,
    hours_between,
    stretches,
)
from vllm_cost_meter.ledger import schema
from vllm_cost_meter.ledger.billed import is_known
from vllm_cost_meter.ledger.store import cause_of, open_ledger, writing
from vllm_cost_meter.pricing import format_usd
from vllm_cost_meter.records import NS_PER_HOUR, rfc3339, unix_ns_of

# Of the resources in a file, earlier imports included: what is computed while a server waits.
HOURS_MAX = 1_000_000
# Resources whose facts are asked for at once: SQLite takes 32,766 values.
_CHUNK = 5_000

_SAME_NAMES = ("invoice", "item", "charge_class", "kind", "nanousd")

Fact = TypeVar("Fact", BillingSnapshot, InvoiceLine)
Meter = tuple[str, str]


def import_invoice(
    url: str, file: InvoiceFile, gap_ns: int, now_ns: int, *, dry_run: bool = False
) -> dict[str, Any]:
    """Write what a file holds into a ledger, and return what that was, ready for JSON.

    Raises ValueError, with nothing written, for a fact that contradicts the ledger and for too
    many hours, LedgerError where there is no ledger of this version.
    """
    engine = open_ledger(url, create=False)
    try:
        with writing(engine).connect() as connection, connection.begin() as transaction:
            if engine.dialect.name == "postgresql":
                # Two imports at once would each miss the other's facts.
                connection.execute(text("LOCK TABLE billed_hours IN EXCLUSIVE MODE"))
            answer = _import(connection, file, gap_ns, now_ns)
            if dry_run:
                transaction.rollback()
    except SQLAlchemyError as error:
        shown = engine.url.render_as_string(hide_password=True)
        raise LedgerError(f"ledger {shown}: cannot be written: {cause_of(error)}") from error
    finally:
        engine.dispose()
    return {"file": file.name, "dry_run": dry_run, **answer}


def meters(connection: Connection, resources: Sequence[str] | None = None) -> list[dict[str, Any]]:
    """Return what is known of each resource and kind, or of these resources: span, facts, sum."""
    s, i = schema.billing_snapshots.c, schema.invoice_lines.c
    count, none = func.count(), {"snapshots": 0, "lines": 0}
    found: dict[Meter, dict[str, Any]] = {}
    for name, table, low, high in (
        ("snapshots", s, s.taken_at, s.taken_at),
        ("lines", i, i.begins_at, i.ends_at),
    ):
        told = select(table.resource, table.kind, func.min(low), func.max(high), count)
        for resource, kind, begin, end, rows in connection.execute(
            _only(told, table.resource, resources).group_by(table.resource, table.kind)
        ):
            known = found.setdefault((resource, kind), {"from": begin, "to": end, **none})
            known["from"], known["to"] = min(known["from"], begin), max(known["to"], end)
            known[name] = int(rows)
    spent = _spent(connection, resources)
    rows = []
    for meter, known in sorted(found.items()):
        nanousd, unobserved, resets = spent.get(meter, (None, 0.0, 0))
        rows.append(
            {
                "resource": meter[0],
                "kind": meter[1],
                **known,
                "billed_nanousd": nanousd,
                "billed_usd": format_usd(nanousd),
                "unobserved_hours": unobserved,
                "resets": resets,
            }
        )
    return rows


def _spent(
    connection: Connection, resources: Sequence[str] | None
) -> dict[Meter, tuple[int | None, float, int]]:
    """Return nano-USD (None if nothing is known), unobserved hours and resets of each meter."""
    h = schema.billed_hours.c
    sums = (func.sum(h.nanousd), is_known(), func.sum(h.unobserved_ns), func.sum(h.resets))
    asked = _only(select(h.resource, h.kind, *sums), h.resource, resources)
    return {
        (resource, kind): (
            int(nanousd) if known else None,
            int(unobserved_ns) / NS_PER_HOUR,
            int(resets),
        )
        for resource, kind, nanousd, known, unobserved_ns, resets in connection.execute(
            asked.group_by(h.resource, h.kind)
        )
    }


def _only(query: Any, column: Any, resources: Sequence[str] | None) -> Any:
    return query if resources is None else query.where(column.in_(resources))


def _import(connection: Connection, file: InvoiceFile, gap_ns: int, now_ns: int) -> dict[str, Any]:
    resources = sorted({fact.resource for facts in (file.snapshots, file.lines) for fact in facts})
    known_snapshots = {one.key: one for one in _snapshots(connection, resources)}
    known_lines = {one.key: one for one in _lines(connection, resources)}
    _refuse_another_kind(file.snapshots, known_snapshots.values())
    new_snapshots = _new(file.snapshots, known_snapshots)
    new_lines = _new(file.lines, known_lines)
    told = {"source": file.name, "imported_at": rfc3339(now_ns)}
    _insert(connection, schema.billing_snapshots, [_snapshot_row(s) | told for s in new_snapshots])
    _insert(connection, schema.invoice_lines, [_line_row(line) | told for line in new_lines])
    found = _stretches(
        file.name,
        [*known_snapshots.values(), *new_snapshots],
        [*known_lines.values(), *new_lines],
        gap_ns,
    )
    _write_hours(connection, resources, found)
    return {
        "snapshots": len(new_snapshots),
        "lines": len(new_lines),
        "known": len(file.snapshots) + len(file.lines) - len(new_snapshots) - len(new_lines),
        "ignored": file.ignored,
        "resources": [row for chunk in _chunks(resources) for row in meters(connection, chunk)],
        "unobserved": [
            _unobserved(meter, piece)
            for meter, pieces in found.items()
            for piece in pieces
            if piece.unobserved is not None
        ],
    }


def _write_hours(
    connection: Connection, resources: Sequence[str], found: Mapping[Meter, Sequence[Stretch]]
) -> None:
    """Write the hours of these resources in place of what was there."""
    for chunk in _chunks(resources):
        connection.execute(
            delete(schema.billed_hours).where(schema.billed_hours.c.resource.in_(chunk))
        )
    _insert(
        connection,
        schema.billed_hours,
        (
            {"resource": resource, "kind": kind, **hour._asdict()}
            for (resource, kind), pieces in found.items()
            for hour in billed_hours(pieces)
        ),
    )


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
    return found


def _amount(fact: BillingSnapshot | InvoiceLine) -> str:
    if isinstance(fact, InvoiceLine):
        return f"{format_usd(fact.nanousd)} USD of {fact.kind}"
    if fact.cumulative_nanousd is not None:
        return f"{format_usd(fact.cumulative_nanousd)} USD of {fact.kind} so far"
    return f"{format_usd(fact.nanousd_per_hour)} USD of {fact.kind} per hour"


def _refuse_another_kind(
    told: Mapping[BillingSnapshot, str], known: Iterable[BillingSnapshot]
) -> None:
    """Raise ValueError for a counter that was one of another kind: it would count twice."""
    kinds = {snapshot.resource: snapshot.kind for snapshot in known}
    for snapshot, where in told.items():
        if (kind := kinds.get(snapshot.resource, snapshot.kind)) != snapshot.kind:
            raise ValueError(
                f"{where}: kind of {snapshot.resource!r}: expected {kind}, as the ledger has it,"
                f" got {snapshot.kind}"
            )


def _stretches(
    name: str, snapshots: Iterable[BillingSnapshot], lines: Iterable[InvoiceLine], gap_ns: int
) -> dict[Meter, list[Stretch]]:
    """Return the stretches of each meter. Raises ValueError for too many hours."""
    facts: dict[Meter, tuple[list[BillingSnapshot], list[InvoiceLine]]]
    facts = defaultdict(lambda: ([], []))
    for snapshot in snapshots:
        facts[snapshot.resource, snapshot.kind][0].append(snapshot)
    for line in lines:
        facts[line.resource, line.kind][1].append(line)
    found = {meter: stretches(*facts[meter], gap_ns) for meter in sorted(facts)}
    hours = sum(
        len(hours_between(piece.from_ns, piece.to_ns))
        for pieces in found.values()
        for piece in pieces
    )
    if hours > HOURS_MAX:
        raise ValueError(
            f"{name}: expected at most {HOURS_MAX:,} hours x charges of the resources in a file,"
            f" got {hours:,}: ignore what is not of this deployment, or import it in parts"
        )
    return found


def _unobserved(meter: Meter, piece: Stretch) -> dict[str, Any]:
    return {
        "resource": meter[0],
        "kind": meter[1],
        "from": rfc3339(piece.from_ns),
        "to": rfc3339(piece.to_ns),
        "reason": piece.unobserved,
    }


def _snapshots(connection: Connection, resources: Sequence[str]) -> Iterator[BillingSnapshot]:
    table = schema.billing_snapshots
    for chunk in _chunks(resources):
        for row in connection.execute(select(table).where(table.c.resource.in_(chunk))):
            amounts = (row.cumulative_nanousd, row.nanousd_per_hour)
            yield BillingSnapshot(row.resource, row.kind, unix_ns_of(row.taken_at), *amounts)


def _snapshot_row(snapshot: BillingSnapshot) -> dict[str, Any]:
    return {
        "resource": snapshot.resource,
        "taken_at": rfc3339(snapshot.at_ns),
        "kind": snapshot.kind,
        "cumulative_nanousd": snapshot.cumulative_nanousd,
        "nanousd_per_hour": snapshot.nanousd_per_hour,
    }


def _lines(connection: Connection, resources: Sequence[str]) -> Iterator[InvoiceLine]:
    table = schema.invoice_lines
    for chunk in _chunks(resources):
        for row in connection.execute(select(table).where(table.c.resource.in_(chunk))):
            yield InvoiceLine(
                *(row.resource, row.kind, unix_ns_of(row.begins_at), unix_ns_of(row.ends_at)),
                *(row.nanousd, row.invoice, row.item, row.charge_class),
            )


def _line_row(line: InvoiceLine) -> dict[str, Any]:
    return {
        "resource": line.resource,
        "begins_at": rfc3339(line.from_ns),
        "ends_at": rfc3339(line.to_ns),
        **{name: getattr(line, name) for name in _SAME_NAMES},
    }


def _chunks(resources: Sequence[str]) -> Iterator[Sequence[str]]:
    for start in range(0, len(resources), _CHUNK):
        yield resources[start : start + _CHUNK]


def _insert(connection: Connection, table: Table, rows: Iterable[Mapping[str, Any]]) -> None:
    if told := list(rows):
        connection.execute(insert(table), told)
