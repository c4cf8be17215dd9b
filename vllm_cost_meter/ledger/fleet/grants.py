"""Keep who may read and write what while tables and views of a fleet's database are made anew.

Invariant: a role that had a right to a table or a view has it to the one of the same name.
"""

from collections.abc import Iterator
from contextlib import contextmanager
from typing import NamedTuple

from sqlalchemy import text
from sqlalchemy.engine import Connection

# Rights to single columns are of tables that stay.
_GRANTS = text(
    "SELECT c.relname, COALESCE(quote_ident(r.rolname), 'PUBLIC'), a.privilege_type"
    " FROM pg_class c CROSS JOIN LATERAL aclexplode(c.relacl) a"
    " LEFT JOIN pg_roles r ON r.oid = a.grantee"
    " WHERE c.relnamespace = current_schema()::regnamespace AND c.relkind IN ('r', 'p', 'v')"
    " AND a.grantee <> c.relowner ORDER BY 1, 2, 3"
)
_RELATIONS = text(
    "SELECT relname FROM pg_class WHERE relnamespace = current_schema()::regnamespace"
    " AND relkind IN ('r', 'p', 'v')"
)


class _Grant(NamedTuple):
    relation: str
    role: str
    privilege: str


@contextmanager
def grants_kept(connection: Connection) -> Iterator[None]:
    """Give back at the end, within the transaction, all rights to what is made anew meanwhile."""
    before = _grants(connection)
    yield
    there = set(connection.execute(_RELATIONS).scalars())
    quoted = connection.dialect.identifier_preparer.quote
    for grant in sorted(before - _grants(connection)):
        if grant.relation in there:
            connection.exec_driver_sql(
                f"GRANT {grant.privilege} ON {quoted(grant.relation)} TO {grant.role}"
            )


def _grants(connection: Connection) -> set[_Grant]:
    return {_Grant._make(row) for row in connection.execute(_GRANTS)}
