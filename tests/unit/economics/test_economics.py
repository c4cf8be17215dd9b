"""The formulas by cases computed by hand: what they give, leave undefined, and refuse."""

import math

import pytest

from vllm_cost_meter import economics as e

# 100, 400 and 800 output tokens/s at 1, 4 and 16 requests/s: saturated between the last two.
CURVE = e.curve_of(
    [
        {"requests_per_s": 16, "output_tokens_per_s": 800, "ttft_p99_ms": 900, "tpot_ms": 60},
        {"requests_per_s": 1, "output_tokens_per_s": 100, "ttft_p99_ms": 50, "tpot_ms": 20},
        {"rps": 4, "output_tokens_per_s": 400, "ttft_p99_ms": 80, "tpot_ms": 30},
    ]
)

# ---- one operating point


def test_effective_cost_is_price_over_throughput():
    cost = e.c_eff(
        usd_per_hour=3.6, output_tokens_per_s=1000, total_tokens_per_s=4000, requests_per_s=5
    )
    assert cost.usd_per_m_output_tokens == pytest.approx(1.0)
    assert cost.usd_per_m_total_tokens == pytest.approx(0.25)
    assert cost.usd_per_1k_requests == pytest.approx(0.2)
    assert cost.usd_per_month == pytest.approx(3.6 * 730)


def test_gpus_are_priced_once():
    one = e.c_eff(usd_per_hour=14.4, output_tokens_per_s=1000)
    assert e.c_eff(usd_per_gpu_hour=3.6, gpus=4, output_tokens_per_s=1000) == one
    for given, said in (
        ({"usd_per_hour": 1, "usd_per_gpu_hour": 1, "gpus": 2}, "got both"),
        ({"usd_per_hour": 1, "gpus": 2}, "usd_per_hour is for the whole deployment"),
        ({"usd_per_gpu_hour": 1}, "gpus: expected how many"),
        ({}, "got neither"),
    ):
        with pytest.raises(ValueError, match=said):
            e.c_eff(**given)


def test_what_no_rate_was_given_for_is_undefined_and_not_0():
    cost = e.c_eff(usd_per_hour=2)
    assert cost.usd_per_m_output_tokens is None
    assert cost.usd_per_m_total_tokens is None
    assert cost.usd_per_1k_requests is None
    assert cost.usd_per_month == 1460


def test_at_low_load_arrivals_set_the_cost():
    # 0.5 requests/s of 200 tokens are 100 tokens/s: 0.36 million an hour.
    low = e.arrival(usd_per_hour=3.6, requests_per_s=0.5, output_tokens_per_request=200)
    assert low.output_tokens_per_s == 100
    assert low.usd_per_m_output_tokens == pytest.approx(10)
    assert low.usd_per_request == pytest.approx(0.002)


def test_a_blended_price_weighs_by_the_ratio():
    mixed = e.blended(
        input_usd_per_m=1, output_usd_per_m=5, ratio="3:1", m_tokens_per_day=10, days=30
    )
    assert mixed.usd_per_m_blended == 2
    assert mixed.usd_per_month == 600
    assert e.blended(input_usd_per_m=0, output_usd_per_m=4, ratio="0:1").usd_per_m_blended == 4


@pytest.mark.parametrize("ratio", ["3", "3/1", "a:b", "0:0", "-1:2", "nan:1", "inf:1", ""])
def test_what_is_no_ratio_is_refused(ratio):
    with pytest.raises(ValueError, match="^ratio: expected INPUT:OUTPUT, such as 3:1, got"):
        e.blended(input_usd_per_m=1, output_usd_per_m=1, ratio=ratio)


def test_failures_are_paid_by_what_is_served():
    # One in two fails and is sent once more: 1.5 attempts, 3 of 4 served.
    cost = e.request(usd_per_hour=3.6, requests_per_s=1, failure_share=0.5, retries_max=1)
    assert cost.usd_per_attempt == pytest.approx(0.001)
    assert (cost.attempts_per_request, cost.served_share) == (1.5, 0.75)
    assert cost.usd_per_served_request == pytest.approx(0.002)
    assert cost.usd_added_by_failures == pytest.approx(0.001)
    fine = e.request(usd_per_hour=3.6, requests_per_s=1)
    assert fine.usd_added_by_failures == 0


# ---- curves


