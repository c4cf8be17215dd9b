"""Reports priced by the book: each hour of each run, late prices, missing ones, and what is apart.

At 36 USD an hour a nanosecond of GPU time costs 0.01 nano-USD.
"""

import sqlite3
from contextlib import closing
from decimal import Decimal

import pytest

from tests.component.ledger.test_energy import energy, told
from tests.component.ledger.test_reader import HOUR, NOW, T0, Ledger, http, part, snapshot
from tests.support.builders import make_open
from vllm_cost_meter.ledger.queries.cut import AsOf
from vllm_cost_meter.prices.book import EnergyPrice, PriceEntry, RunMatch
from vllm_cost_meter.prices.overheads import Overhead
from vllm_cost_meter.records.accrued import Accrued
from vllm_cost_meter.records.bill import UsagePiece
from vllm_cost_meter.records.snapshot import ClassTotals
from vllm_cost_meter.units.time import NS_PER_HOUR, rfc3339

PIECES = (UsagePiece(HOUR, 1_000, 0, 8, 0), UsagePiece(HOUR + 2, 0, 3_000, 0, 5))
# What the engine of such a bill says of its hours.
HOURS = {
    HOUR: ClassTotals(requests=1_000, idle=500),
    HOUR + 1: ClassTotals(idle=500),
    HOUR + 2: ClassTotals(requests=3_000, host=500, in_flight=100),
}
TOTALS = HOURS[HOUR].plus(HOURS[HOUR + 1]).plus(HOURS[HOUR + 2])


def price(amount: str, since: int | None = HOUR, **more) -> PriceEntry:
    matches = RunMatch(**{n: more.pop(n) for n in ("model", "gpu_name", "host") if n in more})
    key = more.pop("key", f"at {amount}")
    return PriceEntry(key, Decimal(amount), "the invoice", since, matches=matches, **more)


@pytest.fixture
def ledger(tmp_path):
    ledger = Ledger(f"sqlite:///{tmp_path / 'ledger.db'}")
    yield ledger
    ledger.close()


def write(ledger: Ledger, run_id: str = "run", usd: str | None = None, **changes) -> None:
    """One request of alice over three hours, in the middle of which the engine idled."""
    bill = part(1, f"h-{run_id}", run_id=run_id, pieces=PIECES, cost_nanousd=None)
    told = http(f"h-{run_id}", cost_nanousd=None)
    values = {"totals": TOTALS, "hours": HOURS, **changes}
    ledger.write(bill, told, snapshot([bill], run_id=run_id, **values), usd=usd)


def costs(report: dict) -> dict[str, int | None]:
    rows = {row["tenant"]: row["cost_nanousd"] for row in report["tenants"]}
    return {name: cost for name, cost in rows.items() if cost != 0} | {
        "all": report["cost_nanousd"]
    }


def content(ledger: Ledger) -> list[str]:
    with closing(sqlite3.connect(ledger.url.removeprefix("sqlite:///"))) as connection:
        return list(connection.iterdump())


# ---- by the hour


def test_each_hour_is_priced_by_the_price_of_that_hour(ledger):
    write(ledger)
    ledger.priced(price("36"), price("72", HOUR + 1), price("360", HOUR + 2))
    report = ledger.tenants()
    assert costs(report) == {
        "alice": 10 + 300,
        "__idle__": 5 + 10,
        "__host__": 50,
        "__in_flight__": 10,
        "all": 15 + 10 + 360,
    }
    assert [row["usd_per_gpu_hour"] for row in report["prices"]] == ["36", "72", "360"]
    assert report["usd_per_gpu_hour"] is None
    assert ledger.reader.tenant("alice", as_of=AsOf(NOW, 0))["prices"] == report["prices"]
    assert {row["cost_reason"] for row in report["tenants"]} == {None}


def test_windows_cost_what_their_hours_cost_and_add_up_to_the_whole(ledger):
    write(ledger)
    ledger.priced(price("36"), price("72", HOUR + 1), price("360", HOUR + 2))
    windows = [ledger.tenants(HOUR + n, HOUR + n + 1) for n in range(3)]
    assert [window["cost_nanousd"] for window in windows] == [15, 10, 360]
    assert [window["usd_per_gpu_hour"] for window in windows] == ["36", "72", "360"]
    assert costs(windows[2]) == {"alice": 300, "__host__": 50, "__in_flight__": 10, "all": 360}


