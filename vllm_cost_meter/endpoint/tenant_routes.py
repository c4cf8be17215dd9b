"""A tenant's own figures on vLLM's port: `/v1/cost/me` and `/v1/cost/requests/{id}`.

The two routes are added to vLLM's application, so clients need no second address. vLLM's API-key
check guards everything below `/v1`. These routes demand more: the caller's tenant must follow from
its API key, because a header or a default tenant proves nothing. vLLM's own handlers answer errors.

Invariant: the meter adds no other route to vLLM's port, and these show no other tenant.
"""

from collections.abc import Callable
from typing import Annotated

from fastapi import APIRouter, Depends, HTTPException, Request

from vllm_cost_meter.endpoint.access import Viewer
from vllm_cost_meter.endpoint.answers import NothingUsed, OwnFigures
from vllm_cost_meter.endpoint.app import look_up
from vllm_cost_meter.endpoint.dependencies import WindowQuery, hours_asked
from vllm_cost_meter.endpoint.limits import refuse_unknown_words
from vllm_cost_meter.endpoint.shapes import AnswerRoute
from vllm_cost_meter.exchange import exchange_of
from vllm_cost_meter.ledger.reader import LedgerReader
from vllm_cost_meter.reports.request_answers import RequestWithParts
from vllm_cost_meter.tenants.budgets import BudgetFigures, budget_row


def _own_tenant(request: Request) -> str:
    """Return the caller's tenant. Raises HTTPException unless its API key named the tenant."""
    exchange = exchange_of(request.scope)
    if exchange is None or not exchange.owner.by_api_key:
        raise HTTPException(401, "expected the API key of a tenant that the cost meter knows")
    return exchange.owner.tenant


OwnTenant = Annotated[str, Depends(_own_tenant)]


def make_router(
    reader: LedgerReader,
    refresh: Callable[[], None],
    budgets: Callable[[], BudgetFigures],
    is_coarse: Callable[[], bool] = lambda: False,
) -> APIRouter:
    """Return the two routes. The first arguments are those of the side endpoint's application."""
    router = APIRouter(
        prefix="/v1/cost",
        route_class=AnswerRoute,
        dependencies=[Depends(refuse_unknown_words)],
    )

    @router.get("/me")
    def me(name: OwnTenant, window: WindowQuery = None) -> OwnFigures | NothingUsed:
        """Return the usage and cost of the caller's tenant, and the use of its budgets."""
        hours = hours_asked(window)
        refresh()
        own = Viewer(name, is_coarse=is_coarse())
        row = reader.tenant(name, *hours)
        standings = budgets().standings
        own_budgets = [
            own.view(budget_row(each)) for each in standings if own.may_see(each.budget.tenant)
        ]
        if row is None:
            return {"tenant": name, "requests": 0, "gpu_time_ns": 0, "budgets": own_budgets}
        return {**own.view(row), "budgets": own_budgets}

    @router.get("/requests/{request_id:path}")
    def request(request_id: str, name: OwnTenant) -> RequestWithParts:
        """Return one HTTP request of the caller's tenant, by any of its ids."""
        own = Viewer(name, is_coarse=is_coarse())
        return own.view(look_up(reader, refresh, request_id, own)[0])

    return router
