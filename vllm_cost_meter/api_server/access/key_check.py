"""vLLM's own API-key check: which routes it guards, and which callers it lets in.

vLLM's `--api-key` guards some path prefixes only, and a new vLLM may guard others or have other
routes. So neither is listed here. The routes are those of the running application. The check is
vLLM's own middleware, made a second time with the same keys around an application that only notes
that it was reached: a path is open if that happens without a key.

Invariant: nothing here raises or keeps a key.
"""

import re
from collections.abc import Iterable, Sequence
from typing import Any

from starlette.routing import BaseRoute
from starlette.types import Message, Receive, Scope, Send

from vllm_cost_meter.api_server.access.app_routes import does_work, working_routes
from vllm_cost_meter.api_server.routes import KNOWN_ROUTES, OWN_ROUTES
from vllm_cost_meter.logs import meter_logger

logger = meter_logger()

_AUTHENTICATION = "AuthenticationMiddleware"
# Every vLLM guards its OpenAI routes.
_GUARDED_PATH = "/v1/models"

RawHeaders = Iterable[tuple[bytes, bytes]]


class KeyCheck:
    """The key check of one application of vLLM, as it is installed there."""

    def __init__(self, app: Any) -> None:
        self._routes: Sequence[BaseRoute] = getattr(app, "routes", ())
        self._check = _Probe(getattr(app, "user_middleware", ()))

    @property
    def has_keys(self) -> bool:
        """Whether vLLM checks API keys at all."""
        return self._check.is_there

    def open_routes(self) -> list[str]:
        """Return the routes that do work for callers without a key, such as `POST /pooling`.

        Without keys vLLM guards nothing; then the list is empty.
        """
        if not self.has_keys:
            return []
        return [
            f"{method} {path}"
            for method, path in working_routes(self._routes)
            if self._check.lets_in(re.sub(r"{[^}]*}", "x", path), ())
        ]

    def guarded_routes(self) -> frozenset[str]:
        """Return the labels of known routes on which vLLM checks keys; none if that is uncertain.

        There the key by which vLLM admitted a request says who asks.
        """
        known = KNOWN_ROUTES | OWN_ROUTES
        guarded = [each for each in known if not self._check.lets_in(each, ())]
        return frozenset() if self._check.has_failed else frozenset(guarded)

    def does_work(self, scope: Scope) -> bool:
        """Return whether the route that serves this request does work."""
        return does_work(self._routes, scope)

    def accepts(self, headers: RawHeaders) -> bool:
        """Return whether vLLM would let a caller with these headers in where it checks keys."""
        return not self.has_keys or self._check.lets_in(_GUARDED_PATH, headers)


class _Probe:
    """vLLM's authentication around an application that notes that it was reached."""

    def __init__(self, middleware: Iterable[Any]) -> None:
        self._reached = False
        # Once a check has failed, nothing is certain of any.
        self.has_failed = False
        self._checks = [self._made(each) for each in middleware if _is_authentication(each.cls)]

    @property
    def is_there(self) -> bool:
        return bool(self._checks)

    def lets_in(self, path: str, headers: RawHeaders) -> bool:
        """Return whether a POST to a path gets past every check."""
        return all(self._passes(check, path, headers) for check in self._checks)

    def _made(self, middleware: Any) -> Any:
        return middleware.cls(self._note, *middleware.args, **middleware.kwargs)

    def _passes(self, check: Any, path: str, headers: RawHeaders) -> bool:
        scope = {
            "type": "http",
            "method": "POST",
            "path": path,
            "raw_path": path.encode(),
            "root_path": "",
            "query_string": b"",
            "headers": list(headers),
        }
        self._reached = False
        try:
            _run(check(scope, _nothing_more, _ignore))
        except Exception as error:  # noqa: BLE001 - a check that fails lets nobody in
            logger.warning("cost meter: vLLM's key check could not be asked: %r", error)
            self.has_failed = True
            return False
        return self._reached

    async def _note(self, _scope: Scope, _receive: Receive, _send: Send) -> None:
        self._reached = True


def _is_authentication(kind: type) -> bool:
    return kind.__name__ == _AUTHENTICATION and kind.__module__.partition(".")[0] == "vllm"


def _run(awaitable: Any) -> None:
    """Run a coroutine that waits for nothing. Raises RuntimeError if it does wait."""
    steps = awaitable.__await__()
    try:
        next(steps)
    except StopIteration:
        return
    steps.close()
    raise RuntimeError("expected an answer at once, got a wait")


async def _nothing_more() -> Message:
    return {"type": "http.disconnect"}


async def _ignore(_message: Message) -> None:
    pass
