"""What a deployment costs by its load: the formulas, as functions of plain numbers.

`calc` and `break-even` of the command line and `/cost/calc` of the side endpoint are these very
functions: what one of them takes, returns and refuses is the same in all three (`calculators`).
Money is USD, a month is 730 hours unless it is said otherwise, and a price is always that of a
whole deployment: a price per GPU is multiplied by its GPUs once, in `usd_per_hour_of`. Nothing here
knows what an API or a GPU costs. The standard library and core only.

Invariant: every result is a finite number, or None where it is undefined; an argument that is none
a rate, price or share raises ValueError with one line that names it.
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
from vllm_cost_meter.economics.fixed_cost import BreakEven, Moved, Rate, Verdict, break_even
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
from vllm_cost_meter.economics.per_second import Serverless, serverless
from vllm_cost_meter.economics.saturation import SaturationPoint, saturation_of

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
    "Verdict",
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
