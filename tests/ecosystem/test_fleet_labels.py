"""Two servers in one fleet: one report tells their pools apart, and rates double with the load.

Method: each server writes a ledger of its own that sends, and the same records go into one ledger
in SQLite. The fleet must answer as that one does, and as one server alone where its engines are
chosen.
"""

from decimal import Decimal
from pathlib import Path

import pytest

from tests.component.ledger.test_reader import HOUR, T0, http, part, snapshot
from tests.ecosystem.test_fleet import send, write
from vllm_cost_meter.economics import Declared, Offer
from vllm_cost_meter.journal.entries import Record
from vllm_cost_meter.ledger.database import open_database
from vllm_cost_meter.ledger.economics.api_comparison import ComparisonQuestion, compared
from vllm_cost_meter.ledger.economics.query import economics
from vllm_cost_meter.ledger.queries.cut import AsOf
from vllm_cost_meter.ledger.reader import LedgerReader
from vllm_cost_meter.prices.book import PriceBook, PriceEntry, RunMatch
from vllm_cost_meter.records.bill import UsagePiece
from vllm_cost_meter.records.snapshot import ClassTotals
from vllm_cost_meter.reports.grammar import engines_named

S = 10**9
MINUTE = 60
AT = AsOf(T0 + MINUTE * S, 0)
BILLS = 12
POOLS = ("spot", "big")
USD = {"spot": 1, "big": 4}
BOOK = PriceBook(
    PriceEntry(pool, Decimal(3600 * usd), "list", None, matches=RunMatch(labels=(("pool", pool),)))
    for pool, usd in USD.items()
)
WORDS = [
    {"aggregate": "label:pool"},
    {"aggregate": "tenant,label:pool,label:pod", "idle": "proportional"},
    {"filter": "label:pool=spot", "idle": "even"},
    {"filter": "label:pool=big", "aggregate": "tenant,hour", "step": "1h"},
    {"filter": "label:pool=__unallocated__"},
    {"filter": "label:pool=spot,big+tenant:alice", "aggregate": "model,label:pool"},
]  # fmt: skip


def records_of(pool: str) -> list[Record]:
    """A minute of a server with one GPU, all at the same time: 12 requests of 2 s, then idle."""
    pieces = (UsagePiece(HOUR, S, S, 8, 5),)
    bills = [
        part(seq, f"{pool}-h{seq}", run_id=pool, pieces=pieces, tenant=("alice", "bob")[seq % 2])
        for seq in range(1, BILLS + 1)
    ]
    told = [http(one.http_request_id or "", at=1, owner=one.owner) for one in bills]
    totals = ClassTotals(requests=2 * S * BILLS, idle=(MINUTE - 2 * BILLS) * S)
    labels = {"pool": pool, "pod": f"{pool}-7f9", "node": "gpu-1"}
    said = snapshot(
        bills, run_id=pool, totals=totals, hours={HOUR: totals}, labels=labels,
        wall_ns=MINUTE * S, taken_at_ns=T0 + MINUTE * S,
    )  # fmt: skip
    return [*bills, *told, said]


@pytest.fixture
def urls(tmp_path: Path, url: str) -> tuple[str, str]:
    """The fleet of two servers that run at once, and one ledger with the same."""
    alone = f"sqlite:///{tmp_path}/alone.db"
    open_database(alone).dispose()
    for pool in POOLS:
        own = f"sqlite:///{tmp_path}/{pool}.db"
        open_database(own).dispose()
        write(own, *records_of(pool))
        write(alone, *records_of(pool))
        send(own, url)
    return url, alone


def test_a_fleet_groups_and_filters_by_labels_as_one_ledger_does(urls):
    fleet, alone = (LedgerReader(each, book=BOOK) for each in urls)
    with fleet, alone:
        for words in WORDS:
            assert fleet.report(as_of=AT, **words) == alone.report(as_of=AT, **words)
        for chosen in ("label:pool=spot", "label:node=gpu-1+label:pool=big", None):
            of = {"filter": chosen, "as_of": AT}
            assert fleet.statement("2027-01", **of) == alone.statement("2027-01", **of)
            engines = engines_named(chosen)
            told = [
                economics(reader, Declared(e2e_ms=9), HOUR, HOUR + 1, AT, engines)
                for reader in (fleet, alone)
            ]
            assert told[0]["figures"] == pytest.approx(told[1]["figures"])
            assert told[0] | {"figures": None} == told[1] | {"figures": None}


def test_each_pool_of_a_fleet_has_the_price_of_its_label(urls):
    with LedgerReader(urls[0], book=BOOK) as fleet:
        (whole,) = fleet.report(as_of=AT, aggregate="label:pool")["series"]
        spot = fleet.report(as_of=AT, filter="label:pool=spot")
    costs = {
        (row["label:pool"], row["class"]): row["cost_nanousd"]
        for row in whole["rows"]
        if row["gpu_time_ns"]
    }
    used = 2 * BILLS
    assert costs == {
        ("spot", "requests"): used * S, ("spot", "idle"): (MINUTE - used) * S,
        ("big", "requests"): 4 * used * S, ("big", "idle"): 4 * (MINUTE - used) * S,
    }  # fmt: skip
    assert (spot["adds_up"], spot["wall_cost_nanousd"]) == (True, MINUTE * S)


@pytest.mark.parametrize("place", [0, 1], ids=["fleet", "one ledger"])
def test_two_servers_at_once_have_twice_the_rates_and_the_monthly_cost_of_one(urls, place):
    at_one_usd = PriceBook([PriceEntry("all", Decimal(3600), "list", None)])
    with LedgerReader(urls[place], book=at_one_usd) as reader:
        two, one = (
            economics(reader, Declared(), HOUR, HOUR + 1, AT, engines_named(chosen))["figures"]
            for chosen in (None, "label:pool=spot")
        )
        months = [month_of(reader, chosen) for chosen in (None, "label:pool=spot")]
    assert (one["observed_seconds"], two["observed_seconds"]) == (MINUTE, MINUTE)
    assert (one["arrivals"], one["arrivals_per_s"]) == (BILLS, pytest.approx(BILLS / MINUTE))
    doubled = ("cost_usd", "wall_gpu_seconds", "arrivals", "arrivals_per_s", "requests")
    doubled += ("output_tokens", "output_tokens_per_s", "prompt_tokens", "concurrency")
    for name in doubled:
        assert two[name] == pytest.approx(2 * one[name]), name
    for name in ("usd_per_m_output_tokens", "usd_per_request", "utilization", "mean_e2e_seconds"):
        assert two[name] == pytest.approx(one[name]), name
    # A USD each second, for a month of 730 hours.
    assert months == [pytest.approx(2 * 730 * 3600), pytest.approx(730 * 3600)]


def month_of(reader: LedgerReader, chosen: str | None) -> float:
    """What a month of these engines costs, as `compare` supposes it."""
    window = "2027-01-15T08:00:00Z,2027-01-15T09:00:00Z"
    asked = ComparisonQuestion(window, ratio="2:1", volume=("1M",), filter=chosen)
    offers = [Offer("api", "m", "file", "list", "2027-01-01", lambda *_: Decimal(1))]
    found = compared(reader, asked, offers, None)["what_if"]
    assert found is not None
    return float(found["self_hosted_usd_per_month"] or 0)
