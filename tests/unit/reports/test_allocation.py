"""Reports from facts by hand: both bases, every policy, steps, filters, what has no price.

At 3600 USD per GPU-hour a nanosecond costs a nano-USD.
"""

from fractions import Fraction

import pytest

from vllm_cost_meter.prices.cost import Rates
from vllm_cost_meter.records.snapshot import OTHER_ROWS
from vllm_cost_meter.reports.allocation import report
from vllm_cost_meter.reports.charges import ChargesKnown
from vllm_cost_meter.reports.facts import UNALLOCATED, Ended, Facts, Used
from vllm_cost_meter.reports.grammar import question
from vllm_cost_meter.units.time import unix_ns_of

HOUR = 500_000  # 2027-01-15T08Z
DAY = HOUR + 24
DIMENSIONS = ("tenant", "model")


def facts(used=(), other_time=(), ended=(), wall_gpu_ns=None) -> Facts:
    used = [Used(*each) for each in used]
    other_time = [Used(run, hour, (name,), ns) for run, hour, name, ns in other_time]
    if wall_gpu_ns is None:
        wall_gpu_ns = sum(each.gpu_time_ns for each in (*used, *other_time))
    wall = [Used("run", HOUR, (), wall_gpu_ns)]
    return Facts(used, other_time, [Ended(*each) for each in ended], wall, wall_gpu_ns)


# Two days: alice used 300 and 100, bob 200; 240 and 60 idle, 6 startup, 10 in flight.
TWO_DAYS = facts(
    used=[
        ("run", HOUR, ("alice", "m"), 300),
        ("run", HOUR, ("bob", "m"), 200),
        ("run", DAY, ("alice", "n"), 100),
    ],
    other_time=[
        ("run", HOUR, "startup", 6),
        ("run", HOUR, "idle", 240),
        ("run", DAY, "idle", 60),
        ("run", DAY, "in_flight", 10),
    ],
    ended=[
        (HOUR, ("alice", "m"), (1, 10, 2, 5, 6, 10)),
        (DAY, ("alice", "n"), (2, 20, 0, 7, 0, 0)),
    ],
)


def price(run_id: str, hour: int) -> Rates | None:
    return {"run": Rates(Fraction(3600)), "dear": Rates(Fraction(7200))}.get(run_id)


def ask(known: Facts = TWO_DAYS, price_of=price, **words):
    """The answer to a question about facts that are told apart by tenant and model."""
    asked = question(**{"aggregate": "tenant,model", **words})
    assert asked.dimensions == DIMENSIONS
    return report(known, asked, price_of)


def rows(known: Facts = TWO_DAYS, price_of=price, **words):
    (series,) = ask(known, price_of, **words)["series"]
    return series["rows"]


def figures(found, *names):
    """The usage rows' columns, by tenant and model."""
    return {
        (row["tenant"], row["model"]): tuple(row[name] for name in names)
        for row in found
        if row["class"] == "requests"
    }


def of_class(found, name: str) -> tuple[int, int, int | None, int | None]:
    (row,) = [row for row in found if row["class"] == name]
    assert row["tenant"] == row["model"] == f"__{name}__"
    columns = ("gpu_time_ns", "idle_share_ns", "usage_cost_nanousd", "cost_nanousd")
    return tuple(row[column] for column in columns)


# ---- both bases


def test_without_sharing_every_class_costs_its_own_time():
    found = rows()
    assert figures(found, "gpu_time_ns", "idle_share_ns", "usage_cost_nanousd", "cost_nanousd") == {
        ("alice", "m"): (300, 0, 300, 300),
        ("alice", "n"): (100, 0, 100, 100),
        ("bob", "m"): (200, 0, 200, 200),
    }
    assert [row["class"] for row in found[3:]] == list(OTHER_ROWS)
    assert of_class(found, "idle") == (300, 0, 300, 300)
    assert of_class(found, "dummy") == (0, 0, 0, 0)


