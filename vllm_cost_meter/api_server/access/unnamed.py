"""Refuse requests that no rule names, and close vLLM's open routes, if the settings say so.

With `unnamed_requests = "refuse"` every route that does work demands what vLLM's guarded routes
demand, one of its API keys, if it has any. A route that is known to serve tenants also demands that
a rule names the tenant.

Invariant: with `unnamed_requests = "serve"` nothing is refused here.
"""

from typing import Any
from weakref import WeakKeyDictionary

from starlette.types import Scope

from vllm_cost_meter.api_server.access.key_check import KeyCheck
from vllm_cost_meter.api_server.refusal import contradicting, unauthorized
from vllm_cost_meter.api_server.routes import reaches_engine
from vllm_cost_meter.config.settings import Settings
from vllm_cost_meter.exchange import Refusal
from vllm_cost_meter.metrics import series
from vllm_cost_meter.records.owner import CONTRADICTION, UNKNOWN, Owner

NO_KEY = (
    "expected one of this server's API keys in the header Authorization: Bearer KEY, got none that"
    " it accepts"
)
NO_NAME = (
    "expected an API key, or a gateway's headers, that name a tenant of this server, got none that"
    " do"
)

_checks: WeakKeyDictionary[Any, KeyCheck] = WeakKeyDictionary()


def key_check_of(app: Any) -> KeyCheck:
    """Return the key check of an application, made at the first call."""
    if app is None:
        return KeyCheck(None)
    if app not in _checks:
        _checks[app] = KeyCheck(app)
    return _checks[app]


def refusal_of_unnamed(
    scope: Scope, route: str, owner: Owner, settings: Settings
) -> Refusal | None:
    """Return the refusal of a request that has no name or no key; None if it may be served."""
    if settings.unnamed_requests == "serve" or scope["type"] == "lifespan":
        return None
    check = key_check_of(scope.get("app"))
    serves_tenants = reaches_engine(route)
    if not serves_tenants and not check.does_work(scope):
        return None
    if not check.accepts(scope["headers"]):
        return _counted("unnamed", unauthorized(NO_KEY, route))
    if not serves_tenants or owner.tenant != UNKNOWN:
        return None
    if owner == CONTRADICTION:
        return _counted("contradicting", contradicting(route))
    return _counted("unnamed", unauthorized(NO_NAME, route))


def _counted(kind: str, refusal: Refusal) -> Refusal:
    series.count_refused(kind, "")
    return refusal
