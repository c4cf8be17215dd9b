"""The routes `/cost/economics` and `/cost/economics/method`, for operators and a public page.

Operators see all figures. With the setting `public_economics` anybody may read the cost of a
million tokens in the trailing week and the SQL behind it, without a token and from a page of
another origin. That answer is cached (see `cached`), so many readers cause few reads of the ledger.

Invariant: only an operator sees a total, a count or the name of a tenant.
"""

from collections.abc import Callable, Iterable
from typing import Any, TypeVar

from fastapi import FastAPI, HTTPException

from vllm_cost_meter.economics import Declared
from vllm_cost_meter.endpoint.access import Viewer
from vllm_cost_meter.endpoint.cached import Kept
from vllm_cost_meter.endpoint.dependencies import (
    EnginesQuery,
    Trailing,
    ViewerOf,
    engines_asked,
    hours_asked,
    refuse_others,
)
from vllm_cost_meter.endpoint.shapes import OrjsonResponse, described, shape_of
from vllm_cost_meter.ledger.economics.answers import Economics, FigureMethods, PublicEconomics
from vllm_cost_meter.ledger.economics.figures import FIGURES, OF_SLO
from vllm_cost_meter.ledger.economics.query import economics, method
from vllm_cost_meter.ledger.reader import LedgerReader
from vllm_cost_meter.units.calendar import WEEK

PATH = "/cost/economics"
METHOD_PATH = f"{PATH}/method"
# These paths need no token if the setting `public_economics` is on.
PUBLIC_PATHS = (PATH, METHOD_PATH)
# A public page has the cost per token, and the load and latency under which it was measured.
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

T = TypeVar("T")


def _figures(name: str, of: Iterable[str]) -> Any:
    """Return the type of an answer's figures, each described by its unit and meaning."""
    said = {
        figure: ": ".join(filter(None, (FIGURES[figure].unit, FIGURES[figure].meaning)))
        for figure in of
    }
    fields = {figure: (float | None, text) for figure, text in said.items()}
    # Figures about latency bounds are missing if none is declared.
    return described(name, "Each figure, null if it is undefined.", fields, OF_SLO)


def _answers() -> Any:
    everything = shape_of(Economics, figures=_figures("Figures", FIGURES))
    public = shape_of(PublicEconomics, figures=_figures("PublicFigures", PUBLIC_FIGURES))
    return everything | public


def add_economics(
    app: FastAPI,
    reader: LedgerReader,
    refresh: Callable[[], None],
    declared: Callable[[], Declared],
    is_public: Callable[[], bool],
) -> None:
    """Add both routes."""

    def week() -> PublicEconomics:
        refresh()
        answer = economics(reader, declared(), *hours_asked(WEEK))
        return {
            "window": answer["window"],
            "taken_at": answer["taken_at"],
            "deployments": answer["deployments"],
            "rows_kept_from": answer["rows_kept_from"],
            "slo": answer["slo"],
            "figures": {name: answer["figures"][name] for name in PUBLIC_FIGURES},
        }

    def week_method() -> FigureMethods:
        steps = method(reader, declared(), *hours_asked(WEEK))
        return {"figures": [step for step in steps if step["figure"] in PUBLIC_FIGURES]}

    kept, kept_method = Kept(week), Kept(week_method)

    def of_public(
        make: Kept[T], viewer: Viewer, window: str, engines: str | None
    ) -> OrjsonResponse:
        if not is_public():
            refuse_others(viewer)
        if window != WEEK:
            raise HTTPException(403, f"window: expected the admin token for any but {WEEK}")
        if engines:
            raise HTTPException(403, "filter: expected the admin token for any")
        if (answer := make()) is None:
            raise HTTPException(503, "economics: being made; ask again", {"Retry-After": "10"})
        # There is nothing in it that depends on who asks.
        headers = {"access-control-allow-origin": "*", "cache-control": "public, max-age=60"}
        return OrjsonResponse(answer, headers=headers)

    @app.get(PATH, responses={200: {"model": _answers()}})
    def figures(
        viewer: ViewerOf, window: Trailing = WEEK, engines: EnginesQuery = None
    ) -> Economics | OrjsonResponse:
        """Return the cost of tokens and requests, with load and latency."""
        if not viewer.is_admin:
            return of_public(kept, viewer, window, engines)
        hours, chosen = hours_asked(window), engines_asked(engines)
        refresh()
        return economics(reader, declared(), *hours, engines=chosen)

    @app.get(METHOD_PATH)
    def how(
        viewer: ViewerOf, window: Trailing = WEEK, engines: EnginesQuery = None
    ) -> FigureMethods | OrjsonResponse:
        """Return the SQL that is executed for each of these figures."""
        if not viewer.is_admin:
            return of_public(kept_method, viewer, window, engines)
        hours, chosen = hours_asked(window), engines_asked(engines)
        return {"figures": method(reader, declared(), *hours, engines=chosen)}
