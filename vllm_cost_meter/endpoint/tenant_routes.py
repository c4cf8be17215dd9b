"""A tenant's own figures on vLLM's port: `/v1/cost/me` and `/v1/cost/requests/{id}`.

The two routes are added to vLLM's application, so clients need no second address. vLLM's API-key
check guards everything below `/v1`. These routes demand more: the caller's tenant must follow from
its API key, because a header or a default tenant proves nothing. The process of the side endpoint
answers; vLLM's own process reads no ledger for them. vLLM's own handlers answer errors.

Invariant: the meter adds no other route to vLLM's port, and these show no other tenant.
"""

from collections.abc import Awaitable, Callable
from typing import Annotated

from fastapi import APIRouter, Depends, HTTPException, Request, Response

from vllm_cost_meter.endpoint.answers import NothingUsed, OwnFigures
from vllm_cost_meter.endpoint.dependencies import CoversQuery, WindowQuery
from vllm_cost_meter.endpoint.handed import OwnAnswer, OwnQuestion
from vllm_cost_meter.endpoint.limits import refuse_unknown_words
from vllm_cost_meter.endpoint.questions import RETRY_AFTER_S
from vllm_cost_meter.endpoint.shapes import AnswerRoute
from vllm_cost_meter.errors import AwayError
from vllm_cost_meter.exchange import exchange_of
from vllm_cost_meter.records.owner import WITH_CHILDREN
from vllm_cost_meter.reports.request_answers import RequestWithParts
from vllm_cost_meter.side_process.channel import RefusedError

AskSideEndpoint = Callable[[OwnQuestion], Awaitable[OwnAnswer]]


async def _own(request: Request) -> str:
    """Return the tenant that asks. Raises HTTPException unless an API key said so."""
    exchange = exchange_of(request.scope)
    if exchange is None or not exchange.owner.by_api_key:
        raise HTTPException(401, "expected the API key of a tenant that the cost meter knows")
    return exchange.owner.tenant


Own = Annotated[str, Depends(_own)]


def make_router(ask: AskSideEndpoint) -> APIRouter:
    """Return the two routes. `ask` has the process of the side endpoint answer."""
    router = APIRouter(
        prefix="/v1/cost",
        route_class=AnswerRoute,
        dependencies=[Depends(refuse_unknown_words)],
    )

    async def answer(question: OwnQuestion) -> Response:
        try:
            answered = await ask(question)
        except (AwayError, RefusedError) as error:
            said = f"the cost meter's figures are not to be had now: {error}"
            raise HTTPException(503, said, {"Retry-After": str(RETRY_AFTER_S)}) from None
        if answered.status != 200:
            again = answered.retry_after
            headers = None if again is None else {"Retry-After": again}
            raise HTTPException(answered.status, answered.detail, headers)
        return Response(answered.body, media_type="application/json")

    @router.get("/me")
    async def me(
        own: Own, window: WindowQuery = None, covers: CoversQuery = WITH_CHILDREN
    ) -> OwnFigures | NothingUsed | Response:
        """Return the usage and cost of the caller's tenant, and the use of its budgets."""
        return await answer(OwnQuestion(own, window=window, covers=covers))

    @router.get("/requests/{request_id:path}")
    async def request(request_id: str, own: Own) -> RequestWithParts | Response:
        """Return one HTTP request of the caller's tenant, by any of its ids."""
        return await answer(OwnQuestion(own, request_id))

    return router
