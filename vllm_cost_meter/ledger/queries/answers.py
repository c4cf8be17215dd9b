"""Answer types of audits and cost models: each JSON field, its meaning and its unit.

A docstring below a field is its description; unknown is null.

Invariant: an answer has these fields and no other.
"""

from typing import Literal

from typing_extensions import TypedDict

from vllm_cost_meter.reports.answers import AfterCut
from vllm_cost_meter.reports.request_answers import ModelInUse


class LostRequest(TypedDict):
    """A request that a dead engine had in flight and never billed."""

    request_id: str
    """vLLM's internal id of the engine request."""
    http_request_id: str | None
    """The meter's own id of the exchange; null if the API server never announced it."""
    tenant: str | None
    """The tenant who sent it; null if the API server never announced it."""
    gpu_time_ns: int | None
    """GPU-ns: the GPU time that it had used; null if no snapshot has it."""
    as_of: str | None
    """RFC 3339 UTC: the engine's last snapshot, which the figure is from."""


class UnbilledReply(TypedDict):
    """An HTTP request that ended as an engine died, and of which the ledger has no bill."""

    http_request_id: str
    """The meter's own id of the exchange."""
    tenant: str
    """The tenant who sent it."""
    route: str
    """The route that was asked."""
    status: int
    """The HTTP status of the reply; 499 if the client left before."""
    gpu_time_ns: int | None
    """GPU-ns: what its client was told; null if nothing was."""
    started_at: str
    """RFC 3339 UTC: when the request came."""
    finished_at: str
    """RFC 3339 UTC: when the reply ended."""


class AuditRun(TypedDict):
    """The audit of one engine run at its cut: each class of time, each difference."""

    run_id: str
    """The id of the engine run, which is new whenever an engine process starts."""
    engine_index: int
    """The data-parallel rank of the engine, from 0."""
    model: str
    """The name that the model is served by."""
    host: str
    """The name of the machine that the engine runs on."""
    started_at: str
    """RFC 3339 UTC: creation of the engine process."""
    state: str
    """Whether the meter works in this engine: `on`, or `off` after too many errors."""
    alive: bool
    """Whether the engine lives: a snapshot came in the last 15 s, or its server knows that it
    runs."""
    taken_at: str | None
    """RFC 3339 UTC: the last snapshot, which is the cut of a living run."""
    heard_at: str
    """RFC 3339 UTC: when the run is last known to have lived: its last snapshot or last bill."""
    wall_ns: int
    """Wall ns: the time from the creation of the engine process to the last snapshot."""
    gpus: int
    """Number of GPUs the engine uses: its `world_size`."""
    requests_ns: int
    """GPU-ns: the time billed to requests."""
    in_flight_ns: int
    """GPU-ns: the time used by requests that have no bill yet."""
    idle_ns: int
    """GPU-ns: the time in which the engine was awake and held no unfinished request."""
    sleep_ns: int
    """GPU-ns: the time that the engine spent in vLLM's sleep mode."""
    startup_ns: int
    """GPU-ns: the time that the engine took to start, until its scheduler was made."""
    tail_ns: int
    """GPU-ns: the time in which steps still ran for requests that already had their bill."""
    dummy_ns: int
    """GPU-ns: the time of data-parallel dummy batches, which hold no request."""
    recomputed_ns: int
    """GPU-ns: the time in which requests computed again what a preemption threw away, where the
    operator pays for it."""
    host_ns: int
    """GPU-ns: the time in which requests waited and no step ran: vLLM's work between steps."""
    lost_ns: int
    """GPU-ns: the time that is known to be missing from bills, after an error or a crash."""
    difference_ns: int
    """GPU-ns: `wall_ns` x `gpus` less all classes."""
    billed_ns: int
    """GPU-ns: the sum of all bills up to the last snapshot, as the engine counted it."""
    billed_difference_ns: int
    """GPU-ns: the class `requests` of the last snapshot less `billed_ns`."""
    ledger_ns: int
    """GPU-ns: the sum of the bills that the ledger holds up to the last snapshot."""
    ledger_difference_ns: int
    """GPU-ns: `billed_ns` less `ledger_ns`."""
    snapshot_seq: int
    """The number of the last bill that the last snapshot counts."""
    last_seq: int
    """The number of the run's last bill up to the cut: of a dead run, of its last bill."""
    last_bills: int
    """Number of bills of a dead run after its last snapshot; 0 while it lives."""
    last_bills_ns: int
    """GPU-ns: the time of these bills, which is part of `requests_ns`."""
    last_bills_in_flight_ns: int
    """GPU-ns: the part of it that the snapshot had in flight; the rest is beyond `wall_ns`."""
    missing_bills: list[str]
    """The numbers of bills that the ledger lacks, as text: `"7"`, `"9-12"`."""
    uneven_bills: int | None
    """Number of bills that are not the sum of their pieces by hour; null if the bills were not
    read."""
    changed: bool | None
    """Whether any bill is not as it was written; null if the bills were not read."""
    sums_difference_ns: int
    """GPU-ns: how far the sums that reports read are from the bills, in all by day; in a full audit
    hour by hour."""
    sums_difference_block_ms: int | None
    """Blocks x ms: how far the KV residency in these sums is from that of the bills, hour by hour;
    null if the bills were not read."""
    hours_difference_ns: int
    """GPU-ns: how far the hours are from the totals, summed over all classes."""
    energy_mj: int | None
    """mJ: the energy of the run's GPUs up to the cut; null if it is not read."""
    energy_difference_mj: int | None
    """mJ: `energy_mj` less the energy of the requests in the ledger and of all classes."""
    in_flight_difference_ns: int
    """GPU-ns: `in_flight_ns` less what each open request had used and the step that ran."""
    running: int
    """Number of requests that the engine ran at the last snapshot."""
    waiting: int
    """Number of requests that waited in the engine at the last snapshot."""
    lost_requests: list[LostRequest]
    """The requests that were open when the engine died; empty while it lives."""
    lost_requests_ns: int | None
    """GPU-ns: the time that all lost requests had used; 0 if it lives, null if unknown."""
    lost_step_ns: int | None
    """GPU-ns: the time of the step at a dead engine's last snapshot, as far as no last bill has
    it; null if unknown."""
    unbilled_replies: list[UnbilledReply]
    """HTTP requests without a bill that ended as the engine died, in whichever engine they were,
    besides those in `lost_requests`; empty while it lives."""
    balanced: bool
    """Whether every difference is 0 and no bill is missing."""


