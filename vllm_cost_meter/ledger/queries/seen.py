"""Which tenants the ledger has ever seen, each by one look into an index."""

from collections.abc import Iterable

from sqlalchemy import and_, or_, select
from sqlalchemy.engine import Connection

from vllm_cost_meter.ledger.schema import http_requests
from vllm_cost_meter.records.owner import SLASH

# In the order of characters it comes right after the slash.
_AFTER_SLASH = chr(ord(SLASH) + 1)


def unseen(connection: Connection, names: Iterable[str]) -> list[str]:
    """Return those names of which no request ever was, nor of a child PARENT/CHILD of them."""
    return [name for name in dict.fromkeys(names) if not _is_seen(connection, name)]


def _is_seen(connection: Connection, name: str) -> bool:
    tenant = http_requests.c.tenant
    below = and_(tenant >= name + SLASH, tenant < name + _AFTER_SLASH)
    found = select(http_requests.c.http_request_id).where(or_(tenant == name, below)).limit(1)
    return connection.execute(found).first() is not None
