"""Bills in a real ledger: written once by key, compared with the meter, in statements and figures.

The engine is that of test_ledger_economics: at 36 USD per GPU-hour it cost 0.40 USD in HOUR and
0.20 USD in the next.
"""

import contextlib
import sqlite3
from dataclasses import replace
from decimal import Decimal

import pytest

from tests.component.ledger.test_economics import write
from tests.component.ledger.test_reader import HOUR, NOW, Ledger, part, snapshot
from vllm_cost_meter.economics import Declared
from vllm_cost_meter.errors import LedgerError
from vllm_cost_meter.invoices.files import InvoiceFile
from vllm_cost_meter.invoices.timeline import InvoiceLine, Reading
from vllm_cost_meter.ledger.billing.hours import HOURS_MAX
from vllm_cost_meter.ledger.billing.importing import import_invoice
from vllm_cost_meter.ledger.billing.meters import meters
from vllm_cost_meter.ledger.economics.query import economics, method
from vllm_cost_meter.ledger.queries.cut import AsOf
from vllm_cost_meter.ledger.reader import LedgerReader
from vllm_cost_meter.prices.overheads import Overhead
from vllm_cost_meter.records.bill import UsagePiece
from vllm_cost_meter.records.snapshot import ClassTotals
from vllm_cost_meter.units.time import NS_PER_HOUR

USD = 10**9
DAY = 24 * NS_PER_HOUR
MONTH = "2027-01"
AFTER = (HOUR + 24 * 30) * NS_PER_HOUR


def read(hour: float, usd: float, resource: str = "gpu-1", kind: str = "gpu") -> Reading:
    at_ns = round((HOUR + hour) * NS_PER_HOUR)
    return Reading(resource, kind, at_ns, round(usd * USD))


def charged(
    hour: float, hours: float, usd: float, resource: str = "gpu-1", kind: str = "gpu", **more: str
) -> InvoiceLine:
    begin, end = (round((HOUR + at) * NS_PER_HOUR) for at in (hour, hour + hours))
    return InvoiceLine(resource, kind, begin, end, round(usd * USD), **more)


def a_file(*facts) -> InvoiceFile:
    def those(kind):
        return {fact: f"bill.csv:{n}" for n, fact in enumerate(facts, 2) if isinstance(fact, kind)}

    return InvoiceFile("bill.csv", those(Reading), those(InvoiceLine), 0)


@pytest.fixture
def ledger(tmp_path):
    ledger = Ledger(f"sqlite:///{tmp_path / 'ledger.db'}")
    yield ledger
    ledger.close()


def bring(ledger, *facts, gap_ns: int = DAY, **options):
    return import_invoice(ledger.url, a_file(*facts), gap_ns, NOW, **options)


def rows(ledger, query: str):
    path = ledger.url.removeprefix("sqlite:///")
    with contextlib.closing(sqlite3.connect(path)) as connection:
        return connection.execute(query).fetchall()


def everything(ledger):
    tables = ("billing_snapshots", "invoice_lines", "billed_hours")
    return [rows(ledger, f"SELECT * FROM {table}") for table in tables]


def figures(ledger, *hours, declared=None):
    return economics(ledger.reader, declared or Declared(), *hours, as_of=AsOf(settle_s=0))[
        "figures"
    ]


def summary(ledger, *hours):
    return ledger.reader.summary(*hours, as_of=AsOf(NOW, 0))["billed"]


# ---- import


