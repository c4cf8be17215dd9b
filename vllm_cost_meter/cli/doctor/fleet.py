"""The checks of the fleet: whether its database is reached, what it is to get, what it shares, and
when budgets read it last.

Invariant: an empty database stays empty.
"""

import time

from vllm_cost_meter.api_server.shipping.settings_puller import restored_line
from vllm_cost_meter.cli.doctor.findings import Finding, Outcome, failed, fine
from vllm_cost_meter.cli.doctor.ledger import place_of
from vllm_cost_meter.config.kept_copy import kept_path, read_kept
from vllm_cost_meter.config.settings import Settings
from vllm_cost_meter.errors import LedgerError
from vllm_cost_meter.ledger.database import parse_url, sqlite_path
from vllm_cost_meter.ledger.fleet.opening import (
    fleet_name,
    fleet_there,
    parse_fleet_url,
    shared_store,
)
from vllm_cost_meter.ledger.fleet.sender import sending_state
from vllm_cost_meter.ledger.fleet_use.kept import figures_path, last_read_ns
from vllm_cost_meter.ledger.fleet_use.others import FRESH_S_MIN
from vllm_cost_meter.records.shared_settings import may_follow
from vllm_cost_meter.units.time import NS_PER_SECOND, rfc3339

# More waits only where the database is away, or slower than the server.
WAITING_BYTES_MAX = 64 << 20


def fleet_reached(url: str | None, ledger_url: str) -> Finding:
    """Check that the fleet's database answers, is one of this version, and gets what is new."""
    if url is None:
        return fine("fleet", "none is set: the ledger is sent nowhere")
    shown = parse_fleet_url(url).render_as_string(hide_password=True)
    try:
        is_there = fleet_there(url)
    except LedgerError as error:
        return failed("fleet", str(error))
    made = "is reached" if is_there else "is reached, and empty: the first server makes its tables"
    found = fine("fleet", f"{shown} {made}")
    if place_of(ledger_url).unread is not None:
        return found
    return _with_waiting(found, ledger_url)


def _with_waiting(found: Finding, ledger_url: str) -> Finding:
    try:
        sender, left = sending_state(ledger_url)
    except LedgerError as error:
        return found.and_also(Outcome.WARN, str(error))
    if sender is None:
        return found.and_also(Outcome.OK, "this ledger joins at the next start of its server")
    if sender.joined_at is None:
        return found.and_also(Outcome.WARN, "this ledger has not joined yet")
    outcome = Outcome.WARN if left.content_bytes > WAITING_BYTES_MAX else Outcome.OK
    detail = f"{left.rows:,} transactions ({left.content_bytes:,} bytes) wait to be sent"
    return _with_figures(found.and_also(outcome, detail), ledger_url)


def settings_shared(settings: Settings, ledger_url: str) -> Finding:
    """Compare what this server has of the fleet's settings with what the database has."""
    if not settings.fleet_settings:
        return fine("settings", "those of this environment and file; none are shared")
    version, url = settings.shared_version, settings.fleet
    if ledger_url.startswith("postgresql") or url is None:
        return fine("settings", f"version {version} of the fleet, from its database")
    kept = read_kept(kept_path(settings.ledger))
    if kept is None:
        found = Finding("settings", Outcome.WARN, "no copy is kept yet: a server that starts does")
    else:
        found = fine("settings", f"version {kept.settings.version} of {kept.pulled_at} is kept")
    try:
        with shared_store(url) as store:
            head = store.head()
            digest = store.digest_of(0 if kept is None else kept.settings.version)
            now = store.read()
    except LedgerError as error:
        return found.and_also(Outcome.WARN, str(error))
    if kept is not None and not may_follow(kept.settings, now, digest):
        line = restored_line(fleet_name(url), kept.settings.version, head.version)
        return found.and_also(Outcome.FAIL, line)
    return found.and_also(Outcome.OK, f"the fleet has version {head.version}")


def _with_figures(found: Finding, ledger_url: str) -> Finding:
    """Add how old is what budgets know of other servers; nothing where none was ever read."""
    path = sqlite_path(parse_url(ledger_url))
    try:
        read_at_ns = None if path is None else last_read_ns(figures_path(path, 0))
    except LedgerError as error:
        return found.and_also(Outcome.WARN, str(error))
    if read_at_ns is None:
        return found
    age_s = max(time.time_ns() - read_at_ns, 0) / NS_PER_SECOND
    if age_s <= FRESH_S_MIN:
        return found.and_also(Outcome.OK, "budgets know what other servers have used")
    detail = f"budgets count what other servers had used at {rfc3339(read_at_ns)}, if a server runs"
    return found.and_also(Outcome.WARN, detail)
