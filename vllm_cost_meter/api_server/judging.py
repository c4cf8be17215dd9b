"""Judge a new request: admit it, delay it, warn in its reply, or refuse it.

Invariant: without a budget, without a tenant that fails closed, and with unnamed requests served,
every request is admitted whose credentials do not name two tenants.
"""

import contextlib
from collections.abc import Collection, Sequence
from dataclasses import dataclass

from starlette.types import Scope

from vllm_cost_meter.api_server.access.unnamed import refusal_of_unnamed
from vllm_cost_meter.api_server.admission import Admission, fails_closed
from vllm_cost_meter.api_server.refusal import contradicting, refusal, warning
from vllm_cost_meter.api_server.routes import reaches_engine, route_of, serves_tenants
from vllm_cost_meter.config.settings import Settings
from vllm_cost_meter.exchange import Exchange, Refusal
from vllm_cost_meter.metrics import series
from vllm_cost_meter.records.owner import CONTRADICTION
from vllm_cost_meter.tenants.budgets import Verdict
from vllm_cost_meter.tenants.rules import BodyClaims


@dataclass(frozen=True, slots=True)
class Judged:
    """The decision about a new request; the defaults mean that it is simply admitted."""

    refusal: Refusal | None = None
    delay_s: float = 0.0
    warnings: Sequence[tuple[bytes, bytes]] = ()


ADMITTED = Judged()
_DOWN = Verdict("unavailable", stale="the meter of this server is off")


def route_of_scope(scope: Scope) -> str:
    """Return the ledger's label for the path of a request."""
    return route_of(scope["path"].removeprefix(scope.get("root_path", "")))


async def wait_for_figures(exchange: Exchange | None, admission: Admission | None) -> None:
    """Wait until the budgets that cover a new request were counted once, within a bound."""
    if exchange is not None and admission is not None and reaches_engine(exchange.route):
        await admission.first_figures(exchange.owner)


def judge(exchange: Exchange, admission: Admission | None, settings: Settings) -> Judged:
    """Decide about a new request by its budgets, without any I/O."""
    if exchange.owner == CONTRADICTION and serves_tenants(exchange.route):
        series.count_refused("contradicting", "")
        return Judged(contradicting(exchange.route))
    if admission is None or not reaches_engine(exchange.route):
        return ADMITTED
    verdict = admission.admit(exchange)
    if verdict.kind == "admitted":
        warnings = warning(verdict.soft, exchange.owner, is_coarse=settings.is_coarse)
        return Judged(warnings=warnings)
    if verdict.kind == "throttled":
        return Judged(delay_s=settings.budget_throttle_s)
    return Judged(_refusal(verdict, exchange, settings))


def judge_access(exchange: Exchange, scope: Scope, settings: Settings) -> Judged:
    """Decide whether a new request has the key and the name that the settings demand."""
    return Judged(refusal_of_unnamed(scope, exchange.route, exchange.owner, settings))


def _refusal(verdict: Verdict, exchange: Exchange, settings: Settings) -> Refusal:
    return refusal(verdict, exchange.owner, exchange.route, is_coarse=settings.is_coarse)


def refuse_birth(
    exchange: Exchange | None, admission: Admission | None, settings: Settings
) -> Refusal | None:
    """Return the reply to a request that may have no further engine request, None if it may.

    From then on it is the reply of the exchange.
    """
    if exchange is None or admission is None:
        return None
    verdict = admission.refused_birth(exchange)
    if verdict is None:
        return None
    exchange.refusal = _refusal(verdict, exchange, settings)
    return exchange.refusal


def judge_unmetered(
    scope: Scope, settings: Settings | None, checked: Collection[str] = ()
) -> Judged:
    """Decide about a new request while nothing is measured. Never raises.

    The request is refused if its tenant fails closed, or if no rule names it and such requests are
    refused. vLLM checks keys on the `checked` routes.
    """
    if settings is None or not settings.refuses_unmetered or scope["type"] == "lifespan":
        return ADMITTED
    with contextlib.suppress(Exception):  # metering may fail, serving may not
        route = route_of_scope(scope)
        resolver = settings.resolver
        unread = BodyClaims(unread=resolver.body_fields)
        owner = resolver.resolve(scope["headers"], unread, keys_checked=route in checked)
        # Nobody reads bodies now, so a client that may name itself there cannot be judged.
        if not settings.clients_name_tenants and (
            refused := refusal_of_unnamed(scope, route, owner, settings)
        ):
            return Judged(refused)
        if not reaches_engine(route) or not settings.failing_closed:
            return ADMITTED
        if owner == CONTRADICTION:
            return Judged(contradicting(route))
        if fails_closed(owner, settings.failing_closed):
            return Judged(refusal(_DOWN, owner, route, is_coarse=settings.is_coarse))
    return ADMITTED