def test_a_row_has_every_figure():
    assert rows()[0] == {
        "class": "requests", "tenant": "alice", "model": "m", "requests": 1, "prompt_tokens": 10,
        "cached_tokens": 2, "output_tokens": 5, "external_tokens": 6, "external_known_tokens": 10,
        "gpu_time_ns": 300, "idle_share_ns": 0,
        "charge_known_ns": 0, "charge_error_ns": 0, "charge_error": None,
        "usage_cost_nanousd": 300, "usage_cost_usd": "0.000000300",
        "kv_cost_nanousd": 0, "kv_cost_usd": "0.000000000", "cost_nanousd": 300,
        "cost_usd": "0.000000300", "cost_reason": None, "covers": "own",
    }  # fmt: skip
    idle = rows()[3]
    assert (idle["requests"], idle["prompt_tokens"], idle["output_tokens"]) == (0, None, None)


def test_rows_add_up_what_is_known_of_the_split_and_idle_time_has_none():
    known = facts(
        used=[
            ("run", HOUR, ("alice", "m"), 300, 0, ChargesKnown(300, 30)),
            ("run", DAY, ("alice", "m"), 100, 0, ChargesKnown(100, 2)),
            ("run", DAY, ("alice", "m"), 50),
            ("run", HOUR, ("alice", "n"), 100),
        ],
        other_time=[("run", HOUR, "idle", 60)],
    )
    names = ("gpu_time_ns", "charge_known_ns", "charge_error_ns", "charge_error")
    assert figures(rows(known, idle="proportional"), *names) == {
        ("alice", "m"): (450, 400, 32, 0.08), ("alice", "n"): (100, 0, 0, None),
    }  # fmt: skip
    days = ask(known, step="1d")["series"]
    assert [figures(day["rows"], *names)["alice", "m"] for day in days] == [
        (300, 300, 30, 0.1), (150, 100, 2, 0.02),
    ]  # fmt: skip
    (idle,) = [row for row in rows(known) if row["class"] == "idle"]
    assert [idle[name] for name in names[1:]] == [None, None, None]


def test_the_answer_says_what_was_asked_and_whether_it_adds_up():
    answer = ask(idle="even", window="2027-01-15T00:00:00Z,2027-01-17T00:00:00Z")
    assert {name: answer[name] for name in answer if name != "series"} == {
        "aggregate": ["tenant", "model"], "covers": None, "engines": None, "idle": "even",
        "what_if_usd_per_gpu_hour": None, "wall_gpu_ns": 916, "wall_cost_nanousd": 916,
        "wall_cost_usd": "0.000000916", "kv_cost_nanousd": 0, "kv_cost_usd": "0.000000000",
        "adds_up": True, "difference_ns": 0,
        "without_totals_ns": 0,
    }  # fmt: skip
    (series,) = answer["series"]
    assert {name: series[name] for name in series if name != "rows"} == {
        "from": "2027-01-15T00:00:00.000000Z", "to": "2027-01-17T00:00:00.000000Z",
        "gpu_time_ns": 916, "cost_nanousd": 916, "cost_usd": "0.000000916",
    }  # fmt: skip


def test_a_missing_bill_is_a_difference():
    answer = ask(facts(used=[("run", HOUR, ("alice", "m"), 300)], wall_gpu_ns=500))
    assert (answer["adds_up"], answer["difference_ns"]) == (False, 200)


# ---- policies: 306 are shared, 10 in flight are not


@pytest.mark.parametrize(
    ("idle", "shares"),
    [
        ("proportional", {"alice": 204, "bob": 102}),
        ("even", {"alice": 153, "bob": 153}),
        ("reserved:alice=50,bob=25", {"alice": 153, "bob": 76}),
        ("owner:bob", {"alice": 0, "bob": 306}),
    ],
)
def test_a_policy_moves_idle_to_tenants_and_changes_no_total(idle, shares):
    found = rows(idle=idle)
    carried = dict.fromkeys(shares, 0)
    for (tenant, _), (share_ns, usage, cost) in figures(
        found, "idle_share_ns", "usage_cost_nanousd", "cost_nanousd"
    ).items():
        carried[tenant] += share_ns
        assert abs(cost - usage - share_ns) <= 1
    assert all(abs(carried[tenant] - share) <= 1 for tenant, share in shares.items())
    assert sum(row["idle_share_ns"] for row in found) == 0
    assert sum(row["cost_nanousd"] for row in found) == 916
    assert sum(row["usage_cost_nanousd"] for row in found) == 916
    assert of_class(found, "idle")[::2] == (300, 300), "its own figure stays"
    assert of_class(found, "in_flight") == (10, 0, 10, 10)


