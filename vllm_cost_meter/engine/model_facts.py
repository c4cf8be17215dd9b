"""What the books take from a published cost model: its record, and what a cached prompt saved.

Invariant: both follow from the model alone.
"""

from vllm_cost_meter.attribution.cost_model import CURVE, PAIRS, Model, token_ns
from vllm_cost_meter.records.snapshot import TWO_PLANES, CostModel, LearntCurve


def saved_ns(model: Model, cached_tokens: int) -> int:
    """Estimate the GPU-ns that computing the cached start of a prompt would have taken.

    The estimate uses what the cost model knows of prefill. It leaves out the fixed part and the
    part per sequence, because the rest of the prompt paid for them. Token k meets k tokens of
    context, or as many as the window has. With two planes a real chunk counts as if all its tokens
    met the context of its last one, so the estimate is rather too low than too high.
    """
    products = cached_tokens * (cached_tokens + 1) / 2
    if model.form == TWO_PLANES:
        _fixed, per_token, _per_sequence, per_product, _per_context = model.planes[0]
        return int(per_token * cached_tokens + per_product * products)
    layers, beyond = model.served.layers, max(0, cached_tokens - model.served.layers.window)
    pairs = layers.whole * products + layers.windowed * (products - beyond * (beyond + 1) / 2)
    return int(token_ns(model.coefficients) * cached_tokens + model.coefficients[PAIRS] * pairs)


def recorded(model: Model) -> CostModel:
    """Return a published model as snapshots have it."""
    served = model.served
    return CostModel(
        version=model.version,
        form=model.form,
        planes=model.planes,
        steps=model.steps,
        error_two_planes=model.error_two_planes,
        error_other_form=model.error_curve,
        explained=model.explained,
        curve=LearntCurve(
            model.coefficients,
            (served.experts.number, served.experts.per_token),
            (served.layers.whole, served.layers.windowed, served.layers.window),
            served.captured,
            CURVE,
        ),
        charge_errors=model.charge_errors,
    )