class AuditWithoutTotals(TypedDict):
    """A run that has bills and no snapshot, so that nothing can be held against its bills."""

    run_id: str
    """The id of the engine run."""
    started_at: str
    """RFC 3339 UTC: when its first billed request came."""
    finished_at: str
    """RFC 3339 UTC: when its last bill came."""
    bills: int
    """Number of bills that the ledger holds."""
    ledger_ns: int
    """GPU-ns: the sum of these bills."""
    last_seq: int
    """The number of the last bill."""
    missing_bills: list[str]
    """The numbers of bills that the ledger lacks up to the last one, as text."""
    uneven_bills: int | None
    """Number of bills that are not the sum of their pieces by hour; null if the bills were not
    read."""
    changed: bool | None
    """Whether any bill is not as it was written; null if the bills were not read."""
    sums_difference_ns: int
    """GPU-ns: how far the sums that reports read are from the bills, in all by day; in a full audit
    hour by hour."""
    sums_difference_block_ms: int | None
    """Blocks x ms: how far the KV residency in these sums is from that of the bills, hour by hour;
    null if the bills were not read."""


class JournalLoss(TypedDict):
    """Records of a journal that are lost: they were damaged, or no ledger can take them."""

    journal_id: str
    """The journal's random name."""
    after_number: int
    """The number of the record before the first that is lost."""
    records: int
    """How many are lost."""
    reason: str
    """What was found, in one line."""
    noticed_at: str
    """RFC 3339 UTC: when it was noticed."""


class SetAsideFile(TypedDict):
    """A damaged file of the ledger that was set aside: the ledger may lack what it holds."""

    file: str
    """Its name, in the folder where the ledger was then."""
    reason: str
    """Why it is there, and what to run, in one line."""
    noticed_at: str
    """RFC 3339 UTC: when the ledger took its place."""


RunState = Literal["complete", "arriving", "missing", "unknown"]


