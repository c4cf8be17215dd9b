"""Whose fault a failed write is: the database's, the record's, or not to be told from the error.

A database that is locked, full or gone is waited for, and no record is given up. A record that can
never be written would hold up all others for ever. Drivers give the same cause different classes,
so SQLite's result codes and PostgreSQL's SQLSTATE decide where there are any.

Invariant: an error that may come from the state of the database is never said to be the record's.
"""

import sqlite3
from enum import Enum, auto

from sqlalchemy.exc import DataError, DBAPIError, IntegrityError

from vllm_cost_meter.errors import LedgerError


class Fault(Enum):
    """What has to change before a write can succeed."""

    DATABASE = auto()
    RECORD = auto()
    UNKNOWN = auto()


# ValueError covers text that is not UTF-8, ArithmeticError covers integers over 64 bits.
_RECORD_ERRORS = (
    ArithmeticError,
    AttributeError,
    DataError,
    IntegrityError,
    TypeError,
    ValueError,
)
# No driver can bind such a value. The error's class differs by driver and Python, its text does
# not.
_BINDING_ERRORS = ("Error binding parameter", "cannot adapt type")
_SQLITE_DATABASE = frozenset(
    {
        sqlite3.SQLITE_PERM,
        sqlite3.SQLITE_BUSY,
        sqlite3.SQLITE_LOCKED,
        sqlite3.SQLITE_NOMEM,
        sqlite3.SQLITE_READONLY,
        sqlite3.SQLITE_INTERRUPT,
        sqlite3.SQLITE_IOERR,
        sqlite3.SQLITE_CORRUPT,
        sqlite3.SQLITE_FULL,
        sqlite3.SQLITE_CANTOPEN,
        sqlite3.SQLITE_PROTOCOL,
        sqlite3.SQLITE_SCHEMA,
        sqlite3.SQLITE_AUTH,
        sqlite3.SQLITE_NOTADB,
    }
)
# SQLite has one code for these and for much else. What is not there may come back.
_NOT_THERE = ("no such ", "has no column named", "values were supplied")
_SQLITE_RECORD = frozenset({sqlite3.SQLITE_TOOBIG, sqlite3.SQLITE_MISMATCH})
# Classes of SQLSTATE (PostgreSQL, appendix A): connection, transaction state, rollback, syntax and
# access, resources, object state, operator, system.
_SQLSTATE_DATABASE = ("08", "25", "40", "42", "53", "55", "57", "58")
_SQLSTATE_LOCKED = "55P03"
# Data, constraint, and a program's limit: a row is too big for an index.
_SQLSTATE_RECORD = ("22", "23", "54")


def fault_of(error: Exception) -> Fault:
    """Return whose fault a failed write is."""
    if isinstance(error, LedgerError | OSError | MemoryError):
        return Fault.DATABASE
    if isinstance(error, _RECORD_ERRORS) or any(text in str(error) for text in _BINDING_ERRORS):
        return Fault.RECORD
    if not isinstance(error, DBAPIError):
        return Fault.UNKNOWN
    if error.connection_invalidated:
        return Fault.DATABASE
    cause = error.orig
    if (code := getattr(cause, "sqlite_errorcode", None)) is not None:
        is_away = any(text in str(cause) for text in _NOT_THERE)
        return Fault.DATABASE if is_away else _of_sqlite(int(code) & 0xFF)
    if (state := getattr(cause, "sqlstate", None)) is not None:
        return _of_sqlstate(str(state))
    return Fault.UNKNOWN


def is_busy(error: DBAPIError) -> bool:
    """Return whether others hold what a write needs, so that it may succeed a moment later."""
    cause = error.orig
    code = getattr(cause, "sqlite_errorcode", None)
    if code is not None:
        return int(code) & 0xFF in (sqlite3.SQLITE_BUSY, sqlite3.SQLITE_LOCKED)
    return getattr(cause, "sqlstate", None) == _SQLSTATE_LOCKED


def _of_sqlite(code: int) -> Fault:
    if code in _SQLITE_DATABASE:
        return Fault.DATABASE
    return Fault.RECORD if code in _SQLITE_RECORD else Fault.UNKNOWN


def _of_sqlstate(state: str) -> Fault:
    if state.startswith(_SQLSTATE_DATABASE):
        return Fault.DATABASE
    return Fault.RECORD if state.startswith(_SQLSTATE_RECORD) else Fault.UNKNOWN
