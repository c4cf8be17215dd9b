"""What servers and engines do, as Prometheus metrics.

Names start with `cost_meter_` and do not contain "vllm", because vLLM unregisters metrics that look
like its own. Money and time are counters; request ids are never labels. What bills add up to is in
`owners.py`. An engine tells its totals so far; a counter gets what they grew by. Only the first API
server sees them, so with several of them nothing counts twice.

Invariant: the number of series is bounded, and every caller contains errors raised here.
"""

import math
from bisect import bisect_left
from collections.abc import Mapping, Sequence

from prometheus_client import Counter, Gauge, Histogram

from vllm_cost_meter.records.snapshot import CLASSES, Snapshot
from vllm_cost_meter.tenants.budgets import Standing
from vllm_cost_meter.units.time import NS_PER_SECOND

# Bounds in seconds; on a loaded server TTFT and end-to-end latency reach minutes.
LATENCY_BUCKETS = (0.005, 0.01, 0.025, 0.05, 0.1, 0.25, 0.5, 1, 2.5, 5, 10, 30, 60, 120, 300)
# Bounds in seconds between tokens, from a tiny model's milliseconds to a starved decode.
TOKEN_BUCKETS = (0.001, 0.0025, 0.005, 0.01, 0.02, 0.03, 0.05, 0.075, 0.1, 0.2, 0.5, 1, 5)

