"""The FastAPI application of the side endpoint: the ledger over HTTP, for operators and tenants.

It reads figures through a `LedgerReader`. Before it does, `refresh` asks the engines for snapshots,
so the ledger is up to date. In a process that cannot ask them, figures are up to one snapshot old.
Handlers that read the ledger are plain functions: `questions` runs a few of them at a time, in its
threads.

All errors have one shape: `{"error": {"message", "type", "code"}}`.

Invariant: the endpoint reads and never writes. Every JSON body is an object.
"""

import asyncio
from collections.abc import Callable
from typing import Annotated, Any, TypeVar

from fastapi import Depends, FastAPI, HTTPException, Query, Request, Response
from fastapi.exceptions import RequestValidationError
from prometheus_client import CONTENT_TYPE_LATEST
from starlette.exceptions import HTTPException as StarletteHTTPException

from vllm_cost_meter.economics import Declared
from vllm_cost_meter.endpoint.access import OPEN, Access, Viewer
from vllm_cost_meter.endpoint.answers import (
    ERRORS,
    NO_METER,
    NOT_FOUND,
    SEVERAL,
    SEVERAL_EXPLAINED,
    Budgets,
    CostModels,
    Health,
    MeterHealth,
    WholeHealth,
    WholeSummary,
)
from vllm_cost_meter.endpoint.calc import add_calculators
from vllm_cost_meter.endpoint.compare import Comparer, add_compare
from vllm_cost_meter.endpoint.dependencies import (
    FOR_ADMINS,
    CoversQuery,
    ViewerOf,
    WindowQuery,
    asked_wrongly,
    hours_asked,
)
from vllm_cost_meter.endpoint.economics import add_economics
from vllm_cost_meter.endpoint.guarding import Failures, LoopbackHosts, authorizing
from vllm_cost_meter.endpoint.limits import LimitSizes, refuse_unknown_words
from vllm_cost_meter.endpoint.questions import RETRY_AFTER_S, AskerGoneError, Questions
from vllm_cost_meter.endpoint.shapes import AnswerRoute, OrjsonResponse, error_reply
from vllm_cost_meter.errors import AwayError, LedgerError, OverdueError
from vllm_cost_meter.exchange import CLIENT_LEFT
from vllm_cost_meter.ledger.billing.answers import InvoiceDays
from vllm_cost_meter.ledger.database import shown_url
from vllm_cost_meter.ledger.queries.answers import Audit
from vllm_cost_meter.ledger.reader import LedgerReader
from vllm_cost_meter.ledger.schema import SCHEMA_VERSION
from vllm_cost_meter.logs import meter_logger
from vllm_cost_meter.records.owner import WITH_CHILDREN
from vllm_cost_meter.reports.answers import Report, Tenant, TenantsReport
from vllm_cost_meter.reports.grammar import STEPS, question
from vllm_cost_meter.reports.idle import EXPECTED as POLICIES
from vllm_cost_meter.reports.request_answers import Explanation, RequestsPage, RequestWithParts
from vllm_cost_meter.tenants.budgets import BudgetFigures, budget_row
from vllm_cost_meter.units.text import quoted
from vllm_cost_meter.units.time import rfc3339
from vllm_cost_meter.version import __version__

logger = meter_logger()

REQUESTS_PER_PAGE_MAX = 1_000

T = TypeVar("T")


