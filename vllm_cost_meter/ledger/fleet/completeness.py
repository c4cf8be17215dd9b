"""Whether a fleet's database has all that its servers' ledgers have, run by run.

A snapshot says the number of the last bill that it counts, and what the bills add up to. So a run
of which every number is there, with that sum, is whole up to its last snapshot. An outbox is sent
in order: a ledger that has sent anything since a run died has sent all that it has of that run. Of
a run that died together with its ledger, nobody knows whether there were more bills.

Clocks of other machines decide nothing: what came, and how long ago, is by the database's own.

Invariant: a run is called complete only if the fleet has every bill that its server's ledger has.
"""

from collections.abc import Collection, Mapping, Sequence
from typing import Any, NamedTuple

from sqlalchemy import cast, func, lateral, select, true
from sqlalchemy.engine import Connection
from sqlalchemy.types import Float

from vllm_cost_meter.ledger import schema
from vllm_cost_meter.ledger.fleet.schema import (
    TOLD,
    has_fleet,
    now_text,
    run_senders,
    senders,
    shipments,
)
from vllm_cost_meter.ledger.queries.answers import AuditRun, FleetAudit, FleetRun, RunState
from vllm_cost_meter.ledger.queries.cut import DEAD_AFTER_NS
from vllm_cost_meter.units.time import NS_PER_SECOND

_DEAD_AFTER_S = DEAD_AFTER_NS / NS_PER_SECOND
# A shipment may be so many intervals late, and more, before its sender counts as silent.
_INTERVALS = 3
# So many runs that are not complete are named.
NAMED_MAX = 1_000


class _Sender(NamedTuple):
    """A sender: its machine, its last shipment by its own clock, and whether it still sends."""

    host: str
    sent_at: str
    is_heard: bool


def alive_in(connection: Connection) -> Collection[str]:
    """Return the runs of a fleet that were told of just now; none in a ledger."""
    if connection.dialect.name != "postgresql" or not has_fleet(connection):
        return ()
    told = TOLD[schema.snapshots.name].c
    latest = lateral(
        select(told.told_at)
        .where(told.run_id == schema.runs.c.run_id)
        .order_by(told.number.desc())
        .limit(1)
    )
    since = select(func.coalesce(func.max(shipments.c.interval_s), 0.0)).scalar_subquery()
    recent = now_text(_DEAD_AFTER_S + _INTERVALS * cast(since, Float))
    asked = select(schema.runs.c.run_id).join(latest, true()).where(latest.c.told_at >= recent)
    return frozenset(connection.execute(asked).scalars())


def completeness(connection: Connection, runs: Sequence[AuditRun]) -> FleetAudit | None:
    """Return whether a fleet has all of these audited runs; None for a ledger."""
    if connection.dialect.name != "postgresql" or not has_fleet(connection):
        return None
    known = _senders(connection)
    by_run: dict[str, list[_Sender]] = {}
    s = run_senders.c
    for run_id, sender_id in connection.execute(select(s.run_id, s.sender_id)):
        if sender_id in known:
            by_run.setdefault(run_id, []).append(known[sender_id])
    found = [_run(run, by_run.get(run["run_id"], ())) for run in runs]
    incomplete = [run for run in found if run["state"] != "complete"]
    return {
        "senders": len(known),
        "runs": len(found),
        "complete_runs": len(found) - len(incomplete),
        "incomplete": incomplete[:NAMED_MAX],
    }


def _senders(connection: Connection) -> Mapping[str, _Sender]:
    """Return all senders by their names; the last shipment of each is one look into the key."""
    s, c = senders.c, shipments.c
    last = lateral(
        select(c.sent_at, c.received_at, c.interval_s)
        .where(c.sender_id == s.sender_id)
        .order_by(c.first_number.desc())
        .limit(1)
    )
    heard_since = now_text(_DEAD_AFTER_S + _INTERVALS * last.c.interval_s)
    is_heard = last.c.received_at >= heard_since
    asked = select(s.sender_id, s.host, last.c.sent_at, is_heard).join(last, true())
    return {sender_id: _Sender(*rest) for sender_id, *rest in connection.execute(asked)}


def _run(run: AuditRun, tellers: Sequence[_Sender]) -> FleetRun:
    is_heard = any(sender.is_heard for sender in tellers)
    last_word = max((sender.sent_at for sender in tellers), default=None)
    return {
        "run_id": run["run_id"],
        "host": run["host"],
        "state": _state(run, is_heard=is_heard, last_word=last_word),
        "last_seq": run["last_seq"],
        "missing_bills": run["missing_bills"],
        "held_by": sorted({sender.host for sender in tellers}),
        "last_word_at": last_word,
    }


def _state(run: Mapping[str, Any], *, is_heard: bool, last_word: str | None) -> RunState:
    if run["missing_bills"] or run["ledger_difference_ns"]:
        return "arriving" if is_heard else "missing"
    if run["alive"]:
        return "complete"
    # What was sent after the run's last sign of life came behind all of it.
    return "complete" if is_heard or (last_word or "") > run["heard_at"] else "unknown"