def test_within_a_tenant_its_share_goes_by_gpu_time():
    found = figures(rows(idle="proportional"), "idle_share_ns")
    assert found == {("alice", "m"): (153,), ("alice", "n"): (51,), ("bob", "m"): (102,)}


def test_what_nobody_carries_stays_with_its_class():
    found = rows(idle="reserved:alice=50,bob=25")
    assert of_class(found, "idle") == (300, -225, 300, 75)
    assert of_class(found, "startup")[2:] == (6, 1)


def test_idle_without_usage_stays_idle():
    nobody = facts(other_time=[("run", HOUR, "idle", 240)])
    for policy in ("proportional", "even"):
        found = rows(nobody, idle=policy)
        assert figures(found, "cost_nanousd") == {}
        assert of_class(found, "idle") == (240, 0, 240, 240)


def test_a_tenant_that_used_nothing_carries_what_it_reserved():
    found = rows(idle="reserved:carol=50")
    assert figures(found, "requests", "gpu_time_ns", "idle_share_ns", "cost_nanousd")[
        "carol", UNALLOCATED
    ] == (0, 0, 153, 153)


def test_what_an_idle_tenant_carries_is_of_the_day_it_was_idle_on():
    series = ask(idle="owner:carol", aggregate="tenant,model,day")["series"][0]
    assert [
        (row["day"], row["idle_share_ns"]) for row in series["rows"] if row["tenant"] == "carol"
    ] == [("2027-01-15", 246), ("2027-01-16", 60)]


# ---- aggregation, steps, filters


def test_rows_are_by_time_then_the_most_gpu_time_first_then_classes():
    series = ask(aggregate="day,tenant,model")["series"][0]
    assert [(row["day"], row["tenant"], row["gpu_time_ns"]) for row in series["rows"]] == [
        ("2027-01-15", "alice", 300), ("2027-01-15", "bob", 200), ("2027-01-16", "alice", 100),
        ("2027-01-15", "__idle__", 240), ("2027-01-15", "__startup__", 6),
        ("2027-01-16", "__idle__", 60), ("2027-01-16", "__in_flight__", 10),
    ]  # fmt: skip


def test_hours_of_two_offsets_are_in_the_order_in_which_they_were():
    first = unix_ns_of("2026-10-25T00:00:00Z") // (3600 * 10**9)
    known = facts(used=[("run", first + n, ("alice", "m"), 7) for n in (1, 0)])
    asked = question(aggregate="hour", tz="Europe/Berlin", filter="model:m")
    shown = report(known, asked, price)["series"][0]["rows"]
    assert [row["hour"] for row in shown] == [
        "2026-10-25T02:00:00+02:00", "2026-10-25T02:00:00+01:00",
    ]  # fmt: skip


def test_without_a_tenant_in_it_a_report_by_model_shares_by_tenant_all_the_same():
    asked = question(aggregate="model", idle="even")
    (series,) = report(TWO_DAYS, asked, price)["series"]
    shares = {row["model"]: row["idle_share_ns"] for row in series["rows"][:2]}
    assert shares == {"m": 115 + 153, "n": 38}


