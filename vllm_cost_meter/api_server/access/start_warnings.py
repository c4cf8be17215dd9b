"""Looks at the start at who can use the server: unnamed requests, open routes, short, shared keys.

Invariant: no line shows a key.
"""

import os
from collections.abc import Iterator
from typing import Any

from vllm_cost_meter.api_server.access.unnamed import key_check_of
from vllm_cost_meter.config.settings import Settings
from vllm_cost_meter.config.types import TOKEN_CHARS_MIN
from vllm_cost_meter.tenants.rules import sha256_of


def vllm_args(app: Any) -> Any:
    """Return the arguments that vLLM built an application with; None if it has none."""
    return getattr(getattr(app, "state", None), "args", None)


def vllm_keys(args: Any) -> list[str]:
    """Return the API keys in vLLM's arguments or its environment, in clear."""
    given = getattr(args, "api_key", None) or [os.environ.get("VLLM_API_KEY", "")]
    return [key for key in given if key]


def shared_admin_token(args: Any, settings: Settings) -> str | None:
    """Return in one line that the admin token is one of vLLM's API keys; None if it is not."""
    admin = settings.admin_sha256()
    if admin is None or admin not in {sha256_of(key.encode()) for key in vllm_keys(args)}:
        return None
    return (
        "COST_METER_ADMIN_TOKEN: expected a token other than vLLM's API keys, got one of them, so"
        " that every client could read all tenants' figures"
    )


def start_warnings(app: Any, settings: Settings) -> Iterator[str]:
    """Yield one line for each thing that an operator should know at the start."""
    if settings.unnamed_requests == "serve":
        if settings.leaves_some_unnamed:
            yield (
                "requests that no rule names are served and billed to 'unknown';"
                " COST_METER_UNNAMED_REQUESTS=refuse answers them with 401"
            )
        if open_routes := key_check_of(app).open_routes():
            yield (
                f"vLLM's API keys do not guard {', '.join(open_routes)}: anybody who reaches the"
                " server may use them, also a tenant whose budget is spent;"
                f" {_how_to_close(settings)}"
            )
    if settings.ledger is not None and not settings.ledger.startswith("sqlite"):
        yield (
            "bills of this server wait for a database over the network before a report has them;"
            " with COST_METER_FLEET each server keeps a ledger of its own and sends it there"
        )
    for tenant in _with_short_keys(app, settings):
        yield (
            f"an API key of {tenant!r} has fewer than {TOKEN_CHARS_MIN} characters, so it could be"
            " guessed: give out a longer one"
        )


def _how_to_close(settings: Settings) -> str:
    close = "COST_METER_UNNAMED_REQUESTS=refuse closes them"
    is_possible = settings.tenants or settings.tenant_rules
    return close if is_possible else f"once tenants are declared, {close}"


def _with_short_keys(app: Any, settings: Settings) -> list[str]:
    short = [key for key in vllm_keys(vllm_args(app)) if len(key) < TOKEN_CHARS_MIN]
    tenants = {settings.tenant_keys.get(sha256_of(key.encode()) or "") for key in short}
    return sorted(name for name in tenants if name is not None)
