"""Any usage, price, policy and question: rows add up on both bases, and a filter changes none."""

from dataclasses import replace
from fractions import Fraction

from hypothesis import given, settings
from hypothesis import strategies as st

from tests.support.examples import examples
from tests.support.worlds_of_usage import facts, policies, priced, prices
from vllm_cost_meter.records.owner import OWN
from vllm_cost_meter.records.snapshot import OTHER_ROWS
from vllm_cost_meter.reports.allocation import kv_cost, pieces, report, wall_cost
from vllm_cost_meter.reports.facts import REQUESTS, Facts
from vllm_cost_meter.reports.grammar import Question, question
from vllm_cost_meter.reports.idle import SHARED_CLASSES

HOUR = 500_000
hours = st.integers(HOUR, HOUR + 24 * 40)
zones = st.sampled_from(["UTC", "Europe/Berlin", "Asia/Kolkata", "America/St_Johns"])
columns = st.lists(
    st.sampled_from(["tenant", "model", "hour", "day", "month"]),
    min_size=1, max_size=3, unique=True,
).map(",".join)  # fmt: skip
steps = st.sampled_from([None, "1h", "1d", "1w", "month"])
questions = st.builds(
    lambda aggregate, step, accumulate, idle, tz: question(
        aggregate=aggregate, step=step, accumulate=accumulate, idle=idle, tz=tz
    ),
    columns, steps, st.booleans(), policies, zones,
)  # fmt: skip


def told_apart(known: Facts, asked: Question) -> Facts:
    """The facts with the dimensions that the question has, in its order."""
    place = {"tenant": 0, "model": 1}
    order = [place[name] for name in asked.dimensions]

    def cut(key: tuple[str, ...]) -> tuple[str, ...]:
        return tuple(key[i] for i in order)

    return replace(
        known,
        used=[one._replace(key=cut(one.key)) for one in known.used],
        ended=[one._replace(key=cut(one.key)) for one in known.ended],
    )


@given(facts(hours), questions, prices)
def test_rows_are_the_whole_on_both_bases(known, asked, base):
    answer = report(told_apart(known, asked), asked, priced(base))
    assert answer["difference_ns"] == 0
    for piece in answer["series"]:
        rows = piece["rows"]
        assert sum(row["gpu_time_ns"] for row in rows) == piece["gpu_time_ns"]
        assert sum(row["idle_share_ns"] for row in rows) == 0
        for name in ("cost_nanousd", "usage_cost_nanousd"):
            known_costs = [row[name] for row in rows if row[name] is not None]
            assert sum(known_costs) == (piece["cost_nanousd"] or 0)
        for row in (row for row in rows if row["class"] != REQUESTS):
            assert row["kv_cost_nanousd"] in (0, None)
    for_blocks = [
        row["kv_cost_nanousd"] or 0 for piece in answer["series"] for row in piece["rows"]
    ]
    assert sum(for_blocks) == answer["kv_cost_nanousd"]
    assert sum(piece["gpu_time_ns"] for piece in answer["series"]) == known.wall_gpu_ns
    exact = wall_cost(known, asked, priced(base))
    if exact is not None:
        exact += kv_cost(known, asked, priced(base))
    shown = [piece["cost_nanousd"] for piece in answer["series"]]
    if known.wall_gpu_ns and None not in shown:
        assert abs(sum(shown) - exact) <= Fraction(len(shown), 2)


@given(facts(hours), questions, prices)
def test_sharing_moves_time_and_money_and_makes_none(known, asked, base):
    for piece in pieces(told_apart(known, asked), asked, priced(base)):
        assert sum(row.share.gpu_time_ns for row in piece.rows) == 0
        assert sum(row.share.nanousd for row in piece.rows) == 0
        for row in piece.rows:
            if row.class_name == REQUESTS:
                assert row.share.gpu_time_ns >= 0
            elif row.class_name in SHARED_CLASSES:
                assert 0 <= row.whole.gpu_time_ns <= row.used.gpu_time_ns
            else:
                assert row.share.gpu_time_ns == 0


@given(facts(hours), policies, prices, zones)
def test_rows_of_a_finer_report_add_up_to_those_of_a_coarser(known, idle, base, tz):
    def shares(aggregate: str) -> dict[tuple[str, str], tuple[Fraction, Fraction]]:
        asked = question(aggregate=aggregate, idle=idle, tz=tz)
        found: dict[tuple[str, str], tuple[Fraction, Fraction]] = {}
        (piece,) = pieces(told_apart(known, asked), asked, priced(base))
        for row in piece.rows:
            tenant = row.key[asked.aggregate.index("tenant")]
            ns, cost = found.get((row.class_name, tenant), (Fraction(0), Fraction(0)))
            whole = row.whole
            found[row.class_name, tenant] = (ns + whole.gpu_time_ns, cost + whole.nanousd)
        return {key: both for key, both in found.items() if both != (0, 0)}

    coarse = shares("tenant")
    assert shares("tenant,model") == coarse
    assert shares("day,model,tenant") == coarse


@given(facts(hours), questions, prices, st.data())
def test_a_filter_chooses_rows_and_changes_none(known, asked, base, data):
    everything = report(told_apart(known, asked), asked, priced(base))
    column = data.draw(st.sampled_from(asked.aggregate))
    values = sorted({row[column] for one in everything["series"] for row in one["rows"]})
    chosen = data.draw(st.sets(st.sampled_from(values))) if values else set()
    filtered = replace(asked, conditions={column: frozenset(chosen)}, covers=OWN)
    answer = report(told_apart(known, filtered), filtered, priced(base))
    assert [one["rows"] for one in answer["series"]] == [
        [row for row in one["rows"] if row[column] in chosen] for one in everything["series"]
    ]
    for name in ("from", "to", "gpu_time_ns", "cost_nanousd"):
        assert [one[name] for one in answer["series"]] == [
            one[name] for one in everything["series"]
        ]


@settings(max_examples=examples(50))
@given(facts(hours), prices, zones, steps)
def test_without_sharing_steps_accumulate_to_the_report_without_steps(known, base, tz, step):
    whole = question(aggregate="tenant,model", tz=tz)
    stepped = question(aggregate="tenant,model", tz=tz, step=step, accumulate=True)
    assert report(known, stepped, priced(base)) == report(known, whole, priced(base))


def test_the_classes_drawn_are_all_there_are():
    assert {*SHARED_CLASSES, "in_flight"} == set(OTHER_ROWS)
