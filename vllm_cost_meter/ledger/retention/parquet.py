"""Write rows into Parquet files, a folder for each table, and read each file again.

DuckDB writes them: it is an extra, `pip install 'vllm-cost-meter[parquet]'`. Rows reach it as lines
of JSON, because it takes rows one by one a thousand times more slowly. A file is written under
another name, read again, compared row by row with what was to be in it, synced, and only then gets
its name. Files are for their owner only, as the ledger is.

Invariant: a file under its name in the archive holds whole rows, as the ledger had them.
"""

import os
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import orjson
from sqlalchemy import BigInteger, Boolean, Column, Float, Integer, Table

from vllm_cost_meter.errors import LedgerError

MISSING = (
    "an archive needs DuckDB, which is not installed: pip install 'vllm-cost-meter[parquet]', or"
    " pip install duckdb"
)
# The values of a row in the order of its table's columns.
_Row = tuple[Any, ...]


class ParquetArchive:
    """A folder of Parquet files: `requests/2026-08-01.parquet` and so on. Used by one thread."""

    def __init__(self, folder: Path) -> None:
        """Raises LedgerError without DuckDB, and for a folder that cannot be written."""
        try:
            import duckdb  # noqa: PLC0415 - an extra, and heavy
        except ImportError:
            raise LedgerError(MISSING) from None
        self._connect = duckdb.connect
        self._errors = duckdb.Error
        self.folder = folder
        with self._clear_errors():
            folder.mkdir(mode=0o700, parents=True, exist_ok=True)
            if not os.access(folder, os.W_OK | os.X_OK):
                raise PermissionError(None, "Permission denied")

    def keep(self, day: str, rows: Mapping[Table, Sequence[_Row]]) -> list[Path]:
        """Write rows of a UTC day, and return the files that hold them now.

        A day that has files already gets others. Raises LedgerError; then no row may be dropped.
        """
        with self._clear_errors():
            return [
                self._write(table, some, _free_name(self.folder / table.name, day))
                for table, some in rows.items()
                if some
            ]

    def write(self, table: Table, rows: Sequence[_Row], name: Path) -> None:
        """Write rows into a file of this name in the folder, in place of one that is there.

        Raises LedgerError; then no row may be dropped.
        """
        with self._clear_errors():
            self._write(table, rows, self.folder / name)

    def _write(self, table: Table, rows: Sequence[_Row], name: Path) -> Path:
        folder = name.parent
        folder.mkdir(mode=0o700, parents=True, exist_ok=True)
        lines, part = folder / f".{name.stem}.json", folder / f".{name.stem}.part"
        try:
            _write_lines(lines, table, rows)
            self._convert(table, lines, part)
            part.chmod(0o600)
            if self._read(table, part) != list(rows):
                raise LedgerError(
                    f"{part}: expected the {len(rows):,} rows that were written, read others; no"
                    " row was dropped: is the disk at fault?"
                )
            _sync(part)
            part.rename(name)
            _sync(folder)
        finally:
            lines.unlink(missing_ok=True)
            part.unlink(missing_ok=True)
        return name

    def _convert(self, table: Table, lines: Path, part: Path) -> None:
        columns = ", ".join(f"{_quoted(c.name)}: {_quoted(_type_of(c))}" for c in table.c)
        source = (
            f"read_json({_quoted(str(lines))}, format='newline_delimited', columns={{{columns}}})"
        )
        target = f"{_quoted(str(part))} (FORMAT parquet, COMPRESSION zstd)"
        with self._connect(":memory:") as connection:
            connection.execute(f"COPY (SELECT * FROM {source}) TO {target}")  # noqa: S608

    def _read(self, table: Table, part: Path) -> list[_Row]:
        with self._connect(":memory:") as connection:
            names = ", ".join(f'"{column.name}"' for column in table.c)
            found = connection.execute(f"SELECT {names} FROM read_parquet(?)", [str(part)])  # noqa: S608
            return [tuple(row) for row in found.fetchall()]

    @contextmanager
    def _clear_errors(self) -> Iterator[None]:
        try:
            yield
        except (OSError, self._errors) as error:
            cause = error.strerror if isinstance(error, OSError) else str(error).splitlines()[0]
            raise LedgerError(
                f"archive {self.folder}: cannot be written: {cause}; no row of it was dropped"
            ) from error


def _write_lines(path: Path, table: Table, rows: Sequence[_Row]) -> None:
    names = [f"{name}" for name in table.c.keys()]  # noqa: SIM118 - orjson takes plain texts only
    with os.fdopen(os.open(path, os.O_CREAT | os.O_TRUNC | os.O_WRONLY, 0o600), "wb") as file:
        for row in rows:
            file.write(orjson.dumps(dict(zip(names, row, strict=True))) + b"\n")


def _free_name(folder: Path, day: str) -> Path:
    """Return the first name of a day that no file has."""
    name, number = folder / f"{day}.parquet", 1
    while name.exists():
        number += 1
        name = folder / f"{day}.{number}.parquet"
    return name


def _type_of(column: Column[Any]) -> str:
    """Return DuckDB's type for a column's values."""
    for kind, name in ((Boolean, "BOOLEAN"), (BigInteger, "BIGINT"), (Integer, "BIGINT")):
        if isinstance(column.type, kind):
            return name
    return "DOUBLE" if isinstance(column.type, Float) else "VARCHAR"


def _quoted(text: str) -> str:
    return "'" + text.replace("'", "''") + "'"


def _sync(path: Path) -> None:
    opened = os.open(path, os.O_RDONLY)
    try:
        os.fsync(opened)
    finally:
        os.close(opened)
