"""Laws of the formulas, for any prices and rates: money scales with the price, load does not."""

from dataclasses import asdict

import pytest
from hypothesis import given
from hypothesis import strategies as st

from vllm_cost_meter import economics as e

amounts = st.floats(1e-3, 1e6)
prices = amounts
overheads = st.just(0.0) | st.floats(1e-3, 1e3)
points = st.builds(
    lambda rate, tokens: {"rps": rate, "output_tokens_per_s": tokens}, amounts, amounts
)
curves = st.lists(points, min_size=1, max_size=8, unique_by=lambda point: point["rps"])


def about(value: float) -> object:
    return pytest.approx(value, rel=1e-9)


def money_of(result: object) -> dict[str, float]:
    return {name: value for name, value in asdict(result).items() if "usd" in name}


@given(prices, amounts, amounts, amounts)
def test_doubling_the_price_doubles_every_dollar(price, output, total, requests):
    rates = {
        "output_tokens_per_s": output,
        "total_tokens_per_s": total,
        "requests_per_s": requests,
    }
    once, twice = (money_of(e.c_eff(usd_per_hour=n * price, **rates)) for n in (1, 2))
    assert twice == {name: about(2 * usd) for name, usd in once.items()}


@given(prices, amounts, st.integers(1, 64))
def test_a_deployments_price_does_not_depend_on_how_it_is_said(price, tokens, gpus):
    said = e.c_eff(usd_per_gpu_hour=price, gpus=gpus, output_tokens_per_s=tokens)
    whole = e.c_eff(usd_per_hour=price * gpus, output_tokens_per_s=tokens)
    assert said == whole


@given(prices, prices, st.integers(0, 100), st.integers(1, 100))
def test_a_blend_lies_between_its_two_prices(one, other, inputs, outputs):
    mixed = e.blended(input_usd_per_m=one, output_usd_per_m=other, ratio=f"{inputs}:{outputs}")
    low, high = sorted((one, other))
    assert low * (1 - 1e-9) <= mixed.usd_per_m_blended <= high * (1 + 1e-9)


@given(prices, curves, st.floats(0.1, 10))
def test_the_price_moves_no_penalty_and_none_is_below_1(price, curve, factor):
    found = e.penalty(usd_per_hour=price, curve=e.curve_of(curve))
    other = e.penalty(usd_per_hour=price * factor, curve=e.curve_of(curve))
    assert [p.penalty for p in found.points] == [p.penalty for p in other.points]
    assert min(p.penalty for p in found.points) == 1
    assert found.c_naive == about(min(p.usd_per_m_output_tokens for p in found.points))


@given(prices, prices, amounts)
def test_at_the_crossover_self_hosting_costs_what_the_api_does(price, api, tokens):
    rate = e.crossover(
        usd_per_hour=price, api_usd_per_m_output=api, output_tokens_per_request=tokens
    ).requests_per_s
    there = e.c_eff(usd_per_hour=price, output_tokens_per_s=rate * tokens)
    assert there.usd_per_m_output_tokens == about(api)


@given(prices, curves, prices)
def test_a_measured_crossover_lies_between_two_measured_points(price, curve, api):
    points_of = e.curve_of(curve)
    found = e.crossover(
        usd_per_hour=price, api_usd_per_m_output=api, output_tokens_per_request=1, curve=points_of
    )
    rates = [point.requests_per_s for point in points_of.points]
    if found.requests_per_s_log_log is None:
        assert found.reason is not None
    else:
        slack = 1 + 1e-9
        assert min(rates) / slack <= found.requests_per_s_log_log <= max(rates) * slack


@given(prices, amounts, prices, st.lists(st.floats(0.01, 1), min_size=1, max_size=5))
def test_the_break_even_volume_is_the_same_at_every_utilization(price, tokens, api, used):
    found = e.break_even(
        usd_per_hour=price, tokens_per_hour=tokens, api_usd_per_m=api, utilization=used
    )
    volume = found.break_even_m_tokens_per_month
    assert volume * api == about(found.monthly_cost_usd)
    for each in used:
        cost = found.effective_usd_per_m[f"{each:g}"]
        assert cost * each * found.monthly_capacity_m_tokens == pytest.approx(
            found.monthly_cost_usd, rel=1e-4
        )


@given(prices, prices, amounts, amounts, prices, overheads, overheads)
def test_the_break_even_volume_does_not_depend_on_capacity_and_doubles_with_all_costs(
    usd, reserved, tokens, other_tokens, api, fixed, percent
):
    def found(tokens_per_hour, times=1):
        return e.break_even(
            usd_per_hour=usd * times,
            reserved_usd_per_hour=reserved * times,
            tokens_per_hour=tokens_per_hour,
            api_usd_per_m=api,
            overhead_usd_per_month=fixed * times,
            overhead_percent=percent,
        )

    one, other, twice = found(tokens), found(other_tokens), found(tokens, 2)
    for a, b, c in zip(one.rates, other.rates, twice.rates, strict=True):
        assert a.break_even_m_tokens_per_month == b.break_even_m_tokens_per_month
        assert c.break_even_m_tokens_per_month == about(2 * a.break_even_m_tokens_per_month)
        assert c.savings_percent == pytest.approx(a.savings_percent, abs=1e-9)


@given(prices, amounts, prices, overheads, overheads)
def test_a_step_of_the_sensitivity_is_what_that_input_itself_would_give(
    usd, tokens, api, fixed, percent
):
    given = {
        "usd_per_hour": usd,
        "tokens_per_hour": tokens,
        "api_usd_per_m": api,
        "overhead_usd_per_month": fixed,
        "overhead_percent": percent,
    }
    for moved in e.break_even(**given).sensitivity:
        itself = e.break_even(**given | {moved.input: moved.value})
        assert moved.monthly_cost_usd == itself.monthly_cost_usd
        assert moved.break_even_m_tokens_per_month == itself.break_even_m_tokens_per_month
        assert moved.break_even_utilization == itself.break_even_utilization


@given(st.floats(0, 0.99), st.integers(0, 20))
def test_retries_never_make_a_served_request_cheaper(failed, retries):
    cost = e.request(usd_per_hour=1, requests_per_s=1, failure_share=failed, retries_max=retries)
    assert cost.usd_per_served_request >= cost.usd_per_attempt * (1 - 1e-12)
    assert 1 <= cost.attempts_per_request <= retries + 1
