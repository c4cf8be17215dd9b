"""Put the rows of requests into Parquet files, by table, UTC day and run, for DuckDB to read.

The folder may be a mount of an object store, and many servers may share it. A sender puts what it
has sent into files every few minutes; until then its outbox keeps that. Which rows of the outbox a
file has is written down before the file is, in `senders/`, and the file's name says it. So a sender
that dies in the middle writes the same files again. What a ledger held when it joined may be in two
files: rows with the same key are the same.

Invariant: a row leaves the outbox only after a file has it.
"""

import json
import os
import time
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any
from urllib.parse import quote

from sqlalchemy import Engine, Table

from vllm_cost_meter.ledger import schema
from vllm_cost_meter.ledger.fleet import outbox
from vllm_cost_meter.ledger.fleet.changes import RowTuple, TableRows, unpacked
from vllm_cost_meter.ledger.fleet.outbox import Sender
from vllm_cost_meter.ledger.retention.parquet import ParquetArchive
from vllm_cost_meter.ledger.tables.packed import InstantColumn
from vllm_cost_meter.units.time import NS_PER_HOUR, NS_PER_US, rfc3339

EVERY_S = 600.0
# So much of an outbox goes into the files of one range: some 500,000 requests.
_RANGE_BYTES_MAX = 64 << 20
_TABLES = {
    table.name: table
    for table in (
        *(schema.requests, schema.usage_pieces, schema.http_requests, schema.request_energy),
    )
}
_DATE_CHARS = len("2026-08-01")


class RowFiles:
    """The files of a server. Used by one thread."""

    def __init__(self, folder: Path) -> None:
        """Raises LedgerError without DuckDB, and for a folder that cannot be written."""
        self._archive = ParquetArchive(folder)
        self._due_s = time.monotonic() + EVERY_S

    def is_due(self) -> bool:
        """Return whether it is time to write files."""
        return time.monotonic() >= self._due_s

    def filed_number(self, sender: Sender) -> int:
        """Return up to which row of a sender's outbox files have the rows."""
        filed, _ = self._places(sender)
        return filed

    def write_all(self, sender: Sender, tables: Iterable[TableRows]) -> None:
        """Write all that a ledger holds when it joins, and begin with its outbox after that."""
        for part, each in enumerate(tables):
            self._write(sender, f"all-{part}", [each])
        self._note(sender, sender.sent_number, sender.sent_number)

    def write(self, ledger: Engine, sender: Sender) -> Iterator[None]:
        """Write what the outbox has that was sent; yield after each range of it.

        Raises LedgerError if a file cannot be written, and what the ledger raises.
        """
        self._due_s = time.monotonic() + EVERY_S
        filed, last = self._places(sender)
        while filed < sender.sent_number:
            with ledger.connect() as connection:
                rows = outbox.next_rows(connection, filed, _RANGE_BYTES_MAX)
            # A range that was begun is written as it was.
            until = last if last > filed else sender.sent_number
            rows = [(number, content) for number, content in rows if number <= until]
            last = rows[-1][0] if rows else until
            self._note(sender, filed, last)
            tables = [each for _, content in rows for each in unpacked(content)]
            self._write(sender, f"{filed + 1}-{last}", tables)
            self._note(sender, last, last)
            filed = last
            yield

    def _write(self, sender: Sender, what: str, tables: Iterable[TableRows]) -> None:
        files: dict[tuple[str, str], dict[RowTuple, RowTuple]] = {}
        for name, columns, rows in tables:
            if name in _TABLES:
                table = _TABLES[name]
                keys = [column.name for column in table.primary_key]
                for values in map(_as_text(table, columns), rows):
                    key = tuple(values[key] for key in keys)
                    whole = tuple(values.get(column.name) for column in table.c)
                    files.setdefault((name, _folder(values)), {}).setdefault(key, whole)
        for (name, folder), by_key in sorted(files.items()):
            path = Path(name) / folder / f"{sender.sender_id}-{what}.parquet"
            self._archive.write(_TABLES[name], list(by_key.values()), path)

    def _marker(self, sender: Sender) -> Path:
        return self._archive.folder / "senders" / f"{sender.sender_id}.json"

    def _places(self, sender: Sender) -> tuple[int, int]:
        """Return up to which row all is in files, and up to which one the range goes that began."""
        try:
            filed, last = json.loads(self._marker(sender).read_text())
        except FileNotFoundError:
            return sender.sent_number, sender.sent_number
        return int(filed), int(last)

    def _note(self, sender: Sender, filed: int, last: int) -> None:
        marker = self._marker(sender)
        marker.parent.mkdir(mode=0o700, parents=True, exist_ok=True)
        part = marker.with_suffix(".part")
        with part.open("w") as file:
            file.write(json.dumps([filed, last]))
            file.flush()
            os.fsync(file.fileno())
        part.replace(marker)


def _as_text(table: Table, columns: Sequence[str]) -> Callable[[RowTuple], dict[str, Any]]:
    """Return what makes a row by name, with instants as text: an outbox has microseconds."""
    instants = {c.name for c in table.c if isinstance(c.type, InstantColumn)}

    def values_of(row: RowTuple) -> dict[str, Any]:
        return {
            name: rfc3339(value * NS_PER_US)
            if name in instants and isinstance(value, int)
            else value
            for name, value in zip(columns, row, strict=True)
        }

    return values_of


def _folder(values: Mapping[str, Any]) -> str:
    """Return the folder of a row: its day, and its run if it has one."""
    if "finished_at" in values:
        day = values["finished_at"][:_DATE_CHARS]
    else:
        day = rfc3339(values["hour"] * NS_PER_HOUR)[:_DATE_CHARS]
    run = f"/run={quote(values['run_id'], safe='')}" if "run_id" in values else ""
    return f"day={day}{run}"