def test_hours_at_one_price_are_rounded_together(ledger):
    write(ledger)
    ledger.priced(price("0.018"))  # 1,000 ns cost 0.005 nano-USD
    assert ledger.rows()["alice"]["cost_nanousd"] == 0
    ledger.priced(price("0.5"))
    # 4,000 ns cost 0.56; hour by hour it would be 0.14 and 0.42.
    assert ledger.rows()["alice"]["cost_nanousd"] == 1


def test_runs_are_priced_by_what_they_are(ledger):
    write(ledger, "big", hardware="NVIDIA H100 80GB HBM3", host="node-1", gpus=4)
    write(ledger, "small", hardware="NVIDIA L4", host="node-2")
    h100 = price("288", scope="node", gpus=8, gpu_name="*h100*", kind="reserved")
    ledger.priced(h100, price("18", gpu_name="*l4*"))
    report = ledger.tenants()
    assert report["tenants"][0]["cost_nanousd"] == 40 + 20
    assert report["prices"] == [
        {
            "usd_per_gpu_hour": "36", "usd_per_kv_block_hour": None, "amount": "288",
            "currency": "USD", "usd_rate": "1",
            "scope": "node", "gpus": 8, "kind": "reserved", "source": "the invoice",
            "effective_from": "2027-01-15T08:00:00.000000Z",
            "model": None, "gpu_name": "*h100*", "host": None, "labels": None,
        },
        {
            "usd_per_gpu_hour": "18", "usd_per_kv_block_hour": None, "amount": "18",
            "currency": "USD", "usd_rate": "1",
            "scope": "gpu", "gpus": 1, "kind": None, "source": "the invoice",
            "effective_from": "2027-01-15T08:00:00.000000Z",
            "model": None, "gpu_name": "*l4*", "host": None, "labels": None,
        },
    ]  # fmt: skip


def test_the_time_of_a_dead_run_costs_its_hours_too(ledger):
    write(ledger)
    ledger.priced(price("36"), price("360", HOUR + 2))
    report = ledger.tenants(now_ns=NOW + 16 * 10**9)
    assert costs(report)["__lost__"] == 10
    assert costs(report)["all"] == 15 + 5 + 360


# ---- a price that is missing, or late


def test_a_missing_price_makes_null_of_what_needs_it_and_says_which(ledger):
    write(ledger)
    ledger.priced(price("36", HOUR + 1))
    report = ledger.tenants()
    assert costs(report) == {
        "alice": None, "__idle__": None, "__host__": 5, "__in_flight__": 1, "all": None,
    }  # fmt: skip
    assert (
        report["cost_reason"]
        == report["tenants"][0]["cost_reason"]
        == (
            "no price for run run at 2027-01-15T08Z: at 36, the first for model 'm', GPU 'a GPU',"
            " host 'node-1', is effective from 2027-01-15T09Z"
        )
    )
    assert report["cost_usd"] is None
    assert [row["usd_per_gpu_hour"] for row in report["prices"]] == ["36"]
    assert ledger.tenants(HOUR + 1, None)["cost_nanousd"] == 5 + 36


def test_two_prices_that_are_equally_specific_are_none(ledger):
    write(ledger)
    ledger.priced(price("36", model="m"), price("40", host="node-1"))
    assert ledger.rows()["alice"]["cost_nanousd"] is None
    assert "at 36 and at 40 are equally specific" in ledger.rows()["alice"]["cost_reason"]


def test_a_price_that_comes_late_prices_old_hours_and_changes_no_record(ledger):
    write(ledger)
    before = content(ledger)
    assert ledger.tenants()["cost_nanousd"] is None
    ledger.priced(price("36"))
    assert ledger.tenants()["cost_nanousd"] == 56
    ledger.priced(price("36"), price("72", HOUR + 1))
    assert ledger.tenants()["cost_nanousd"] == 15 + 82
    request = ledger.reader.look_up("h-run")[0]
    assert (request["cost_nanousd"], request["cost_reason"]) == (
        None,
        "there was no price when it was billed",
    )
    assert ledger.reader.explain(request)["parts"][0]["cost_nanousd"] == 10 + 60
    assert content(ledger) == before