def make_app(
    reader: LedgerReader,
    *,
    refresh: Callable[[], None] = lambda: None,
    access: Access = OPEN,
    metrics: Callable[[], bytes] | None = None,
    budgets: Callable[[], BudgetFigures] = BudgetFigures,
    declared: Callable[[], Declared] = Declared,
    public_economics: Callable[[], bool] = lambda: False,
    failures: Failures | None = None,
    health: Callable[[], MeterHealth] = lambda: NO_METER,
    questions: Questions | None = None,
    handed: Callable[[], bytes | None] = lambda: None,
) -> FastAPI:
    """Return the side endpoint's application.

    - `refresh` brings the ledger up to date; a worker thread calls it before figures are read.
    - `access` decides which caller may see which figures.
    - `metrics` returns the text of the Prometheus metrics; without it there is no `/metrics`.
    - `budgets` returns the use of each budget.
    - `declared` returns the operator's latency bounds and full load.
    - `public_economics` returns whether anybody may read the cost of tokens.
    - `failures` slows down callers with wrong tokens.
    - `health` returns whether the meter works.
    - `questions` bounds what is answered at once.
    - `handed` returns the settings for a process that compares; without them it reads its own.
    """
    app = FastAPI(
        title="vllm-cost-meter",
        version=__version__,
        default_response_class=OrjsonResponse,
        dependencies=[
            Depends(authorizing(access, public_economics, failures or Failures())),
            Depends(refuse_unknown_words),
        ],
        responses=ERRORS,
        # FastAPI's own pages would load scripts from the internet. The document is served below,
        # and needs the token like everything else.
        docs_url=None,
        redoc_url=None,
        openapi_url=None,
    )
    app.add_middleware(LimitSizes)
    if access.admin_sha256 is None:
        app.add_middleware(LoopbackHosts)
    app.state.questions = Questions() if questions is None else questions
    # This has to come before the first route.
    app.router.route_class = AnswerRoute
    _add_error_handlers(app)
    _add_request_routes(app, reader, refresh)
    _add_book_routes(app, reader, refresh, health)
    _add_report_route(app, reader, refresh)
    _add_model_route(app, reader, refresh)
    add_economics(app, reader, refresh, declared, public_economics)
    _add_budget_route(app, budgets)
    add_calculators(app)
    add_compare(app, Comparer(reader.url, handed), refresh)
    _add_own_routes(app, reader.url, health)

    if metrics is not None:
        _add_metrics_route(app, metrics)
    return app


def _add_metrics_route(app: FastAPI, text: Callable[[], bytes]) -> None:
    @app.get("/metrics", response_class=Response, dependencies=FOR_ADMINS)
    async def metrics() -> Response:
        """Return Prometheus metrics of the meter and of vLLM."""
        return Response(await asyncio.to_thread(text), media_type=CONTENT_TYPE_LATEST)


def _add_own_routes(app: FastAPI, ledger_url: str, ask_meter: Callable[[], MeterHealth]) -> None:
    @app.get("/openapi.json", include_in_schema=False, dependencies=FOR_ADMINS)
    def openapi() -> dict[str, Any]:
        """Return the OpenAPI description of this endpoint."""
        return app.openapi()

    @app.get("/health")
    async def health() -> Health:
        """Return that the endpoint is up, and the meter's version."""
        return {"status": "ok", "version": __version__}

    @app.get("/cost/health", dependencies=FOR_ADMINS)
    async def meter_health() -> WholeHealth:
        """Return whether the meter works: its hooks, its ledger, each background loop."""
        questions: Questions = app.state.questions
        meter: MeterHealth = await asyncio.to_thread(ask_meter)
        return {
            **meter,
            "questions": questions.counts(),
            "version": __version__,
            "ledger": shown_url(ledger_url),
            "schema_version": SCHEMA_VERSION,
        }


def _add_model_route(app: FastAPI, reader: LedgerReader, refresh: Callable[[], None]) -> None:
    @app.get("/cost/models", dependencies=FOR_ADMINS)
    def models(run: str | None = None) -> CostModels:
        """Return the latest cost model of each engine run, or all versions of one run."""
        refresh()
        return {"models": reader.cost_models(run)}


def _add_budget_route(app: FastAPI, budgets: Callable[[], BudgetFigures]) -> None:
    @app.get("/cost/budgets")
    def standings(viewer: ViewerOf) -> Budgets:
        """Return the use of each budget in its period, as new requests are judged by it."""
        figures = budgets()
        answer: Budgets = {
            "as_of": None if figures.as_of_ns is None else rfc3339(figures.as_of_ns),
            "broken": figures.broken,
            # A tag's budget counts several tenants together, so no single tenant may see it.
            "budgets": [
                budget_row(standing)
                for standing in figures.standings
                if viewer.may_see(standing.budget.tenant, standing.budget.above)
            ],
        }
        return viewer.view(answer)


