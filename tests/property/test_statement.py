"""Any month of any time zone, any prices and policy: the lines add up to the cent."""

import zoneinfo
from dataclasses import replace
from fractions import Fraction

from hypothesis import assume, given
from hypothesis import strategies as st

from tests.support.worlds_of_usage import facts, policies, priced, prices
from vllm_cost_meter.prices.cost import MS_PER_HOUR, Rates
from vllm_cost_meter.records.owner import OWN
from vllm_cost_meter.reports.allocation import kv_cost, wall_cost
from vllm_cost_meter.reports.idle import IdlePolicy
from vllm_cost_meter.reports.statement import (
    NANOUSD_PER_CENT,
    OverheadCost,
    month_question,
    statement,
)
from vllm_cost_meter.units.calendar import period_name, zone_of

# Leap days, months in which clocks change, zones off by half an hour and by three quarters.
months = st.tuples(st.integers(2024, 2032), st.integers(1, 12)).map(lambda m: f"{m[0]}-{m[1]:02d}")
zones = st.one_of(
    st.sampled_from(
        ["UTC", "Europe/Berlin", "America/New_York", "Asia/Kolkata", "Asia/Kathmandu"]
        + ["Australia/Lord_Howe", "America/St_Johns", "Africa/Casablanca", "America/Nuuk"]
    ),
    st.sampled_from(sorted(zoneinfo.available_timezones())),
).map(zone_of)
# Of a bill below price x time the difference is less than 0.
costs = st.lists(
    st.builds(OverheadCost, st.sampled_from(["rent", "power", "difference to the bill"]),
              st.just("lease"), st.fractions(-(10**13), 10**13, max_denominator=1000)),
    max_size=3,
)  # fmt: skip


@st.composite
def whole_months(draw):
    """A question of a month, and facts of hours all over it, its first and last among them."""
    asked = month_question(draw(months), draw(zones), IdlePolicy.parse(draw(policies)))
    edges = st.sampled_from([asked.from_hour, asked.to_hour - 1])
    hours = edges | st.integers(asked.from_hour, asked.to_hour - 1)
    return asked, draw(facts(hours))


@given(whole_months(), prices, costs)
def test_all_lines_add_up_to_wall_time_times_price_to_the_cent(month, base, overhead):
    asked, known = month
    answer = statement(known, asked, priced(base), overhead=overhead, now_ns=0)
    if not known.wall_gpu_ns:
        return
    exact = wall_cost(known, asked, priced(base)) + kv_cost(known, asked, priced(base))
    exact += sum(cost.nanousd for cost in overhead)
    cents = round(exact / NANOUSD_PER_CENT)
    assert answer["total"]["amount_cents"] == answer["whole"]["amount_cents"] == cents
    assert sum(line["amount_cents"] for line in answer["lines"]) == cents
    whole = answer["whole"]
    others = sum(cost["cents"] for cost in whole["overhead"])
    assert whole["wall_cents"] + whole["kv_cents"] + others == cents
    for line in answer["lines"]:
        assert line["usage_cents"] + line["idle_share_cents"] == line["amount_cents"]
    assert answer["total"]["gpu_time_ns"] == known.wall_gpu_ns
    assert answer["total"]["idle_share_ns"] == 0


@given(whole_months(), prices, costs)
def test_a_tenants_statement_is_a_slice_of_the_whole(month, base, overhead):
    asked, known = month
    told = {"overhead": overhead, "now_ns": 0}
    everyone = statement(known, asked, priced(base), **told)
    for total in everyone["tenants"]:
        only = {"conditions": {"tenant": frozenset([total["tenant"]])}, "covers": OWN}
        mine = statement(known, replace(asked, **only), priced(base), **told)
        assert mine["lines"] == [
            line for line in everyone["lines"] if line["tenant"] == total["tenant"]
        ]
        assert {"tenant": total["tenant"], "covers": OWN, **mine["total"]} == total


@given(whole_months(), prices)
def test_no_line_and_no_tenants_total_moves_by_a_cent(month, base):
    asked, known = month
    price_of = priced(base)
    answer = statement(known, asked, price_of, now_ns=0)

    def time_cost(one) -> Fraction:
        usd = price_of(one.run_id, one.hour).usd_per_gpu_hour
        return one.gpu_time_ns * usd / 3600 / NANOUSD_PER_CENT

    def blocks_cost(one) -> Fraction:
        usd = price_of(one.run_id, one.hour).usd_per_kv_block_hour
        return one.kv_block_ms * usd / MS_PER_HOUR * 100

    def cost(one) -> Fraction:
        return time_cost(one) + blocks_cost(one)

    of_kind = {"usage": time_cost, "kv": blocks_cost}
    shared = [one for one in known.other_time if one.key != ("in_flight",)]
    pool = sum(map(cost, shared), Fraction(0))
    used_ns = dict.fromkeys((one.key[0] for one in known.used), 0)
    for one in known.used:
        used_ns[one.key[0]] += one.gpu_time_ns
    shares = asked.idle.shares(used_ns)
    for total in answer["tenants"]:
        name = total["tenant"]
        usage = sum((cost(one) for one in known.used if one.key[0] == name), Fraction(0))
        due = usage + pool * shares.get(name, 0)
        assert total["amount_cents"] is None or abs(total["amount_cents"] - due) < 1
    for line in answer["lines"]:
        if line["kind"] not in of_kind or line["usage_cents"] is None:
            continue
        usage = sum(
            of_kind[line["kind"]](one)
            for one in known.used
            if one.key == (line["tenant"], line["item"])
            and period_name(one.hour, "day", asked.zone) == line["day"]
        )
        assert abs(line["usage_cents"] - usage) < 1


@given(whole_months(), st.data())
def test_every_hour_of_the_month_is_on_one_line_of_its_own_day(month, data):
    asked, known = month
    hour = data.draw(st.integers(asked.from_hour, asked.to_hour - 1))
    day = period_name(hour, "day", asked.zone)
    answer = statement(known, asked, priced(Fraction(1)), now_ns=0)
    used = sum(one.gpu_time_ns for one in known.used
               if period_name(one.hour, "day", asked.zone) == day)  # fmt: skip
    lines = [line for line in answer["lines"] if line["day"] == day and line["kind"] == "usage"]
    assert sum(line["gpu_time_ns"] for line in lines) == used


@given(whole_months(), prices)
def test_quantity_times_price_of_a_line_of_blocks_is_its_amount(month, base):
    asked, known = month
    lines = statement(known, asked, priced(base), now_ns=0)["lines"]
    for line in (line for line in lines if line["kind"] == "kv"):
        usd = Fraction(line["usd_per_kv_block_hour"]) * line["kv_block_ms"] / MS_PER_HOUR
        # The price is shown with 18 decimal places, and the amount in whole cents.
        assert abs(usd * 100 - line["amount_cents"]) <= 1


@given(whole_months(), prices, costs)
def test_blocks_that_cost_nothing_change_no_line(month, base, overhead):
    asked, known = month
    assume(known.wall_gpu_ns)  # without any, an amount is unknown unless blocks were held
    without = replace(known, used=[one._replace(kv_block_ms=0) for one in known.used])

    def free(run_id: str, hour: int) -> Rates:
        return priced(base)(run_id, hour)._replace(usd_per_kv_block_hour=Fraction(0))

    told = {"overhead": overhead, "now_ns": 0}
    assert statement(known, asked, free, **told) == statement(without, asked, free, **told)