def test_each_step_shares_its_own_idle():
    series = ask(step="1d", idle="proportional")["series"]
    assert [(one["from"], one["to"], one["gpu_time_ns"]) for one in series] == [
        ("2027-01-15T00:00:00.000000Z", "2027-01-16T00:00:00.000000Z", 746),
        ("2027-01-16T00:00:00.000000Z", "2027-01-17T00:00:00.000000Z", 170),
    ]
    assert [figures(one["rows"], "idle_share_ns") for one in series] == [
        {("alice", "m"): (148,), ("bob", "m"): (98,)}, {("alice", "n"): (60,)},
    ]  # fmt: skip


def test_steps_are_cut_by_the_window():
    window = "2027-01-15T08:00:00Z,2027-01-16T09:00:00Z"
    series = ask(step="1w", window=window)["series"]
    assert [(one["from"], one["to"]) for one in series] == [
        ("2027-01-15T08:00:00.000000Z", "2027-01-16T09:00:00.000000Z"),
    ]


def test_accumulated_steps_are_one_piece_of_what_each_step_shared():
    found = rows(step="1d", idle="proportional", accumulate=True)
    assert figures(found, "idle_share_ns", "cost_nanousd", "requests") == {
        ("alice", "m"): (148, 448, 1), ("alice", "n"): (60, 160, 2), ("bob", "m"): (98, 298, 0),
    }  # fmt: skip
    assert of_class(found, "idle") == (300, -300, 300, 0)
    assert [row["class"] for row in found[3:]] == list(OTHER_ROWS)


def test_accumulated_rows_are_rounded_once_and_add_up_to_the_same_total_as_the_steps():
    """Each row of each day is half a nano-USD: the sums of rounded days are not what it costs."""
    known = facts(
        used=[("run", hour, (name, "m"), 1) for hour in (HOUR, DAY) for name in ("alice", "bob")]
    )
    words = {"step": "1d", "price": "1800"}
    steps = ask(known, **words)["series"]
    (whole,) = ask(known, **words, accumulate=True)["series"]
    (without_steps,) = ask(known, price="1800")["series"]
    costs = [list(figures(one["rows"], "cost_nanousd").values()) for one in (*steps, whole)]
    assert costs == [[(1,), (0,)], [(1,), (0,)], [(1,), (1,)]]
    assert [one["cost_nanousd"] for one in (*steps, whole)] == [1, 1, 2]
    assert without_steps["rows"] == whole["rows"]


def test_a_filter_chooses_rows_and_changes_none():
    everything = rows(idle="proportional")
    own = {"idle": "proportional", "covers": "own"}
    chosen = rows(filter="tenant:alice,__idle__+model:n,__idle__", **own)
    assert chosen == [
        row
        for row in everything
        if (row["tenant"], row["model"]) in (("alice", "n"), ("__idle__", "__idle__"))
    ]
    series = ask(filter="tenant:bob", **own)["series"][0]
    assert (series["gpu_time_ns"], series["cost_nanousd"]) == (916, 916), "of all rows"


def test_a_filter_by_what_is_not_shown_cuts_rows():
    asked = question(aggregate="tenant", filter="model:n+day:2027-01-16")
    (series,) = report(TWO_DAYS, asked, price)["series"]
    assert [(row["tenant"], row["gpu_time_ns"], row["requests"]) for row in series["rows"]] == [
        ("alice", 100, 2),
    ]


def test_nothing_known_is_classes_of_nothing():
    for words in ({}, {"step": "1d"}, {"step": "1d", "accumulate": True}):
        found = rows(facts(), **words)
        assert [row["class"] for row in found] == list(OTHER_ROWS)
        assert {row["cost_nanousd"] for row in found} == {None}


# ---- prices


def test_each_run_and_hour_has_its_own_price():
    known = facts(
        used=[("run", HOUR, ("alice", "m"), 5), ("dear", HOUR, ("alice", "m"), 5)],
        other_time=[("dear", HOUR, "idle", 3)],
    )
    found = rows(known, idle="proportional")
    assert figures(found, "usage_cost_nanousd", "cost_nanousd") == {("alice", "m"): (15, 21)}

    def by_hour(run_id: str, hour: int) -> Rates:
        return Rates(Fraction(3600 if hour == HOUR else 36))

    found = figures(rows(price_of=by_hour), "cost_nanousd")
    assert (found["alice", "m"], found["alice", "n"]) == ((300,), (1,))