def look_up(
    reader: LedgerReader, refresh: Callable[[], None], request_id: str, viewer: Viewer
) -> list[RequestWithParts]:
    """Return the request rows for an id that a viewer may see. Raises HTTPException without any.

    The ledger is brought up to now first: one more client may have been told a cost by this id.
    """
    refresh()
    # Who asks counts first: other tenants' requests under this id must not hide its own.
    rows = reader.look_up(request_id, only=viewer.tenant)
    # Only an operator sees the matches of an ambiguous id.
    if not rows or (len(rows) > 1 and not viewer.is_admin):
        kept_from = reader.kept_from()
        more = "" if kept_from is None else f"; rows from before {kept_from} were dropped"
        detail = f"no request with the id {quoted(request_id)} in the ledger{more}"
        raise HTTPException(404, detail)
    return rows


def _add_request_routes(app: FastAPI, reader: LedgerReader, refresh: Callable[[], None]) -> None:
    def answer(
        request_id: str, viewer: Viewer, tell: Callable[[RequestWithParts], T]
    ) -> T | OrjsonResponse:
        rows = look_up(reader, refresh, request_id, viewer)
        if len(rows) > 1:
            return OrjsonResponse({"matches": [tell(row) for row in rows]}, 300)
        return tell(rows[0])

    # This has to come before the route that takes any path as an id.
    @app.get("/cost/requests/{request_id:path}/explain", responses=NOT_FOUND | SEVERAL_EXPLAINED)
    def explain(request_id: str, viewer: ViewerOf) -> Explanation | OrjsonResponse:
        """Explain the bill of one HTTP request, so that it can be recomputed by hand."""
        if viewer.is_coarse:
            raise HTTPException(
                403, "explain: expected the admin token, as tenants see coarse figures here"
            )
        return answer(request_id, viewer, lambda row: viewer.view_explained(reader.explain(row)))

    @app.get("/cost/requests/{request_id:path}", responses=NOT_FOUND | SEVERAL)
    def request(request_id: str, viewer: ViewerOf) -> RequestWithParts | OrjsonResponse:
        """Return one HTTP request by its response id, X-Request-Id, internal id or own id."""
        return answer(request_id, viewer, viewer.view)

    @app.get("/cost/requests")
    def requests(
        viewer: ViewerOf,
        limit: Annotated[int, Query(ge=1, le=REQUESTS_PER_PAGE_MAX)] = 100,
        next: str | None = None,  # noqa: A002 - the parameter's public name
        tenant: str | None = None,
        covers: CoversQuery = WITH_CHILDREN,
    ) -> RequestsPage:
        """Return a page of HTTP requests, newest first; the first page has running ones too."""
        if tenant is None:
            tenant = viewer.tenant
        with asked_wrongly():
            page = reader.requests(
                limit=limit, next=next, tenant=tenant, covers=covers, only=viewer.tenant
            )
            return viewer.view(page)


def _add_book_routes(
    app: FastAPI,
    reader: LedgerReader,
    refresh: Callable[[], None],
    ask_meter: Callable[[], MeterHealth],
) -> None:
    @app.get("/cost/tenants", dependencies=FOR_ADMINS)
    def tenants(window: WindowQuery = None) -> TenantsReport:
        """Return usage by tenant and engine time by class, which add up to the total."""
        hours = hours_asked(window)
        refresh()
        return reader.tenants(*hours)

    @app.get("/cost/tenants/{tenant:path}", responses=NOT_FOUND)
    def tenant(
        viewer: ViewerOf,
        tenant: str,
        window: WindowQuery = None,
        covers: CoversQuery = WITH_CHILDREN,
    ) -> Tenant:
        """Return a tenant's usage, cost and latest requests."""
        hours = hours_asked(window)
        refresh()
        row = reader.tenant(tenant, *hours, covers=covers, only=viewer.tenant)
        if row is None:
            raise HTTPException(404, f"no tenant {quoted(tenant)} in the ledger")
        return viewer.view(row)

    @app.get("/cost/summary", dependencies=FOR_ADMINS)
    def summary(window: WindowQuery = None) -> WholeSummary:
        """Return totals over all tenants and engines, and what the fleet still lacks of them."""
        hours = hours_asked(window)
        refresh()
        return {**reader.summary(*hours), "fleet": ask_meter()["fleet"]}

    @app.get("/cost/invoices", dependencies=FOR_ADMINS)
    def invoices(window: WindowQuery = None) -> InvoiceDays:
        """Return the metered cost and the provider's bills, day by day."""
        hours = hours_asked(window)
        refresh()
        return reader.invoice_days(*hours)

    @app.get("/cost/audit", dependencies=FOR_ADMINS)
    def audit(
        full: Annotated[
            bool, Query(description="Whether to read every bill again, which may take long.")
        ] = False,
    ) -> Audit:
        """Check for each engine run that its books balance at the last snapshot."""
        refresh()
        return reader.audit(full=full)


