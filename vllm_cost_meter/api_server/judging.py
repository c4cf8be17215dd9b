"""Judge a new request: admit it, delay it, warn in its reply, or refuse it.

Invariant: without a budget, without a tenant that fails closed, and with unnamed requests served,
every request is admitted.
"""

import contextlib
from collections.abc import Sequence
from dataclasses import dataclass

from starlette.types import Scope

from vllm_cost_meter import metrics
from vllm_cost_meter.api_server.access.unnamed import refusal_of_unnamed
from vllm_cost_meter.api_server.admission import Admission, fails_closed
from vllm_cost_meter.api_server.refusal import Refusal, contradicting, refusal, warning
from vllm_cost_meter.api_server.routes import reaches_engine, route_of
from vllm_cost_meter.config.settings import Settings
from vllm_cost_meter.exchange import Exchange
from vllm_cost_meter.records.owner import CONTRADICTION
from vllm_cost_meter.tenants.budgets import Verdict


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


def judge(exchange: Exchange, admission: Admission | None, throttle_s: float) -> Judged:
    """Decide about a new request by its budgets, without any I/O."""
    if admission is None or not reaches_engine(exchange.route):
        return ADMITTED
    if exchange.owner == CONTRADICTION:
        metrics.count_refused("contradicting", "")
        return Judged(contradicting(exchange.route))
    verdict = admission.verdict(exchange.owner)
    if verdict.kind in ("blocked", "unavailable"):
        return Judged(refusal(verdict, exchange.owner.tenant, exchange.route))
    if verdict.kind == "throttled":
        return Judged(delay_s=throttle_s)
    return Judged(warnings=warning(verdict.soft))


def judge_access(exchange: Exchange, scope: Scope, settings: Settings) -> Judged:
    """Decide whether a new request has the key and the name that the settings demand."""
    return Judged(refusal_of_unnamed(scope, exchange.route, exchange.owner, settings))


def judge_unmetered(scope: Scope, settings: Settings | None) -> Judged:
    """Decide about a new request while nothing is measured. Never raises.

    The request is refused if its tenant fails closed, or if no rule names it and such requests are
    refused.
    """
    if settings is None or not settings.refuses_unmetered or scope["type"] == "lifespan":
        return ADMITTED
    with contextlib.suppress(Exception):  # metering may fail, serving may not
        route = route_of_scope(scope)
        owner = settings.resolver.resolve(scope["headers"])
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
            return Judged(refusal(_DOWN, owner.tenant, route))
    return ADMITTED