def test_full_load_is_the_most_tokens_and_less_costs_more_by_its_penalty():
    found = e.penalty(usd_per_hour=2.88, curve=CURVE)
    assert found.theta_max == 800
    assert found.c_naive == pytest.approx(1.0)
    assert [point.penalty for point in found.points] == [8, 2, 1]
    assert [point.requests_per_s for point in found.points] == [1, 4, 16]
    assert found.points[0].usd_per_m_output_tokens == pytest.approx(8)


def test_a_curve_may_bring_its_own_price():
    told = {"points": [{"rps": 1, "output_tokens_per_s": 800}], "usd_per_hour": 2.88}
    assert e.penalty(curve=e.curve_of(told)).c_naive == pytest.approx(1.0)
    with pytest.raises(ValueError, match="usd_per_hour: expected a price, here or in the curve"):
        e.penalty(curve=CURVE)


def test_latency_bounds_choose_the_highest_rate_that_meets_both():
    at = e.slo(usd_per_hour=2.88, curve=CURVE, ttft_p99_ms=100, tpot_ms=40)
    assert (at.requests_per_s, at.output_tokens_per_s) == (4, 400)
    assert at.usd_per_m_output_tokens == pytest.approx(2)
    assert at.premium == pytest.approx(1)
    none = e.slo(usd_per_hour=2.88, curve=CURVE, ttft_p99_ms=10, tpot_ms=40)
    assert none == e.SloCost(None, None, None, None)
    assert e.slo(usd_per_hour=1, curve=CURVE, ttft_p99_ms=900, tpot_ms=60).premium == 0


def test_crossover_is_closed_form_below_saturation_and_measured_with_a_curve():
    # 0.36 USD/h at 1 USD per million of 100 tokens each: 1 request/s.
    found = e.crossover(
        usd_per_hour=0.36, api_usd_per_m_output=1, output_tokens_per_request=100, curve=CURVE
    )
    assert found.requests_per_s == pytest.approx(1)
    assert found.requests_per_s_log_log == pytest.approx(1)
    # Between 4 and 16 requests/s cost falls to half only: at 1/sqrt(2) of the way down.
    price = 2.88 / 2
    between = e.crossover(
        usd_per_hour=price,
        api_usd_per_m_output=price * 1e6 / 3600 / (400 * math.sqrt(2)),
        output_tokens_per_request=100,
        curve=CURVE,
    )
    assert between.requests_per_s == pytest.approx(4 * math.sqrt(2))
    assert between.requests_per_s_log_log == pytest.approx(8)


@pytest.mark.parametrize(
    ("api", "said"),
    [(1e-3, "the curve never costs as little"), (1e3, "costs less than the API at every point")],
)
def test_a_curve_that_does_not_cross_says_why(api, said):
    found = e.crossover(
        usd_per_hour=2.88, api_usd_per_m_output=api, output_tokens_per_request=100, curve=CURVE
    )
    assert found.requests_per_s_log_log is None
    assert said in found.reason


@pytest.mark.parametrize(
    ("told", "said"),
    [
        ([], "expected a list of points"),
        ({"points": "x"}, "expected a list of points"),
        (7, "expected a list of points"),
        ([1], "expected point 0 to be an object, got 1"),
        ([{"rps": 1}], "expected output_tokens_per_s at point 0, got none"),
        ([{"output_tokens_per_s": 1}], "expected requests_per_s at point 0, got none"),
        ([{"rps": 0, "output_tokens_per_s": 1}], "requests_per_s of point 0: expected a number"),
        ([{"rps": "x", "output_tokens_per_s": 1}], "expected a number above 0, got 'x'"),
        ([{"rps": 1, "output_tokens_per_s": [1]}], r"expected a number above 0, got \[1\]"),
        ([{"rps": 1, "output_tokens_per_s": 1}] * 2, "expected each rate once, got 1.0 twice"),
        ({"points": [{"rps": 1, "output_tokens_per_s": 1}], "usd_per_hour": -1}, "usd_per_hour"),
        ([{}] * 10_001, "expected at most 10000 points"),
    ],
)
def test_what_is_no_curve_is_refused(told, said):
    with pytest.raises(ValueError, match=said):
        e.curve_of(told)


def test_a_curve_without_latencies_has_no_slo():
    curve = e.curve_of([{"rps": 1, "output_tokens_per_s": 1}])
    with pytest.raises(ValueError, match="expected ttft_p99_ms and tpot_ms"):
        e.slo(usd_per_hour=1, curve=curve, ttft_p99_ms=1, tpot_ms=1)


# ---- fixed cost against an API


