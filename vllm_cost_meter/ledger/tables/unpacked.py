"""Pack the rows of an older ledger: instants of requests become integers, and ids short.

Schema version 14 stores them so (`tables/packed.py`), and the hour of a bill with it if it is one
(`tables/pieces.py`). SQLite cannot change a column's type, so each table is copied into one with
the new types, in the order of its rows. PostgreSQL changes the type, and keeps ids as they are.

Invariant: each row is there afterwards with the same instants, ids and amounts.
"""

import re
from collections.abc import Iterable
from typing import Any, NamedTuple

from sqlalchemy import text
from sqlalchemy.engine import Connection

from vllm_cost_meter.ledger.tables.packed import pack_id


class UnpackedTable(NamedTuple):
    """A table of version 13, with its columns of instants and ids."""

    name: str
    instants: tuple[str, ...]
    ids: tuple[str, ...]


_IDS = ("request_id", "external_id", "response_id", "http_request_id", "prompt_group")
PACKED_SINCE = 14
UNPACKED = (
    UnpackedTable("requests", ("started_at", "finished_at"), _IDS),
    UnpackedTable("open_requests", ("started_at",), (*_IDS, "x_request_id")),
    UnpackedTable(
        "http_requests",
        ("started_at", "finished_at"),
        ("http_request_id", "response_id", "x_request_id"),
    ),
)
_PIECE_AMOUNTS = (
    *("prefill_ns", "decode_ns", "prefill_tokens", "decode_tokens", "marginal_ns"),
    *("recomputed_ns", "recomputed_tokens", "rejected_ns", "rejected_tokens"),
    *("cut_ns", "cut_tokens", "kv_block_ms", "step_ns", "saved_estimate_ns"),
)
_TEXT_INSTANT = re.compile(r"\b(started_at|finished_at) TEXT\b")
_PACK_ID = "cost_meter_pack_id"


def pack_rows(connection: Connection) -> None:
    """Pack the rows of requests, within the connection's transaction."""
    if connection.dialect.name == "postgresql":
        for table in UNPACKED:
            _change_types(connection, table)
        return
    sqlite: Any = connection.connection.driver_connection
    sqlite.create_function(_PACK_ID, 1, _packed, deterministic=True)
    for table in UNPACKED:
        _copy_packed(connection, table)


def keep_single_hours(connection: Connection) -> None:
    """Keep the hour of each bill of one hour with the bill, and no row of its own for it.

    A bill that is not as its piece stays as it is: an audit says so.
    """
    same = " AND ".join(f"p.{name} = requests.{name}" for name in _PIECE_AMOUNTS)
    mine = "p.run_id = requests.run_id AND p.seq = requests.seq"
    _run(
        connection,
        "UPDATE requests SET hour ="  # noqa: S608 - names of columns
        f" (SELECT MIN(p.hour) FROM usage_pieces p WHERE {mine} GROUP BY p.run_id, p.seq"
        " HAVING COUNT(*) = 1)"
        f" WHERE EXISTS (SELECT 1 FROM usage_pieces p WHERE {mine} AND {same})",
    )
    _run(
        connection,
        "DELETE FROM usage_pieces WHERE EXISTS (SELECT 1 FROM requests r WHERE"
        " r.run_id = usage_pieces.run_id AND r.seq = usage_pieces.seq AND r.hour IS NOT NULL)",
    )


def _change_types(connection: Connection, table: UnpackedTable) -> None:
    changes = ", ".join(
        f"ALTER COLUMN {name} TYPE BIGINT"
        f" USING CAST(EXTRACT(EPOCH FROM CAST({name} AS TIMESTAMPTZ)) * 1000000 AS BIGINT)"
        for name in table.instants
    )
    connection.execute(text(f"ALTER TABLE {table.name} {changes}"))


def _copy_packed(connection: Connection, table: UnpackedTable) -> None:
    ((_, made),) = _made(connection, "name", table.name, "table")
    packed = _TEXT_INSTANT.sub(r"\1 BIGINT", made)
    if packed == made:
        return  # `create_all` made it just now.
    indexes = _made(connection, "tbl_name", table.name, "index")
    columns = [row[1] for row in _run(connection, f"PRAGMA table_info({table.name})")]
    old = f"unpacked_{table.name}"
    _run(connection, f"ALTER TABLE {table.name} RENAME TO {old}")
    for name, _ in indexes:
        _run(connection, f"DROP INDEX {name}")
    _run(connection, packed)
    values = ", ".join(_value(name, table) for name in columns)
    _run(connection, f"INSERT INTO {table.name} ({', '.join(columns)}) SELECT {values} FROM {old}")  # noqa: S608
    _run(connection, f"DROP TABLE {old}")
    for _, sql in indexes:
        _run(connection, sql)


def _made(connection: Connection, column: str, name: str, kind: str) -> list[tuple[str, str]]:
    """Return the names of what was made by a statement, and the statements."""
    asked = text(
        f"SELECT name, sql FROM sqlite_master WHERE {column} = :name AND type = :kind"  # noqa: S608
        " AND sql IS NOT NULL"
    )
    found = connection.execute(asked, {"name": name, "kind": kind})
    return [(str(name), str(sql)) for name, sql in found]


def _value(column: str, table: UnpackedTable) -> str:
    if column in table.ids:
        return f"{_PACK_ID}({column})"
    if column in table.instants:
        # "2027-01-15T08:00:00.000000Z"; a damaged text keeps no row from being there.
        seconds = f"CAST(strftime('%s', substr({column}, 1, 19)) AS INTEGER)"
        return f"coalesce({seconds} * 1000000 + CAST(substr({column}, 21, 6) AS INTEGER), 0)"
    return column


def _packed(id: Any) -> Any:
    return pack_id(id) if isinstance(id, str) else id


def _run(connection: Connection, sql: str) -> Iterable[Any]:
    # Not `text`: a statement of the schema may have colons.
    result = connection.exec_driver_sql(sql)
    return result.fetchall() if result.returns_rows else ()
