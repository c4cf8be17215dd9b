"""Answer types that only the side endpoint has, and its errors: each JSON field and its meaning.

A docstring below a field is its description. Other answer types are in `ledger` and `reports`.

Invariant: an answer has these fields and no other, and an error has one shape whatever its status.
"""

from typing import Any

from typing_extensions import TypedDict

from vllm_cost_meter.endpoint.questions import QuestionCounts
from vllm_cost_meter.endpoint.shapes import shape_of
from vllm_cost_meter.ledger.queries.answers import CostModelRow
from vllm_cost_meter.reports.answers import Summary, Tenant
from vllm_cost_meter.reports.request_answers import Explanation, RequestWithParts
from vllm_cost_meter.tenants.budgets import BudgetRow


class Health(TypedDict):
    """The answer of `/health`: the endpoint is up."""

    status: str
    """`ok`, whenever the endpoint answers."""
    version: str
    """The version of the cost meter."""


class LoopHealth(TypedDict):
    """How one background loop of the first API server does."""

    loop: str
    """`announce`, `budgets`, `engines`, `poll` or `reload`."""
    state: str
    """`ok`, or `failing` while it tries again."""
    failing_for_s: float | None
    """Seconds since the first failure of this outage; null while it works."""
    failures_in_a_row: int
    """Failed attempts of this outage; 0 while it works."""
    failures: int
    """Failed attempts since the server started."""
    last_error: str | None
    """The latest failure, in one line; null if there was none."""


class SideProcessHealth(TypedDict):
    """How a process of the meter beside the first API server does."""

    process: str
    """`side endpoint`; `ledger` writes it, `budgets` counts them, `fleet` sends the ledger."""
    state: str
    """`ok`; `starting`; `ended` until it is started again; `off` if it is not wanted."""
    pid: int | None
    """Its process id; null while there is none."""
    restarts: int
    """How often it was started again since the server started."""
    last_end: str | None
    """How it ended the last time; null if it never did."""


class FleetSending(TypedDict):
    """How this server's ledger is sent to the fleet."""

    waiting_rows: int
    """Transactions of the ledger that the fleet has not got yet."""
    waiting_bytes: int
    """Bytes of the outbox that these take."""
    sent_at: str | None
    """RFC 3339 UTC: when the fleet last had all of the ledger; null before the first time."""
    failures: int
    """Failed attempts since the server started."""
    last_error: str | None
    """Why the fleet cannot be sent to, in one line; null while it can."""


class MeterHealth(TypedDict):
    """Whether the meter of the first API server works."""

    status: str
    """`ok`, `failing` while a loop or the ledger fails, `off` once the hooks are switched off."""
    errors: int
    """Errors of the hooks that were contained since the server started."""
    waiting: int
    """Records that are not in the ledger yet."""
    dropped: int
    """Records that the ledger could not take, or that were too many to wait."""
    ledger_error: str | None
    """Why the last attempt to write the ledger failed, in one line; null if it worked."""
    loops: list[LoopHealth]
    """Each background loop."""
    side_processes: list[SideProcessHealth]
    """Each process beside the API server."""
    fleet: FleetSending | None
    """How the ledger is sent to the fleet; null where it is sent to none."""


class WholeSummary(Summary):
    """Totals over all engines and requests, and how far the fleet has them."""

    fleet: FleetSending | None
    """How the ledger is sent to the fleet; null where it is sent to none, or none is known of."""


class WholeHealth(MeterHealth):
    """Whether the meter of the first API server works, and how busy the side endpoint is."""

    questions: QuestionCounts
    """The questions that the side endpoint has at hand."""
    version: str
    """The version of the cost meter."""
    ledger: str
    """The ledger's URL, without a password."""
    schema_version: int
    """The version of the ledger's schema that this server writes."""


# The side endpoint of a process that meters nothing.
NO_METER: MeterHealth = {
    "status": "off",
    "errors": 0,
    "waiting": 0,
    "dropped": 0,
    "ledger_error": None,
    "loops": [],
    "side_processes": [],
    "fleet": None,
}


class CostModels(TypedDict):
    """The cost models that engines have learnt."""

    models: list[CostModelRow]
    """The latest cost model of each engine run, or all versions of one run."""


class Budgets(TypedDict):
    """How much of each budget is used."""

    as_of: str | None
    """RFC 3339 UTC: the oldest snapshot that the figures are from; null without any."""
    broken: str | None
    """What is wrong with the meter; null if it works."""
    budgets: list[BudgetRow]
    """Each budget that the asker may see."""


class OwnFigures(Tenant):
    """The usage and cost of the caller's tenant, and the use of its budgets."""

    budgets: list[BudgetRow]
    """Each budget of the tenant, and of all tenants below it."""


class NothingUsed(TypedDict):
    """The same for a tenant that the ledger does not know yet."""

    tenant: str
    """The name of the tenant."""
    covers: str
    """`with_children`: all tenants below it have used nothing either, or `own`."""
    requests: int
    """Number of HTTP requests: 0."""
    gpu_time_ns: int
    """GPU-ns: the GPU time used: 0."""
    budgets: list[BudgetRow]
    """Each budget of the tenant."""


class Matches(TypedDict):
    """The requests that an id means, if it means several."""

    matches: list[RequestWithParts]
    """Each request, with its parts."""


class ExplainedMatches(TypedDict):
    """The explanations of the requests that an id means, if it means several."""

    matches: list[Explanation]
    """The explanation of each request."""


class ErrorDetail(TypedDict):
    """The message, kind and HTTP status of an error."""

    message: str
    """What was expected, what came, and what to do, in one line."""
    type: str
    """`invalid_request`, `not_found`, `unavailable`, `ledger_unavailable` or `internal_error`."""
    code: int
    """The HTTP status, the same as that of the reply."""


class ErrorAnswer(TypedDict):
    """An error; all errors have this shape."""

    error: ErrorDetail
    """The message, kind and HTTP status of the error."""


_ERROR = shape_of(ErrorAnswer)
# Errors that any route may answer with, by status. The routes for one thing have two more below.
ERRORS: dict[int | str, dict[str, Any]] = {
    401: {"model": _ERROR, "description": "No token, or one that nobody has."},
    403: {"model": _ERROR, "description": "The token is not for these figures."},
    422: {"model": _ERROR, "description": "The question is wrong."},
    503: {"model": _ERROR, "description": "The ledger cannot be read now."},
}
NOT_FOUND: dict[int | str, dict[str, Any]] = {
    404: {"model": _ERROR, "description": "The ledger does not hold it."}
}
SEVERAL: dict[int | str, dict[str, Any]] = {
    300: {"model": shape_of(Matches), "description": "The id fits several requests."}
}
SEVERAL_EXPLAINED: dict[int | str, dict[str, Any]] = {
    300: {"model": shape_of(ExplainedMatches), "description": "The id fits several requests."}
}