MISSES = Counter("cost_meter_reply_misses", "Replies sent without a cost: it was not there in time")
BUDGET_USED = Gauge(
    "cost_meter_budget_used_ratio",
    "The part of a budget that its tenants used in its period; NaN where it is unknown",
    ["budget"],
    multiprocess_mode="mostrecent",
)
REFUSED = Counter(
    "cost_meter_refused_requests",
    "New requests that a budget blocked or throttled, or that were refused for stale figures",
    ["kind", "budget"],
)
ERRORS = Counter("cost_meter_errors", "Errors of the meter itself, contained", ["side"])
LOOP_FAILURES = Counter(
    "cost_meter_loop_failures", "Failed attempts of the meter's background loops", ["loop"]
)
LOOP_FAILING = Gauge(
    "cost_meter_loop_failing",
    "1 while a background loop fails and tries again, 0 while it works",
    ["loop"],
    multiprocess_mode="livemax",
)
API_OFF = Gauge(
    "cost_meter_api_off",
    "1 after the meter switched itself off in an API server",
    multiprocess_mode="livemax",
)
LEDGER_UP = Gauge(
    "cost_meter_ledger_up",
    "1 while the ledger can be written from the journals, 0 while bills wait there",
    multiprocess_mode="mostrecent",
)
LEDGER_FAILURES = Gauge(
    "cost_meter_ledger_failures",
    "Failed attempts to write the ledger since its process began",
    multiprocess_mode="mostrecent",
)
LEDGER_APPLIED = Gauge(
    "cost_meter_ledger_applied_timestamp_seconds",
    "When the ledger last held all that was journaled",
    multiprocess_mode="mostrecent",
)
FLEET_UP = Gauge(
    "cost_meter_fleet_up",
    "1 while the fleet's database can be sent to, 0 while what it is to get waits in the ledger",
    ["database"],
    multiprocess_mode="mostrecent",
)
FLEET_FAILURES = Gauge(
    "cost_meter_fleet_failures",
    "Failed attempts to send to the fleet since its process began",
    ["database"],
    multiprocess_mode="mostrecent",
)
FLEET_WAITING_ROWS = Gauge(
    "cost_meter_fleet_waiting_rows",
    "Transactions of the ledger that the fleet is still to get",
    ["database"],
    multiprocess_mode="mostrecent",
)
FLEET_WAITING_BYTES = Gauge(
    "cost_meter_fleet_waiting_bytes",
    "Bytes that they take in the ledger",
    ["database"],
    multiprocess_mode="mostrecent",
)
FLEET_FIGURES_FRESH = Gauge(
    "cost_meter_fleet_figures_fresh",
    "1 while it is known what other servers have used of a budget, 0 if only what was last known",
    ["budget"],
    multiprocess_mode="livemin",
)
FLEET_FIGURES_AGE = Gauge(
    "cost_meter_fleet_figures_age_seconds",
    "How long ago was read what other servers have used of a budget",
    ["budget"],
    multiprocess_mode="livemax",
)
FLEET_SENT = Gauge(
    "cost_meter_fleet_sent_timestamp_seconds",
    "When the fleet last had all of the ledger",
    ["database"],
    multiprocess_mode="mostrecent",
)
SETTINGS_VERSION = Gauge(
    "cost_meter_settings_version",
    "Version of the fleet's settings that this server uses",
    multiprocess_mode="min",  # of all API servers, the one that is behind
)
FLEET_SETTINGS_VERSION = Gauge(
    "cost_meter_fleet_settings_version",
    "Latest version of the settings in the fleet's database",
    ["database"],
    multiprocess_mode="mostrecent",
)
FLEET_SETTINGS_SEEN = Gauge(
    "cost_meter_fleet_settings_seen_timestamp_seconds",
    "When this server last asked the fleet's database for that version",
    ["database"],
    multiprocess_mode="mostrecent",
)
FLEET_SETTINGS_REFUSED = Gauge(
    "cost_meter_fleet_settings_refused",
    "1 while this server does not take over what the fleet's database has, 0 otherwise",
    ["database"],
    multiprocess_mode="mostrecent",
)
LEDGER_SET_ASIDE = Gauge(
    "cost_meter_ledger_set_aside_files",
    "Damaged files of the ledger that were set aside and are not merged back",
    multiprocess_mode="mostrecent",
)
JOURNAL_BYTES = Gauge(
    "cost_meter_journal_bytes",
    "Space of the journals' segments, the ones being written included",
    multiprocess_mode="mostrecent",
)
WAL_BYTES = Gauge(
    "cost_meter_ledger_wal_bytes",
    "Size of SQLite's write-ahead log",
    multiprocess_mode="mostrecent",
)
FREE_BYTES = Gauge(
    "cost_meter_ledger_free_bytes",
    "Free space on the disk of the journals",
    multiprocess_mode="mostrecent",
)
JOURNAL_IN_SECOND_PLACE = Gauge(
    "cost_meter_journal_in_second_place",
    "API servers whose journal is in the second place, because the first refuses it",
    multiprocess_mode="livesum",
)
JOURNAL_WITHOUT_RESERVE = Gauge(
    "cost_meter_journal_without_reserve",
    "API servers whose journal has no room in reserve for when the disk is full",
    multiprocess_mode="livesum",
)
WAITING_RECORDS = Gauge(
    "cost_meter_journal_waiting_records",
    "Records that wait in memory because no journal takes them",
    multiprocess_mode="livesum",
)
DROPPED_RECORDS = Gauge(
    "cost_meter_journal_dropped_records",
    "Records that no journal could take, or that were too many to wait",
    multiprocess_mode="livesum",
)
ENGINE_SECONDS = Gauge(
    "cost_meter_engine_gpu_seconds",
    "GPU time of the engine's run so far, by class",
    ["engine", "class"],
    multiprocess_mode="mostrecent",
)
ENERGY_JOULES = Gauge(
    "cost_meter_engine_energy_joules",
    "Energy of the engine's run so far, by class; absent where it is unknown",
    ["engine", "class"],
    multiprocess_mode="mostrecent",
)
ENGINE_CLASS_SECONDS = Counter(
    "cost_meter_engine_class_gpu_seconds",
    "GPU time of engines by class; what is in flight counts as of requests",
    ["engine", "class"],
)
ENGINE_CLASS_JOULES = Counter(
    "cost_meter_engine_class_energy_joules",
    "Energy of engines by class, where it is known; what is in flight counts as of requests",
    ["engine", "class"],
)
ENGINE_OWN_SECONDS = Counter(
    "cost_meter_engine_own_seconds", "Time the meter's own hooks took in engines", ["engine"]
)
OWN_SECONDS = Gauge(
    "cost_meter_own_seconds",
    "Time the meter's own hooks took in the engine since its start",
    ["engine"],
    multiprocess_mode="mostrecent",
)
API_OWN_SECONDS = Counter(
    "cost_meter_api_own_seconds", "Time the meter's own hooks took in the API servers"
)
ENGINE_ON = Gauge(
    "cost_meter_engine_on",
    "1 while the engine's meter works, 0 after it switched itself off",
    ["engine"],
    multiprocess_mode="mostrecent",
)
ENGINE_EVENTS = Gauge(
    "cost_meter_engine_events",
    "Odd events of the engine's run so far: equal_split, missed_arrival",
    ["engine", "event"],
    multiprocess_mode="mostrecent",
)
ENGINE_STEPS_IN_FLIGHT = Gauge(
    "cost_meter_engine_steps_in_flight",
    "Engine steps that were scheduled and have no result yet",
    ["engine"],
    multiprocess_mode="mostrecent",
)
ENGINE_AWAKE = Gauge(
    "cost_meter_engine_awake",
    "1 while the engines are awake, 0 while they sleep",
    multiprocess_mode="mostrecent",
)
TTFT = Histogram("cost_meter_ttft_seconds", "Time to first token", buckets=LATENCY_BUCKETS)
# A Histogram would take a microsecond per value, and a step with 256 requests brings 256 values.
INTER_TOKEN = Counter(
    "cost_meter_inter_token_latencies",
    "Output tokens by the upper bound (s) of the time since the token before; not cumulative",
    ["le"],
)
END_TO_END = Histogram(
    "cost_meter_e2e_seconds", "Time from arrival to last token", buckets=LATENCY_BUCKETS
)

