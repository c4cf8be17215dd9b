"""The words of a report, and what they ask for."""

from datetime import UTC
from decimal import Decimal

import pytest

from vllm_cost_meter.reports.grammar import Question, engines_named, question

NOW = 1_790_000_000 * 10**9  # 2026-09-21 14:13:20 UTC
MIDNIGHT = NOW // 10**9 // 3600 - 14


def test_without_words_everything_is_asked_by_tenant():
    assert question() == Question()
    assert (Question().dimensions, Question().times) == (("tenant",), ())
    assert question(window="", tz="", aggregate="", step="", idle="", filter="", price="") == (
        Question()
    )


def test_the_window_is_of_the_time_zone():
    asked = question(window="today", tz="Europe/Berlin", now_ns=NOW)
    assert (asked.from_hour, asked.to_hour) == (MIDNIGHT - 2, MIDNIGHT + 22)
    assert str(asked.zone) == "Europe/Berlin"
    assert question(window="today", now_ns=NOW).zone is UTC


def test_columns_are_told_apart_whether_shown_or_chosen_by():
    asked = question(aggregate="model, tag:team ,day,model", filter="hour:x+tag:cost,center=y")
    assert asked.aggregate == ("model", "tag:team", "day")
    assert asked.dimensions == ("tenant", "model", "tag:team", "tag:cost,center")
    assert asked.times == ("day", "hour")


@pytest.mark.parametrize(
    ("text", "conditions"),
    [
        ("tenant:a", {"tenant": {"a"}}),
        ("tenant:a,b+model:x", {"tenant": {"a", "b"}, "model": {"x"}}),
        # A plus sign in a URL is a space when it comes.
        ("tenant:a,b model:x", {"tenant": {"a", "b"}, "model": {"x"}}),
        (" tenant: a , b + model:x ", {"tenant": {"a", "b"}, "model": {"x"}}),
        ("tag:team=x,y", {"tag:team": {"x", "y"}}),
        ("tag:a=b=c", {"tag:a": {"b=c"}}),
        ("label:pool=spot,big label:zone=a", {"label:pool": {"spot", "big"}, "label:zone": {"a"}}),
        ("tenant:a,b+tenant:b,c", {"tenant": {"b"}}),
        ("tenant:a+tenant:b", {"tenant": set()}),
        # Signs that belong to a value.
        ("tenant:a+b c:d", {"tenant": {"a+b c:d"}}),
        ("hour:2026-09-21T02:00:00+02:00", {"hour": {"2026-09-21T02:00:00+02:00"}}),
        ('tenant:"a,b","c+model:d"+model:e', {"tenant": {"a,b", "c+model:d"}, "model": {"e"}}),
        ('tenant:"say ""x"""', {"tenant": {'say "x"'}}),
        ('tenant:""', {"tenant": {""}}),
        ("lora:__unallocated__", {"lora": {"__unallocated__"}}),
    ],
)
def test_a_filter_is_values_by_column(text, conditions):
    assert question(filter=text).conditions == conditions


@pytest.mark.parametrize(
    ("text", "shown"),
    [
        ("label:zone=a+label:pool=spot,big", "label:pool=big,spot+label:zone=a"),
        ("label:pool=a tenant:x", "label:pool=a"),
        ('label:pod="a,b","c+tenant:d","say ""x"""', None),
        ("tenant:x", None),
        (None, None),
    ],
)
def test_labels_of_a_filter_choose_engines_and_are_told_as_a_filter(text, shown):
    asked = question(filter=text)
    if shown is not None:
        assert asked.engines.text == shown
    assert engines_named(asked.engines.text) == asked.engines
    assert not any(name.startswith("label:") for name in asked.row_conditions)
    assert "label:pool" not in asked.dimensions


@pytest.mark.parametrize("text", ["tenant:a", "label:pool=a+model:m", "pool=spot", "label:pool"])
def test_what_is_about_engines_as_a_whole_takes_labels_only(text):
    with pytest.raises(ValueError, match="filter: expected"):
        engines_named(text)


def test_steps_and_what_if():
    assert [question(step=step).step for step in ("1h", "1d", "1w", "month")] == [
        "hour", "day", "week", "month",
    ]  # fmt: skip
    assert question(price="2.10").price == Decimal("2.10")
    assert question(accumulate=True).accumulate


@pytest.mark.parametrize(
    ("words", "said"),
    [
        ({"window": "fortnight"}, "window: expected today, yesterday, week, lastweek, month, "),
        ({"tz": "Berlin"}, "tz: expected the name of a time zone"),
        (
            {"aggregate": "pod"},
            "aggregate: expected tenant, model, lora, route, status, hour, day,",
        ),
        ({"aggregate": "tenant,"}, "joined by commas, got ''"),
        ({"aggregate": "tag:"}, "got 'tag:'"),
        ({"aggregate": "label:"}, "got 'label:'"),
        ({"aggregate": "Tenant"}, "got 'Tenant'"),
        ({"step": "1m"}, "step: expected one of 1h, 1d, 1w, month, got '1m'"),
        ({"idle": "weighted"}, "idle: expected none, proportional, even, "),
        ({"filter": "alice"}, "filter: expected COLUMN:VALUE,... joined by +, the column one of"),
        ({"filter": "pod:x"}, "got 'pod:x'"),
        ({"filter": "tenant:"}, "got 'tenant:'"),
        ({"filter": "tag:team"}, "got 'tag:team'"),
        ({"filter": "tag:=x"}, "got 'tag:=x'"),
        ({"filter": "label:pool"}, "got 'label:pool'"),
        ({"filter": "+tenant:a"}, "got ''"),
        ({"filter": "tenant:a\nb"}, "on one line"),
        ({"price": "cheap"}, "price: expected USD per GPU-hour, such as 2.10, got 'cheap'"),
        ({"price": "-1"}, "got '-1'"),
        ({"price": "nan"}, "got 'nan'"),
        ({"price": "1e999999"}, "got '1e999999'"),
    ],
)
def test_a_word_that_is_not_understood_is_refused_and_not_passed_over(words, said):
    with pytest.raises(ValueError, match="expected ") as caught:
        question(**words)
    assert said in str(caught.value)


@pytest.mark.parametrize("text", [" ", "+ ", '"', "tenant:a ", "a+", "\t\n"])
def test_a_filter_of_a_million_characters_is_judged_in_one_pass(text):
    # In quadratic time this would take hours.
    with pytest.raises(ValueError, match="filter: expected|on one line|more than"):
        question(filter="x" + text * (1_000_000 // len(text)))


def test_an_error_repeats_at_most_200_characters_of_what_was_given():
    for word in ("window", "tz", "aggregate", "step", "idle", "filter", "price"):
        with pytest.raises(ValueError, match=f"{word}: expected") as caught:
            question(**{word: "y" * 5_000})
        assert str(caught.value).count("y") < 250


def test_more_columns_than_a_report_can_use_are_refused():
    many = [f"tag:t{number}" for number in range(17)]
    with pytest.raises(ValueError, match="aggregate: expected at most 16 columns, got 17"):
        question(aggregate=",".join(many))
    with pytest.raises(ValueError, match="filter: expected at most 16 columns, got 17"):
        question(filter="+".join(f"{each}=x" for each in many))