def test_readings_become_hours(ledger):
    answer = bring(ledger, read(0, 10), read(1, 12), read(2, 1), read(3, 3))
    assert rows(ledger, "SELECT hour, nanousd, covered_ns, unobserved_ns, resets, basis"
                        " FROM billed_hours ORDER BY hour") == [
        (HOUR, 2 * USD, NS_PER_HOUR, 0, 0, "counter"),
        (HOUR + 1, 0, 0, NS_PER_HOUR, 1, "counter"),
        (HOUR + 2, 2 * USD, NS_PER_HOUR, 0, 0, "counter"),
    ]  # fmt: skip
    [resource] = answer["resources"]
    assert (resource["billed_usd"], resource["unobserved_hours"], resource["resets"]) == (
        "4.000000000", 1.0, 1,
    )  # fmt: skip
    [lost] = answer["unobserved"]
    assert (lost["from"], lost["to"], lost["reason"]) == (
        "2027-01-15T09:00:00.000000Z", "2027-01-15T10:00:00.000000Z", "reset",
    )  # fmt: skip


def test_the_same_file_again_changes_nothing(ledger):
    facts = [read(0, 1), read(2, 3), charged(0, 1, 5, "vol", "disk")]
    first = bring(ledger, *facts)
    before = everything(ledger)
    again = bring(ledger, *reversed(facts))
    assert everything(ledger) == before
    assert (first["snapshots"], first["lines"], first["known"]) == (2, 1, 0)
    assert (again["snapshots"], again["lines"], again["known"]) == (0, 0, 3)


def test_a_later_file_continues_the_counter_of_an_earlier_one(ledger):
    bring(ledger, read(0, 1), read(1, 3))
    bring(ledger, read(2, 7))
    assert rows(ledger, "SELECT hour, nanousd FROM billed_hours ORDER BY hour") == [
        (HOUR, 2 * USD), (HOUR + 1, 4 * USD),
    ]  # fmt: skip


def test_a_fact_that_contradicts_the_ledger_refuses_its_whole_file(ledger):
    bring(ledger, read(0, 1), charged(0, 1, 5, "vol", "disk"))
    before = everything(ledger)
    with pytest.raises(
        ValueError, match=r"bill\.csv:3: 'gpu-1' at 2027-01-15T08:00:00.*"
    ) as caught:
        bring(ledger, read(5, 9), read(0, 2))
    assert str(caught.value).endswith(
        "expected 1.000000000 USD of gpu so far, as the ledger has it, got 2.000000000 USD of gpu"
        " so far"
    )
    with pytest.raises(ValueError, match="expected 5.000000000 USD of disk"):
        bring(ledger, charged(0, 1, 6, "vol", "disk"))
    with pytest.raises(ValueError, match="kind of 'gpu-1': expected gpu, as the ledger has it"):
        bring(ledger, read(7, 9, kind="disk"))
    assert everything(ledger) == before


def test_a_correction_is_another_line(ledger):
    bring(ledger, charged(0, 1, 5))
    bring(ledger, charged(0, 1, -2, invoice="next", charge_class="Correction"))
    assert rows(ledger, "SELECT nanousd FROM billed_hours") == [(3 * USD,)]


def test_a_dry_run_tells_and_writes_nothing(ledger):
    facts = [read(0, 1), read(1, 3)]
    told = bring(ledger, *facts, dry_run=True)
    assert everything(ledger) == [[], [], []]
    assert bring(ledger, *facts) == {**told, "dry_run": False}


def test_too_many_hours_are_refused_with_one_line(ledger):
    with pytest.raises(ValueError, match="expected at most 1,000,000 hours x charges"):
        bring(ledger, read(0, 1), read(HOURS_MAX + 1, 2))
    assert everything(ledger) == [[], [], []]


def test_there_must_be_a_ledger(tmp_path):
    with pytest.raises(LedgerError, match="no such file"):
        import_invoice(f"sqlite:///{tmp_path / 'none.db'}", a_file(read(0, 1)), DAY, NOW)


def test_resources_are_listed_with_one_reading_too(ledger):
    bring(ledger, read(0, 1), charged(1, 2, 5, "vol", "disk"))
    with ledger.reader.transaction() as connection:
        disk, gpu = sorted(meters(connection), key=lambda row: row["kind"])
    assert (gpu["snapshots"], gpu["lines"], gpu["billed_usd"]) == (1, 0, None)
    assert (disk["snapshots"], disk["lines"], disk["billed_usd"]) == (0, 1, "5.000000000")
    assert disk["to"] == "2027-01-15T11:00:00.000000Z"