def _add_report_route(app: FastAPI, reader: LedgerReader, refresh: Callable[[], None]) -> None:
    @app.get("/cost/report")
    def report(
        viewer: ViewerOf,
        window: WindowQuery = None,
        tz: Annotated[str | None, Query(description="Time zone of days; UTC by default.")] = None,
        aggregate: Annotated[str | None, Query(description="Columns to aggregate by.")] = None,
        step: Annotated[str | None, Query(description=f"One of {', '.join(STEPS)}.")] = None,
        accumulate: Annotated[bool, Query(description="Add all steps up.")] = False,
        idle: Annotated[str | None, Query(description=f"{POLICIES}; none by default.")] = None,
        filter: Annotated[
            str | None, Query(description="Rows to show; labels choose engines.")
        ] = None,
        covers: CoversQuery = WITH_CHILDREN,
        price: Annotated[
            str | None, Query(description="A supposed price in USD per GPU-hour, for all time.")
        ] = None,
    ) -> Report:
        """Return usage and cost, with and without idle time, aggregated as asked."""
        with asked_wrongly():
            asked = question(
                window=window,
                tz=tz,
                aggregate=aggregate,
                step=step,
                accumulate=accumulate,
                idle=idle,
                filter=filter,
                covers=covers,
                price=price,
            )
        if not viewer.is_admin and asked.idle.name != "none":
            raise HTTPException(
                403, "idle: expected the admin token, as idle time is of all tenants together"
            )
        if not viewer.is_admin and asked.names_labels:
            raise HTTPException(
                403, "label: expected the admin token, as labels are of the operator's engines"
            )
        refresh()
        return viewer.view(reader.report(asked.by(viewer.tenant)))


def _add_error_handlers(app: FastAPI) -> None:
    @app.exception_handler(StarletteHTTPException)
    def http_error(_request: Request, exception: StarletteHTTPException) -> Response:
        return error_reply(exception.status_code, str(exception.detail), headers=exception.headers)

    @app.exception_handler(RequestValidationError)
    def validation_error(_request: Request, exception: RequestValidationError) -> Response:
        first = exception.errors()[0]
        where = ".".join(str(part) for part in first["loc"])
        return error_reply(422, f"{where}: {first['msg']}, got {quoted(first.get('input'))}")

    @app.exception_handler(LedgerError)
    def ledger_error(_request: Request, exception: LedgerError) -> Response:
        return error_reply(503, str(exception), "ledger_unavailable")

    @app.exception_handler(OverdueError)
    @app.exception_handler(AwayError)
    def later(_request: Request, exception: Exception) -> Response:
        return error_reply(503, str(exception), headers={"Retry-After": str(RETRY_AFTER_S)})

    @app.exception_handler(AskerGoneError)
    def nobody_waits(_request: Request, _exception: AskerGoneError) -> Response:
        return Response(status_code=CLIENT_LEFT)

    @app.exception_handler(Exception)
    def our_bug(_request: Request, exception: Exception) -> Response:
        # The server's log has the traceback.
        return error_reply(500, f"unexpected {type(exception).__name__}", "internal_error")