def test_break_even_is_fixed_cost_over_the_apis_price_at_every_utilization():
    # 1460 USD of hardware, doubled, and 10 % and 80 USD more: 3292 USD; 2628 M tokens at full load.
    found = e.break_even(
        usd_per_hour=2,
        tokens_per_hour=3_600_000,
        api_usd_per_m=4,
        overhead_usd_per_month=80,
        overhead_percent=10,
        redundancy=2,
        utilization=[0.25, 1],
        volume=[823, 100, 3000],
    )
    assert found.monthly_cost_usd == pytest.approx(3292)
    assert found.monthly_capacity_m_tokens == pytest.approx(2628)
    assert found.break_even_m_tokens_per_month == pytest.approx(823)
    assert found.break_even_utilization == pytest.approx(823 / 2628)
    assert found.effective_usd_per_m == {
        "0.25": pytest.approx(3292 / 657),
        "1": pytest.approx(3292 / 2628),
    }
    few, many = found.verdicts[1:]
    assert (few.cheaper, few.api_usd, few.fits) == ("api", 400, True)
    assert (many.cheaper, many.fits) == ("self-hosted", False)
    exactly = e.break_even(usd_per_hour=1, tokens_per_hour=1, api_usd_per_m=730, volume=[1])
    assert exactly.verdicts[0].cheaper == "equal"


def test_rates_stand_side_by_side_with_the_same_overheads():
    # (hours 100) on demand 2 x 2 x 100 x 1.1 + 60 = 500; reserved at 1: 280; spot at 3: 720 USD.
    found = e.break_even(
        usd_per_hour=2, reserved_usd_per_hour=1, spot_usd_per_hour=3, tokens_per_hour=10**7,
        api_usd_per_m=2, overhead_usd_per_month=60, overhead_percent=10, redundancy=2,
        hours_per_month=100,
    )  # fmt: skip
    assert [(one.kind, one.usd_per_hour) for one in found.rates] == [
        ("on_demand", 2), ("reserved", 1), ("spot", 3),
    ]  # fmt: skip
    assert [one.monthly_cost_usd for one in found.rates] == pytest.approx([500, 280, 720])
    volumes = [one.break_even_m_tokens_per_month for one in found.rates]
    assert volumes == pytest.approx([250, 140, 360])
    # Of 1000 M tokens at full load.
    used = [one.break_even_utilization for one in found.rates]
    assert used == pytest.approx([0.25, 0.14, 0.36])
    full = [one.effective_usd_per_m_at_full_load for one in found.rates]
    assert full == pytest.approx([0.5, 0.28, 0.72])
    assert [one.savings_percent for one in found.rates] == pytest.approx([0, 44, -44])


def test_without_other_rates_there_is_the_one_on_demand():
    found = e.break_even(usd_per_hour=1, tokens_per_hour=1, api_usd_per_m=1)
    assert [(one.kind, one.savings_percent) for one in found.rates] == [("on_demand", 0)]


def test_sensitivity_moves_one_input_at_a_time():
    # 200 x 1.1 + 80 = 300 USD, 100 M tokens to break even, of 400.
    found = e.break_even(
        usd_per_hour=2, tokens_per_hour=4 * 10**6, api_usd_per_m=3, overhead_usd_per_month=80,
        overhead_percent=10, hours_per_month=100,
    )  # fmt: skip
    doubled = {
        one.input: (
            one.value,
            one.monthly_cost_usd,
            one.break_even_m_tokens_per_month,
            one.break_even_utilization,
        )
        for one in found.sensitivity
        if one.factor == 2
    }
    assert doubled == {
        "usd_per_hour": pytest.approx((4, 520, 520 / 3, 1.3 / 3)),
        "api_usd_per_m": pytest.approx((6, 300, 50, 0.125)),
        "tokens_per_hour": pytest.approx((8 * 10**6, 300, 100, 0.125)),
        "overhead_usd_per_month": pytest.approx((160, 380, 380 / 3, 0.95 / 3)),
        "overhead_percent": pytest.approx((20, 320, 320 / 3, 0.8 / 3)),
    }
    assert [one.factor for one in found.sensitivity[:4]] == [0.5, 0.8, 1.25, 2]


def test_an_overhead_that_was_not_given_has_no_sensitivity():
    found = e.break_even(usd_per_hour=1, tokens_per_hour=1, api_usd_per_m=1)
    moved = {one.input for one in found.sensitivity}
    assert moved == {"usd_per_hour", "api_usd_per_m", "tokens_per_hour"}