def test_of_a_resource_that_nobody_observed_no_sum_is_told(ledger):
    [row] = bring(ledger, read(0, 9), read(1, 1))["resources"]
    assert (row["billed_usd"], row["billed_nanousd"], row["resets"]) == (None, None, 1)


# ---- against the meter


def bills(ledger) -> None:
    """GPUs billed at 0.50 USD in HOUR and not in the next; a disk and a network in both."""
    write(ledger)
    ledger.priced(overheads=[
        Overhead("overheads[0]", "rent", "lease", usd_per_month=Decimal("7.44")),
        Overhead("overheads[1]", "staff", "plan", percent=Decimal(10)),
    ])  # fmt: skip
    bring(
        ledger, charged(0, 1, 0.5), charged(0, 2, 0.04, "vol", "disk"),
        charged(0, 2, 0.02, "lan", "network"),
    )  # fmt: skip


def test_figures_are_those_computed_by_hand(ledger):
    bills(ledger)
    found = figures(ledger)
    assert found["cost_usd"] == pytest.approx(0.60)  # price x time, as ever
    assert found["billed_gpu_usd"] == pytest.approx(0.50)
    assert found["metered_while_billed_usd"] == pytest.approx(0.40)
    assert found["billed_difference_usd"] == pytest.approx(0.10)
    assert found["capture_rate"] == pytest.approx(0.8)
    assert found["unbilled_usd"] == pytest.approx(0.20)
    assert found["billed_other_usd"] == pytest.approx(0.06)
    # Two hours of the 744 of a month at 7.44 USD, and 10 % of 0.60.
    assert found["overhead_usd"] == pytest.approx(0.02 + 0.06)
    assert found["blended_cost_usd"] == pytest.approx(0.50 + 0.20 + 0.06 + 0.08)
    assert found["blended_usd_per_m_output_tokens"] == pytest.approx(0.84 / 20 * 1e6)
    assert found["blended_usd_per_m_total_tokens"] == pytest.approx(0.84 / 60 * 1e6)


def test_the_sql_that_is_told_gives_the_figure_by_hand(ledger):
    bills(ledger)
    for hours in ((), (HOUR, HOUR + 1), (HOUR + 1, None), (HOUR + 7, HOUR + 9)):
        told = figures(ledger, *hours)
        for step in method(ledger.reader, Declared(), *hours):
            assert rows(ledger, step["sql"]) == [(told[step["figure"]],)], step["figure"]


def test_figures_of_the_parts_of_a_window_add_up_to_it(ledger):
    bills(ledger)
    whole = figures(ledger)
    parts = [figures(ledger, HOUR, HOUR + 1), figures(ledger, HOUR + 1, HOUR + 2)]
    for name in ("billed_gpu_usd", "metered_while_billed_usd", "billed_other_usd", "unbilled_usd",
                 "billed_difference_usd", "overhead_usd", "blended_cost_usd"):  # fmt: skip
        assert sum(part[name] or 0 for part in parts) == pytest.approx(whole[name]), name


def test_an_hour_that_is_billed_in_part_is_priced_for_the_rest(ledger):
    write(ledger)
    bring(ledger, charged(0, 0.25, 0.3))
    found = figures(ledger)
    assert found["metered_while_billed_usd"] == pytest.approx(0.1)
    assert found["blended_cost_usd"] == pytest.approx(0.3 + 0.3 + 0.2)


def test_without_bills_the_blended_cost_is_price_times_time(ledger):
    write(ledger)
    found = figures(ledger)
    assert found["blended_cost_usd"] == found["unbilled_usd"] == pytest.approx(0.6)
    for name in ("billed_gpu_usd", "metered_while_billed_usd", "billed_difference_usd",
                 "capture_rate", "billed_other_usd", "overhead_usd"):  # fmt: skip
        assert found[name] is None, name
    assert summary(ledger) is None