def test_a_price_that_misses_makes_costs_unknown_and_says_of_which_run():
    known = facts(
        used=[("run", HOUR, ("alice", "m"), 5), ("unpriced-run", HOUR, ("bob", "m"), 5)],
        other_time=[("run", HOUR, "idle", 3)],
    )
    found = figures(rows(known), "gpu_time_ns", "cost_nanousd", "cost_reason")
    assert found["alice", "m"] == (5, 5, None)
    assert found["bob", "m"] == (5, None, "no price for run unpriced-run")
    assert ask(known)["series"][0]["cost_nanousd"] is None


def test_idle_without_a_price_makes_the_shared_cost_unknown_and_not_that_of_usage():
    known = facts(
        used=[("run", HOUR, ("alice", "m"), 5)],
        other_time=[("free-1", HOUR, "idle", 3), ("free-2", HOUR, "idle", 3)],
    )
    names = ("usage_cost_nanousd", "cost_nanousd", "cost_reason")
    assert figures(rows(known, idle="even"), *names) == {
        ("alice", "m"): (5, None, "no price for run free-1"),
    }


def test_without_any_price_nothing_has_a_cost():
    found = rows(price_of=lambda run_id, hour: None)
    assert {row["cost_nanousd"] for row in found} == {None}
    assert {row["usage_cost_usd"] for row in found} == {None}
    assert {row["cost_reason"] for row in found} == {"no price for run run"}


def test_a_price_of_0_is_a_price():
    found = rows(price_of=lambda run_id, hour: Rates(Fraction(0)))
    assert {row["cost_nanousd"] for row in found} == {0}


# At 3.6 USD a block-hour a block-ms costs 1000 nano-USD. Alice held 2 blocks-ms, bob none.
BLOCKS = facts(
    used=[("run", HOUR, ("alice", "m"), 300, 2), ("run", HOUR, ("bob", "m"), 100, 0)],
    other_time=[("run", HOUR, "idle", 40)],
)


def with_blocks(run_id: str, hour: int) -> Rates:
    return Rates(Fraction(3600), Fraction("3.6"))


def test_blocks_are_charged_on_top_of_time_and_are_no_part_of_idle_time():
    found = rows(BLOCKS, with_blocks, idle="proportional")
    columns = ("usage_cost_nanousd", "kv_cost_nanousd", "cost_nanousd")
    assert figures(found, *columns) == {
        ("alice", "m"): (300 + 2000, 2000, 300 + 30 + 2000),
        ("bob", "m"): (100, 0, 100 + 10),
    }
    assert of_class(found, "idle") == (40, -40, 40, 0)
    assert {row["kv_cost_nanousd"] for row in found if row["class"] != "requests"} == {0}
    answer = ask(BLOCKS, with_blocks)
    assert (answer["wall_cost_nanousd"], answer["kv_cost_nanousd"]) == (440, 2000)
    assert answer["series"][0]["cost_nanousd"] == 440 + 2000


def test_blocks_without_a_price_of_time_have_an_unknown_cost():
    answer = ask(BLOCKS, lambda run_id, hour: None)
    assert answer["kv_cost_nanousd"] is None
    assert {row["kv_cost_nanousd"] for row in answer["series"][0]["rows"]} == {None}


def test_what_if_supposes_the_price_of_time_and_leaves_that_of_blocks():
    found = rows(BLOCKS, with_blocks, price="7200.0")
    assert figures(found, "cost_nanousd")["alice", "m"] == (600 + 2000,)


def test_what_if_prices_all_time_anew_and_is_said():
    for real in (price, lambda run_id, hour: None):
        answer = ask(price="7200.0", price_of=real, idle="even")
        assert answer["what_if_usd_per_gpu_hour"] == "7200.0"
        assert answer["series"][0]["cost_nanousd"] == 2 * 916
