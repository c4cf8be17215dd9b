"""Read cost models from the ledger: those of each run, and the fit that a new run begins with.

A model's planes and its curve are stored as JSON, and shown with the names of their terms.
"""

import json
from collections.abc import Mapping
from typing import Any

from sqlalchemy import and_, func, select
from sqlalchemy.engine import Connection

from vllm_cost_meter.attribution.cost_model import (
    CHARGE_KIND_NAMES,
    CURVE,
    EARLIER_CURVE,
    FIT_TERMS,
    RAMPS,
)
from vllm_cost_meter.ledger.queries.answers import CostModelRow
from vllm_cost_meter.ledger.schema import cost_models, runs, snapshots
from vllm_cost_meter.records.snapshot import CostModel, EarlierFit, LearntCurve
from vllm_cost_meter.reports.request_answers import ShownCurve

PLANES = ("compute", "memory", "one")
TERM_NAMES = ("fixed_ns", "token_ns", "sequence_ns", "product_ns", "context_ns")
_WITHOUT_FEATURES = (
    *("fixed_ns", "prefill_ns", "sequence_ns", "pair_ns", "prefill_compute_ns"),
    *("decode_compute_ns", "read_ns"),
)
# The own terms of a curve, by its form. After them come the slopes, then one expert's reading.
CURVE_NAMES = {
    EARLIER_CURVE: _WITHOUT_FEATURES,
    CURVE: (
        *_WITHOUT_FEATURES,
        *("lora_ns", "lora_token_ns", "guided_ns", "guided_row_ns"),
        *("encoder_ns", "encoder_token_ns"),
    ),
}
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
    """Return the last fit of another run with the same model, hardware and parallelism.

    None if its curve has another form: what features took is in the other terms of a curve without
    them, and nobody knows how much.
    """
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
            # A fit of an earlier version had another form, and would not do.
            m.curve.is_not(None),
        )
        .order_by(r.started_at.desc(), m.version.desc())
        .limit(1)
    )
    found = connection.execute(query).first()
    if found is None:
        return None
    fit = _model_of(found._asdict())
    if fit.curve is None or fit.curve.form != CURVE or len(fit.curve.coefficients) != FIT_TERMS:
        return None
    return EarlierFit(fit.planes, fit.curve.coefficients, fit.two_planes)


def _model_of(row: Mapping[str, Any]) -> CostModel:
    return CostModel(
        version=row["version"],
        form=row["form"],
        planes=tuple(tuple(plane) for plane in json.loads(row["planes"])),
        steps=row["steps"],
        error_two_planes=row["error_two_planes"],
        error_other_form=row["error_other_form"],
        explained=row["explained"],
        curve=LearntCurve.from_plain(json.loads(row["curve"])) if row["curve"] else None,
        charge_errors=tuple(json.loads(row["charge_errors"])) if row["charge_errors"] else None,
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
            for name, plane in zip(PLANES, model.planes, strict=False)
        },
        "curve": None if model.curve is None else _shown_curve(model.curve),
        "steps": model.steps,
        "error": model.error,
        "error_two_planes": model.error_two_planes,
        "error_other_form": model.error_other_form,
        "explained": model.explained,
        "charge_errors": (
            None
            if model.charge_errors is None
            else dict(zip(CHARGE_KIND_NAMES, model.charge_errors, strict=True))
        ),
    }


def _shown_curve(curve: LearntCurve) -> ShownCurve:
    number, per_token = curve.experts
    whole, windowed, window = curve.layers
    names = CURVE_NAMES.get(curve.form, ())
    slopes = curve.coefficients[len(names) : -1]
    return {
        "form": curve.form,
        "terms": dict(zip(names, curve.coefficients, strict=False)),
        "token_ns": {str(begin): slope for begin, slope in zip(RAMPS, slopes, strict=False)},
        "expert_ns": curve.coefficients[-1],
        "experts": {"number": number, "per_token": per_token},
        "layers": {"whole": whole, "windowed": windowed, "window": window},
        "captured": list(curve.captured),
    }
