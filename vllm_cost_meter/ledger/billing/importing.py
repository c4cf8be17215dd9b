"""Import a provider's bill file into a ledger while a server writes to it.

Each fact is written once, by key, so importing a file again changes nothing. A fact that
contradicts the ledger is refused together with its whole file: one of the two is wrong, and a
report could not say which.

The change is computed in a reader's transaction, for which no writer waits. One short transaction
then writes it, unless another import came between; in that case it is computed anew.

Invariant: a file is taken whole or not at all. `billed_hours` follows from the facts in the ledger,
each hour with the gap setting at the last import that touched it.
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
from vllm_cost_meter.ledger.billing.facts import hour_row, line_row, reading_row, spans_of
from vllm_cost_meter.ledger.billing.hours import LIMITS, Change, ImportLimits, change_of
from vllm_cost_meter.ledger.billing.meters import add_facts, shown, totals_of
from vllm_cost_meter.ledger.database import cause_of, open_database, open_to_read, writing
from vllm_cost_meter.units.time import rfc3339

_WRITTEN = (schema.billing_snapshots, schema.invoice_lines, schema.billed_hours)


def import_invoice(
    url: str,
    file: InvoiceFile,
    gap_ns: int,
    now_ns: int,
    *,
    dry_run: bool = False,
    limits: ImportLimits = LIMITS,
) -> dict[str, Any]:
    """Write a file's facts into a ledger, and return what changed, ready for JSON.

    `gap_ns` is the longest time between two readings without a gap; `now_ns` is recorded as the
    import's time. With `dry_run` nothing is written. Raises ValueError, with nothing written, for a
    fact that contradicts the ledger and for too many hours. Raises LedgerError if there is no
    ledger of this version, and if other imports keep coming between.
    """
    engine = open_to_read(url) if dry_run else open_database(url, create=False)
    shown_url = engine.url.render_as_string(hide_password=True)
    origin = {"source": file.name, "imported_at": rfc3339(now_ns)}
    try:
        for _ in range(limits.attempts):
            with engine.connect() as connection, connection.begin():
                seen = _mark(connection)
                change = change_of(connection, file, gap_ns, limits)
                answer = _answer(connection, file, change)
            if dry_run or _write(engine, change, origin, seen):
                return {"file": file.name, "dry_run": dry_run, **answer}
    except SQLAlchemyError as error:
        raise LedgerError(f"ledger {shown_url}: cannot be written: {cause_of(error)}") from error
    finally:
        engine.dispose()
    raise LedgerError(f"ledger {shown_url}: other imports came between; nothing written, try again")


def _mark(connection: Connection) -> list[int | None]:
    """Return numbers that every import changes: facts are added and never removed.

    SQLite would count rows one by one, but it knows the last row's number at once.
    """
    is_sqlite = connection.dialect.name == "sqlite"
    figure = func.max(literal_column("rowid")) if is_sqlite else func.count()
    return [connection.execute(select(figure).select_from(table)).scalar() for table in _WRITTEN]


def _answer(connection: Connection, file: InvoiceFile, change: Change) -> dict[str, Any]:
    """Return an import's answer: the totals for its resources after the import."""
    known = totals_of(connection, sorted(spans_of([*file.readings, *file.lines])))
    add_facts(known, [*change.readings, *change.lines])
    for sign, hours in ((-1, change.gone), (1, change.come)):
        for meter, hour in hours:
            known[meter].add_hour(hour, sign)
    new = len(change.readings) + len(change.lines)
    return {
        "snapshots": len(change.readings),
        "lines": len(change.lines),
        "known": len(file.readings) + len(file.lines) - new,
        "ignored": file.ignored,
        "resources": shown(known),
        "unobserved": change.unobserved,
    }


def _write(engine: Engine, change: Change, origin: dict[str, str], seen: list[int | None]) -> bool:
    """Write the change; return False, with nothing written, if another import came between."""
    hours = schema.billed_hours
    is_that_hour = [hours.c[name] == bindparam(name) for name in ("resource", "kind", "hour")]
    statements = [
        _prepared(engine, statement, rows)
        for statement, rows in (
            (insert(schema.billing_snapshots), [reading_row(s) | origin for s in change.readings]),
            (insert(schema.invoice_lines), [line_row(line) | origin for line in change.lines]),
            (delete(hours).where(*is_that_hour), [hour_row(*gone) for gone in change.gone]),
            (insert(hours), [hour_row(*come) for come in change.come]),
        )
        if rows
    ]
    if not statements:
        return True
    with writing(engine).begin() as connection:
        if engine.dialect.name == "postgresql":
            # Without the lock, another import could compare its mark before this one commits.
            connection.execute(text("LOCK TABLE billed_hours IN EXCLUSIVE MODE"))
        if _mark(connection) != seen:
            return False
        for sql, parameters in statements:
            connection.exec_driver_sql(sql, parameters)
    return True


def _prepared(engine: Engine, statement: Insert | Delete, rows: Sequence[dict[str, Any]]) -> Any:
    """Return a statement and its parameters as the driver takes them.

    A server waits while the transaction is open. SQLAlchemy would take as long to prepare the rows
    as SQLite takes to write them, so they are prepared before.
    """
    names = list(rows[0]) if isinstance(statement, Insert) else None
    compiled = statement.compile(dialect=engine.dialect, column_keys=names)
    order = compiled.positiontup
    return str(compiled), rows if order is None else [tuple(map(row.get, order)) for row in rows]
