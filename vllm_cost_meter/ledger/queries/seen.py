"""Which tenants and tags the ledger has ever seen.

A tenant takes one look into an index. Tags have none, as few ask for them: the groups of the sums
are read, and then requests until one has it, a second for a million. The rows of a request may have
been dropped; the group of its sums stays.
"""

from collections.abc import Iterable

import orjson
from sqlalchemy import and_, or_, select
from sqlalchemy.engine import Connection

from vllm_cost_meter.ledger.schema import (
    http_requests,
    open_requests,
    requests,
    rollup_groups,
)
from vllm_cost_meter.records.owner import SLASH

# In the order of characters it comes right after the slash.
_AFTER_SLASH = chr(ord(SLASH) + 1)


def unseen(connection: Connection, names: Iterable[str]) -> list[str]:
    """Return those names of which no request ever was, nor of a child PARENT/CHILD of them."""
    return [name for name in dict.fromkeys(names) if not _is_seen(connection, name)]


def _is_seen(connection: Connection, name: str) -> bool:
    for table in (http_requests, rollup_groups):
        tenant = table.c.tenant
        below = and_(tenant >= name + SLASH, tenant < name + _AFTER_SLASH)
        found = select(tenant).where(or_(tenant == name, below)).limit(1)
        if connection.execute(found).first() is not None:
            return True
    return False


def unseen_tags(connection: Connection, tags: Iterable[tuple[str, str]]) -> list[tuple[str, str]]:
    """Return those tags, as (key, value), that no request ever had."""
    return [tag for tag in dict.fromkeys(tags) if not _is_tag_seen(connection, tag)]


def _is_tag_seen(connection: Connection, tag: tuple[str, str]) -> bool:
    # As it stands in the JSON of a row: a key has no quotes, so nothing else reads like this.
    text = orjson.dumps(dict([tag])).decode()[1:-1]
    for table in (rollup_groups, requests, open_requests):
        like = select(table.c.tags).where(table.c.tags.contains(text, autoescape=True))
        # SQLite takes small and capital letters for the same.
        if any(text in tags for tags in connection.execute(like).scalars()):
            return True
    return False
