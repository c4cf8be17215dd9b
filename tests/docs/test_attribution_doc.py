"""The page on attribution says how the cost model is learnt, with the figures of the code."""

from tests.support.pages import DOCS
from vllm_cost_meter.attribution import cost_model_py as fit
from vllm_cost_meter.attribution import curve_fit_py as curve
from vllm_cost_meter.attribution.cost_model import FIT_TERMS, KNOTS
from vllm_cost_meter.attribution.growths_py import ENUMERATED_MAX
from vllm_cost_meter.attribution.shapley_py import LARGE_MAX, SMALL_PART

TEXT = " ".join((DOCS / "explanation" / "attribution.md").read_text().split())


def test_the_figures_of_the_fit_are_those_of_the_code():
    for words in (
        f"The last {fit.RING:,} steps are gone over",
        f"a time constant of {fit.MEMORY_STEPS:,.0f} steps",
        f"All of the first {fit.ALL_STEPS:,} steps are learnt from",
        f"better by {1 - fit.MARGIN:.0%} for {fit.CHOICE_STEPS:,} steps on end".replace("%", " %"),
        f"known to {curve.SPREAD:.0%} of itself".replace("%", " %"),
        f"read to {curve.READ_SPREAD:.0%}".replace("%", " %"),
        f"as soon as {fit.WATCHED_FROM:,} steps are known",
        f"predicts {fit.MOVED:.0%} else".replace("%", " %"),
        f"six in the first {fit.AT_FIRST:,}",
        f"from {fit.FIRST_PUBLISH} on, later every {fit.PUBLISH_STEPS:,}",
        f"{FIT_TERMS} coefficients",
        f"{len(KNOTS)} corners",
        f"exact for up to {LARGE_MAX} requests",
        f"up to {LARGE_MAX} of the largest requests are enumerated",
        f"at least 1/{1 / SMALL_PART:.0f} of all",
        f"Up to {ENUMERATED_MAX} requests are enumerated",
    ):
        assert words in TEXT
    assert (fit.SWEEP_PER_STEP, fit.SWEEP_AT_FIRST, fit.LATER_EVERY) == (2, 6, 4)
    assert "two records per step" in TEXT
    assert "later every fourth" in TEXT
