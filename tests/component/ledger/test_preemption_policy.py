"""Who pays a preemption, from the engine's books to every answer of the ledger.

At 3,600 USD an hour a GPU-ns costs a nano-USD.
"""

from contextlib import closing
from dataclasses import replace
from decimal import Decimal

import pytest

from tests.support.builders import ENGINE, ENGINE_STATE, make_part
from tests.support.ledger_writer import LedgerWriter
from vllm_cost_meter.engine.books import EngineBooks, RequestFacts
from vllm_cost_meter.ledger.queries.cut import AsOf
from vllm_cost_meter.ledger.reader import LedgerReader
from vllm_cost_meter.prices.book import PriceBook, PriceEntry
from vllm_cost_meter.records.engine import OPERATOR, VICTIM
from vllm_cost_meter.reports.statement import notes

BEGAN_NS = 1_800_000_000 * 10**9  # 2027-01-15T08Z
PRICES = PriceBook([PriceEntry("p", Decimal(3600), "s", None)])
ENDED = RequestFacts(
    engine_status="stopped", prompt_tokens=4, cached_tokens=0, output_tokens=2, preemptions=1
)
# The victim's prompt took 40 ns, and 40 of the 60 ns of its last step were for the same again.
PAID, AGAIN = 60, 40


@pytest.fixture(params=[VICTIM, OPERATOR])
def paid_by(request) -> str:
    return request.param


@pytest.fixture
def answers(tmp_path, paid_by):
    """A reader of a ledger with one request that was preempted once, and its bill."""
    engine = replace(ENGINE, kv_block_size=None, kv_blocks=None, preemption_paid_by=paid_by)
    books = EngineBooks(run_id="run", engine=engine, created_ns=0, now_ns=0, unix_ns=BEGAN_NS)
    books.open("r", 4, 0)
    now_ns = 0
    for tokens, took_ns, resumed in ((4, 40, False), (6, 60, True)):
        if resumed:
            books.preempt("r", now_ns)
            books.meter.position("r", 0, True)
        step = object()
        books.begin_step(step, {"r": tokens}, now_ns)
        now_ns += took_ns
        books.end_step(step, now_ns)
    before = books.snapshot(now_ns, BEGAN_NS + now_ns, 0, ENGINE_STATE)
    bill = books.bill("r", ENDED, now_ns)
    after = books.snapshot(now_ns + 5, BEGAN_NS + now_ns + 5, 0, ENGINE_STATE)
    writer = LedgerWriter(f"sqlite:///{tmp_path / 'ledger.db'}")
    writer.start()
    writer.commit(before).result(10)
    writer.commit(make_part(bill, tenant="alice"), after).result(10)
    writer.close()
    with closing(LedgerReader(f"sqlite:///{tmp_path / 'ledger.db'}", book=PRICES)) as reader:
        yield before, bill, reader


def test_a_nanosecond_is_booked_once_before_the_bill_and_after_it(answers, paid_by):
    before, bill, reader = answers
    again = AGAIN if paid_by == OPERATOR else 0
    assert before.difference_ns == 0
    assert (before.totals.recomputed, before.totals.in_flight) == (again, 40 + PAID - again)
    assert before.live_ns == before.totals.in_flight
    assert (bill.gpu_time_ns, bill.sum_of("recomputed_ns")) == (40 + PAID - again, AGAIN)
    audit = reader.audit(AsOf(BEGAN_NS, 0), full=True)
    assert audit["balanced"]
    [run] = audit["runs"]
    assert (run["requests_ns"], run["recomputed_ns"]) == (40 + PAID - again, again)


def test_reports_charge_the_victim_or_the_class_and_add_up_alike(answers, paid_by):
    _, _, reader = answers
    report = reader.tenants(as_of=AsOf(BEGAN_NS, 0))
    rows = {row["tenant"]: row for row in report["tenants"]}
    again = AGAIN if paid_by == OPERATOR else 0
    assert rows["alice"]["cost_nanousd"] == 40 + PAID - again
    assert rows["alice"]["recomputed_ns"] == AGAIN
    assert rows["__recomputed__"]["cost_nanousd"] == again
    assert (report["adds_up"], report["wall_cost_nanousd"]) == (True, 40 + PAID + 5)
    summary = reader.summary(as_of=AsOf(BEGAN_NS, 0))
    assert summary["recomputed_ns"] == again
    assert summary["utilization"] == pytest.approx((40 + PAID) / (40 + PAID + 5))
    assert summary["runs"][0]["preemption_paid_by"] == paid_by


def test_an_explanation_says_who_pays(answers, paid_by):
    _, _, reader = answers
    explanation = reader.explain(reader.look_up("r")[0])
    [part] = explanation["parts"]
    assert part["preempted"] == {
        "preemptions": 1, "recomputed_tokens": 4, "recomputed_ns": AGAIN, "paid_by": paid_by,
    }  # fmt: skip
    # Alone in its steps, it added all of them, and there is nothing that it shared.
    assert (part["marginal_ns"], part["common_ns"]) == (40 + PAID, 0)
    text = " ".join(explanation["text"])
    assert ("GPU-s of it" in text, "more; the operator pays that" in text) == (
        paid_by == VICTIM, paid_by == OPERATOR,
    )  # fmt: skip


def test_a_statement_says_that_the_operator_pays(answers, paid_by):
    _, _, reader = answers
    statement = reader.statement("2027-01", tenant=None)
    assert statement["adds_up"]
    assert statement["preemption_paid_by"] == [paid_by]
    said = [note for note in notes(statement) if "preemptions threw away" in note]
    assert len(said) == (1 if paid_by == OPERATOR else 0)
