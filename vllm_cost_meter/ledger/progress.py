"""How far each journal is in the ledger, and what of it was lost: rows beside a batch's records.

Invariant: a journal's row names the last of its records that the ledger has, because both are
written in one transaction.
"""

import time
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import NamedTuple

from sqlalchemy import delete, select
from sqlalchemy.engine import Connection

from vllm_cost_meter.journal.reader import Position
from vllm_cost_meter.ledger.inserts import insert_rows
from vllm_cost_meter.ledger.schema import journal_losses, journals
from vllm_cost_meter.units.time import rfc3339

_REASON_CHARS_MAX = 500


class Loss(NamedTuple):
    """Records of a journal that are lost: how many, after which number, and why."""

    journal_id: str
    after: int
    records: int
    reason: str


@dataclass(frozen=True, slots=True)
class JournalProgress:
    """What a batch changes: the positions of journals, losses, and a journal that is gone."""

    positions: Mapping[str, Position]
    losses: Sequence[Loss] = ()
    gone: str | None = None


def read_positions(connection: Connection) -> dict[str, Position]:
    """Return how far the ledger has each journal, by its id."""
    c = journals.c
    return {
        journal_id: Position(segment, offset, number)
        for journal_id, segment, offset, number in connection.execute(
            select(c.journal_id, c.segment, c.offset_bytes, c.number)
        )
    }


def write_progress(connection: Connection, progress: JournalProgress) -> None:
    """Write the rows of a batch's progress into its transaction."""
    now = rfc3339(time.time_ns())
    losses = [
        {
            "journal_id": loss.journal_id,
            "after_number": loss.after,
            "records": loss.records,
            "reason": loss.reason[:_REASON_CHARS_MAX],
            "noticed_at": now,
        }
        for loss in progress.losses
    ]
    insert_rows(connection, journal_losses, losses)
    positions = [
        {
            "journal_id": journal_id,
            "segment": position.segment,
            "offset_bytes": position.offset,
            "number": position.number,
            "applied_at": now,
        }
        for journal_id, position in progress.positions.items()
    ]
    changed = [*progress.positions, *([progress.gone] if progress.gone is not None else [])]
    if changed:
        # A row is written even where nothing in it is new. What a commit waits for the disk for is
        # the log, and a transaction without a change writes none.
        connection.execute(delete(journals).where(journals.c.journal_id.in_(changed)))
    insert_rows(connection, journals, positions)
