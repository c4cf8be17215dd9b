"""`/cost/economics` and `/cost/economics/method`: all for operators, a part for a public page.

With `public_economics` anybody may read, without a token and from a page of another origin, what a
million tokens cost in the trailing week, and the SQL behind it. That answer is kept and made anew
by itself (`kept`): however many ask, the ledger is read seldom.

Invariant: who is no operator learns no total, no count and no name of a tenant.
"""

from collections.abc import Callable
from typing import Any

from fastapi import FastAPI, HTTPException, Response

from vllm_cost_meter.economics import Declared
from vllm_cost_meter.endpoint.access import Viewer
from vllm_cost_meter.endpoint.cached import Kept
from vllm_cost_meter.endpoint.dependencies import Trailing, ViewerOf, hours_asked, refuse_others
from vllm_cost_meter.ledger.economics.query import economics, method
from vllm_cost_meter.ledger.reader import LedgerReader
from vllm_cost_meter.units.calendar import WEEK

PATH = "/cost/economics"
METHOD_PATH = f"{PATH}/method"
# Without a token, if the setting says so.
PUBLIC_PATHS = (PATH, METHOD_PATH)
# What a public page has: costs per token, the load and the latency that they came with.
PUBLIC_FIGURES = (
    "blended_usd_per_m_output_tokens",
    "blended_usd_per_m_total_tokens",
    "usd_per_m_output_tokens",
    "usd_per_m_total_tokens",
    "usd_per_m_computed_prompt_tokens",
    "usd_per_m_decoded_tokens",
    "utilization",
    "penalty",
    "ttft_p50_ms",
    "ttft_p99_ms",
    "tpot_p50_ms",
    "tpot_p99_ms",
)
PUBLIC_FIELDS = ("window", "taken_at", "deployments", "slo")


def add_economics(
    app: FastAPI,
    reader: LedgerReader,
    refresh: Callable[[], None],
    declared: Callable[[], Declared],
    is_public: Callable[[], bool],
) -> None:
    """Add both routes."""

    def week() -> dict[str, Any]:
        refresh()
        answer = economics(reader, declared(), *hours_asked(WEEK))
        told = {name: answer[name] for name in PUBLIC_FIELDS}
        return {**told, "figures": {name: answer["figures"][name] for name in PUBLIC_FIGURES}}

    def week_method() -> dict[str, Any]:
        steps = method(reader, declared(), *hours_asked(WEEK))
        return {"figures": [step for step in steps if step["figure"] in PUBLIC_FIGURES]}

    kept, kept_method = Kept(week), Kept(week_method)

    def of_public(
        make: Kept[dict[str, Any]], viewer: Viewer, window: str, response: Response
    ) -> dict[str, Any]:
        if not is_public():
            refuse_others(viewer)
        if window != WEEK:
            raise HTTPException(403, f"window: expected the admin token for any but {WEEK}")
        if (answer := make()) is None:
            raise HTTPException(503, "economics: being made; ask again", {"Retry-After": "10"})
        # There is nothing in it that depends on who asks.
        response.headers["access-control-allow-origin"] = "*"
        response.headers["cache-control"] = "public, max-age=60"
        return answer

    @app.get(PATH)
    def figures(viewer: ViewerOf, response: Response, window: Trailing = WEEK) -> dict[str, Any]:
        """Return what tokens and requests cost in all, at which load and latency."""
        if not viewer.is_admin:
            return of_public(kept, viewer, window, response)
        hours = hours_asked(window)
        refresh()
        return economics(reader, declared(), *hours)

    @app.get(METHOD_PATH)
    def how(viewer: ViewerOf, response: Response, window: Trailing = WEEK) -> dict[str, Any]:
        """Return the SQL behind each of these figures, as it is executed."""
        if not viewer.is_admin:
            return of_public(kept_method, viewer, window, response)
        return {"figures": method(reader, declared(), *hours_asked(window))}
