"""Random priors of the cost model, and what a served model may be, for Hypothesis."""

from hypothesis import strategies as st

from vllm_cost_meter.attribution.cost_model import FIT_TERMS, Experts, Layers, ServedModel
from vllm_cost_meter.attribution.priors import CurvePrior, Prior, PriorPart

COEFFICIENT = st.just(0.0) | st.floats(1e-3, 1e4)
LARGE_COEFFICIENT = st.floats(0, 1e9, allow_subnormal=False)
PLANE = st.tuples(*[LARGE_COEFFICIENT] * 5)
COEFFICIENTS = st.tuples(*[COEFFICIENT] * FIT_TERMS)
SERVED = st.builds(
    ServedModel,
    st.sampled_from([Experts(), Experts(128, 8), Experts(8, 2)]),
    st.sampled_from([Layers(), Layers(8, 40, 1024), Layers(0, 1, 7)]),
    st.sampled_from([(), (1, 2, 4, 8, 16, 24, 32), tuple(range(8, 520, 8))]),
)
PARTS = st.lists(
    st.builds(PriorPart, COEFFICIENTS, st.floats(0.5, 2.0), st.floats(0.1, 1.0)),
    min_size=1,
    max_size=5,
)
PRIORS = st.builds(
    lambda planes, parts, start, has_ratio, counts, served: Prior(
        planes,
        CurvePrior(
            tuple(parts if has_ratio else (part._replace(scale=0.0) for part in parts)),
            start,
            counts_reading=counts,
        ),
        served,
        "random",
    ),
    st.tuples(PLANE, PLANE),
    PARTS,
    COEFFICIENTS,
    st.booleans(),
    st.booleans(),
    SERVED,
)
