"""Store and read full load in the ledger: the points that sweeps measured.

The SQL for the figure `saturation_output_tokens_per_s` chooses the point for a window: the latest
point measured on the same deployment with requests of about the same size.

Invariant: a curve is kept once, however often it is imported.
"""

from collections.abc import Collection, Iterable
from typing import Any

from sqlalchemy import insert, select
from sqlalchemy.exc import SQLAlchemyError

from vllm_cost_meter.economics import SaturationPoint
from vllm_cost_meter.errors import LedgerError
from vllm_cost_meter.ledger.database import cause_of, open_database, open_to_read, writing
from vllm_cost_meter.ledger.schema import runs, saturation_points


def knows_runs(url: str, run_ids: Collection[str]) -> bool:
    """Return whether a ledger has all of these engine runs; False if there is no ledger."""
    try:
        engine = open_to_read(url)
    except LedgerError:
        return False
    try:
        with engine.begin() as connection:
            query = select(runs.c.run_id).where(runs.c.run_id.in_(run_ids))
            return set(connection.execute(query).scalars()) == set(run_ids)
    finally:
        engine.dispose()


def keep(url: str, points: Iterable[SaturationPoint]) -> int:
    """Keep these points in an existing ledger; return how many are new. Raises LedgerError."""
    engine = open_database(url, create=False)
    try:
        with writing(engine).begin() as connection:
            known = set(connection.execute(select(saturation_points.c.point_id)).scalars())
            rows = {point.point_id: _row(point) for point in points if point.point_id not in known}
            if rows:
                connection.execute(insert(saturation_points), list(rows.values()))
            return len(rows)
    except SQLAlchemyError as error:
        shown = engine.url.render_as_string(hide_password=True)
        raise LedgerError(f"ledger {shown}: cannot be written: {cause_of(error)}") from error
    finally:
        engine.dispose()


def kept(url: str) -> list[dict[str, Any]]:
    """Return all points, the latest first. Raises LedgerError."""
    engine = open_to_read(url)
    try:
        with engine.begin() as connection:
            latest = select(saturation_points).order_by(saturation_points.c.measured_at.desc())
            # SQLAlchemy's names are no plain texts, and orjson refuses them.
            names = [str(name) for name in saturation_points.c.keys()]  # noqa: SIM118
            return [dict(zip(names, row, strict=True)) for row in connection.execute(latest)]
    finally:
        engine.dispose()


def _row(point: SaturationPoint) -> dict[str, Any]:
    own = {name: getattr(point, name) for name in point.__slots__ if name != "about"}
    return {**own, **point.about}
