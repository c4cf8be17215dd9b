"""What a bill says of the KV cache: how long it held blocks of it, and what cached tokens saved."""

from dataclasses import replace

import pytest

from tests.support.builders import ENGINE
from vllm_cost_meter.attribution.cost_model import (
    EXPERTS,
    FIT_TERMS,
    FIXED,
    PAIRS,
    SEQUENCE,
    SLOPES,
    Layers,
    Model,
    ServedModel,
)
from vllm_cost_meter.attribution.priors import NOTHING_KNOWN
from vllm_cost_meter.engine.books import EngineBooks, RequestFacts
from vllm_cost_meter.engine.model_facts import saved_ns
from vllm_cost_meter.units.time import NS_PER_HOUR, NS_PER_MS

HOUR = 500_000
START_NS = 10**9
COMPUTE = (1e6, 100.0, 7.0, 2.0, 3.0)
MEMORY = (2e6, 1.0, 7.0, 0.0, 40.0)
# Of a curve: 50 ns a token, and 1 ns a pair of query and key.
COEFFICIENTS = tuple(
    {FIXED: 3e6, SEQUENCE: 7.0, PAIRS: 1.0}.get(term, 50.0 if SLOPES <= term < EXPERTS else 0.0)
    for term in range(FIT_TERMS)
)


def make_books(until_hour_ns: int = NS_PER_HOUR) -> EngineBooks:
    """Open the books so long before the end of HOUR; blocks are of 16 tokens."""
    return EngineBooks(
        run_id="run",
        engine=replace(ENGINE, gpus=2),
        created_ns=START_NS,
        now_ns=START_NS,
        unix_ns=(HOUR + 1) * NS_PER_HOUR - until_hour_ns,
        prior=replace(
            NOTHING_KNOWN, curve=replace(NOTHING_KNOWN.curve, start=COEFFICIENTS), source="a test"
        ),
    )


def facts(cached_tokens: int = 0) -> RequestFacts:
    return RequestFacts(
        engine_status="stopped",
        prompt_tokens=100,
        cached_tokens=cached_tokens,
        output_tokens=1,
        preemptions=0,
    )


def at_ms(ms: int) -> int:
    return START_NS + ms * NS_PER_MS


def test_residency_is_wall_time_whatever_the_gpus():
    books = make_books()
    books.open("a", 100, at_ms(0))
    books.begin_step("step", {"a": 20}, at_ms(1))
    books.end_step("step", at_ms(3))
    assert books.bill("a", facts(), at_ms(6)).sum_of("kv_block_ms") == 2 * 5


def test_each_hour_has_the_residency_within_it():
    books = make_books(until_hour_ns=10 * NS_PER_MS)
    books.open("a", 100, at_ms(0))
    books.begin_step("step", {"a": 1}, at_ms(4))
    books.end_step("step", at_ms(5))
    bill = books.bill("a", facts(), at_ms(13))
    assert [(piece.hour, piece.kv_block_ms) for piece in bill.pieces] == [(HOUR, 6), (HOUR + 1, 3)]


def test_a_preempted_request_holds_nothing_while_it_waits():
    books = make_books()
    books.open("a", 100, at_ms(0))
    books.begin_step("step", {"a": 32}, at_ms(0))
    books.end_step("step", at_ms(1))
    books.preempt("a", at_ms(2))
    assert books.bill("a", facts(), at_ms(900)).sum_of("kv_block_ms") == 2 * 2


def test_what_the_cache_saved_is_an_estimate_of_what_prefill_costs():
    served = ServedModel()
    model = Model(1, "curve", (COMPUTE, MEMORY), COEFFICIENTS, served, 64, 0.1, 0.1, 0.9, ())
    products = 10 * 11 / 2
    assert saved_ns(model, 10) == int(50.0 * 10 + 1.0 * products)
    two = model._replace(form="two planes")
    assert saved_ns(two, 10) == int(100.0 * 10 + 2.0 * products)


def test_what_the_cache_saved_ends_where_a_window_does():
    served = ServedModel(layers=Layers(whole=1, windowed=2, window=4))
    model = Model(1, "curve", (COMPUTE, MEMORY), COEFFICIENTS, served, 64, 0.1, 0.1, 0.9, ())
    in_window = sum(min(token, 4) for token in range(1, 11))
    assert saved_ns(model, 10) == int(50.0 * 10 + 55 + 2 * in_window)


@pytest.mark.parametrize(("cached_tokens", "saved"), [(0, 0), (64, 50 * 64 + 64 * 65 // 2)])
def test_a_bill_says_what_the_cache_saved(cached_tokens, saved):
    books = make_books()
    books.open("a", 100, at_ms(0))
    books.begin_step("step", {"a": 36}, at_ms(0))
    books.end_step("step", at_ms(1))
    bill = books.bill("a", facts(cached_tokens), at_ms(2))
    assert bill.sum_of("saved_estimate_ns") == saved
    assert bill.gpu_time_ns == 2 * NS_PER_MS


def test_tokens_that_may_have_come_over_a_kv_connector_are_no_savings():
    books = make_books()
    books.open("a", 100, at_ms(0))
    books.begin_step("step", {"a": 36}, at_ms(0))
    books.end_step("step", at_ms(1))
    bill = books.bill("a", {**facts(64), "external_tokens": None}, at_ms(2))
    assert (bill.cached_tokens, bill.sum_of("saved_estimate_ns")) == (64, 0)
