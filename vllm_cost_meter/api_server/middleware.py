"""The ASGI middleware: opens an exchange for each HTTP request and puts the cost into its reply.

If a tenant rule needs the body of a request, the middleware reads the body before the application
does, and passes it on unchanged. `judging` decides whether the request is admitted. `ReplyEditor`
puts the cost into the reply.

The endpoint plugin installs it (vLLM 0.26 and later), or `--middleware
vllm_cost_meter.middleware.CostMiddleware` does, which the meter adds by itself to the command line
of an older vLLM. Installing it twice does no harm.

An application whose settings are wrong does not start; after that, nothing of ours stops it.

Invariant: a request is served exactly once, metered or not, unless a budget refuses it.
"""

import asyncio
import contextlib
import time
from collections.abc import Callable

from starlette.types import ASGIApp, Message, Receive, Scope, Send

from vllm_cost_meter.api_server.access.metrics_page import hides_metrics, serve_without_private
from vllm_cost_meter.api_server.access.unnamed import key_check_of
from vllm_cost_meter.api_server.judging import (
    ADMITTED,
    Judged,
    judge,
    judge_access,
    judge_unmetered,
    route_of_scope,
    wait_for_figures,
)
from vllm_cost_meter.api_server.reply_editor import BODY, ReplyEditor
from vllm_cost_meter.api_server.reply_plan import exposed_to, plan_of
from vllm_cost_meter.api_server.request_body import (
    BODY_BYTES_MAX,
    claims_of,
    is_json,
    read_ahead,
    unread_claims,
)
from vllm_cost_meter.api_server.routes import reaches_engine
from vllm_cost_meter.api_server.runtime import NoRuntime, Runtime, get_runtime
from vllm_cost_meter.exchange import (
    Exchange,
    Refusal,
    current_exchange,
    is_metered,
    set_exchange,
)
from vllm_cost_meter.records.client_text import stored
from vllm_cost_meter.tenants.rules import NO_CLAIMS, BodyClaims


class CostMiddleware:
    """Puts the measured cost of a request into its reply."""

    def __init__(
        self,
        app: ASGIApp,
        runtime: Callable[[], Runtime | NoRuntime] = get_runtime,
        body_bytes_max: int = BODY_BYTES_MAX,
    ) -> None:
        """Wrap `app`. `runtime` is called at each request, so that the serving process makes it.

        A body longer than `body_bytes_max` is handed on unread.
        """
        self.app = app
        self._body_bytes_max = body_bytes_max
        self._runtime = runtime
        # The routes on which vLLM checks keys; None until the first request.
        self._checked: frozenset[str] | None = None

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        if is_metered(scope):  # The middleware is installed twice.
            await self.app(scope, receive, send)
            return
        if self._checked is None:
            self._checked = _guarded_routes(scope)
        runtime = self._runtime()
        if isinstance(runtime, NoRuntime) and runtime.wrong and scope["type"] == "lifespan":
            await receive()
            await send({"type": "lifespan.startup.failed", "message": runtime.wrong})
        elif runtime.settings is not None and hides_metrics(scope, runtime.settings):
            set_exchange(scope, None)
            await serve_without_private(self.app, scope, receive, send)
        elif not isinstance(runtime, Runtime):
            judged = judge_unmetered(scope, runtime.settings, self._checked)
            if judged.refusal is None:
                await self.app(scope, receive, send)
            else:
                await _refuse(judged.refusal, scope, send)
        elif scope["type"] == "lifespan":
            set_exchange(scope, None)
            await self.app(scope, receive, _starting(scope, send, runtime))
        else:
            await self._metered(scope, receive, send, runtime, self._checked)

    async def _metered(
        self,
        scope: Scope,
        receive: Receive,
        send: Send,
        runtime: Runtime,
        checked: frozenset[str],
    ) -> None:
        started_at_ns = time.time_ns()
        guard = runtime.guard
        claims, receive = await _read_claims(scope, receive, runtime, self._body_bytes_max)
        exchange = guard.run(
            "new exchange", _new_exchange, runtime, scope, claims, checked, started_at_ns
        )
        await wait_for_figures(exchange, runtime.admission)
        judged = _judged(exchange, scope, runtime, checked)
        if judged.refusal is not None:
            await _refuse(judged.refusal, scope, send)
            return
        try:
            await self._admitted(scope, receive, send, runtime, exchange, judged)
        finally:
            admission = runtime.admission
            if exchange is not None and admission is not None:
                guard.run("end of place", admission.in_flight.served, exchange)

    async def _admitted(
        self,
        scope: Scope,
        receive: Receive,
        send: Send,
        runtime: Runtime,
        exchange: Exchange | None,
        judged: Judged,
    ) -> None:
        guard = runtime.guard
        if judged.delay_s:
            await asyncio.sleep(judged.delay_s)
        editor = None
        if exchange is not None:
            editor = guard.run("new editor", _new_editor, runtime, exchange, scope, send, judged)
        # Set it even to None, because the context may hold another tenant's exchange.
        exchange = exchange if editor is not None else None
        set_exchange(scope, exchange)
        token = current_exchange.set(exchange)
        try:
            await self._served(scope, receive, send, editor)
        finally:
            current_exchange.reset(token)
            if exchange is not None:
                guard.run("end of exchange", runtime.collector.ended, exchange)

    async def _served(
        self, scope: Scope, receive: Receive, send: Send, editor: ReplyEditor | None
    ) -> None:
        """Call the application; if its reply stays incomplete, send the held part unedited."""
        if editor is None:
            await self.app(scope, receive, send)
            return
        try:
            await self.app(scope, editor.receiving(receive), editor.sending())
        except Exception:
            with contextlib.suppress(Exception):  # The application's own error must be raised.
                await editor.release()
            raise
        await editor.release()


