"""Until when a question may take the database's time, and the end of its queries after that.

The deadline stands in the context of whoever asks. SQLite asks for it every few thousand steps of a
query and then stops the query; PostgreSQL gets what is left of the time with each transaction. So a
question that nobody waits for any more costs nothing more.

Invariant: without a deadline nothing is bounded, and a connection keeps no deadline of a question
before.
"""

import time
from collections.abc import Iterator
from contextlib import contextmanager
from contextvars import ContextVar
from typing import Any

from sqlalchemy.engine import Connection

from vllm_cost_meter.errors import OverdueError

# Some 0.1 ms: often enough to end in time, seldom enough to cost nothing.
STEPS_BETWEEN_LOOKS = 10_000


class Deadline:
    """The end of the time that one question may take. Any thread may ask, or end it at once."""

    __slots__ = ("_at_s", "limit_s")

    def __init__(self, limit_s: float) -> None:
        self.limit_s = limit_s
        self._at_s = time.monotonic() + limit_s

    @property
    def remaining_s(self) -> float:
        """Seconds that are left, 0 after the deadline."""
        return max(self._at_s - time.monotonic(), 0.0)

    @property
    def is_over(self) -> bool:
        """Whether no time is left."""
        return time.monotonic() >= self._at_s

    def end(self) -> None:
        """Leave no time: nobody waits any more."""
        self._at_s = 0.0

    def check(self) -> None:
        """Raise OverdueError if no time is left."""
        if self.is_over:
            raise OverdueError(
                f"the question took longer than {self.limit_s:g} s and was ended; ask for a"
                " shorter window, or set COST_METER_QUESTION_TIMEOUT_S"
            )


deadline: ContextVar[Deadline | None] = ContextVar("cost_meter_deadline", default=None)


@contextmanager
def bounded(connection: Connection) -> Iterator[None]:
    """End the queries of this connection at the deadline. Raises OverdueError after it."""
    until = deadline.get()
    if until is None:
        yield
        return
    until.check()
    if connection.dialect.name == "postgresql":
        left_ms = max(int(until.remaining_s * 1000), 1)
        connection.exec_driver_sql(f"SET LOCAL statement_timeout = {left_ms}")
        yield
        return
    sqlite: Any = connection.connection.driver_connection
    sqlite.set_progress_handler(lambda: until.is_over, STEPS_BETWEEN_LOOKS)
    try:
        yield
    finally:
        sqlite.set_progress_handler(None, 0)
