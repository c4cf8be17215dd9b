"""Find out on which routes vLLM checks API keys, by asking vLLM's own middleware.

With `--api-key` vLLM admits a request by the key in its first `Authorization`, but not on every
route. The application holds vLLM's middleware with its keys. We call that middleware, once for each
route, with a request without a key: where it lets the request through, vLLM checks nothing.

Invariant: nothing here raises. What cannot be found out counts as not checked.
"""

from typing import Any

from starlette.types import ASGIApp, Message, Receive, Scope, Send

from vllm_cost_meter.api_server.routes import KNOWN_ROUTES

# vLLM's class has this name in every version, in one module or another.
_NAME, _PACKAGE = "AuthenticationMiddleware", "vllm."


async def checked_routes(app: Any) -> frozenset[str]:
    """Return the labels of the routes on which vLLM's application checks API keys."""
    try:
        checks = [
            (each.cls, each.args, each.kwargs)
            for each in app.user_middleware
            if each.cls.__name__ == _NAME and each.cls.__module__.startswith(_PACKAGE)
        ]
        return frozenset(
            [
                route
                for route in KNOWN_ROUTES
                for cls, args, kwargs in checks
                if not await _lets_through(cls, args, kwargs, route)
            ]
        )
    except Exception:  # noqa: BLE001 - metering may fail, serving may not
        return frozenset()


async def _lets_through(cls: Any, args: Any, kwargs: Any, route: str) -> bool:
    is_through = False

    async def inner(scope: Scope, receive: Receive, send: Send) -> None:
        nonlocal is_through
        is_through = True

    async def receive() -> Message:
        return {"type": "http.disconnect"}

    async def send(message: Message) -> None:
        """Put the answer aside."""

    check: ASGIApp = cls(inner, *args, **kwargs)
    await check(
        {"type": "http", "method": "POST", "path": route, "root_path": "", "headers": []},
        receive,
        send,
    )
    return is_through
