"""The shapes of audits and cost models, field by field, with their units: what JSON has.

A docstring below a field is its description; unknown is null.

Invariant: an answer has these fields and no other.
"""

from typing_extensions import TypedDict

from vllm_cost_meter.reports.answers import AfterCut


class LostRequest(TypedDict):
    """A request that a dead engine had in flight and never billed."""

    request_id: str
    """vLLM's internal id."""
    http_request_id: str | None
    """The exchange; null if it was never announced."""
    tenant: str | None
    """Likewise."""
    gpu_time_ns: int
    """GPU-ns: what it had used."""
    as_of: str
    """RFC 3339 UTC: at which snapshot."""


class AuditRun(TypedDict):
    """The books of one engine run at its cut, and every difference in them."""

    run_id: str
    """The engine run."""
    engine_index: int
    """Data-parallel rank."""
    model: str
    """The served name."""
    host: str
    """The name of its machine."""
    started_at: str
    """RFC 3339 UTC: creation of the engine process."""
    state: str
    """`on`, or `off` after too many errors."""
    alive: bool
    """Whether its engine was asked for a snapshot and has not failed, or answered within 15 s."""
    taken_at: str | None
    """RFC 3339 UTC: the cut."""
    wall_ns: int
    """Wall ns: from the creation of the engine process to the cut."""
    gpus: int
    """`world_size` of the engine."""
    requests_ns: int
    """GPU-ns: classes."""
    in_flight_ns: int
    """GPU-ns."""
    idle_ns: int
    """GPU-ns."""
    sleep_ns: int
    """GPU-ns."""
    startup_ns: int
    """GPU-ns."""
    tail_ns: int
    """GPU-ns."""
    dummy_ns: int
    """GPU-ns."""
    host_ns: int
    """GPU-ns."""
    lost_ns: int
    """GPU-ns."""
    difference_ns: int
    """GPU-ns: `wall_ns` x `gpus` less all classes."""
    billed_ns: int
    """GPU-ns: what the engine says it billed."""
    billed_difference_ns: int
    """GPU-ns: `requests_ns` less `billed_ns`."""
    ledger_ns: int
    """GPU-ns: sum of the bills in the ledger up to the cut."""
    ledger_difference_ns: int
    """GPU-ns: `billed_ns` less `ledger_ns`."""
    last_seq: int
    """Number of the last bill up to the cut."""
    missing_bills: list[str]
    """Numbers that the ledger does not hold, as text: `"7"`, `"9-12"`."""
    uneven_bills: int
    """Bills that are not the sum of their pieces by hour."""
    hours_difference_ns: int
    """GPU-ns: how far the hours are from the totals, over all classes."""
    energy_mj: int | None
    """mJ: read of the GPUs up to the cut."""
    energy_difference_mj: int | None
    """mJ: that less the energy of the requests in the ledger and of all classes."""
    in_flight_difference_ns: int
    """GPU-ns: what was in flight, less what each request had used and the step that ran."""
    lost_requests: list[LostRequest]
    """The requests that were open when the engine died; empty while it lives."""
    lost_requests_ns: int | None
    """GPU-ns: what all lost requests had used."""
    lost_step_ns: int | None
    """GPU-ns: of the step that ran at the cut, which was nobody's yet."""
    balanced: bool
    """Whether every difference is 0 and no bill is missing."""


class Audit(TypedDict):
    """Whether the books of every run balance."""

    balanced: bool
    """Whether those of all runs do."""
    runs: list[AuditRun]
    """One for each run."""
    after_cut: AfterCut
    """Bills that no snapshot counts yet."""


class CostModelRow(TypedDict):
    """What the steps of an engine run cost, as it has learnt."""

    run_id: str
    """The engine run."""
    engine_index: int
    """Data-parallel rank."""
    model: str
    """Served name."""
    hardware: str
    """Name of the GPU, or of the CPU."""
    parallelism: str
    """Tensor, pipeline and other parallelism."""
    method: str
    """How its steps are split."""
    prior: str
    """Where the model started: `ledger` (an earlier fit), `ModelMetrics` or `tokens`."""
    version: int
    """0 is the prior."""
    taken_at: str | None
    """RFC 3339 UTC: when a snapshot first told of it."""
    form: str
    """`two planes` (`compute` and `memory`) or `one plane` (`one`)."""
    planes: dict[str, dict[str, float]]
    """GPU-ns: of `compute`, `memory` and `one`: `fixed_ns`, `token_ns`, `sequence_ns`."""
    steps: int
    """Learnt from."""
    error: float
    """Mean relative error of the form in use (MAPE)."""
    error_two_planes: float
    """The mean relative error of the form with two planes."""
    error_one_plane: float
    """The mean relative error of the form with one plane."""
    explained: float
    """Share of the variance of step times that the form in use explains."""