def test_without_the_settings_a_run_costs_what_it_was_told_when_it_began(ledger):
    write(ledger, usd="36")
    report = ledger.tenants()
    assert (report["cost_nanousd"], report["usd_per_gpu_hour"]) == (56, "36")
    [shown] = report["prices"]
    assert (shown["source"], shown["effective_from"]) == (
        "settings (recorded when the run began)",
        None,
    )
    ledger.priced(price("72", HOUR + 2))
    assert ledger.tenants()["cost_nanousd"] == 20 + 72
    ledger.priced(price("1", None), price("72", HOUR + 2))
    assert [row["usd_per_gpu_hour"] for row in ledger.tenants()["prices"]] == ["1", "72"]


def test_two_runs_that_were_told_the_same_price_show_it_once(ledger):
    write(ledger, usd="36")
    write(ledger, "run2", usd="36")
    assert len(ledger.tenants()["prices"]) == 1


def test_an_empty_ledger_and_an_empty_window_say_why_they_cost_nothing_known(ledger):
    ledger.priced(price("36"))
    assert ledger.tenants()["cost_reason"] == "no engine has run in this window"
    write(ledger)
    empty = ledger.tenants(HOUR + 5, HOUR + 6)
    assert (empty["cost_nanousd"], empty["cost_reason"]) == (
        None,
        "no engine has run in this window",
    )


def test_hours_that_do_not_add_up_to_the_totals_have_no_cost(ledger):
    write(ledger, hours={HOUR: HOURS[HOUR]})
    ledger.priced(price("36"))
    report = ledger.tenants()
    assert (costs(report)["alice"], costs(report)["all"]) == (40, None)
    why = "the hours of run run do not add up to its totals: see the audit"
    assert report["cost_reason"] == why
    host = next(row for row in report["tenants"] if row["tenant"] == "__host__")
    assert (host["gpu_time_ns"], host["cost_nanousd"], host["cost_reason"]) == (500, None, why)


# ---- explained


def test_a_bill_over_a_change_of_price_is_explained_price_by_price(ledger):
    write(ledger)
    ledger.priced(price("36"), price("360", HOUR + 2, scope="node", gpus=2, kind="spot"))
    explanation = ledger.reader.explain(ledger.reader.look_up("h-run")[0])
    [bill] = explanation["parts"]
    assert [(row["gpu_time_ns"], row["usd_per_gpu_hour"]) for row in bill["prices"]] == [
        (1_000, "36"),
        (3_000, "180"),
    ]
    assert (bill["cost_nanousd"], bill["usd_per_gpu_hour"], bill["price_source"]) == (
        10 + 150, None, None,
    )  # fmt: skip
    text = explanation["text"]
    assert "  1000 ns x 36 USD per GPU-hour (gpu, from 2027-01-15T08Z, the invoice)" in text
    assert (
        "  3000 ns x 180 USD per GPU-hour (360 USD per node of 2 GPUs, spot, from 2027-01-15T10Z,"
        " the invoice)"
    ) in text
    assert "  together 0.000000160 USD" in text


def test_a_bill_of_a_run_without_totals_is_explained_by_a_price_for_all_runs(ledger):
    ledger.write(part(1, pieces=PIECES), http())
    ledger.priced(price("36"))
    [bill] = ledger.reader.explain(ledger.reader.look_up("h1")[0])["parts"]
    assert (bill["cost_nanousd"], bill["usd_per_gpu_hour"]) == (40, "36")


def test_a_run_without_totals_has_no_price_where_another_one_may_hold_for_it(ledger):
    ledger.write(part(1, pieces=PIECES), http())
    ledger.priced(price("36"), price("72", host="node-1"))
    [bill] = ledger.reader.explain(ledger.reader.look_up("h1")[0])["parts"]
    assert (bill["cost_nanousd"], bill["usd_per_gpu_hour"]) == (None, None)
    row = ledger.rows()["alice"]
    assert row["cost_nanousd"] is None
    assert "is in force, but another entry may hold for model 'unknown'" in row["cost_reason"]


