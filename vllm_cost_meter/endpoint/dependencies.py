"""What the routes of the side endpoint share: who asks, and that what was asked wrongly is a 422.

Invariant: a route has a viewer before it runs, or it does not run.
"""

from collections.abc import Iterator
from contextlib import contextmanager
from typing import Annotated

from fastapi import Depends, HTTPException, Query, Request

from vllm_cost_meter.endpoint.access import Viewer
from vllm_cost_meter.units.calendar import EXPECTED, hours_of_window

WindowQuery = Annotated[
    str | None,
    Query(
        description=f"{EXPECTED}; widened to whole UTC hours. Without it: everything in the ledger."
    ),
]
Trailing = Annotated[str, Query(description=f"{EXPECTED}; widened to whole UTC hours.")]


def _viewer(request: Request) -> Viewer:
    viewer: Viewer = request.state.viewer
    return viewer


def refuse_others(viewer: Viewer) -> None:
    """Raise HTTPException for whoever is no admin."""
    if not viewer.is_admin:
        raise HTTPException(403, "expected the admin token: this holds figures of all tenants")


ViewerOf = Annotated[Viewer, Depends(_viewer)]


def _for_admins(viewer: ViewerOf) -> None:
    refuse_others(viewer)


FOR_ADMINS = [Depends(_for_admins)]


@contextmanager
def asked_wrongly() -> Iterator[None]:
    """Make a ValueError about what the asker wrote a 422; any other is our own bug."""
    try:
        yield
    except ValueError as error:
        raise HTTPException(422, str(error)) from None


def hours_asked(window: str | None) -> tuple[int | None, int | None]:
    """Return the hours of a window. Raises HTTPException for what is none."""
    with asked_wrongly():
        return hours_of_window(window)
