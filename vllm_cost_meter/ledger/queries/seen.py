"""Which tenants and tags the ledger has ever seen.

What had a bill has a group in the sums, whatever became of its row since: the groups are few. A
request that never reached an engine is looked for in an index.

Invariant: a tenant or tag of any bill that ever came is seen.
"""

from collections.abc import Iterable

import orjson
from sqlalchemy import and_, or_, select
from sqlalchemy.engine import Connection

from vllm_cost_meter.ledger.schema import http_requests, open_requests, rollup_groups
from vllm_cost_meter.records.owner import SLASH

# In the order of characters it comes right after the slash.
_AFTER_SLASH = chr(ord(SLASH) + 1)


def unseen(connection: Connection, names: Iterable[str]) -> list[str]:
    """Return those names of which no request ever was, nor of a child PARENT/CHILD of them."""
    return [name for name in dict.fromkeys(names) if not _is_seen(connection, name)]


def _is_seen(connection: Connection, name: str) -> bool:
    for table in (rollup_groups, http_requests):
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
    for table in (rollup_groups, open_requests):
        like = select(table.c.tags).where(table.c.tags.contains(text, autoescape=True))
        # SQLite takes small and capital letters for the same.
        if any(text in tags for tags in connection.execute(like).scalars()):
            return True
    return False
