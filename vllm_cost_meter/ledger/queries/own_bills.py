"""The bills of one tenant, or of all below it too, found without reading those of others.

`usage_pieces` has an index by hour and tenant. So the hours that have any piece are looked up one
after the other, and in each the tenant's pieces: that costs time in proportion to the hours of the
ledger and the tenant's own bills. A bill has at least one piece, so no bill is missed. The tenants
below one are looked up in an index of `requests` by tenant and the tenants above it.

Invariant: a table holds all rows of the tenants that are meant, and a database makes it by index. A
tenant that had other parents in between brings those rows along; `coverage` tells them apart.
"""

import functools
from typing import Any

from sqlalchemy import ColumnElement, FromClause, Select, Subquery, func, select, tuple_

from vllm_cost_meter.ledger.coverage import is_of
from vllm_cost_meter.ledger.schema import requests, usage_pieces
from vllm_cost_meter.records.owner import OWN, TenantScope

# One object for each scope: the parts of a query that ask for it must mean the same table.
_same = functools.lru_cache(maxsize=256)


@_same
def pieces_of(whose: TenantScope | None) -> FromClause:
    """Return `usage_pieces` with the rows of the tenants that are meant; None is all tenants."""
    if whose is None:
        return usage_pieces
    p = usage_pieces.c
    return _made_first(select(usage_pieces).where(p.hour.in_(_hours()), _is_of(whose)))


@_same
def bills_of(whose: TenantScope | None) -> FromClause:
    """Return `requests` with the rows of the tenants that are meant; None is all tenants."""
    if whose is None:
        return requests
    p, r = usage_pieces.c, requests.c
    own = select(p.run_id, p.seq).where(p.hour.in_(_hours()), _is_of(whose))
    return _made_first(select(requests).where(tuple_(r.run_id, r.seq).in_(own)))


def _is_of(whose: TenantScope) -> ColumnElement[bool]:
    p, r = usage_pieces.c, requests.alias("of_tenants").c
    if whose.covers == OWN:
        own: ColumnElement[bool] = p.tenant == whose.tenant
        return own
    return p.tenant.in_(select(r.tenant).where(is_of(r, whose)).distinct())


def _made_first(rows: Select[Any]) -> Subquery:
    """Return a table that a database makes before it joins it; else it would go through all rows.

    The offset is what keeps a planner from mixing both queries.
    """
    return rows.offset(0).subquery()


@functools.cache
def _hours() -> Select[Any]:
    """Select the hours that have any piece. One object: a query may ask for them several times."""
    pieces, later = usage_pieces.alias("first_piece"), usage_pieces.alias("later_piece")
    hours = select(func.min(pieces.c.hour).label("hour")).cte("piece_hours", recursive=True)
    following = select(func.min(later.c.hour)).where(later.c.hour > hours.c.hour).scalar_subquery()
    hours = hours.union_all(select(following).where(hours.c.hour.is_not(None)))
    return select(hours.c.hour).where(hours.c.hour.is_not(None))