def test_a_bill_stands_in_for_a_price_that_nobody_declared(ledger):
    write(ledger, usd=None)
    bring(ledger, charged(0, 1, 0.5))
    assert figures(ledger, HOUR, HOUR + 1)["blended_cost_usd"] == pytest.approx(0.5)
    found = figures(ledger)
    assert (found["metered_while_billed_usd"], found["blended_cost_usd"]) == (None, None)


def test_what_nobody_observed_is_not_billed_at_nothing(ledger):
    write(ledger)
    bring(ledger, read(0, 9), read(1, 1))
    found = figures(ledger)
    assert (found["billed_gpu_usd"], found["capture_rate"]) == (None, None)
    assert found["blended_cost_usd"] == pytest.approx(0.6)
    told = summary(ledger)
    assert (told["billed_gpu_usd"], told["unobserved_hours"], told["resets"]) == (None, 1.0, 1)


def test_a_credit_by_itself_lowers_the_cost_and_covers_no_time(ledger):
    write(ledger)
    bring(ledger, charged(0, 1, -0.1, charge_class="Credit"))
    found = figures(ledger)
    assert found["billed_gpu_usd"] == pytest.approx(-0.1)
    assert (found["metered_while_billed_usd"], found["capture_rate"]) == (0, None)
    assert found["blended_cost_usd"] == pytest.approx(0.5)
    assert summary(ledger)["capture_rate"] is None


def test_gpus_that_were_billed_and_ran_nothing_are_captured_at_0(ledger):
    write(ledger)
    bring(ledger, charged(5, 2, 3))
    found = figures(ledger, HOUR + 5, HOUR + 7)
    assert (found["capture_rate"], found["blended_cost_usd"]) == (0, 3)


def test_twice_the_price_and_twice_the_bill_double_every_dollar_and_nothing_else(tmp_path):
    found = []
    for factor, usd in ((1, "36"), (2, "72")):
        ledger = Ledger(f"sqlite:///{tmp_path / f'{factor}.db'}")
        write(ledger, usd)
        bring(ledger, charged(0, 0.5, 0.5 * factor), charged(0, 2, 0.04 * factor, "vol", "disk"))
        found.append(figures(ledger))
        ledger.close()
    once, twice = found
    for name, value in once.items():
        factor = 2 if "usd" in name else 1
        assert twice[name] == (None if value is None else pytest.approx(factor * value)), name


def test_renaming_tenants_moves_no_money(ledger):
    bills(ledger)
    before = figures(ledger), summary(ledger)
    path = ledger.url.removeprefix("sqlite:///")
    with contextlib.closing(sqlite3.connect(path)) as connection, connection:
        for table in ("requests", "http_requests", "usage_pieces", "open_requests"):
            connection.execute(f"UPDATE {table} SET tenant = 'one'")
    assert (figures(ledger), summary(ledger)) == before


# ---- days, summary, statement


def test_each_day_has_metered_billed_and_the_rest_on_its_own(ledger):
    bills(ledger)
    bring(ledger, read(24, 1), read(25, 3), read(26, 1))
    answer = ledger.reader.invoice_days(as_of=AsOf(settle_s=0))
    first, second = answer["days"]
    assert first == {
        "day": "2027-01-15",
        "metered_usd": "0.600000000", "metered_while_billed_usd": "0.400000000",
        "billed_gpu_usd": "0.500000000", "difference_usd": "0.100000000", "capture_rate": 0.8,
        "billed_disk_usd": "0.040000000", "billed_network_usd": "0.020000000",
        "billed_other_usd": None, "covered_hours": 1.0, "unobserved_hours": 0.0, "resets": 0,
    }  # fmt: skip
    assert (second["day"], second["metered_usd"], second["billed_gpu_usd"]) == (
        "2027-01-16", None, "2.000000000",
    )  # fmt: skip
    assert (second["capture_rate"], second["unobserved_hours"], second["resets"]) == (0, 1.0, 1)
    assert answer["total"]["billed_gpu_usd"] == "2.500000000"


