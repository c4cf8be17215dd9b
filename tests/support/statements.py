"""Count what is asked of a ledger: the measure of work that does not depend on the machine."""

import contextlib
from collections.abc import Callable, Iterator
from typing import Any

import sqlalchemy


@contextlib.contextmanager
def statements() -> Iterator[list[str]]:
    """Collect the SQL that this process sends meanwhile, by the hook of SQLAlchemy's engines."""
    seen: list[str] = []

    def asked(_connection: Any, _cursor: Any, statement: str, *_more: Any) -> None:
        seen.append(statement)

    sqlalchemy.event.listen(sqlalchemy.Engine, "before_cursor_execute", asked)
    try:
        yield seen
    finally:
        sqlalchemy.event.remove(sqlalchemy.Engine, "before_cursor_execute", asked)


def asked_by(read: Callable[..., object], **options: object) -> int:
    """Count the statements of a reading; one that waits for a bill asks for it again and again."""
    with statements() as asked:
        read(**options)
    return len(asked)
