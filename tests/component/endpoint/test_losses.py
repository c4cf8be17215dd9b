"""What was lost is told by the side endpoint too, row by row."""

import contextlib
import sqlite3
from typing import Any

from tests.component.endpoint.test_app import make

__all__ = ["make"]


def test_an_audit_tells_what_journals_lost(make: Any) -> None:
    side = make()
    lost = ("3f", 7, 2, "a damaged record", "2027-01-15T08:00:00.000000Z")
    places = ", ".join("?" * len(lost))
    with contextlib.closing(sqlite3.connect(side.path)) as connection, connection:
        connection.execute(f"INSERT INTO journal_losses VALUES ({places})", lost)
    answer = side.get("/cost/audit")
    assert answer.status_code == 200, answer.text
    names = ("journal_id", "after_number", "records", "reason", "noticed_at")
    assert answer.json()["journal_losses"] == [dict(zip(names, lost, strict=True))]
    assert answer.json()["balanced"] is False
