"""Read cost models from the ledger: those of each run, and the fit that a new run begins with.

A model's planes are stored as JSON, and shown with the names of their terms.
"""

import json
from collections.abc import Mapping
from typing import Any

from sqlalchemy import and_, func, select
from sqlalchemy.engine import Connection

from vllm_cost_meter.ledger.queries.answers import CostModelRow
from vllm_cost_meter.ledger.schema import cost_models, runs, snapshots
from vllm_cost_meter.records.snapshot import CostModel, EarlierFit

PLANES = ("compute", "memory", "one")
TERM_NAMES = ("fixed_ns", "token_ns", "sequence_ns", "product_ns", "context_ns")
# A fit of so many steps is better than a prior from counts of FLOPs and bytes.
STEPS_MIN = 512


def models(connection: Connection, run_id: str | None) -> list[CostModelRow]:
    """Return the latest model of each run, newest run first; or all versions of one run."""
    m, r, s = cost_models.c, runs.c, snapshots.c
    query = (
        select(cost_models, r.engine_index, r.model, r.hardware, r.parallelism, r.method, s.prior)
        .join(runs, r.run_id == m.run_id)
        .join(snapshots, s.run_id == m.run_id)
    )
    if run_id is not None:
        query = query.where(m.run_id == run_id).order_by(m.version)
    else:
        latest = select(m.run_id, func.max(m.version).label("version")).group_by(m.run_id)
        newest = latest.subquery()
        query = query.join(
            newest, and_(newest.c.run_id == m.run_id, newest.c.version == m.version)
        ).order_by(r.started_at.desc(), m.run_id)
    return [_shown(row._asdict()) for row in connection.execute(query)]


def earlier_fit(
    connection: Connection, run_id: str, model: str, hardware: str, parallelism: str
) -> EarlierFit | None:
    """Return the last fit of another run with the same model, hardware and parallelism."""
    m, r = cost_models.c, runs.c
    query = (
        select(cost_models)
        .join(runs, r.run_id == m.run_id)
        .where(
            r.run_id != run_id,
            r.model == model,
            r.hardware == hardware,
            r.parallelism == parallelism,
            m.steps >= STEPS_MIN,
        )
        .order_by(r.started_at.desc(), m.version.desc())
        .limit(1)
    )
    found = connection.execute(query).first()
    if found is None:
        return None
    fit = _model_of(found._asdict())
    return EarlierFit(fit.planes, fit.two_planes)


def _model_of(row: Mapping[str, Any]) -> CostModel:
    return CostModel(
        version=row["version"],
        form=row["form"],
        planes=tuple(tuple(plane) for plane in json.loads(row["planes"])),
        steps=row["steps"],
        error_two_planes=row["error_two_planes"],
        error_one_plane=row["error_one_plane"],
        explained=row["explained"],
    )


def _shown(row: Mapping[str, Any]) -> CostModelRow:
    model = _model_of(row)
    return {
        "run_id": row["run_id"],
        "engine_index": row["engine_index"],
        "model": row["model"],
        "hardware": row["hardware"],
        "parallelism": row["parallelism"],
        "method": row["method"],
        "prior": row["prior"],
        "version": model.version,
        "taken_at": row["taken_at"],
        "form": model.form,
        "planes": {
            name: dict(zip(TERM_NAMES, plane, strict=True))
            for name, plane in zip(PLANES, model.planes, strict=True)
        },
        "steps": model.steps,
        "error": model.error,
        "error_two_planes": model.error_two_planes,
        "error_one_plane": model.error_one_plane,
        "explained": model.explained,
    }
