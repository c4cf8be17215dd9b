"""KV residency with a price: every answer of the ledger charges it, says so, and adds up.

At 36 USD an hour a nanosecond of GPU time costs 0.01 nano-USD. At 0.0036 USD a block-ms costs 1.
"""

from dataclasses import replace
from decimal import Decimal

import pytest

from tests.component.ledger.test_open_requests import open_, row_of, seen
from tests.component.ledger.test_reader import HOUR, NOW, Ledger, http, part, snapshot
from tests.support.builders import make_owner
from tests.support.ledger_writer import LedgerWriter
from vllm_cost_meter.economics import Declared
from vllm_cost_meter.ledger.economics.query import economics
from vllm_cost_meter.ledger.queries.cut import AsOf
from vllm_cost_meter.ledger.queries.spending import Spending
from vllm_cost_meter.ledger.reader import LedgerReader
from vllm_cost_meter.prices.book import PriceBook, PriceEntry, RunMatch
from vllm_cost_meter.prices.overheads import Overhead
from vllm_cost_meter.records.accrued import Accrued
from vllm_cost_meter.records.bill import UsagePiece
from vllm_cost_meter.records.pending import PendingBill
from vllm_cost_meter.records.requests import Price
from vllm_cost_meter.records.snapshot import ClassTotals
from vllm_cost_meter.tenants.budgets import Budget
from vllm_cost_meter.units.time import NS_PER_HOUR

PIECES = (
    UsagePiece(HOUR, 1_000, 0, 8, 0, kv_block_ms=700),
    UsagePiece(HOUR + 2, 0, 3_000, 0, 5, kv_block_ms=20),
)
HOURS = {
    HOUR: ClassTotals(requests=1_000, idle=500),
    HOUR + 2: ClassTotals(requests=3_000, host=500),
}
TOTALS = HOURS[HOUR].plus(HOURS[HOUR + 2])
NOW_NS = AsOf(NOW, 0)


def price(amount: str, blocks: str | None = None, since: int | None = HOUR) -> PriceEntry:
    usd = None if blocks is None else Decimal(blocks)
    key = f"at {amount}"
    return PriceEntry(key, Decimal(amount), "the invoice", since, usd_per_kv_block_hour=usd)


@pytest.fixture
def ledger(tmp_path):
    """A ledger with a request of alice over two hours, in which its engine idled, too."""
    ledger = Ledger(f"sqlite:///{tmp_path / 'ledger.db'}")
    bill = part(1, "h1", pieces=PIECES, cost_nanousd=None)
    told = http("h1", cost_nanousd=None)
    ledger.write(bill, told, snapshot([bill], totals=TOTALS, hours=HOURS))
    yield ledger
    ledger.close()


# ---- reports


def test_rows_charge_blocks_on_top_of_time_by_the_price_of_each_hour(ledger):
    ledger.priced(price("36", "0.0036"), price("36", "0.036", HOUR + 2))
    report = ledger.tenants()
    rows = {row["tenant"]: row for row in report["tenants"]}
    assert (rows["alice"]["cost_nanousd"], rows["alice"]["kv_cost_nanousd"]) == (40 + 900, 900)
    assert (rows["__idle__"]["cost_nanousd"], rows["__idle__"]["kv_cost_nanousd"]) == (5, 0)
    assert (report["wall_cost_nanousd"], report["kv_cost_nanousd"]) == (50, 900)
    assert report["series"][0]["cost_nanousd"] == 50 + 900
    assert [row["usd_per_kv_block_hour"] for row in report["prices"]] == ["0.0036", "0.036"]
    summary = ledger.reader.summary(as_of=NOW_NS)
    assert (summary["cost_nanousd"], summary["kv_cost_nanousd"]) == (50, 900)
    assert ledger.reader.tenant("alice", as_of=NOW_NS)["kv_cost_nanousd"] == 900


def test_a_tenant_with_children_is_charged_the_blocks_of_all(ledger):
    child = make_owner("bob", parent="alice")
    bill = replace(part(2, "h2", pieces=PIECES, cost_nanousd=None), owner=child)
    both = ClassTotals(requests=8_000, idle=500, host=500)
    ledger.write(bill, snapshot([part(1), bill], 2, totals=both, billed_ns=8_000))
    ledger.priced(price("36", "0.0036"))
    row = ledger.reader.tenant("alice", as_of=NOW_NS)
    assert (row["kv_cost_nanousd"], row["kv_cost_usd"]) == (2 * 720, "0.000001440")
    assert row["cost_nanousd"] == 2 * 760


def test_windows_charge_the_blocks_of_their_hours(ledger):
    ledger.priced(price("36", "0.0036"))
    found = [ledger.tenants(HOUR + n, HOUR + n + 1)["kv_cost_nanousd"] for n in range(3)]
    assert found == [700, 0, 20]


def test_a_price_of_zero_costs_what_no_price_of_blocks_costs(ledger):
    answers = []
    for blocks in (None, "0"):
        ledger.priced(price("36", blocks))
        answer = ledger.tenants()
        answers.append({**answer, "prices": None})
    assert answers[0] == answers[1]
    assert answers[0]["kv_cost_nanousd"] == 0