def test_days_that_lose_half_a_nano_usd_each_add_up_to_their_total(ledger):
    ran = {hour: ClassTotals(idle=50) for hour in (HOUR, HOUR + 24)}  # 0.5 nano-USD at 36 USD/h
    ledger.write(snapshot([], totals=ClassTotals(idle=100), hours=ran), usd="36")
    bring(ledger, charged(0, 1, 3e-9), charged(24, 1, 3e-9))
    answer = ledger.reader.invoice_days(as_of=AsOf(settle_s=0))
    money = ("metered_usd", "metered_while_billed_usd", "billed_gpu_usd", "difference_usd")
    assert [[row[name] for name in money] for row in (*answer["days"], answer["total"])] == [
        ["0.000000001", "0.000000001", "0.000000003", "0.000000002"],
        ["0.000000000", "0.000000000", "0.000000003", "0.000000003"],
        ["0.000000001", "0.000000001", "0.000000006", "0.000000005"],
    ]


def test_on_a_day_that_bills_cover_whole_both_metered_amounts_are_the_same(ledger):
    """Half a nano-USD on a billed day and 1.5 in all: rounded apart they would be 0 and 1."""
    ran = {HOUR: ClassTotals(idle=50), HOUR + 24: ClassTotals(idle=100)}
    ledger.write(snapshot([], totals=ClassTotals(idle=150), hours=ran), usd="36")
    bring(ledger, charged(0, 1, 3e-9))
    answer = ledger.reader.invoice_days(as_of=AsOf(settle_s=0))
    money = ("metered_usd", "metered_while_billed_usd", "difference_usd")
    assert [[row[name] for name in money] for row in (*answer["days"], answer["total"])] == [
        ["0.000000001", "0.000000001", "0.000000002"],
        ["0.000000001", None, None],
        ["0.000000002", "0.000000001", "0.000000002"],
    ]


def test_the_exact_amounts_of_a_summary_are_those_of_the_figures(ledger):
    bills(ledger)
    for hours in ((), (HOUR, HOUR + 1), (HOUR + 1, HOUR + 2)):
        told, found = summary(ledger, *hours), figures(ledger, *hours)
        for ours, theirs in (
            ("billed_gpu_usd", "billed_gpu_usd"),
            ("metered_while_billed_usd", "metered_while_billed_usd"),
            ("difference_usd", "billed_difference_usd"),
            ("capture_rate", "capture_rate"),
        ):
            exact = None if told[ours] is None else float(told[ours])
            assert exact == (None if found[theirs] is None else pytest.approx(found[theirs])), ours
    assert summary(ledger)["others"] == [
        {"resource": "vol", "kind": "disk", "billed_usd": "0.040000000"},
        {"resource": "lan", "kind": "network", "billed_usd": "0.020000000"},
    ]  # fmt: skip


def write_balanced(ledger) -> None:
    """As `write`, of books that balance: 9 s of alice in HOUR, 3 s of bob in the next."""
    s = 10**9
    pieces = [(UsagePiece(HOUR, 3 * s, 6 * s, 8, 5),), (UsagePiece(HOUR + 1, s, 2 * s, 8, 5),)]
    parts = [part(1, "h1", pieces=pieces[0]), part(2, "h2", pieces=pieces[1], tenant="bob")]
    hours = {
        HOUR: ClassTotals(requests=9 * s, idle=31 * s),
        HOUR + 1: ClassTotals(requests=3 * s, startup=17 * s),
    }
    totals = hours[HOUR].plus(hours[HOUR + 1])
    taken = snapshot(parts, totals=totals, hours=hours, gpus=2, wall_ns=30 * s)
    ledger.write(*parts, taken, usd="36")


