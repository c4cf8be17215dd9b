"""The roles of a fleet's database, by the statements of docs/howto/fleet.md."""

import re

import psycopg

from tests.support.pages import DOCS

_ROLE = re.compile(r"CREATE ROLE (\w+) LOGIN;")


def make_roles(url: str) -> None:
    """Give the roles their rights in a fleet's database. All databases of a server share roles."""
    page = (DOCS / "howto" / "fleet.md").read_text()
    statements = re.findall(r"^    ((?:CREATE ROLE|GRANT|REVOKE) .*;)$", page, re.MULTILINE)
    assert len(statements) == 9
    with psycopg.connect(url.replace("+psycopg", ""), autocommit=True) as connection:
        known = {name for (name,) in connection.execute("SELECT rolname FROM pg_roles")}
        for statement in statements:
            created = _ROLE.fullmatch(statement)
            if created is None or created[1] not in known:
                connection.execute(statement)


def as_role(url: str, role: str) -> str:
    """Return the URL of a database for another role."""
    return url.replace("//meter@", f"//{role}@")
