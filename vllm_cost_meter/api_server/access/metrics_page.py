"""Leave metrics with tenants, budgets or money out of vLLM's own `/metrics`.

vLLM serves `/metrics` without a key. With one API server it shows the default registry; with
several it adds up files to which every metric of every process goes. So a metric cannot be kept out
at its source in both cases. Instead its lines are taken out of the page on its way to the client.

Invariant: every line of another metric leaves as it came. The side endpoint shows all metrics.
"""

import re
from collections.abc import Iterable

from starlette.types import ASGIApp, Message, Receive, Scope, Send

from vllm_cost_meter.config.settings import Settings
from vllm_cost_meter.metrics.series import PRIVATE_NAMES

# vLLM serves the page at every path that begins like this.
_PATH = "/metrics"
_NAME = re.compile(rb"(?:# (?:HELP|TYPE|UNIT) )?([a-zA-Z_:][a-zA-Z0-9_:]*)")
_ENDINGS = ("", "_total", "_created", "_bucket", "_sum", "_count")
_PRIVATE = frozenset(f"{name}{ending}".encode() for name in PRIVATE_NAMES for ending in _ENDINGS)
START, BODY = "http.response.start", "http.response.body"


def hides_metrics(scope: Scope, settings: Settings) -> bool:
    """Return whether this request asks for vLLM's `/metrics`, and tenants are left out there."""
    if settings.tenant_metrics == "everywhere" or scope["type"] != "http":
        return False
    path: str = scope["path"].removeprefix(scope.get("root_path", ""))
    return path.startswith(_PATH)


async def serve_without_private(app: ASGIApp, scope: Scope, receive: Receive, send: Send) -> None:
    """Serve vLLM's page of metrics without the private ones."""
    start: Message | None = None
    parts: list[bytes] = []

    async def editing_send(message: Message) -> None:
        nonlocal start
        if message["type"] == START:
            start = message
            return
        if message["type"] != BODY or start is None:
            await send(message)
            return
        parts.append(message.get("body", b""))
        if message.get("more_body", False):
            return
        body = without_private(b"".join(parts))
        kept = [(n, v) for n, v in start.get("headers", ()) if n.lower() != b"content-length"]
        length = (b"content-length", b"%d" % len(body))
        await send({**start, "headers": [*kept, length]})
        await send({"type": BODY, "body": body})

    # A compressed page could not be read.
    headers = [(name, value) for name, value in scope["headers"] if name != b"accept-encoding"]
    await app({**scope, "headers": headers}, receive, editing_send)


def without_private(page: bytes) -> bytes:
    """Return a page of metrics (Prometheus or OpenMetrics text) without the private ones."""
    return b"".join(line for line in _lines(page) if not _is_private(line))


def _lines(page: bytes) -> Iterable[bytes]:
    # Label values have no line feeds of their own: they are escaped. Other ends of lines are not.
    return re.findall(rb"[^\n]*\n|[^\n]+", page)


def _is_private(line: bytes) -> bool:
    found = _NAME.match(line)
    return found is not None and found[1] in _PRIVATE
