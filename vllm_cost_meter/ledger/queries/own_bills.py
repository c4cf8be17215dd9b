"""The bills of one tenant, or of all below it too, found without reading those of others.

`requests` has an index by tenant: that costs time in proportion to the tenant's own bills. The
tenants below one are looked up, each once, in the groups of the sums: each bill's tenant, with
those above it, has a group. That costs time in proportion to the tenants of the ledger.

Invariant: a table holds all rows of the tenants that are meant, and a database makes it by index. A
tenant that had other parents in between brings those rows along; `coverage` tells them apart.
"""

import functools
from typing import Any

from sqlalchemy import (
    CTE,
    ColumnElement,
    FromClause,
    Select,
    Subquery,
    case,
    cast,
    func,
    literal,
    null,
    select,
    true,
)

from vllm_cost_meter.ledger.coverage import is_of
from vllm_cost_meter.ledger.schema import requests, rollup_groups
from vllm_cost_meter.records.owner import OWN, TenantScope

# One object for each scope: the parts of a query that ask for it must mean the same table.
_same = functools.lru_cache(maxsize=256)


@_same
def bills_of(whose: TenantScope | None, since: str | None = None) -> FromClause:
    """Return `requests` with the rows of the tenants that are meant; None is all tenants.

    Of the rows of some tenants only those are read that ended since an instant, if there is one.
    """
    if whose is None:
        return requests
    own = select(requests).where(may_be_of(requests.c.tenant, whose))
    return _made_first(own if since is None else own.where(requests.c.ended_at >= since))


def may_be_of(tenant: ColumnElement[str], whose: TenantScope | None) -> ColumnElement[bool]:
    """Return a condition on a column of tenants that an index answers: rows that may be meant.

    `coverage.is_of` tells which of these rows are. A tenant below another one has had a bill.
    """
    if whose is None:
        return true()
    if whose.covers == OWN:
        own: ColumnElement[bool] = tenant == whose.tenant
        return own
    owners = _owners().c
    below = select(owners.tenant).where(is_of(owners, whose))
    return tenant.in_(below.union(select(literal(whose.tenant))))


def _made_first(rows: Select[Any]) -> Subquery:
    """Return a table that a database makes before it joins it; else it would go through all rows.

    The offset is what keeps a planner from mixing both queries.
    """
    return rows.offset(0).subquery()


@functools.cache
def _owners() -> CTE:
    """Return a table of each tenant with each of the tenants above it, and once without any.

    From one row the next is found by a look into the index. One object: a query may ask for them
    several times.
    """
    groups = rollup_groups
    first, same, later = (groups.alias(f"{which}_owner") for which in ("first", "same", "later"))
    owners = select(
        func.min(first.c.tenant).label("tenant"),
        cast(null(), first.c.tenant_above.type).label("tenant_above"),
    ).cte("owners", recursive=True)
    above = (
        select(func.min(same.c.tenant_above))
        .where(same.c.tenant == owners.c.tenant)
        .where(same.c.tenant_above > func.coalesce(owners.c.tenant_above, ""))
        .scalar_subquery()
    )
    following = select(func.min(later.c.tenant)).where(later.c.tenant > owners.c.tenant)
    tenant = case((above.is_not(None), owners.c.tenant), else_=following.scalar_subquery())
    return owners.union_all(select(tenant, above).where(owners.c.tenant.is_not(None)))
