"""Import of a provider's bills into a ledger while a server writes to it.

Facts are written once by key: the same file again changes nothing, and a fact that says otherwise
than the ledger is refused with all of its file, because one of the two is wrong and a report could
not say which. What changes is computed in a reader's transaction, for which no writer waits. Then
it is written in one short transaction, if no other import came between; else it is computed anew.

Invariant: a file is taken whole or not at all; `billed_hours` is what the facts in the ledger say,
each hour by the gap of the last import that touched it.
"""

from collections.abc import Sequence
from typing import Any

from sqlalchemy import (
    Delete,
    Engine,
    Insert,
    bindparam,
    delete,
    func,
    insert,
    literal_column,
    select,
    text,
)
from sqlalchemy.engine import Connection
from sqlalchemy.exc import SQLAlchemyError

from vllm_cost_meter.errors import LedgerError
from vllm_cost_meter.invoices.files import InvoiceFile
from vllm_cost_meter.ledger import schema
from vllm_cost_meter.ledger.billing.facts import hour_row, line_row, snapshot_row, spans_of
from vllm_cost_meter.ledger.billing.hours import Change, change_of
from vllm_cost_meter.ledger.billing.meters import add_facts, shown, totals_of
from vllm_cost_meter.ledger.database import cause_of, open_ledger, writing
from vllm_cost_meter.units.time import rfc3339

# Imports that may come between before one gives up.
ATTEMPTS = 10

_WRITTEN = (schema.billing_snapshots, schema.invoice_lines, schema.billed_hours)


def import_invoice(
    url: str, file: InvoiceFile, gap_ns: int, now_ns: int, *, dry_run: bool = False
) -> dict[str, Any]:
    """Write what a file holds into a ledger, and return what that was, ready for JSON.

    Raises ValueError, with nothing written, for a fact that contradicts the ledger and for too
    many hours, LedgerError where there is no ledger of this version.
    """
    engine = open_ledger(url, create=False)
    shown_url = engine.url.render_as_string(hide_password=True)
    told = {"source": file.name, "imported_at": rfc3339(now_ns)}
    try:
        for _ in range(ATTEMPTS):
            with engine.connect() as connection, connection.begin():
                seen = _mark(connection)
                change = change_of(connection, file, gap_ns)
                answer = _answer(connection, file, change)
            if dry_run or _write(engine, change, told, seen):
                return {"file": file.name, "dry_run": dry_run, **answer}
    except SQLAlchemyError as error:
        raise LedgerError(f"ledger {shown_url}: cannot be written: {cause_of(error)}") from error
    finally:
        engine.dispose()
    raise LedgerError(f"ledger {shown_url}: other imports came between, try again")


def _mark(connection: Connection) -> list[int | None]:
    """Return what changes with every import: facts are added and never removed.

    SQLite counts rows one by one, but knows the number of the last one at once.
    """
    is_sqlite = connection.dialect.name == "sqlite"
    figure = func.max(literal_column("rowid")) if is_sqlite else func.count()
    return [connection.execute(select(figure).select_from(table)).scalar() for table in _WRITTEN]


def _answer(connection: Connection, file: InvoiceFile, change: Change) -> dict[str, Any]:
    """Return what an import tells: what is known of its resources once it is written."""
    known = totals_of(connection, sorted(spans_of([*file.snapshots, *file.lines])))
    add_facts(known, [*change.snapshots, *change.lines])
    for sign, hours in ((-1, change.gone), (1, change.come)):
        for meter, hour in hours:
            known[meter].add_hour(hour, sign)
    new = len(change.snapshots) + len(change.lines)
    return {
        "snapshots": len(change.snapshots),
        "lines": len(change.lines),
        "known": len(file.snapshots) + len(file.lines) - new,
        "ignored": file.ignored,
        "resources": shown(known),
        "unobserved": change.unobserved,
    }


def _write(engine: Engine, change: Change, told: dict[str, str], seen: list[int | None]) -> bool:
    """Write what an import changes; False, with nothing written, if another one came between."""
    hours = schema.billed_hours
    is_that_hour = [hours.c[name] == bindparam(name) for name in ("resource", "kind", "hour")]
    statements = [
        _prepared(engine, statement, rows)
        for statement, rows in (
            (insert(schema.billing_snapshots), [snapshot_row(s) | told for s in change.snapshots]),
            (insert(schema.invoice_lines), [line_row(line) | told for line in change.lines]),
            (delete(hours).where(*is_that_hour), [hour_row(*gone) for gone in change.gone]),
            (insert(hours), [hour_row(*come) for come in change.come]),
        )
        if rows
    ]
    if not statements:
        return True
    with writing(engine).begin() as connection:
        if engine.dialect.name == "postgresql":
            # Another import would compare its mark before this one commits.
            connection.execute(text("LOCK TABLE billed_hours IN EXCLUSIVE MODE"))
        if _mark(connection) != seen:
            return False
        for sql, parameters in statements:
            connection.exec_driver_sql(sql, parameters)
    return True


def _prepared(engine: Engine, statement: Insert | Delete, rows: Sequence[dict[str, Any]]) -> Any:
    """Return a statement and its parameters as the driver takes them.

    A server waits from here to the commit: SQLAlchemy would take as long to prepare the rows as
    SQLite takes to write them.
    """
    names = list(rows[0]) if isinstance(statement, Insert) else None
    compiled = statement.compile(dialect=engine.dialect, column_keys=names)
    order = compiled.positiontup
    return str(compiled), rows if order is None else [tuple(map(row.get, order)) for row in rows]