def test_runs_that_differ_in_the_price_of_blocks_alone_are_priced_apart(ledger):
    other = part(1, "h2", run_id="other", pieces=PIECES, cost_nanousd=None)
    values = {"totals": TOTALS, "hours": HOURS, "hardware": "NVIDIA L4"}
    ledger.write(other, http("h2", cost_nanousd=None), snapshot([other], run_id="other", **values))
    dear = replace(price("36", "0.036"), key="dear", matches=RunMatch(gpu_name="*L4*"))
    ledger.priced(price("36", "0.0036"), dear)
    assert ledger.tenants()["tenants"][0]["kv_cost_nanousd"] == 720 + 7_200


def test_a_percentage_of_the_cost_of_gpus_takes_none_of_blocks(ledger):
    ledger.priced(price("36", "0.0036"), overheads=[Overhead("o", "ops", "s", percent=Decimal(10))])
    assert ledger.tenants()["overheads"][0]["cost_nanousd"] == 5


def test_a_statement_has_a_line_for_blocks_and_adds_up(ledger):
    ledger.priced(price("36000000", "3600"))
    answer = ledger.reader.statement("2027-01", tenant=None)
    kinds = [(line["kind"], line["kv_block_ms"]) for line in answer["lines"] if line["tenant"]]
    assert kinds == [("usage", None), ("kv", 720)]
    assert sum(line["amount_cents"] for line in answer["lines"]) == answer["whole"]["amount_cents"]
    assert answer["whole"]["kv_cents"] == 72  # 720 block-ms at 3,600 USD an hour


def test_a_price_that_the_run_recorded_prices_blocks_too(tmp_path):
    url = f"sqlite:///{tmp_path / 'recorded.db'}"
    begun = Price("p", "36", "settings", HOUR * NS_PER_HOUR, "0.0036")
    bill = part(1, "h1", pieces=PIECES, cost_nanousd=None)
    writer = LedgerWriter(url, price_of=lambda _: begun)
    writer.start()
    writer.commit(bill, snapshot([bill], totals=TOTALS, hours=HOURS)).result(10)
    writer.close(5)
    with LedgerReader(url) as reader:
        assert reader.tenants(as_of=NOW_NS)["kv_cost_nanousd"] == 720


# ---- one request


def test_a_bill_is_explained_with_its_time_its_blocks_and_their_prices(ledger):
    ledger.priced(price("36", "0.0036"))
    explanation = ledger.reader.explain(ledger.reader.look_up("h1")[0])
    [bill] = explanation["parts"]
    costs = [bill[f"{name}cost_nanousd"] for name in ("time_", "kv_", "")]
    assert costs == [40, 720, 760]
    assert (bill["prices"][0]["gpu_time_ns"], bill["prices"][0]["kv_block_ms"]) == (4_000, 720)
    assert (
        "  4000 ns and 720 KV block-ms x 36 USD per GPU-hour and 0.0036 USD per KV block-hour (gpu,"
        " from 2027-01-15T08Z, the invoice) = 0.000000760 USD"
    ) in explanation["text"]


def test_a_running_request_costs_its_blocks_so_far(ledger):
    used = Accrued(prefill_ns=1_000, prefill_tokens=8, kv_block_ns=700_999_999)
    ledger.write(open_(2, "h2"), seen(("internal-2", used), number=2))
    ledger.priced(price("36", "0.0036"))
    row = row_of(ledger, "h2")
    assert (row["kv_block_ms"], row["cost_nanousd"]) == (700, 10 + 700)


# ---- budgets


def spent(ledger: Ledger, book: PriceBook, pending=()) -> list[int | None]:
    spending = Spending(ledger.url)
    now_ns = (HOUR + 2) * NS_PER_HOUR + 1
    budgets = [
        Budget(name=unit, limit=10**9, unit=unit, period="rolling", tenant="alice")
        for unit in ("usd", "gpu_seconds")
    ]
    figures = spending.look(budgets, book, now_ns, pending=pending)
    spending.close()
    return [standing.total for standing in figures.standings]


def test_a_budget_in_usd_counts_blocks_and_one_in_gpu_seconds_does_not(ledger):
    book = PriceBook([price("36", "0.0036")])
    assert spent(ledger, book) == [760, 4_000]
    late = PendingBill.of(part(2, pieces=PIECES))
    assert spent(ledger, book, [late]) == [2 * 760, 2 * 4_000]


def test_a_budget_counts_the_blocks_of_running_requests(ledger):
    used = Accrued(prefill_ns=1_000, prefill_tokens=8, kv_block_ns=700_999_999)
    ledger.write(open_(2, "h2"), seen(("internal-2", used), number=2, taken_at_ns=NOW))
    spending = Spending(ledger.url)
    one = Budget(name="b", limit=10**9, unit="usd", period="rolling", tenant="alice")
    book = PriceBook([price("36", "0.0036", since=None)])
    (standing,) = spending.look([one], book, NOW).standings
    spending.close()
    assert standing.total == 760 + 10 + 700


# ---- economics


def test_economics_says_what_is_charged_beside_what_the_gpus_cost(ledger):
    ledger.priced(price("36", "0.0036"))
    figures = economics(ledger.reader, Declared(), as_of=NOW_NS)["figures"]
    assert figures["cost_usd"] == pytest.approx(50e-9)
    assert figures["kv_cost_usd"] == pytest.approx(720e-9)
    assert figures["charged_usd"] == pytest.approx(760e-9)
    assert figures["recovered_share"] == pytest.approx(760 / 50)
    ledger.priced(price("36"))
    figures = economics(ledger.reader, Declared(), as_of=NOW_NS)["figures"]
    assert (figures["kv_cost_usd"], figures["recovered_share"]) == (0, pytest.approx(40 / 50))
