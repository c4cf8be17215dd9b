"""A tenant's own figures on vLLM's own port, so that clients need no second address.

Two routes, put into vLLM's application: `/v1/cost/me` and `/v1/cost/requests/{id}`. They stand
below `/v1`, which vLLM's API-key check guards, and ask more: that this very request was resolved by
its API key, as a header or a default tenant prove nothing of who asks. The process of the side
endpoint answers; vLLM's reads no ledger for them. Errors are vLLM's, with its handlers.

Invariant: nothing else of the meter is on vLLM's port, and nothing here tells of another tenant.
"""

from collections.abc import Awaitable, Callable
from typing import Annotated

from fastapi import APIRouter, Depends, HTTPException, Request, Response

from vllm_cost_meter.endpoint.answers import NothingUsed, OwnFigures
from vllm_cost_meter.endpoint.dependencies import Window
from vllm_cost_meter.endpoint.handed import OwnAnswer, OwnQuestion
from vllm_cost_meter.endpoint.limits import refuse_unknown_words
from vllm_cost_meter.endpoint.questions import RETRY_AFTER_S
from vllm_cost_meter.endpoint.shapes import AnswerRoute
from vllm_cost_meter.errors import AwayError
from vllm_cost_meter.exchange import exchange_of
from vllm_cost_meter.reports.request_answers import RequestWithParts
from vllm_cost_meter.side_process.channel import RefusedError

Ask = Callable[[OwnQuestion], Awaitable[OwnAnswer]]


async def _own(request: Request) -> str:
    """Return the tenant that asks. Raises HTTPException unless an API key said so."""
    exchange = exchange_of(request.scope)
    if exchange is None or not exchange.owner.by_api_key:
        raise HTTPException(401, "expected the API key of a tenant that the cost meter knows")
    return exchange.owner.tenant


Own = Annotated[str, Depends(_own)]


def make_router(ask: Ask) -> APIRouter:
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
    async def me(own: Own, window: Window = None) -> OwnFigures | NothingUsed | Response:
        """Return what the caller's tenant used, and where its budgets stand."""
        return await answer(OwnQuestion(own, window=window))

    @router.get("/requests/{request_id:path}")
    async def request(request_id: str, own: Own) -> RequestWithParts | Response:
        """Return one HTTP request of the caller's tenant, by any of its ids."""
        return await answer(OwnQuestion(own, request_id))

    return router
