"""The page on invoices says which files are read, and what is told of them."""

import re

import pytest
from fastapi.testclient import TestClient

from tests.support.pages import DOCS, names, section
from tests.support.small_ledger import HOUR, small_ledger
from vllm_cost_meter.config.invoices import InvoiceSettings
from vllm_cost_meter.config.loading import load_settings
from vllm_cost_meter.endpoint.app import make_app
from vllm_cost_meter.invoices import focus as invoice_focus
from vllm_cost_meter.invoices.files import InvoiceFile, InvoiceRules, read_invoice
from vllm_cost_meter.invoices.rows import FILE_BYTES_MAX
from vllm_cost_meter.invoices.timeline import CHARGE_CLASSES, KINDS, InvoiceLine, Reading
from vllm_cost_meter.ledger.billing.comparison import DIFFERENCE
from vllm_cost_meter.ledger.billing.hours import HOURS_MAX, ROWS_MAX
from vllm_cost_meter.ledger.billing.importing import import_invoice
from vllm_cost_meter.units.time import NS_PER_HOUR

PAGE = DOCS / "howto" / "against-the-invoice.md"


@pytest.fixture
def client(tmp_path):
    reader = small_ledger(tmp_path)
    line = InvoiceLine("vol", "disk", HOUR * NS_PER_HOUR, (HOUR + 1) * NS_PER_HOUR, 5)
    url = f"sqlite:///{tmp_path / 'ledger.db'}"
    import_invoice(url, InvoiceFile("f", {}, {line: "f:1"}, 0), NS_PER_HOUR, 0)
    yield TestClient(make_app(reader), base_url="http://localhost")
    reader.close()


def test_the_settings_on_the_page_can_be_loaded(tmp_path):
    above = section(PAGE, "Formats").partition("**A layout**")[2]
    lines = [line[4:] for line in above.splitlines() if line.startswith("    ") or not line]
    path = tmp_path / "meter.toml"
    path.write_text("\n".join(lines))
    rules = load_settings({"COST_METER_CONFIG": str(path)}).invoice_rules
    assert (list(rules.layouts), len(rules.kinds), list(rules.usd_rates)) == (
        ["lambda"],
        2,
        ["EUR"],
    )


def test_a_snapshot_has_the_fields_that_the_page_says(tmp_path):
    before = section(PAGE, "Formats")
    fields = re.findall(r"^\| `(\w+)`", before, re.MULTILINE)
    path = tmp_path / "readings.csv"
    path.write_text(f"{','.join(fields)}\nr,2026-11-01T00:00:00Z,1,,disk\n")
    [reading] = read_invoice(path, "snapshots", InvoiceRules()).readings
    assert (reading.cumulative_nanousd, reading.kind) == (10**9, "disk")
    row = re.search(r"^\| `kind` \| \| (.*) \|$", before, re.MULTILINE)[1]
    assert tuple(re.findall("`(.*?)`", row.partition(";")[0])) == KINDS


def test_the_columns_of_focus_are_those_that_are_needed():
    said = re.findall("`(.*?)`", section(PAGE, "Formats").partition(" are needed")[0])
    assert set(said) - {"focus"} == set(invoice_focus.COLUMNS.values())


def test_the_numbers_and_words_are_those_of_the_code():
    text = " ".join(PAGE.read_text().split())
    assert f"{FILE_BYTES_MAX // 10**6} MB" in text
    assert f"at most {ROWS_MAX:,} rows of facts and of hours" in text
    assert f"{HOURS_MAX:,} hours x charges" in text
    gap = InvoiceSettings.model_fields["invoice_gap_hours"].default
    assert f"`invoice_gap_hours` ({gap:g} hours)" in text
    assert "`Correction`, `Credit` or `Adjustment`" in text
    assert CHARGE_CLASSES == ("Correction", "Credit", "Adjustment")
    assert f"`{DIFFERENCE}`" in text


def test_every_field_of_a_resource_and_of_an_import_is_documented_and_no_other(client, tmp_path):
    begin, end = HOUR * NS_PER_HOUR, (HOUR + 1) * NS_PER_HOUR
    read = [Reading("r", "gpu", at, usd) for at, usd in ((begin, 2), (end, 1))]
    told = InvoiceFile("f", dict.fromkeys(read, "f:1"), {}, 0)
    answer = import_invoice(f"sqlite:///{tmp_path / 'ledger.db'}", told, NS_PER_HOUR, 0)
    assert names(PAGE, "What import and list report") == list(answer["resources"][0])
    said = section(PAGE, "What import and list report").partition("`import` also has")[2]
    [lost] = answer["unobserved"]
    fields = (answer.keys() | lost.keys()) - {"resources", "resource", "kind"}
    assert set(re.findall("`(.*?)`", said)) == fields


def test_every_field_of_a_day_and_of_a_summary_is_documented_and_no_other(client):
    answer = client.get("/cost/invoices").json()
    assert set(answer) == {"window", "taken_at", "prices", "days", "total"}
    [day] = answer["days"]
    fields = names(PAGE, "Day by day")
    assert fields == list(day)
    assert fields[1:] == list(answer["total"])
    billed = client.get("/cost/summary").json()["billed"]
    assert list(billed) == [*fields[1:], *names(DOCS / "reference" / "totals.md", "Billed")]
    assert billed["others"] == [{"resource": "vol", "kind": "disk", "billed_usd": "0.000000005"}]