# The metrics that name tenants or budgets, or have money; see the setting `tenant_metrics`.
PRIVATE_NAMES = (
    "cost_meter_gpu_seconds",
    "cost_meter_cost_usd",
    "cost_meter_tokens",
    "cost_meter_bills",
    "cost_meter_budget_used_ratio",
    "cost_meter_refused_requests",
    "cost_meter_fleet_figures_fresh",
    "cost_meter_fleet_figures_age_seconds",
)

_INTER_TOKEN_BUCKETS = [INTER_TOKEN.labels(str(bound)) for bound in (*TOKEN_BUCKETS, "+Inf")]


def count_refused(kind: str, budget: str) -> None:
    """Count a request that a budget blocked, throttled or refused; `kind` is the verdict's kind."""
    REFUSED.labels(kind, budget).inc()


def set_ledger(
    *,
    is_up: bool,
    failures: int,
    journal_bytes: int,
    wal_bytes: int,
    free_bytes: int | None,
    applied_at_s: float | None,
    set_aside: int | None,
) -> None:
    """Show how the ledger does; what is unknown is NaN."""
    LEDGER_UP.set(is_up)
    LEDGER_FAILURES.set(failures)
    JOURNAL_BYTES.set(journal_bytes)
    WAL_BYTES.set(wal_bytes)
    FREE_BYTES.set(math.nan if free_bytes is None else free_bytes)
    LEDGER_SET_ASIDE.set(math.nan if set_aside is None else set_aside)
    LEDGER_APPLIED.set(math.nan if applied_at_s is None else applied_at_s)


def set_fleet(
    database: str,
    *,
    is_up: bool,
    failures: int,
    waiting_rows: int,
    waiting_bytes: int,
    sent_at_s: float | None,
) -> None:
    """Show how sending to a fleet's database does; what is unknown is NaN.

    A server without a fleet has no such series: 0 would look like an outage.
    """
    FLEET_UP.labels(database).set(is_up)
    FLEET_FAILURES.labels(database).set(failures)
    FLEET_WAITING_ROWS.labels(database).set(waiting_rows)
    FLEET_WAITING_BYTES.labels(database).set(waiting_bytes)
    FLEET_SENT.labels(database).set(math.nan if sent_at_s is None else sent_at_s)


def set_fleet_settings(
    database: str, *, version: int | None, seen_at_s: float | None, is_refused: bool
) -> None:
    """Show what a fleet's database has of the shared settings; what is unknown is NaN."""
    FLEET_SETTINGS_VERSION.labels(database).set(math.nan if version is None else version)
    FLEET_SETTINGS_SEEN.labels(database).set(math.nan if seen_at_s is None else seen_at_s)
    FLEET_SETTINGS_REFUSED.labels(database).set(is_refused)


def set_settings_version(version: int) -> None:
    """Show which version of the fleet's settings this API server uses."""
    SETTINGS_VERSION.set(version)


def set_journal(waiting: int, dropped: int, *, is_in_second_place: bool, has_reserve: bool) -> None:
    """Show how many records wait in memory or were dropped, and how the journal's disks do."""
    JOURNAL_IN_SECOND_PLACE.set(is_in_second_place)
    JOURNAL_WITHOUT_RESERVE.set(not has_reserve)
    WAITING_RECORDS.set(waiting)
    DROPPED_RECORDS.set(dropped)


def set_budgets(standings: Sequence[Standing]) -> None:
    """Show how much of each budget is used; NaN where that is unknown."""
    for standing in standings:
        total = standing.total
        used = math.nan if total is None else total / standing.budget.limit
        BUDGET_USED.labels(standing.budget.name).set(used)


