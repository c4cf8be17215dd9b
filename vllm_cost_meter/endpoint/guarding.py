"""Guard the side endpoint against web pages that pose as local, and against guessed tokens.

Without an admin token a caller on loopback is an operator. A web page cannot reach loopback by that
name, but its own host name may be made to resolve to 127.0.0.1 (DNS rebinding). The browser then
sends that name as `Host`. So without an admin token only names of loopback are answered.

A wrong token waits before it is refused. The waits are few at a time, so a flood of guesses is as
slow as a trickle, and a right token never waits. While too many wrong ones wait, nobody's token is
looked at. A wait holds no thread.

Invariant: at most `at_once` wrong tokens are refused in `delay_s`.
"""

import asyncio
import ipaddress
import re
from collections.abc import Awaitable, Callable
from typing import Annotated

from fastapi import Header, HTTPException, Request
from starlette.datastructures import Headers
from starlette.types import ASGIApp, Receive, Scope, Send

from vllm_cost_meter.endpoint.access import STRANGER, Access
from vllm_cost_meter.endpoint.economics import PUBLIC_PATHS
from vllm_cost_meter.endpoint.shapes import error_reply
from vllm_cost_meter.units.text import quoted

_HOST = re.compile(r"(?:\[(?P<v6>[^]]*)\]|(?P<name>[^:]*))(?::\d*)?")
FAILURE_DELAY_S = 0.5
FAILURES_AT_ONCE = 8
FAILURES_WAITING_MAX = 256


class LoopbackHosts:
    """ASGI middleware that answers only requests whose `Host` is a name of loopback."""

    def __init__(self, app: ASGIApp) -> None:
        self.app = app

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        host = Headers(scope=scope).get("host", "") if scope["type"] == "http" else "localhost"
        if is_loopback(host):
            await self.app(scope, receive, send)
            return
        message = (
            "Host: expected a name of loopback such as localhost, because no admin token is set"
            f" (COST_METER_ADMIN_TOKEN), got {quoted(host)}"
        )
        await error_reply(421, message)(scope, receive, send)


def is_loopback(host: str) -> bool:
    """Return whether a `Host` header names loopback, with or without a port."""
    found = _HOST.fullmatch(host)
    name = "" if found is None else found["v6"] or found["name"]
    try:
        return ipaddress.ip_address(name).is_loopback
    except ValueError:
        return name.lower() == "localhost"


class Failures:
    """Slows down callers with wrong tokens."""

    def __init__(
        self,
        *,
        delay_s: float = FAILURE_DELAY_S,
        at_once: int = FAILURES_AT_ONCE,
        waiting_max: int = FAILURES_WAITING_MAX,
        sleep: Callable[[float], Awaitable[None]] = asyncio.sleep,
    ) -> None:
        self.waiting = 0
        self._delay_s = delay_s
        self._waiting_max = waiting_max
        self._sleep = sleep
        self._turns = asyncio.Semaphore(at_once)

    @property
    def are_too_many(self) -> bool:
        """Whether so many wrong tokens wait that no other token is looked at."""
        return self.waiting >= self._waiting_max

    async def slow_down(self) -> None:
        """Wait for a turn, and then for the delay."""
        self.waiting += 1
        try:
            async with self._turns:
                await self._sleep(self._delay_s)
        finally:
            self.waiting -= 1


def authorizing(
    access: Access, public_economics: Callable[[], bool], failures: Failures
) -> Callable[..., Awaitable[None]]:
    """Return the dependency of every route: it finds the viewer, or refuses the caller."""

    async def authorized(
        request: Request, authorization: Annotated[str | None, Header()] = None
    ) -> None:
        if authorization and failures.are_too_many:
            message = "expected fewer callers with wrong tokens; try again later"
            raise HTTPException(503, message, {"Retry-After": "1"})
        viewer = access.viewer(authorization)
        is_open = request.url.path in PUBLIC_PATHS and not authorization and public_economics()
        if viewer is None and is_open:
            viewer = STRANGER
        if viewer is None:
            if authorization:
                await failures.slow_down()
            raise HTTPException(
                401,
                "expected the header Authorization: Bearer <admin token, or a tenant's API key>",
                {"WWW-Authenticate": "Bearer"},
            )
        request.state.viewer = viewer

    return authorized
