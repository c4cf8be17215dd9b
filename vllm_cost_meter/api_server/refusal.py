"""Replies to a client of the meter's own: the refusal of a request, and the header that warns.

The error has OpenAI's form, so its SDKs raise the same error as for a spent quota. The header
`x-should-retry` keeps them from trying again. For Anthropic's messages the error has Anthropic's
form. docs/howto/budgets.md lists both.

Invariant: a client is told nothing about other tenants.
"""

from dataclasses import dataclass

import orjson

from vllm_cost_meter.tenants.budgets import Standing, Verdict

BAD_REQUEST = 400
UNAUTHORIZED = 401
TOO_MANY_REQUESTS = 429
UNAVAILABLE = 503
# If stale figures become fresh again at all, it takes only a few snapshots.
RETRY_STALE_S = 5

Headers = list[tuple[bytes, bytes]]


@dataclass(frozen=True, slots=True)
class Refusal:
    """A complete HTTP reply that refuses a request."""

    status: int
    headers: Headers
    body: bytes


def refusal(verdict: Verdict, tenant: str, route: str) -> Refusal:
    """Return the reply to a blocked request, or to one refused because figures are stale."""
    standing = verdict.standing
    if standing is None:
        return _reply(
            UNAVAILABLE,
            f"the cost of requests cannot be measured now ({verdict.stale}), and without that"
            f" tenant {tenant!r} is not served; try again later",
            ("service_unavailable", "api_error", "cost_meter_stale"),
            route,
            [(b"retry-after", b"%d" % RETRY_STALE_S)],
        )
    budget = standing.budget
    return _reply(
        TOO_MANY_REQUESTS,
        f"budget {budget.name!r} is used up: {budget.shown(standing.total or 0)} of"
        f" {budget.shown(budget.limit)} in its period ({_period(standing)}); it resets at"
        f" {standing.reset_text()}",
        ("insufficient_quota", "rate_limit_error", "budget_exceeded"),
        route,
        [
            (b"x-should-retry", b"false"),
            (b"x-cost-meter-budget", _header_text(budget.name)),
            (b"x-cost-meter-budget-reset", standing.resets_at().isoformat().encode()),
        ],
    )


def contradicting(route: str) -> Refusal:
    """Return the reply to a request that claims two tenants, where budgets apply.

    Otherwise a client with a spent budget could send two different keys and count as no tenant.
    """
    return _reply(
        BAD_REQUEST,
        "expected one API key and one tenant, got headers that contradict each other: send each"
        " of Authorization, x-api-key and the tenant's header once",
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


def warning(standings: tuple[Standing, ...]) -> Headers:
    """Return the headers that warn of budgets at their soft limit."""
    return [
        (
            b"x-cost-meter-budget-warning",
            _header_text(
                f"{standing.budget.name}: {standing.budget.shown(standing.total or 0)} of"
                f" {standing.budget.shown(standing.budget.limit)} used;"
                f" resets {standing.reset_text()}"
            ),
        )
        for standing in standings
    ]


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
    return Refusal(status, [*first, *headers], body)


def _period(standing: Standing) -> str:
    budget = standing.budget
    return f"the last {budget.days} days" if budget.period == "rolling" else f"the {budget.period}"


def _header_text(text: str) -> bytes:
    # A name may be any printable text, but a header must be ASCII.
    return text.encode("ascii", "replace")