def test_a_serverless_bill_is_the_sum_of_its_lines():
    # (0.001 + 4 x 0.0001 + 10 x 0.00001) x 2 = 0.003 USD a second.
    bill = e.serverless(
        gpu_usd_per_s=0.001, cpu_cores=4, cpu_usd_per_core_s=0.0001, memory_gib=10,
        memory_usd_per_gib_s=0.00001, multiplier=2, build_s=600, builds=2, init_s=30,
        cold_starts=10, run_s=2, calls=1000, storage_gib=50, free_storage_gib=10,
        storage_usd_per_gib_month=0.2,
    )  # fmt: skip
    assert bill.usd_per_s == pytest.approx(0.003)
    assert bill.build_usd == pytest.approx(3.6)
    assert bill.init_usd == pytest.approx(0.9)
    assert bill.inference_usd == pytest.approx(6)
    assert bill.storage_usd == pytest.approx(8)
    assert bill.total_usd == pytest.approx(18.5)
    assert bill.usd_per_call == pytest.approx(0.0185)


def test_storage_within_the_free_tier_costs_nothing_and_no_call_has_no_cost_per_call():
    bill = e.serverless(
        gpu_usd_per_s=1, run_s=1, calls=0, storage_gib=5, free_storage_gib=10,
        storage_usd_per_gib_month=1,
    )  # fmt: skip
    assert (bill.storage_usd, bill.total_usd, bill.usd_per_call) == (0, 0, None)


# ---- refusals

NO_RATE = [0, -1, math.nan, math.inf, -math.inf, 1e16, 1e-13, True]


@pytest.mark.parametrize("value", NO_RATE)
@pytest.mark.parametrize(
    ("function", "given", "name"),
    [
        (e.c_eff, {}, "usd_per_hour"),
        (e.c_eff, {"usd_per_hour": 1}, "output_tokens_per_s"),
        (e.c_eff, {"usd_per_hour": 1}, "requests_per_s"),
        (e.arrival, {"usd_per_hour": 1, "requests_per_s": 1}, "output_tokens_per_request"),
        (e.request, {"usd_per_hour": 1}, "requests_per_s"),
        (e.penalty, {"curve": CURVE}, "usd_per_hour"),
        (e.slo, {"curve": CURVE, "usd_per_hour": 1, "tpot_ms": 1}, "ttft_p99_ms"),
        (
            e.crossover,
            {"usd_per_hour": 1, "output_tokens_per_request": 1},
            "api_usd_per_m_output",
        ),
        (e.break_even, {"usd_per_hour": 1, "api_usd_per_m": 1}, "tokens_per_hour"),
        (e.serverless, {"run_s": 1, "calls": 1}, "gpu_usd_per_s"),
    ],
)
def test_what_is_no_rate_or_price_is_refused_by_its_name(function, given, name, value):
    with pytest.raises(ValueError, match=f"^{name}: expected a number above 0") as refused:
        function(**given, **{name: value})
    assert "\n" not in str(refused.value)


@pytest.mark.parametrize(
    ("given", "said"),
    [
        ({"utilization": [0]}, "utilization: expected a number above 0, at most 1, got 0"),
        ({"utilization": [1.1]}, "utilization: expected"),
        ({"utilization": [math.nan]}, "utilization: expected"),
        ({"redundancy": 0.5}, "redundancy: expected 1 or more"),
        ({"overhead_percent": -1}, "overhead_percent: expected 0 or a number above it"),
        ({"volume": [0]}, "volume: expected a number above 0"),
        ({"reserved_usd_per_hour": 0}, "reserved_usd_per_hour: expected a number above 0"),
        ({"spot_usd_per_hour": math.nan}, "spot_usd_per_hour: expected a number above 0"),
    ],
)
def test_a_break_even_of_no_sense_is_refused(given, said):
    with pytest.raises(ValueError, match=said):
        e.break_even(usd_per_hour=1, tokens_per_hour=1, api_usd_per_m=1, **given)


@pytest.mark.parametrize(
    ("given", "said"),
    [
        ({"failure_share": 1}, "nothing is ever served"),
        ({"failure_share": -0.1}, "failure_share: expected a number from 0"),
        ({"retries_max": -1}, "retries_max: expected a whole number"),
        ({"retries_max": 2000}, "retries_max: expected a whole number"),
    ],
)
def test_failures_of_no_sense_are_refused(given, said):
    with pytest.raises(ValueError, match=said):
        e.request(usd_per_hour=1, requests_per_s=1, **given)
