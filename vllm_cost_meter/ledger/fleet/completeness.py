"""Whether a fleet's database has all that its servers' ledgers have, run by run.

A snapshot says the number of the last bill that it counts, and what the bills add up to. So a run
of which every number is there, with that sum, is whole up to its last snapshot. Whether there were
later bills:

- While an engine lives and its server sends, they are on their way.
- A server that stops says that it has sent everything.
- A ledger that has sent all it held at an instant when a run was dead has sent all that it has of
  that run. An engine tells of itself each second: it was dead if it said nothing for long. Until
  then a server that sends again, after a run died, may still hold bills of it.
- Of a run that died together with its server, nobody knows.

Clocks of other machines decide nothing: what came, and how long ago, is by the database's own.

Invariant: a run is called complete only if the fleet has every bill that its server's ledger has.
"""

from collections.abc import Collection, Mapping, Sequence
from typing import Any, NamedTuple

from sqlalchemy import exists, func, lateral, select, true
from sqlalchemy.engine import Connection

from vllm_cost_meter.ledger import schema
from vllm_cost_meter.ledger.fleet.rows.unsent import unsent_in
from vllm_cost_meter.ledger.fleet.schema import (
    INTERVAL_MAX_S,
    NEVER,
    TOLD,
    has_fleet,
    latest_shipment,
    now_text,
    run_senders,
    sender_ends,
    senders,
    shipments,
)
from vllm_cost_meter.ledger.queries.answers import AuditRun, FleetAudit, FleetRun, RunState
from vllm_cost_meter.ledger.queries.cut import DEAD_AFTER_NS
from vllm_cost_meter.units.time import NS_PER_SECOND, rfc3339, unix_ns_of

_DEAD_AFTER_S = DEAD_AFTER_NS / NS_PER_SECOND
# An engine tells of itself each second. So a sender is silent if nothing came for two of its
# intervals and a moment; its engines may live for longer than that without a word.
_INTERVALS = 2
_MOMENT_S = 2.0
# So many runs that are not complete are named.
NAMED_MAX = 1_000


class _Sender(NamedTuple):
    """A sender: its machine, until when the fleet has all of it, and what may still come from it.

    `sent_at` is by its own clock. `is_heard` is whether it still sends, `has_more` whether its
    ledger held more than it had sent, and `has_ended` whether it said that this was all.
    """

    host: str
    sent_at: str
    is_heard: bool
    has_more: bool
    has_ended: bool


def alive_in(connection: Connection) -> Collection[str]:
    """Return the runs of a fleet that were told of just now; none in a ledger."""
    if connection.dialect.name != "postgresql" or not has_fleet(connection):
        return ()
    told = TOLD[schema.snapshots.name].c
    recent = now_text(_DEAD_AFTER_S + _INTERVALS * INTERVAL_MAX_S)
    asked = select(told.run_id).where(told.told_at >= recent).distinct()
    return frozenset(connection.execute(asked).scalars())


def rowless_in(connection: Connection) -> Collection[str]:
    """Return the runs of which a fleet lacks rows of requests; none in a ledger."""
    if connection.dialect.name != "postgresql" or not has_fleet(connection):
        return ()
    kept_away = connection.exec_driver_sql("SELECT run_id FROM rowless_runs").scalars()
    return {*kept_away, *(unsent["run_id"] for unsent in unsent_in(connection))}


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
        "unsent": unsent_in(connection),
    }


def _senders(connection: Connection) -> Mapping[str, _Sender]:
    """Return all senders by their names; the last shipment of each is one look into the key."""
    s, c = senders.c, shipments.c
    latest = latest_shipment(s.sender_id, c.sent_at, c.received_at, c.interval_s, c.last_number)
    last, before = lateral(latest), lateral(latest.offset(1))
    # A shipment that leaves something behind repeats what the one before it says.
    has_more = last.c.sent_at == func.coalesce(before.c.sent_at, NEVER)
    heard_since = now_text(_MOMENT_S + _INTERVALS * last.c.interval_s)
    is_heard = last.c.received_at >= heard_since
    e = sender_ends.c
    has_ended = exists().where(e.sender_id == s.sender_id, e.last_number == last.c.last_number)
    asked = (
        select(s.sender_id, s.host, last.c.sent_at, is_heard, has_more, has_ended)
        .select_from(senders)
        .join(last, true())
        .join(before, true(), isouter=True)
    )
    return {sender_id: _Sender(*rest) for sender_id, *rest in connection.execute(asked)}


def _run(run: AuditRun, tellers: Sequence[_Sender]) -> FleetRun:
    # What a run left behind may come late, and makes its engine look alive.
    is_followed = run["alive"] and any(
        sender.is_heard and not sender.has_more for sender in tellers
    )
    is_known = is_followed or any(sender.has_ended for sender in tellers)
    is_heard = any(sender.is_heard for sender in tellers)
    last_word = max((sender.sent_at for sender in tellers), default=None)
    return {
        "run_id": run["run_id"],
        "host": run["host"],
        "state": _state(run, last_word, is_heard=is_heard, is_known=is_known),
        "last_seq": run["last_seq"],
        "missing_bills": run["missing_bills"],
        "held_by": sorted({sender.host for sender in tellers}),
        "last_word_at": last_word,
    }


def _state(
    run: Mapping[str, Any], last_word: str | None, *, is_heard: bool, is_known: bool
) -> RunState:
    """Return the state of a run; `is_known` says whether its server's word covers all of it."""
    if run["missing_bills"] or run["ledger_difference_ns"]:
        return "arriving" if is_heard else "missing"
    if is_known:
        return "complete"
    dead_at = rfc3339(unix_ns_of(run["heard_at"]) + DEAD_AFTER_NS)
    if not run["alive"] and last_word is not None and last_word > dead_at:
        return "complete"
    return "arriving" if is_heard else "unknown"