def set_fleet_figures(standings: Sequence[Standing]) -> None:
    """Show how reliable the part of other servers is in each budget; NaN for an unknown age.

    A budget that counts one server alone has no such series: 0 would look like an outage.
    """
    for standing in standings:
        if (others := standing.others) is None:
            continue
        name, age_ns = standing.budget.name, others.age_ns
        FLEET_FIGURES_FRESH.labels(name).set(others.stale is None)
        age_s = math.nan if age_ns is None else age_ns / NS_PER_SECOND
        FLEET_FIGURES_AGE.labels(name).set(age_s)


def count_miss() -> None:
    """Count a reply that was sent without its cost."""
    MISSES.inc()


def count_own_time(own_ns: int) -> None:
    """Add time that the meter's own hooks took in this API server."""
    API_OWN_SECONDS.inc(own_ns / NS_PER_SECOND)


def count_error(side: str) -> None:
    """Count a contained error of the meter; `side` is engine or API server."""
    ERRORS.labels(side).inc()


def count_loop_failure(loop: str) -> None:
    """Count a failed attempt of a background loop."""
    LOOP_FAILURES.labels(loop).inc()


def set_loop_failing(loop: str, *, is_failing: bool) -> None:
    """Show whether a background loop fails."""
    LOOP_FAILING.labels(loop).set(is_failing)


def set_api_off() -> None:
    """Show that the meter switched itself off in this API server."""
    API_OFF.set(1)


class Growth:
    """What totals of engine runs grow by.

    A total may shrink: of a request that is preempted, time moves to the class of what was in vain.
    It grows again only once it is higher than ever before.
    """

    def __init__(self) -> None:
        self._highest: dict[tuple[str, str], float] = {}

    def of(self, run_id: str, name: str, total: float) -> float:
        """Return by how much a run's total is higher than it ever was."""
        before = self._highest.get((run_id, name), 0.0)
        self._highest[run_id, name] = max(before, total)
        return max(total - before, 0.0)


_GROWTH = Growth()


def count_engine(snapshot: Snapshot, growth: Growth = _GROWTH) -> None:
    """Count what an engine's time and energy have grown by since its last snapshot."""
    engine, run_id = str(snapshot.engine.engine_index), snapshot.run_id
    seconds = {name: getattr(snapshot.totals, name) / NS_PER_SECOND for name in CLASSES}
    joules = {name: mj / 1000 for name, mj in snapshot.energy.classes.items()}
    for counter, unit, totals in (
        (ENGINE_CLASS_SECONDS, "s", seconds),
        (ENGINE_CLASS_JOULES, "J", joules),
    ):
        for name, total in _with_in_flight(totals).items():
            counter.labels(engine, name).inc(growth.of(run_id, f"{name} {unit}", total))
    own_s = snapshot.own_ns / NS_PER_SECOND
    ENGINE_OWN_SECONDS.labels(engine).inc(growth.of(run_id, "own", own_s))


def _with_in_flight(totals: Mapping[str, float]) -> dict[str, float]:
    """Return totals with what is in flight among requests: when it is billed it moves there."""
    found = dict(totals)
    if "requests" in found:
        found["requests"] += found.pop("in_flight", 0.0)
    return found


def set_engine(snapshot: Snapshot) -> None:
    """Set an engine's gauges from a snapshot of its books."""
    engine = str(snapshot.engine.engine_index)
    for name in CLASSES:
        seconds = getattr(snapshot.totals, name) / NS_PER_SECOND
        ENGINE_SECONDS.labels(engine, name).set(seconds)
    for name, mj in snapshot.energy.classes.items():
        ENERGY_JOULES.labels(engine, name).set(mj / 1000)
    OWN_SECONDS.labels(engine).set(snapshot.own_ns / NS_PER_SECOND)
    ENGINE_ON.labels(engine).set(snapshot.state == "on")
    ENGINE_EVENTS.labels(engine, "equal_split").set(snapshot.equal_splits)
    ENGINE_EVENTS.labels(engine, "missed_arrival").set(snapshot.missed_arrivals)
    ENGINE_STEPS_IN_FLIGHT.labels(engine).set(snapshot.steps_in_flight)


def count_inter_token_latencies(seconds: Sequence[float]) -> None:
    """Count one iteration's inter-token latencies, in seconds."""
    counts: dict[int, int] = {}
    for latency in seconds:
        bucket = bisect_left(TOKEN_BUCKETS, latency)
        counts[bucket] = counts.get(bucket, 0) + 1
    for bucket, count in counts.items():
        _INTER_TOKEN_BUCKETS[bucket].inc(count)
