"""What a tenant covers, in SQL: the condition that a row is of a tenant, or of one below it.

This is `records.owner.TenantScope` for rows of `requests`, `open_requests` and `http_requests`,
which keep the tenant and all tenants above it. It compares byte by byte. LIKE would not do: SQLite
takes it without regard to case, and `%` and `_` in names would have to be escaped.

Invariant: for every row the condition says what `TenantScope.includes` says of its owner.
"""

from collections.abc import Iterable
from typing import Any

from sqlalchemy import ColumnElement, and_, case, false, func, literal_column, or_, true

from vllm_cost_meter.records.owner import BETWEEN, OWN, SLASH, TenantScope
from vllm_cost_meter.reports.grammar import COVERED, NO, YES, Question

# Stands after a tenant's name, for details of its rows that are not shown. They sort together.
HIDDEN = BETWEEN
# The labels of the two columns below, to group by. PostgreSQL takes an expression with parameters
# for a new one each time, so grouping by the expression itself would fail.
COVERED_NAME: ColumnElement[Any] = literal_column(COVERED)
DETAILS_NAME: ColumnElement[Any] = literal_column("details_name")
# The character after the slash: `acme/...` are the texts from `acme/` to `acme0`.
_AFTER_SLASH = chr(ord(SLASH) + 1)


def is_of(row: Any, scope: TenantScope) -> ColumnElement[bool]:
    """Return the condition that a row is of the tenant that is meant. `row` has the columns."""
    tenant, name = row.tenant, scope.tenant
    itself: ColumnElement[bool] = tenant == name
    if scope.covers == OWN:
        return itself
    by_name = and_(tenant >= name + SLASH, tenant < name + _AFTER_SLASH)
    return or_(
        itself,
        by_name,
        _has(row.tenant_above, BETWEEN + name + BETWEEN),
        _has(row.tenant_above, BETWEEN + name + SLASH),
    )


def is_of_all(row: Any, *scopes: TenantScope | None) -> list[ColumnElement[bool]]:
    """Return the conditions that a row is of each of these; None stands for no condition."""
    return [is_of(row, scope) for scope in scopes if scope is not None]


def is_of_any(row: Any, scopes: Iterable[TenantScope]) -> ColumnElement[bool]:
    """Return the condition that a row is of one of these."""
    return or_(false(), *(is_of(row, scope) for scope in scopes))


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
    return and_(true(), *(is_of_any(row, any_of) for any_of in question.scopes))


def _has(column: ColumnElement[str], text: str) -> ColumnElement[bool]:
    """Return the condition that a column contains a text; false for NULL."""
    # Both databases have `replace`; the functions that look for a text have other names in each.
    return and_(column.is_not(None), func.replace(column, text, "") != column)