def _guarded_routes(scope: Scope) -> frozenset[str]:
    """Return the routes on which vLLM checks keys; none where that cannot be found out."""
    try:
        return key_check_of(scope.get("app")).guarded_routes()
    except Exception:  # noqa: BLE001 - metering may fail, serving may not
        return frozenset()


def _starting(scope: Scope, send: Send, runtime: Runtime) -> Send:
    """Wrap `send` of the lifespan to start and stop the meter together with the application."""

    async def starting_send(message: Message) -> None:
        if message["type"] == "lifespan.startup.complete":
            if (refused := await runtime.start(scope.get("app"))) is not None:
                # The server says this in its log, and ends.
                message = {"type": "lifespan.startup.failed", "message": f"cost meter: {refused}"}
        elif message["type"] == "lifespan.shutdown.complete":
            try:
                await runtime.stop()
            except Exception as error:  # noqa: BLE001 - metering may fail, serving may not
                runtime.guard.failed("stop", error)
        await send(message)

    return starting_send


async def _read_claims(
    scope: Scope, receive: Receive, runtime: Runtime, bytes_max: int
) -> tuple[BodyClaims, Receive]:
    """Return what the body claims about the tenant, and a `receive` for the application."""
    # This is a separate function so that the body does not live as long as the exchange.
    needed = runtime.settings.resolver.body_fields
    if not needed or not runtime.guard.run("body", _reaches_engine, scope):
        return NO_CLAIMS, receive
    headers, is_websocket = scope["headers"], scope["type"] == "websocket"
    if is_websocket or not is_json(headers):
        return unread_claims(headers, is_websocket, needed), receive
    body, replayed = await read_ahead(receive, bytes_max)
    claims = runtime.guard.run("claims", lambda: claims_of(body, runtime.served))
    return claims or NO_CLAIMS, replayed


def _reaches_engine(scope: Scope) -> bool:
    return reaches_engine(route_of_scope(scope))


def _new_exchange(
    runtime: Runtime,
    scope: Scope,
    claims: BodyClaims,
    checked: frozenset[str],
    started_at_ns: int,
) -> Exchange:
    headers, route = scope["headers"], route_of_scope(scope)
    request_ids = [value for name, value in headers if name == b"x-request-id"]
    return Exchange(
        route=route,
        owner=runtime.settings.resolver.resolve(headers, claims, keys_checked=route in checked),
        x_request_id=stored(request_ids[0].decode("latin-1")) if request_ids else None,
        started_at_ns=started_at_ns,
        is_socket=scope["type"] == "websocket",
    )


def _judged(
    exchange: Exchange | None, scope: Scope, runtime: Runtime, checked: frozenset[str]
) -> Judged:
    settings = runtime.settings
    if exchange is not None:
        access = runtime.guard.run("access", judge_access, exchange, scope, settings) or ADMITTED
        if access.refusal is not None:
            return access
        judged = runtime.guard.run("budgets", judge, exchange, runtime.admission, settings)
        if judged is not None:
            return judged
    return judge_unmetered(scope, settings, checked)


def _new_editor(
    runtime: Runtime, exchange: Exchange, scope: Scope, send: Send, judged: Judged
) -> ReplyEditor:
    settings = runtime.settings
    detail = settings.reply_for(exchange.owner.tenant)
    plan = plan_of(scope["headers"], detail, settings.stream_comment, judged.warnings)
    return ReplyEditor(runtime.collector, runtime.guard, exchange, send, plan)


async def _refuse(refusal: Refusal, scope: Scope, send: Send) -> None:
    if scope["type"] == "websocket":
        # The socket is not accepted yet, so the server answers the handshake with 403.
        await send({"type": "websocket.close", "code": 1008})
        return
    headers = exposed_to(scope["headers"], refusal.headers)
    await send({"type": "http.response.start", "status": refusal.status, "headers": headers})
    await send({"type": BODY, "body": refusal.body})
