"""A bill says how much of its time may belong to others: what the meter knows when it is made."""

from dataclasses import replace

import pytest

from tests.support.builders import ENGINE
from vllm_cost_meter.attribution.cost_model import CHARGE_KIND_NAMES
from vllm_cost_meter.engine.books import EngineBooks, RequestFacts
from vllm_cost_meter.records.bill import Bill
from vllm_cost_meter.units.time import NS_PER_HOUR, NS_PER_MS

HOUR = 500_000
FACTS = RequestFacts(
    engine_status="stopped", prompt_tokens=100, cached_tokens=0, output_tokens=20, preemptions=0
)


class Engine:
    """Books whose clock runs by hand."""

    def __init__(self, method: str = "shapley", before_hour_ns: int = NS_PER_HOUR) -> None:
        self.now_ns = 10**12
        self.cached_tokens = 0  # of prompts to come
        self.books = EngineBooks(
            run_id="run",
            engine=replace(ENGINE, method=method),
            created_ns=self.now_ns,
            now_ns=self.now_ns,
            unix_ns=(HOUR + 1) * NS_PER_HOUR - before_hour_ns,
        )

    def step(self, took_ns: int, **tokens: int) -> None:
        for name in tokens:
            if not self.books.meter.is_open(name):
                self.books.open(name, 100, self.now_ns)
                self.books.meter.position(name, self.cached_tokens, False)
        key = object()
        self.books.begin_step(key, tokens, self.now_ns)
        self.now_ns += took_ns
        self.books.end_step(key, self.now_ns)

    def end(self, name: str) -> Bill:
        return self.books.bill(name, FACTS, self.now_ns)

    def learn(self) -> None:
        """Serve prompts of 100 tokens beside others' decodes, until errors of both are known."""
        self.step(9 * NS_PER_MS, a=100, b=100, c=100)
        for number in range(1200):
            prompt = {f"p{number}": 100} if number % 3 == 0 else {}
            decodes = {"a": 1, "b": 1} if number % 2 else {"a": 1, "b": 1, "c": 1}
            self.step(4 * NS_PER_MS + 2 * NS_PER_MS * len(prompt) + number % 7, **decodes, **prompt)
            for name in prompt:
                self.end(name)


@pytest.mark.parametrize("method", ["shapley", "tokens", "equal"])
def test_a_request_that_had_all_its_steps_for_itself_has_no_error_whatever_splits_steps(method):
    engine = Engine(method, before_hour_ns=15 * NS_PER_MS)
    for tokens in (100, 1, 1):
        engine.step(10 * NS_PER_MS, a=tokens)
    bill = engine.end("a")
    assert [piece.charge_error_ns for piece in bill.pieces] == [0, 0]
    assert [piece.charges_known for piece in bill.pieces] == [
        (15 * NS_PER_MS, 0), (15 * NS_PER_MS, 0),
    ]  # fmt: skip


def test_a_shared_step_is_unknown_while_nobody_has_looked():
    engine = Engine()
    engine.step(10 * NS_PER_MS, a=100, b=100)
    bill = engine.end("a")
    assert [piece.charge_error_ns for piece in bill.pieces] == [None]
    assert [piece.charges_known for piece in bill.pieces] == [(0, 0)]


@pytest.mark.parametrize("method", ["tokens", "equal"])
def test_a_split_by_another_method_has_no_known_error_though_the_model_has(method):
    engine = Engine(method)
    engine.cached_tokens = 100
    for number in range(1000):  # Equal decodes: any method splits them as the model does.
        engine.step(
            4 * NS_PER_MS + number % 7, **({"a": 1, "b": 1} if number % 2 else {"a": 1, "c": 1})
        )
    errors = dict(zip(CHARGE_KIND_NAMES, engine.books.meter.model().charge_errors, strict=True))
    assert errors["decode_to_4096_context"] < 1
    bill = engine.end("b")
    assert (bill.prefill_ns, bill.whole().charge_error_ns) == (0, None)


def test_the_error_is_that_of_its_prefill_and_its_decode_by_their_time_in_each_hour():
    engine = Engine()
    engine.learn()
    for tokens in (100, 1, 1, 1):
        engine.step(10 * NS_PER_MS, late=tokens, a=1, b=1)
    # The next step begins in this hour and ends in the next one.
    engine.now_ns = 10**12 + NS_PER_HOUR - 3 * NS_PER_MS
    engine.step(10 * NS_PER_MS, late=1, a=1)
    errors = dict(zip(CHARGE_KIND_NAMES, engine.books.meter.model().charge_errors, strict=True))
    of_prefill, of_decode = errors["prefill_to_128_tokens"], errors["decode_to_4096_context"]
    assert 0 < of_prefill < 1
    assert 0 < of_decode < 1
    bill = engine.end("late")
    assert len(bill.pieces) == 2
    for piece in bill.pieces:
        due = piece.prefill_ns * of_prefill + piece.decode_ns * of_decode
        assert piece.charge_error_ns == round(due)
    assert bill.pieces[0].prefill_ns > 0 == bill.pieces[1].prefill_ns
    whole = bill.whole()
    assert whole.charge_error_ns == sum(piece.charge_error_ns for piece in bill.pieces)


def test_one_phase_that_is_unknown_makes_the_whole_bill_unknown():
    engine = Engine()
    engine.learn()
    engine.step(30 * NS_PER_MS, long=3000, a=1)  # Nobody has split such a prefill before.
    engine.step(10 * NS_PER_MS, long=1, a=1)
    engine.now_ns = 10**12 + NS_PER_HOUR - 3 * NS_PER_MS
    engine.step(10 * NS_PER_MS, long=1, a=1)
    bill = engine.end("long")
    assert [piece.charge_error_ns for piece in bill.pieces] == [None, None]
    assert bill.whole().charge_error_ns is None