class FleetRun(TypedDict):
    """A run of which a fleet's database may not have everything."""

    run_id: str
    """The id of the engine run."""
    host: str
    """The name of the machine that the engine runs on."""
    state: RunState
    """`arriving`: bills are missing, or the run ended and later ones may be, and their server still
    sends; `missing`: bills are missing, and their server is silent; `unknown`: every bill up to the
    last snapshot is here, but its server has been silent since, so there may have been later
    ones."""
    last_seq: int
    """The number of the last bill that is known."""
    missing_bills: list[str]
    """The numbers of bills that are not here, as text: `"7"`, `"9-12"`."""
    held_by: list[str]
    """The names of the machines whose ledgers have sent of this run: they hold what is missing."""
    last_word_at: str | None
    """RFC 3339 UTC: until when the fleet has all of these ledgers, by their own clocks."""


class UnsentBills(TypedDict):
    """Bills of a run whose rows were dropped before the fleet got them."""

    run_id: str
    """The id of the engine run."""
    host: str
    """The name of the machine whose ledger dropped them."""
    bills: int
    """How many there are. What they add up to is here."""
    first_seq: int
    """The number of the first of these bills."""
    last_seq: int
    """The number of the last of these bills."""
    noticed_at: str
    """When that was noticed, by the clock of the database."""


class FleetAudit(TypedDict):
    """Whether a fleet's database has all that its servers' ledgers have."""

    senders: int
    """Number of ledgers that send; one that was restored or copied counts once for each name."""
    runs: int
    """Number of engine runs with totals."""
    complete_runs: int
    """Number of runs of which every bill is here, and they add up to what the engine counted."""
    incomplete: list[FleetRun]
    """The other runs, up to 1,000."""
    unsent: list[UnsentBills]
    """Bills of which only what they add up to is here: the ledger of their server dropped their
    rows before it sent them."""


class Audit(TypedDict):
    """The audit of all runs: whether the books of every engine balance."""

    balanced: bool | None
    """Whether the books of all runs balance; null if the ledger cannot tell, and no difference is
    known."""
    reason: Literal["no_runs", "no_totals", "not_applied", "set_aside", "not_sent"] | None
    """Why `balanced` is null: no engine run is in the ledger; of a run that has bills no totals are
    known, so that nothing can be held against them; journals hold what the ledger lacks; a damaged
    file does, or the ledger of a fleet's server, so that bills which are missing here may be
    there."""
    full: bool
    """Whether every bill was read, or only the sums kept with the bills: what was changed from
    outside is found by a full audit."""
    rows_kept_from: str | None
    """Rows of requests that ended before this instant were dropped, and count by what they added up
    to; null if none were."""
    fleet: FleetAudit | None
    """Whether all has come that the servers' ledgers have; null for a ledger that is no fleet's."""
    runs: list[AuditRun]
    """The audit of each run with a snapshot."""
    without_totals: list[AuditWithoutTotals]
    """The runs that have bills and no snapshot."""
    after_cut: AfterCut
    """Number and GPU time of bills that no snapshot, and so no run's audit, counts yet."""
    not_applied_records: int | None
    """Number of records in journals that the ledger lacks; null if they cannot be counted."""
    set_aside: list[SetAsideFile]
    """Damaged files that were set aside and are not merged back yet."""
    journal_losses: list[JournalLoss]
    """What journals held and nobody can read any more, or no ledger can take; then the books do not
    balance."""


class CostModelRow(ModelInUse):
    """A cost model: what the steps of an engine run cost, as the run has learnt."""

    run_id: str
    """The id of the engine run that learnt it."""
    engine_index: int
    """The data-parallel rank of the engine, from 0."""
    model: str
    """The name that the model is served by."""
    hardware: str
    """Name of the GPU, or of the CPU."""
    parallelism: str
    """How the model is spread over the GPUs: tensor, pipeline and other parallelism."""
    method: str
    """How the time of a step is split between its requests: `shapley`, `tokens` or `equal`."""
    prior: str
    """Where the model started: `ledger` (an earlier fit), `ModelMetrics` or `tokens`."""
    error_two_planes: float
    """The mean relative error of the form with two planes."""
    error_other_form: float
    """The mean relative error of the curve, or before there were curves of one plane."""
