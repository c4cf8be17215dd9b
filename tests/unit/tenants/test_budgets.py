"""What a budget covers, when its period begins and ends, and what becomes of a new request."""

from datetime import UTC, datetime
from zoneinfo import ZoneInfo

import pytest

from vllm_cost_meter.records.owner import Owner
from vllm_cost_meter.tenants.budgets import (
    Budget,
    BudgetFigures,
    Others,
    Standing,
    budget_row,
    decide,
)
from vllm_cost_meter.units.time import NS_PER_HOUR, NS_PER_SECOND

S = NS_PER_SECOND
BERLIN = ZoneInfo("Europe/Berlin")
KOLKATA = ZoneInfo("Asia/Kolkata")  # UTC+5:30


def ns(*instant: int, zone=UTC) -> int:
    return int(datetime(*instant, tzinfo=zone).timestamp()) * S


def hour(*instant: int, zone=UTC) -> int:
    return ns(*instant, zone=zone) // NS_PER_HOUR


def budget(**changes) -> Budget:
    values = {"name": "b", "limit": 100, "unit": "gpu_seconds", "period": "month", "tenant": "acme"}
    return Budget(**{**values, **changes})


NOW = ns(2026, 11, 24, 12, 30)


def standing(used: int | None, **changes) -> Standing:
    hours = None if used is None else {NOW // NS_PER_HOUR: used}
    return Standing(budget(**changes), hours, NOW)


# -- what counts


def test_a_budget_covers_its_tenant_its_children_and_those_it_is_the_parent_of():
    of_acme = budget()
    assert of_acme.covers(Owner("acme"))
    assert of_acme.covers(Owner("acme/bob"))
    assert of_acme.covers(Owner("lab", parent="acme"))
    assert not of_acme.covers(Owner("acme-2"))
    assert not of_acme.covers(Owner("other"))


def test_a_child_that_was_not_read_counts_against_its_parent_and_all_its_children():
    unread = Owner("acme/__unread__", parent="acme")
    for tenant in ("acme", "acme/bob", "acme/eve"):
        assert budget(tenant=tenant).covers(unread)
    for tenant in ("acm", "other", "other/bob", "acme-2/bob"):
        assert not budget(tenant=tenant).covers(unread)


def test_whom_clients_name_below_unknown_counts_against_the_budget_of_unknown():
    of_unknown = budget(tenant="unknown")
    assert of_unknown.covers(Owner("unknown/acme", parent="unknown"))
    assert of_unknown.covers(Owner("unknown/acme/llama", parent="unknown/acme"))
    assert not budget().covers(Owner("unknown/acme", parent="unknown"))


def test_a_budget_covers_all_that_is_declared_below_its_tenant_and_what_clients_make_of_it():
    of_acme = budget()
    assert of_acme.covers(Owner("bench", parent="lab", higher=("acme",)))
    assert of_acme.covers(Owner("bench/bob", parent="bench", higher=("lab", "acme")))
    assert not of_acme.covers(Owner("rival/bench", parent="rival"))


def test_a_budget_of_a_tag_covers_who_carries_it():
    of_team = budget(tenant=None, tag=("team", "search"))
    assert of_team.covers(Owner("any", tags={"team": "search"}))
    assert not of_team.covers(Owner("any", tags={"team": "chat"}))
    assert not of_team.covers(Owner("search"))


# -- periods


@pytest.mark.parametrize(
    ("period", "zone", "first", "after"),
    [
        ("day", UTC, hour(2026, 11, 24), hour(2026, 11, 25)),
        ("week", UTC, hour(2026, 11, 23), hour(2026, 11, 30)),  # a Monday
        ("month", UTC, hour(2026, 11, 1), hour(2026, 12, 1)),
        ("day", BERLIN, hour(2026, 11, 23, 23), hour(2026, 11, 24, 23)),
        ("month", BERLIN, hour(2026, 10, 31, 23), hour(2026, 11, 30, 23)),
        # Midnight there is 18:30 UTC: the hour that began at 18:00 belongs to the day before.
        ("day", KOLKATA, hour(2026, 11, 23, 19), hour(2026, 11, 24, 19)),
    ],
)
def test_a_period_is_the_hours_that_begin_in_the_local_day_week_or_month(
    period, zone, first, after
):
    assert budget(period=period, zone=zone).hours(NOW) == (first, after)


def test_the_day_a_clock_is_put_forward_has_23_hours_and_back_25():
    of_day = budget(period="day", zone=BERLIN)
    first, after = of_day.hours(ns(2026, 3, 29, 12, zone=BERLIN))
    assert after - first == 23
    first, after = of_day.hours(ns(2026, 10, 25, 12, zone=BERLIN))
    assert after - first == 25


def test_a_leap_february_has_29_days_and_december_ends_with_the_year():
    of_month = budget()
    first, after = of_month.hours(ns(2028, 2, 10))
    assert after - first == 29 * 24
    assert of_month.hours(ns(2026, 12, 31, 23)) == (hour(2026, 12, 1), hour(2027, 1, 1))


def test_a_rolling_period_ends_with_the_present_hour():
    of_week = budget(period="rolling", days=7)
    assert of_week.hours(NOW) == (hour(2026, 11, 17, 13), hour(2026, 11, 24, 13))


def test_a_fixed_period_resets_at_its_end_in_its_time_zone():
    assert standing(1, zone=BERLIN).reset_text() == "2026-12-01T00:00:00+01:00 (Europe/Berlin)"
    assert standing(1).reset_text() == "2026-12-01T00:00:00+00:00 (UTC)"


def test_a_rolling_period_resets_when_enough_of_what_was_used_has_left_it():
    rolling = budget(period="rolling", days=1)
    used = {hour(2026, 11, 23, 20): 30, hour(2026, 11, 24, 2): 60, hour(2026, 11, 24, 12): 20}
    # 110 of 100: without the first hour it is 80, and that leaves a day after it began.
    assert Standing(rolling, used, NOW).resets_at() == datetime(2026, 11, 24, 20, tzinfo=UTC)


# -- verdicts: under, at and over; fresh and stale; nothing known


@pytest.mark.parametrize(
    ("used", "fresh", "fail_closed", "kind"),
    [
        (99, True, False, "admitted"),
        (100, True, False, "blocked"),
        (101, True, False, "blocked"),
        (99, True, True, "admitted"),
        (100, True, True, "blocked"),
        (101, True, True, "blocked"),
        (99, False, False, "admitted"),
        (100, False, False, "admitted"),
        (101, False, False, "admitted"),
        (99, False, True, "unavailable"),
        (100, False, True, "unavailable"),
        (101, False, True, "unavailable"),
        (0, True, True, "admitted"),
        (None, True, False, "admitted"),
    ],
)
def test_a_new_request_is_judged_by_what_is_known(used, fresh, fail_closed, kind):
    stale = None if fresh else "the latest figures are 9 s old"
    verdict = decide([standing(used)], stale, fail_closed)
    assert verdict.kind == kind
    assert (verdict.standing is not None) == (kind == "blocked")


def test_a_tenant_without_a_budget_is_admitted():
    assert decide([], None, fail_closed=False).kind == "admitted"


def test_a_soft_limit_warns_and_a_soft_budget_only_warns():
    near = standing(80, soft_limit=80)
    assert decide([near], None, False).soft == (near,)
    assert decide([standing(79, soft_limit=80)], None, False).soft == ()
    over = standing(150, hard=False)
    verdict = decide([over], None, False)
    assert (verdict.kind, verdict.soft) == ("admitted", (over,))


def test_blocking_goes_before_throttling_whatever_the_order():
    throttles, blocks = standing(100, over="throttle", name="t"), standing(100, name="b")
    assert decide([throttles], None, False).kind == "throttled"
    for standings in ([throttles, blocks], [blocks, throttles]):
        assert decide(standings, None, False).standing is blocks


def test_what_ran_on_past_the_limit_is_told_apart():
    assert standing(130).over == 30
    assert standing(99).over == 0
    assert standing(None).over is None


# -- fresh or stale


def test_figures_are_stale_without_an_engine_when_old_and_when_the_meter_is_off():
    assert BudgetFigures().stale(NOW, 5 * S) == "no engine has been heard of yet"
    fresh = BudgetFigures(heard_ns=100 * S)
    assert fresh.stale(105 * S, 5 * S) is None
    assert fresh.stale(106 * S, 5 * S) == "the latest figures are 6 s old"
    off = BudgetFigures(heard_ns=100 * S, broken="the meter of engine run r is off")
    assert off.stale(100 * S, 5 * S) == "the meter of engine run r is off"


# -- amounts that are not known


@pytest.mark.parametrize(
    ("used", "over", "fail_closed", "kind"),
    [
        (None, "block", False, "admitted"),
        (None, "block", True, "unavailable"),
        (0, "block", True, "unavailable"),
        (100, "block", True, "blocked"),
        (100, "throttle", True, "unavailable"),
        (100, "throttle", False, "throttled"),
    ],
)
def test_what_has_no_price_is_judged_as_stale_unless_the_rest_is_spent(
    used, over, fail_closed, kind
):
    hours = None if used is None else {hour(2026, 11, 24, 2): used}
    unknown = Standing(budget(over=over), hours, NOW, "no price for run r at 2026-11-24T12Z: none")
    assert decide([unknown], None, fail_closed).kind == kind


@pytest.mark.parametrize(
    ("used", "over", "fail_closed", "kind"),
    [
        (0, "block", False, "admitted"),
        (0, "block", True, "unavailable"),
        (100, "block", True, "blocked"),
        (100, "throttle", True, "unavailable"),
        (100, "throttle", False, "throttled"),
    ],
)
def test_what_is_stale_of_other_servers_counts_as_last_known_but_for_who_fails_closed(
    used, over, fail_closed, kind
):
    hours = {hour(2026, 11, 24, 2): used}
    stale = Others(0, 12 * S, "the figures of the fleet are 12 s old", is_counted=True)
    of_fleet = Standing(budget(over=over), hours, NOW, others=stale)
    fresh = Standing(budget(name="fresh"), {}, NOW, others=Others(0, S, None, is_counted=True))
    alone = Standing(budget(name="alone", each_server=True), {}, NOW)
    assert decide([alone, fresh, of_fleet], None, fail_closed).kind == kind
    assert decide([alone, fresh], None, fail_closed).kind == "admitted"


def test_a_row_tells_the_part_of_this_server_and_how_old_that_of_others_is():
    others = Others(30, 2 * S, None, is_counted=True)
    row = budget_row(Standing(budget(), {NOW // NS_PER_HOUR: 90}, NOW, others=others))
    assert (row["used"], row["used_here"]) == (90, 30)
    assert (row["others_age_ns"], row["others_stale"], row["each_server"]) == (2 * S, None, False)
    row = budget_row(standing(90, each_server=True))
    assert (row["used_here"], row["others_age_ns"], row["each_server"]) == (None, None, True)


def test_a_row_says_why_a_budget_is_unknown():
    why = "no price for run r at 2026-11-24T12Z: none"
    row = budget_row(Standing(budget(), None, NOW, why))
    assert (row["used"], row["state"], row["unknown"]) == (None, "unknown", why)
    row = budget_row(Standing(budget(), {hour(2026, 11, 24, 2): 0}, NOW, why))
    assert (row["used"], row["state"], row["unknown"]) == (0, "unknown", why)
    row = budget_row(standing(100))
    assert (row["state"], row["unknown"]) == ("spent", None)