def statement(ledger, **told):
    return ledger.reader.statement(MONTH, as_of=AsOf(AFTER, 0), **told)


@pytest.mark.parametrize("idle", ["none", "proportional", "even", "owner:alice"])
@pytest.mark.parametrize("gpu_usd", [0.5, 0.3])
def test_a_statement_is_of_what_was_billed_to_the_cent(ledger, idle, gpu_usd):
    write_balanced(ledger)
    bring(ledger, charged(0, 1, gpu_usd), charged(0, 2, 0.04, "vol", "disk"))
    answer = statement(ledger, idle=idle)
    # 0.20 USD of the hour that no bill covers is price x time.
    assert answer["total"]["amount_cents"] == round(100 * (gpu_usd + 0.2 + 0.04))
    assert answer["whole"]["amount_cents"] == answer["total"]["amount_cents"]
    assert [(one["name"], one["cents"]) for one in answer["whole"]["overhead"]] == [
        ("difference to the bill", round(100 * gpu_usd - 40)), ("disk vol", 4),
    ]  # fmt: skip
    assert sum(line["amount_cents"] for line in answer["lines"]) == answer["total"]["amount_cents"]
    assert answer["billed"] == {"covered_hours": 1.0, "unobserved_hours": 0.0, "resets": 0}


def test_a_tenants_statement_has_its_part_of_the_difference(ledger):
    write_balanced(ledger)
    bring(ledger, charged(0, 1, 0.8))
    lines = statement(ledger, idle="proportional", tenant="alice")["lines"]
    [difference] = [line for line in lines if line["item"] == "difference to the bill"]
    assert (difference["kind"], difference["amount_cents"]) == ("overhead", 30)  # 9 of 12 s


def test_a_month_without_bills_has_a_statement_as_ever(ledger):
    write(ledger)
    answer = statement(ledger)
    assert (answer["billed"], answer["whole"]["overhead"]) == (None, [])


def test_a_reader_of_an_empty_ledger_has_no_days(ledger):
    answer = LedgerReader(ledger.url).invoice_days(as_of=AsOf(settle_s=0))
    assert (answer["days"], answer["total"]["billed_gpu_usd"]) == ([], None)


def test_a_gap_is_said_and_its_money_counts(ledger):
    write(ledger)
    told = bring(ledger, read(0, 0), read(48, 4.8))
    assert [one["reason"] for one in told["unobserved"]] == ["gap"]
    found = figures(ledger)
    assert found["billed_gpu_usd"] == pytest.approx(4.8)
    assert found["unbilled_usd"] == 0
    assert summary(ledger)["unobserved_hours"] == 48


def test_the_gap_of_the_latest_import_holds_for_its_resources(ledger):
    bring(ledger, read(0, 0), read(48, 4.8))
    assert bring(ledger, read(0, 0), gap_ns=2 * DAY)["unobserved"] == []
    assert rows(ledger, "SELECT SUM(unobserved_ns) FROM billed_hours") == [(0,)]


def test_an_invoice_takes_the_place_of_the_readings_of_its_time(ledger):
    bring(ledger, read(0, 0), read(2, 2))
    bring(ledger, charged(1, 1, 7))
    assert rows(ledger, "SELECT nanousd, basis FROM billed_hours ORDER BY hour") == [
        (USD, "counter"), (7 * USD, "invoice"),
    ]  # fmt: skip


def test_two_kinds_of_one_resource_are_apart(ledger):
    bring(ledger, charged(0, 1, 5, item="a"), replace(charged(0, 1, 3, item="b"), kind="disk"))
    assert rows(ledger, "SELECT kind, nanousd FROM billed_hours ORDER BY kind") == [
        ("disk", 3 * USD), ("gpu", 5 * USD),
    ]  # fmt: skip
