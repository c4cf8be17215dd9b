"""Shared route dependencies: the viewer, the window, and status 422 for bad input.

Invariant: a route runs only if it has a viewer.
"""

from collections.abc import Iterator
from contextlib import contextmanager
from typing import Annotated

from fastapi import Depends, HTTPException, Query, Request

from vllm_cost_meter.endpoint.access import Viewer
from vllm_cost_meter.records.owner import Covers
from vllm_cost_meter.reports.engine_labels import EngineFilter
from vllm_cost_meter.reports.grammar import engines_named
from vllm_cost_meter.units.calendar import EXPECTED, hours_of_window

WindowQuery = Annotated[
    str | None,
    Query(description=f"{EXPECTED}; widened to whole UTC hours. The whole ledger by default."),
]
CoversQuery = Annotated[
    Covers,
    Query(description="What a tenant means: itself with all tenants below it, or on its own."),
]
EnginesQuery = Annotated[
    str | None,
    Query(
        alias="filter",
        description="Engines to answer about, such as label:pool=spot; all by default.",
    ),
]
Trailing = Annotated[str, Query(description=f"{EXPECTED}; widened to whole UTC hours.")]


def _viewer(request: Request) -> Viewer:
    viewer: Viewer = request.state.viewer
    return viewer


def refuse_others(viewer: Viewer) -> None:
    """Raise HTTPException unless the viewer is an operator."""
    if not viewer.is_admin:
        raise HTTPException(403, "expected the admin token: this holds figures of all tenants")


ViewerOf = Annotated[Viewer, Depends(_viewer)]


def _for_admins(viewer: ViewerOf) -> None:
    refuse_others(viewer)


FOR_ADMINS = [Depends(_for_admins)]


@contextmanager
def asked_wrongly() -> Iterator[None]:
    """Turn a ValueError about the caller's input into a 422.

    A ValueError anywhere else is a bug of ours, and becomes a 500.
    """
    try:
        yield
    except ValueError as error:
        raise HTTPException(422, str(error)) from None


def hours_asked(window: str | None) -> tuple[int | None, int | None]:
    """Return the hours of a window. Raises HTTPException for text that is no window."""
    with asked_wrongly():
        return hours_of_window(window)


def engines_asked(filter: str | None) -> EngineFilter:  # noqa: A002 - the parameter's public name
    """Return the engines of a filter. Raises HTTPException for text that names no labels."""
    with asked_wrongly():
        return engines_named(filter)
