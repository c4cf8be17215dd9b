"""Replies to a client of the meter's own: the refusal of a request, and the header that warns.

The error has OpenAI's form, so its SDKs raise the same error as for a spent quota. The header
`x-should-retry` keeps them from trying again. For Anthropic's messages the error has Anthropic's
form. docs/howto/budgets.md lists both.

A budget may be used by others too, by its tag or as that of a common parent. Then a client is told
only that there is one and when it resets: its name and its amounts say what the others did. Where
tenants see coarse figures, the amounts are coarse here too (`is_coarse`).

Invariant: a client is told nothing about other tenants.
"""

import orjson

from vllm_cost_meter.exchange import Refusal
from vllm_cost_meter.records.owner import Owner
from vllm_cost_meter.reports.coarse import coarse_use
from vllm_cost_meter.tenants.budgets import Standing, Verdict

BAD_REQUEST = 400
UNAUTHORIZED = 401
TOO_MANY_REQUESTS = 429
UNAVAILABLE = 503
# If stale figures become fresh again at all, it takes only a few snapshots.
RETRY_STALE_S = 5
SHARED = "a budget that you share with others"

# A request that runs may end at any moment.
RETRY_FULL_S = 1

Headers = list[tuple[bytes, bytes]]


def refusal(verdict: Verdict, owner: Owner, route: str, *, is_coarse: bool) -> Refusal:
    """Return the reply to a request that is blocked, one too many, or refused for stale figures."""
    standing = verdict.standing
    if standing is None:
        return _unavailable(verdict, owner, route)
    if verdict.kind == "full":
        return _full(standing, owner, route)
    return _spent(standing, owner, route, is_coarse)


def _unavailable(verdict: Verdict, owner: Owner, route: str) -> Refusal:
    return _reply(
        UNAVAILABLE,
        f"the cost of requests cannot be measured now ({verdict.stale}), and without that"
        f" tenant {owner.tenant!r} is not served; try again later",
        ("service_unavailable", "api_error", "cost_meter_stale"),
        route,
        [(b"retry-after", b"%d" % RETRY_STALE_S)],
    )


def _full(standing: Standing, owner: Owner, route: str) -> Refusal:
    budget = standing.budget
    which, many = f"budget {budget.name!r}", f" ({budget.max_concurrent} at once)"
    headers = [(b"retry-after", b"%d" % RETRY_FULL_S)]
    if budget.is_shared(owner):
        which, many = SHARED, ""
    else:
        headers.append((b"x-cost-meter-budget", _header_text(budget.name)))
    return _reply(
        TOO_MANY_REQUESTS,
        f"{which} has as many requests running as it allows{many}; try again when one has ended",
        ("requests", "rate_limit_error", "rate_limit_exceeded"),
        route,
        headers,
    )


def _spent(standing: Standing, owner: Owner, route: str, is_coarse: bool) -> Refusal:
    budget = standing.budget
    headers = [(b"x-should-retry", b"false")]
    if budget.is_shared(owner):
        what = f"{SHARED} is used up"
    else:
        what = (
            f"budget {budget.name!r} is used up: {_use(standing, is_coarse)} in its period"
            f" ({_period(standing)})"
        )
        headers.append((b"x-cost-meter-budget", _header_text(budget.name)))
    headers.append((b"x-cost-meter-budget-reset", standing.resets_at().isoformat().encode()))
    return _reply(
        TOO_MANY_REQUESTS,
        f"{what}; it resets at {standing.reset_text()}",
        ("insufficient_quota", "rate_limit_error", "budget_exceeded"),
        route,
        headers,
    )


def contradicting(route: str) -> Refusal:
    """Return the reply to a request whose credentials name two tenants.

    Serving it would bill one of them, or nobody, by our guess.
    """
    return _reply(
        BAD_REQUEST,
        "expected one API key and one tenant, got headers that contradict each other: send each"
        " of Authorization, x-api-key and the gateway's headers once",
        ("invalid_request_error", "invalid_request_error", "contradicting_credentials"),
        route,
        [],
    )


def unauthorized(message: str, route: str) -> Refusal:
    """Return the reply to a request without a credential that is needed; `message` says which."""
    return _reply(
        UNAUTHORIZED,
        message,
        ("invalid_request_error", "authentication_error", "invalid_api_key"),
        route,
        [(b"www-authenticate", b"Bearer")],
    )


def warning(standings: tuple[Standing, ...], owner: Owner, *, is_coarse: bool) -> Headers:
    """Return the headers that warn of budgets at their soft limit."""
    return [
        (b"x-cost-meter-budget-warning", _header_text(_warning(standing, owner, is_coarse)))
        for standing in standings
    ]


def _warning(standing: Standing, owner: Owner, is_coarse: bool) -> str:
    budget = standing.budget
    if budget.is_shared(owner):
        return f"{SHARED} is nearly used up; resets {standing.reset_text()}"
    return f"{budget.name}: {_use(standing, is_coarse)} used; resets {standing.reset_text()}"


def _use(standing: Standing, is_coarse: bool) -> str:
    """Return what is used of a budget, and its limit."""
    budget, used = standing.budget, standing.total or 0
    if is_coarse:
        used = coarse_use(used, budget.unit, budget.limit)
    return f"{budget.shown(used)} of {budget.shown(budget.limit)}"


def _reply(
    status: int, message: str, names: tuple[str, str, str], route: str, headers: Headers
) -> Refusal:
    """Return a reply; `names` are OpenAI's type, Anthropic's type, and the code."""
    openai_type, anthropic_type, code = names
    error = {"message": message, "type": openai_type, "param": None, "code": code}
    content: dict[str, object] = {"error": error}
    if route == "/v1/messages":
        content = {"type": "error", "error": {**error, "type": anthropic_type}}
    body = orjson.dumps(content)
    first = [(b"content-type", b"application/json"), (b"content-length", b"%d" % len(body))]
    return Refusal(status, [*first, *headers], body, message)


def _period(standing: Standing) -> str:
    budget = standing.budget
    if budget.period != "rolling":
        return f"the {budget.period}"
    return "the last day" if budget.days == 1 else f"the last {budget.days} days"


def _header_text(text: str) -> bytes:
    # A name may be any printable text, but a header must be ASCII.
    return text.encode("ascii", "replace")
