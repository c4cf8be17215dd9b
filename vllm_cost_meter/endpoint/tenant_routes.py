"""A tenant's own figures on vLLM's own port, so that clients need no second address.

Two routes, put into vLLM's application: `/v1/cost/me` and `/v1/cost/requests/{id}`. They stand
below `/v1`, which vLLM's API-key check guards, and ask more: that this very request was resolved by
its API key, as a header or a default tenant prove nothing of who asks. Errors are vLLM's, with its
handlers.

Invariant: nothing else of the meter is on vLLM's port, and nothing here tells of another tenant.
"""

from collections.abc import Callable
from typing import Annotated

from fastapi import APIRouter, Depends, HTTPException, Request

from vllm_cost_meter.endpoint.access import Viewer
from vllm_cost_meter.endpoint.answers import NothingUsed, OwnFigures
from vllm_cost_meter.endpoint.app import look_up
from vllm_cost_meter.endpoint.dependencies import Window, hours_asked
from vllm_cost_meter.endpoint.limits import refuse_unknown_words
from vllm_cost_meter.endpoint.shapes import AnswerRoute
from vllm_cost_meter.exchange import exchange_of
from vllm_cost_meter.ledger.reader import LedgerReader
from vllm_cost_meter.reports.request_answers import RequestWithParts
from vllm_cost_meter.tenants.budgets import Figures, told


def _own(request: Request) -> Viewer:
    """Return who asks. Raises HTTPException unless an API key said so."""
    exchange = exchange_of(request.scope)
    if exchange is None or not exchange.owner.by_api_key:
        raise HTTPException(401, "expected the API key of a tenant that the cost meter knows")
    return Viewer(exchange.owner.tenant)


Own = Annotated[Viewer, Depends(_own)]


def make_router(
    reader: LedgerReader, refresh: Callable[[], None], budgets: Callable[[], Figures]
) -> APIRouter:
    """Return the two routes. Arguments are those of the side endpoint's application."""
    router = APIRouter(
        prefix="/v1/cost",
        route_class=AnswerRoute,
        dependencies=[Depends(refuse_unknown_words)],
    )

    @router.get("/me")
    def me(own: Own, window: Window = None) -> OwnFigures | NothingUsed:
        """Return what the caller's tenant used, and where its budgets stand."""
        hours = hours_asked(window)
        refresh()
        name = str(own.tenant)
        row = reader.tenant(name, *hours)
        standings = budgets().standings
        own_budgets = [told(each) for each in standings if own.may_see(each.budget.tenant)]
        if row is None:
            return {"tenant": name, "requests": 0, "gpu_time_ns": 0, "budgets": own_budgets}
        return {**row, "budgets": own_budgets}

    @router.get("/requests/{request_id:path}")
    def request(request_id: str, own: Own) -> RequestWithParts:
        """Return one HTTP request of the caller's tenant, by any of its ids."""
        return look_up(reader, refresh, request_id, own)[0]

    return router
