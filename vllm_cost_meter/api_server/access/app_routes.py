"""The routes of vLLM's application that do work, those of mounted applications included.

A route does work if its method changes something (POST and the like) or it is a WebSocket. The few
such routes that are known to leave the engines alone are left out. A route of an unknown kind, and
an application that is mounted and does not show its routes, count as ones that do work: nobody can
know what they do.

Since FastAPI 0.137 an application keeps the routers that it includes as they are, one entry each.
FastAPI itself lists the routes in them.

Invariant: what may do work is never taken for what does none.
"""

from collections.abc import Callable, Iterable, Iterator
from typing import Any

import fastapi.routing
from starlette.routing import Host, Match, Mount, WebSocketRoute
from starlette.staticfiles import StaticFiles
from starlette.types import Scope

WEBSOCKET, ANY = "WEBSOCKET", "ANY"
_IDLE_METHODS = frozenset({"GET", "HEAD", "OPTIONS", "TRACE"})
# These count tokens, answer at once in the API server, or show its metrics.
_IDLE_PATHS = frozenset({"/tokenize", "/detokenize", "/ping", "/is_scaling_elastic_ep", "/metrics"})
# Returns each route with what Starlette's have: path, methods, `matches`.
each_route: Callable[[Iterable[Any]], Iterable[Any]] = getattr(
    fastapi.routing, "iter_route_contexts", iter
)


def working_routes(routes: Iterable[Any], prefix: str = "") -> Iterator[tuple[str, str]]:
    """Yield method and path of each route that does work.

    The method is `WEBSOCKET` for a WebSocket, and `ANY` where nobody can know which there are.
    """
    for route in each_route(routes):
        path = prefix + (getattr(route, "path", None) or "")
        if inner := _inner(route):
            yield from working_routes(inner, path)
        else:
            for method in sorted(_methods(route, path)):
                yield method, path


def does_work(routes: Iterable[Any], scope: Scope, prefix: str = "") -> bool:
    """Return whether the route that serves this request does work."""
    asked = WEBSOCKET if scope["type"] == "websocket" else scope["method"]
    if asked in _IDLE_METHODS:
        return False
    for route in each_route(routes):
        match, more = route.matches(scope)
        if match is Match.FULL:
            path = prefix + (getattr(route, "path", None) or "")
            if inner := _inner(route):
                return does_work(inner, {**scope, **more}, path)
            return not _methods(route, path).isdisjoint({asked, ANY})
    return False


def _inner(route: Any) -> Iterable[Any]:
    """Return the routes of an application that is mounted here; none if it shows none."""
    return route.routes if isinstance(_original(route), Mount | Host) else ()


def _methods(route: Any, path: str) -> frozenset[str]:
    """Return the methods of a route that do work."""
    original = _original(route)
    if path in _IDLE_PATHS or _is_files(original):
        return frozenset()
    if isinstance(original, WebSocketRoute):
        return frozenset({WEBSOCKET})
    methods = getattr(route, "methods", None)
    return frozenset({ANY} if methods is None else set(methods) - _IDLE_METHODS)


def _is_files(route: Any) -> bool:
    """Return whether files are mounted here, which are only ever read."""
    return isinstance(route, Mount) and isinstance(route.app, StaticFiles)


def _original(route: Any) -> Any:
    return getattr(route, "original_route", route)
