"""What each form of a published cost model predicts for a step.

The models are those that `/cost/models` shows: both forms have been learnt from the same steps, and
one of them is in use. The prediction is v(all) of the step's game, by the twin of the native code.

Invariant: a form that the model lacks is left out.
"""

from collections.abc import Mapping, Sequence
from typing import Any

from vllm_cost_meter.attribution.cost_model import (
    CURVE,
    RAMPS,
    TWO_PLANES,
    Experts,
    Layers,
    Plane,
    ServedModel,
)
from vllm_cost_meter.attribution.features_py import StepPart
from vllm_cost_meter.attribution.game_py import StepModel, solve_step
from vllm_cost_meter.ledger.queries.cost_models import CURVE_NAMES, TERM_NAMES


def forms_of(model: Mapping[str, Any]) -> dict[str, StepModel]:
    """Return both forms of a model, by name, from its row in `/cost/models`."""
    forms: dict[str, StepModel] = {}
    if (curve := model["curve"]) is not None and curve["form"] == CURVE:
        coefficients = (
            *(curve["terms"][name] for name in CURVE_NAMES[CURVE]),
            *(curve["token_ns"][str(begin)] for begin in RAMPS),
            curve["expert_ns"],
        )
        served = ServedModel(
            Experts(**curve["experts"]), Layers(**curve["layers"]), tuple(curve["captured"])
        )
        forms[CURVE] = StepModel.of_curve(coefficients, served)
    compute, memory = (_plane(model["planes"][name]) for name in ("compute", "memory"))
    forms[TWO_PLANES] = StepModel.of_planes(compute, memory)
    return forms


def predicted_ns(form: StepModel, parts: Sequence[StepPart]) -> float:
    """Return the GPU-ns of a step of these parts: tokens, context at its end, is it a prefill."""
    return solve_step(form, parts).total_ns


def _plane(terms: Mapping[str, float]) -> Plane:
    one, token, sequence, product, context = (terms[name] for name in TERM_NAMES)
    return (one, token, sequence, product, context)
