"""Cost formulas for a deployment, on plain numbers: cost per token, request and month.

The commands `calc` and `break-even` and the endpoint's `/cost/calc` call these functions, so all
three take, return and refuse the same (`calculators`). Money is in USD. A month has 730 hours
unless an argument says otherwise. A price is for the whole deployment: `usd_per_hour_of` multiplies
a price per GPU by the number of GPUs, once. Nothing here knows what an API or a GPU costs.

Invariant: every result is a finite number, or None where it is undefined. An argument that is not a
valid rate, price or share raises a ValueError that names it in one line.
"""

from vllm_cost_meter.economics.comparison import (
    Compared,
    Mix,
    Offer,
    Sent,
    WhatIf,
    compare,
    volumes_of,
    what_if,
)
from vllm_cost_meter.economics.curves import (
    Crossover,
    Curve,
    Penalty,
    PenaltyPoint,
    Point,
    SloCost,
    crossover,
    curve_of,
    penalty,
    slo,
)
from vllm_cost_meter.economics.declared import Declared
from vllm_cost_meter.economics.fixed_cost import BreakEven, Moved, Rate, VolumeVerdict, break_even
from vllm_cost_meter.economics.formulas import (
    Arrival,
    Blended,
    EffectiveCost,
    RequestCost,
    arrival,
    blended,
    c_eff,
    ratio_of,
    request,
    usd_per_hour_of,
)
from vllm_cost_meter.economics.saturation import SaturationPoint, saturation_of
from vllm_cost_meter.economics.serverless_bill import Serverless, serverless

__all__ = [
    "Arrival",
    "Blended",
    "BreakEven",
    "Compared",
    "Crossover",
    "Curve",
    "Declared",
    "EffectiveCost",
    "Mix",
    "Moved",
    "Offer",
    "Penalty",
    "PenaltyPoint",
    "Point",
    "Rate",
    "RequestCost",
    "SaturationPoint",
    "Sent",
    "Serverless",
    "SloCost",
    "VolumeVerdict",
    "WhatIf",
    "arrival",
    "blended",
    "break_even",
    "c_eff",
    "compare",
    "crossover",
    "curve_of",
    "penalty",
    "ratio_of",
    "request",
    "saturation_of",
    "serverless",
    "slo",
    "usd_per_hour_of",
    "volumes_of",
    "what_if",
]