def test_a_bill_of_no_time_costs_nothing_if_there_is_a_price(ledger):
    bill = part(1, pieces=(), finished_at_ns=T0)
    ledger.write(bill, http(), snapshot([bill], totals=ClassTotals(idle=5)))
    for entries, cost in (([], None), ([price("36")], 0)):
        ledger.priced(*entries)
        [bill] = ledger.reader.explain(ledger.reader.look_up("h1")[0])["parts"]
        assert bill["cost_nanousd"] == cost
        assert (bill["cost_reason"] is None) is (cost == 0)


# ---- running requests


def test_a_running_request_is_priced_by_the_hour_of_its_snapshot(ledger):
    live = (("internal-1", Accrued(decode_ns=3_000, marginal_ns=1_000)),)
    totals = ClassTotals(in_flight=3_000)
    ledger.write(make_open(), snapshot([], totals=totals, live=live, taken_at_ns=NOW))
    ledger.priced(price("36", HOUR - 1), price("72"), price("360", HOUR + 1))
    [match] = ledger.reader.find("internal-1")
    row = ledger.reader.request(match, as_of=AsOf(NOW, 0))
    assert (row["state"], row["as_of"]) == ("running", rfc3339(NOW))
    assert (row["cost_nanousd"], row["marginal_cost_usd"]) == (60, "0.000000020")
    ledger.priced(price("360", HOUR + 1))
    row = ledger.reader.request(match, as_of=AsOf(NOW, 0))
    assert row["cost_nanousd"] is None
    assert row["cost_reason"].startswith(
        "no price for run run at 2027-01-15T08Z: at 360, the first"
    )
    assert row["parts"][0]["cost_reason"] == row["cost_reason"]
    [listed] = ledger.reader.requests(as_of=AsOf(NOW))["running"]
    assert listed["cost_reason"] == row["cost_reason"]


def test_the_reason_is_told_for_requests_that_no_engine_worked_on(ledger):
    ledger.write(http(status=400, gpu_time_ns=None, cost_nanousd=None))
    [row] = ledger.reader.look_up("h1")
    assert (row["cost_nanousd"], row["cost_reason"]) == (None, "no engine worked on it")


# ---- energy


def energy_price(usd: str, since: int = HOUR, **matches) -> EnergyPrice:
    return EnergyPrice(f"at {usd}", Decimal(usd), "the utility", since, RunMatch(**matches))


def write_energy(ledger: Ledger) -> None:
    """700 mJ of alice in two hours, and an idle engine in the first of them."""
    hours = {
        HOUR: {"requests": 500, "idle": 40},
        HOUR + 1: {"requests": 200},
    }
    full = {h: dict.fromkeys(energy().classes, 0) | mj for h, mj in hours.items()}
    bill = part(1, pieces=PIECES)
    used = energy(told(1, 500), told(1, 200, HOUR + 1), hours=full, idle=40)
    ledger.write(bill, http(), snapshot([bill], totals=TOTALS, hours=HOURS, energy=used))


def energy_costs(report: dict) -> dict[str, int | None]:
    rows = {row["tenant"]: row["energy_cost_nanousd"] for row in report["tenants"]}
    return {name: cost for name, cost in rows.items() if cost} | {
        "all": report["energy_cost_nanousd"]
    }


def test_energy_has_a_cost_of_its_own_by_the_hour_and_adds_to_no_other(ledger):
    write_energy(ledger)
    # At 3.6 USD per kWh a millijoule costs a nano-USD.
    ledger.priced(price("36"), energy_prices=[energy_price("3.6"), energy_price("36", HOUR + 1)])
    report = ledger.tenants()
    assert energy_costs(report) == {"alice": 500 + 2_000, "__idle__": 40, "all": 2_540}
    assert costs(report)["all"] == 56
    assert [row["usd_per_kwh"] for row in report["energy_prices"]] == ["3.6", "36"]
    second = ledger.tenants(HOUR + 1, HOUR + 2)
    assert energy_costs(second) == {"alice": 2_000, "all": 2_000}
    rows = {row["tenant"]: row for row in report["tenants"]}
    assert (rows["__host__"]["energy_cost_nanousd"], rows["__startup__"]["energy_mj"]) == (0, None)
    assert rows["__startup__"]["energy_cost_reason"] == "no energy is known"


