"""An answer that is kept: how old it grows, and that nobody waits for it twice."""

import threading

import pytest

from vllm_cost_meter.endpoint.cached import Kept


class Clock:
    def __init__(self) -> None:
        self.now_s = 100.0

    def __call__(self) -> float:
        return self.now_s


def counting(clock: Clock, takes_s: float):
    made = []

    def make() -> int:
        made.append(len(made) + 1)
        clock.now_s += takes_s
        return made[-1]

    return made, make


def test_an_answer_is_made_anew_when_it_is_old_and_not_before():
    clock = Clock()
    made, make = counting(clock, 0.0)
    kept = Kept(make, keep_s=60, clock=clock)
    assert (kept(), kept()) == (1, 1)
    clock.now_s += 59
    assert kept() == 1
    clock.now_s += 2
    assert kept() == 2
    assert made == [1, 2]


def test_what_takes_long_to_make_is_kept_for_longer():
    clock = Clock()
    _, make = counting(clock, 10.0)
    kept = Kept(make, keep_s=60, share_max=0.02, clock=clock)
    kept()
    clock.now_s += 499
    assert kept() == 1
    clock.now_s += 2
    assert kept() == 2


def test_whoever_asks_meanwhile_gets_the_old_one_or_none():
    clock, going, go_on = Clock(), threading.Event(), threading.Event()

    def make() -> int:
        going.set()
        go_on.wait(10)
        return 7

    kept = Kept(make, keep_s=60, clock=clock)
    first = threading.Thread(target=kept)
    first.start()
    assert going.wait(10)
    assert kept() is None
    go_on.set()
    first.join(10)
    assert kept() == 7

    clock.now_s += 61
    going.clear()
    go_on.clear()
    second = threading.Thread(target=kept)
    second.start()
    assert going.wait(10)
    assert kept() == 7, "the old one"
    go_on.set()
    second.join(10)


def test_an_error_is_the_askers_and_not_kept():
    answers = iter([None, 5])

    def make() -> int:
        if (answer := next(answers)) is None:
            raise ValueError("once")
        return answer

    kept = Kept(make)
    with pytest.raises(ValueError, match="once"):
        kept()
    assert kept() == 5
