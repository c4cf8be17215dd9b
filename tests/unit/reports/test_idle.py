"""Idle policies: what their words are, and which part each tenant carries."""

from fractions import Fraction

import pytest

from vllm_cost_meter.records.snapshot import OTHER_ROWS
from vllm_cost_meter.reports.idle import EXPECTED, SHARED_CLASSES, IdlePolicy

USED = {"alice": 300, "bob": 100, "carol": 0}


def shares(text: str, used=USED) -> dict[str, Fraction]:
    return IdlePolicy.parse(text).shares(used)


def test_without_a_policy_nobody_carries_anything():
    assert shares("none") == {}
    assert IdlePolicy.parse(None) == IdlePolicy.parse("") == IdlePolicy.parse("none")


def test_proportional_goes_by_gpu_time():
    assert shares("proportional") == {"alice": Fraction(3, 4), "bob": Fraction(1, 4)}


def test_even_is_among_those_who_used_something():
    assert shares("even") == {"alice": Fraction(1, 2), "bob": Fraction(1, 2)}


@pytest.mark.parametrize("text", ["proportional", "even"])
def test_what_nobody_used_stays_idle(text):
    assert shares(text, {}) == shares(text, {"alice": 0}) == {}


def test_reserved_shares_are_as_declared_whoever_used_what():
    assert shares("reserved:alice=30,dave=12.5%") == {
        "alice": Fraction(3, 10), "dave": Fraction(1, 8),
    }  # fmt: skip
    assert sum(shares("reserved:a=33.3,b=33.3,c=33.4").values()) == 1


def test_a_name_with_a_comma_stands_in_quotes():
    assert shares('reserved:"a,b"=20, "say ""x"""=5,c=d=1') == {
        "a,b": Fraction(1, 5), 'say "x"': Fraction(1, 20), "c=d": Fraction(1, 100),
    }  # fmt: skip


def test_an_owner_carries_all():
    assert shares("owner:platform, the team") == {"platform, the team": Fraction(1)}


def test_all_classes_are_shared_but_time_in_flight():
    assert set(OTHER_ROWS) - set(SHARED_CLASSES) == {"in_flight"}


@pytest.mark.parametrize(
    "text",
    ["weighted", "None", "none:", "even:alice", "owner", "owner:", "owner:__idle__", "reserved"]
    + ["reserved:"],
)
def test_what_is_no_policy_is_refused_with_what_was_expected(text):
    with pytest.raises(ValueError, match="^idle: expected ") as caught:
        IdlePolicy.parse(text)
    assert str(caught.value) == f"idle: expected {EXPECTED}, got {text!r}"


@pytest.mark.parametrize(
    ("text", "said"),
    [
        ("reserved:alice", "reserved:TENANT=PERCENT,..., got 'alice'"),
        ("reserved:=5", "reserved:TENANT=PERCENT,..., got '=5'"),
        ("reserved:alice=-5", "got 'alice=-5'"),
        ("reserved:alice=nan", "got 'alice=nan'"),
        ("reserved:alice=1/3", "got 'alice=1/3'"),
        ("reserved:__idle__=5", "got '__idle__=5'"),
        ("reserved:alice=5,", "got ''"),
        ("reserved:alice=5,alice=6", "each tenant once in reserved, got 'alice' twice"),
        ("reserved:alice=60,bob=40.5", "at most 100 %, got 100.5 %"),
        ("reserved:alice=5\nbob=6", "on one line"),
    ],
)
def test_reserved_shares_that_cannot_be_are_refused(text, said):
    with pytest.raises(ValueError, match="expected ") as caught:
        IdlePolicy.parse(text)
    assert said in str(caught.value)