def test_energy_costs_of_rows_and_of_nobody_add_up_to_that_of_all_energy(ledger):
    bills = [part(n, f"h{n}", tenant=f"t{n}") for n in (1, 2, 3)]
    mj = {"requests": 30, "idle": 10, "unattributed": 10}
    full = dict.fromkeys(energy().classes, 0) | mj
    used = energy(*(told(n, 10) for n in (1, 2, 3)), hours={HOUR: full}, idle=10, unattributed=10)
    ledger.write(*bills, snapshot(bills, energy=used))
    # 10 mJ cost 1/3 nano-USD: each by itself would be 0, and all 50 mJ are 1.67.
    ledger.priced(energy_prices=[energy_price("0.12")])
    report = ledger.tenants()
    rows = [row["energy_cost_nanousd"] or 0 for row in report["tenants"]]
    assert report["energy_cost_nanousd"] == sum(rows) == 2


def test_energy_without_a_price_has_no_cost_and_says_why(ledger):
    write_energy(ledger)
    ledger.priced(energy_prices=[energy_price("3.6", HOUR + 1)])
    report = ledger.tenants()
    assert energy_costs(report) == {"all": None}
    assert report["energy_cost_reason"] == (
        "no energy price for run run at 2027-01-15T08Z: at 3.6, the first for model 'm', GPU 'a"
        " GPU', host 'node-1', is effective from 2027-01-15T09Z"
    )
    assert ledger.tenants(HOUR + 1, None)["energy_cost_nanousd"] == 200
    ledger.priced()
    assert ledger.tenants()["energy_cost_reason"].endswith("none is set by [[energy_prices]]")


def test_where_no_energy_is_known_it_has_no_cost(ledger):
    write(ledger)
    ledger.priced(energy_prices=[energy_price("3.6")])
    report = ledger.tenants()
    assert (report["energy_cost_nanousd"], report["energy_cost_reason"]) == (
        None,
        "no energy is known",
    )
    assert {row["energy_cost_reason"] for row in report["tenants"]} == {"no energy is known"}


# ---- overheads


def test_overheads_are_lines_apart_from_every_cost(ledger):
    write(ledger)
    rent = Overhead("o0", "rent", "the lease", usd_per_month=Decimal("744"))
    staff = Overhead("o1", "staff", "plan", percent=Decimal(10), effective_from_hour=HOUR + 2)
    ledger.priced(price("36"), overheads=[rent, staff])
    summary = ledger.reader.summary(as_of=AsOf(NOW, 0))
    shown = [(row["name"], row["cost_nanousd"], row["from"]) for row in summary["overheads"]]
    assert shown == [
        ("rent", 3 * 10**9, rfc3339(HOUR * NS_PER_HOUR)),  # three of the 744 hours of January
        ("staff", 4, rfc3339((HOUR + 2) * NS_PER_HOUR)),  # 10 % of 36
    ]
    assert summary["cost_nanousd"] == 56
    day = ledger.tenants(HOUR, HOUR + 24)["overheads"]
    assert [row["cost_nanousd"] for row in day] == [24 * 10**9, 4]


def test_a_percentage_of_hours_without_a_price_is_unknown_and_the_rest_is_told(ledger):
    write(ledger)
    staff = Overhead("o0", "staff", "plan", percent=Decimal(10))
    ledger.priced(price("36", HOUR + 1), overheads=[staff])
    [line] = ledger.tenants()["overheads"]
    assert (line["cost_nanousd"], line["cost_reason"]) == (
        None,
        "the cost it is a part of is null",
    )
    assert ledger.tenants(HOUR + 1, None)["overheads"][0]["cost_nanousd"] == 4


def test_a_ledger_without_hours_has_no_overheads_unless_a_window_is_asked_for(ledger):
    rent = Overhead("o0", "rent", "the lease", usd_per_month=Decimal("744"))
    ledger.priced(overheads=[rent])
    assert ledger.tenants()["overheads"] == []
    assert ledger.tenants(HOUR, HOUR + 1)["overheads"][0]["cost_nanousd"] == 10**9
