"""What a tenant covers, in SQL: the condition that a row is of a tenant, or of one below it.

This is `records.owner.TenantScope` for rows of `requests`, `open_requests` and `replies`,
which keep the tenant and all tenants above it. It compares byte by byte. LIKE would not do: SQLite
takes it without regard to case, and `%` and `_` in names would have to be escaped.

Invariant: for every row the condition says what `TenantScope.includes` says of its owner. A tenant
that asks for another gets only what is of the other, and only if that one is below it.
"""

from collections.abc import Sequence
from typing import Any

from sqlalchemy import ColumnElement, Integer, and_, case, false, func, literal_column, or_, true
from sqlalchemy.ext.compiler import compiles
from sqlalchemy.sql.compiler import SQLCompiler
from sqlalchemy.sql.functions import GenericFunction

from vllm_cost_meter.records.owner import BETWEEN, OWN, SLASH, TenantScope
from vllm_cost_meter.reports.grammar import COVERED, NO, YES, Question

# Stands after a tenant's name, for details of its rows that are not shown. They sort together.
HIDDEN = BETWEEN
# The labels of the two columns below, to group by. PostgreSQL takes an expression with parameters
# for a new one each time, so grouping by the expression itself would fail.
COVERED_NAME: ColumnElement[Any] = literal_column(COVERED)
DETAILS_NAME: ColumnElement[Any] = literal_column("details_name")


def is_of(row: Any, scope: TenantScope) -> ColumnElement[bool]:
    """Return the condition that a row is of the tenant that is meant. `row` has the columns."""
    if scope.covers == OWN:
        itself: ColumnElement[bool] = row.tenant == scope.tenant
        return itself
    return _place(row, scope.tenant) > 0


def is_shown(
    row: Any, asked: TenantScope | None, asker: TenantScope | None = None
) -> ColumnElement[bool]:
    """Return the condition that a row is of the tenant asked for, and shown to the one that asks.

    None stands for all tenants. The tenant asked for must not be above the one that asks: a child
    that names its parent would else get its own figures under the parent's name.
    """
    if asked is None or asker is None:
        one = asked or asker
        return true() if one is None else is_of(row, one)
    if asked.tenant == asker.tenant:
        return and_(is_of(row, asked), is_of(row, asker))
    if TenantScope(asked.tenant).includes(asker.tenant):
        return false()
    is_below = _place(row, asked.tenant) <= _place(row, asker.tenant)
    return and_(is_of(row, asked), is_of(row, asker), is_below)


def told(row: Any, question: Question) -> ColumnElement[str]:
    """Return the column `COVERED` of a question: whether a row is of the tenants it asks for."""
    return case((_is_meant(row, question), YES), else_=NO).label(COVERED)


def details_name(row: Any, question: Question) -> ColumnElement[str]:
    """Return the name under which details of a row stand; rows that are not shown have another."""
    shown: ColumnElement[str] = row.tenant
    if question.tells_coverage:
        shown = case((_is_meant(row, question), row.tenant), else_=row.tenant + HIDDEN)
    return shown.label("details_name")


def _is_meant(row: Any, question: Question) -> ColumnElement[bool]:
    asker = None if question.only is None else TenantScope(question.only)
    asked: Sequence[TenantScope | None] = (None,)
    if question.asked is not None:
        asked = question.asked
    return or_(false(), *(is_shown(row, each, asker) for each in asked))


def _place(row: Any, name: str) -> ColumnElement[int]:
    """Return where a name stands among a row's tenant and those above it; 0 if it does not.

    A line break is put before each slash, so that `acme` stands in `acme/web` as well.
    """
    path = BETWEEN + row.tenant + func.coalesce(row.tenant_above, BETWEEN)
    text = f"{BETWEEN}{name}{BETWEEN}"
    return _TextPlace(func.replace(path, SLASH, BETWEEN + SLASH), _with_breaks(text))


def _with_breaks(text: str) -> str:
    return text.replace(SLASH, BETWEEN + SLASH)


class _TextPlace(GenericFunction[int]):
    """Where a text begins in another, from 1; 0 if it is not in it."""

    name = "strpos"
    type = Integer()
    inherit_cache = True


@compiles(_TextPlace, "sqlite")
def _in_sqlite(element: _TextPlace, compiler: SQLCompiler, **options: Any) -> str:
    return f"instr({compiler.process(element.clauses, **options)})"
