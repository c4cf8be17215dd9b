"""Routes by which an orchestrator asks whether the endpoint lives, and whether it can answer.

They are open to everybody, because a kubelet or a load balancer has no token. `/` names the
questions that the endpoint answers, for who comes by with a browser.

Invariant: they say nothing of any tenant, and read at most one row.
"""

import asyncio

from fastapi import FastAPI
from starlette.requests import Request
from starlette.responses import PlainTextResponse, Response

from vllm_cost_meter.errors import LedgerError
from vllm_cost_meter.ledger.reader import LedgerReader
from vllm_cost_meter.version import __version__

READY_WITHIN_S = 5.0
LIVE_PATHS = ("/livez", "/healthz")
READY_PATH = "/readyz"


def add_probes(app: FastAPI, reader: LedgerReader) -> None:
    """Add the routes to an application that answers from a ledger."""

    async def root(_request: Request) -> Response:
        asked = sorted({path for path in app.openapi()["paths"] if path.startswith("/cost")})
        return PlainTextResponse("\n".join([f"vllm-cost-meter {__version__}", "", *asked, ""]))

    async def live(_request: Request) -> Response:
        return PlainTextResponse("ok\n")

    async def ready(_request: Request) -> Response:
        try:
            await asyncio.wait_for(asyncio.to_thread(reader.kept_from), READY_WITHIN_S)
        except (LedgerError, TimeoutError) as error:
            return PlainTextResponse(f"{error or 'the ledger does not answer'}\n", 503)
        return PlainTextResponse("ok\n")

    app.add_route("/", root, include_in_schema=False)
    for path in LIVE_PATHS:
        app.add_route(path, live, include_in_schema=False)
    app.add_route(READY_PATH, ready, include_in_schema=False)
