"""The page on attribution says how the cost model is learnt, with the figures of the code."""

from tests.support.pages import DOCS
from vllm_cost_meter.attribution import cost_model_py as fit
from vllm_cost_meter.attribution.shapley_py import LARGE_MAX
from vllm_cost_meter.lab.validation.real_server import TENANTS

TEXT = " ".join((DOCS / "explanation" / "attribution.md").read_text().split())


def test_the_figures_of_the_fit_are_those_of_the_code():
    for words in (
        f"The last {fit.RING:,} steps are gone over",
        f"a time constant of {fit.MEMORY_STEPS:,.0f} steps",
        f"missed by {fit.CHANGED} times more than is usual",
        f"All of the first {fit.ALL_STEPS:,} steps are learnt from",
        f"by {1 - fit.MARGIN:.0%} to begin with".replace("%", " %"),
        f"known to {fit.PRIOR_SPREAD:.0%} of itself".replace("%", " %"),
        f"from {fit.FIRST_PUBLISH} on, later every {fit.PUBLISH_STEPS:,}",
        f"at most {fit.TERMS} terms",
        f"exactly for up to {LARGE_MAX} requests",
        f"prefill chunks, at most {LARGE_MAX}, are enumerated",
    ):
        assert words in TEXT
    assert (fit.SWEEP_PER_STEP, fit.LATER_EVERY) == (2, 4)
    assert "two records per step" in TEXT
    assert "later every fourth" in TEXT


def test_the_tenants_of_the_real_server_are_those_that_are_sent():
    for tenant in TENANTS:
        shape = f"{tenant.prompt_tokens:,}:{tenant.output_tokens} tokens"
        assert f"{tenant.name} ({tenant.requests} requests of {shape})" in TEXT
