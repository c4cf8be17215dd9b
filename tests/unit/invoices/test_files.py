"""Files of bills: what a row of each format is, and the one line that refuses a file."""

from decimal import Decimal
from pathlib import Path

import pytest

from vllm_cost_meter.invoices.files import InvoiceRules, Layout, read_invoice
from vllm_cost_meter.invoices.timeline import InvoiceLine, Reading
from vllm_cost_meter.units.calendar import zone_of
from vllm_cost_meter.units.time import NS_PER_HOUR, unix_ns_of

USD = 10**9
T0 = unix_ns_of("2026-11-01T00:00:00Z")
DAY_NS = 24 * NS_PER_HOUR
NO_RULES = InvoiceRules()
LAMBDA = Layout(
    {"resource": "Instance", "from": "Start", "to": "End", "amount": "Cost", "currency": "Cur",
     "item": "What", "charge_class": "Class"},
    {"kind": "gpu", "invoice": "17"}, "%d.%m.%Y %H:%M", zone_of("Europe/Berlin"), ";",
)  # fmt: skip
RULES = InvoiceRules(
    {"lambda": LAMBDA},
    [("vol-*", "disk"), ("Nothing-*", "ignore")],
    {"EUR": Decimal("1.17")},
)
FOCUS_HEADER = (
    "BilledCost,BillingCurrency,ChargePeriodStart,ChargePeriodEnd,ResourceId,ServiceCategory,"
    "ServiceName,ResourceType,SkuMeter,ChargeClass,ChargeCategory,BillingPeriodStart"
)
DAY = "2026-11-01T00:00:00Z,2026-11-02T00:00:00Z"


def read(folder: Path, format: str, text: str | bytes, rules: InvoiceRules = RULES):
    path = folder / "bill.csv"
    path.write_bytes(text if isinstance(text, bytes) else text.encode())
    return read_invoice(path, format, rules)


def focus(*rows: str) -> str:
    return "\n".join([FOCUS_HEADER, *rows]) + "\n"


def refusal(folder: Path, format: str, text: str | bytes) -> str:
    with pytest.raises(ValueError, match="expected|cannot") as caught:
        read(folder, format, text)
    message = str(caught.value)
    assert "\n" not in message
    return message.removeprefix(f"{folder}/")


# ---- snapshots


def test_readings_come_as_csv_and_as_json(tmp_path):
    csv = (
        "resource,timestamp,cumulative_usd,usd_per_hour,kind\n"
        "gpu-1,2026-11-01T00:00:00Z,1.5,,\n"
        "vol-1,2026-11-01T01:00:00+01:00,,0.25,gpu\n"
    )
    json = (
        '[{"resource": "gpu-1", "timestamp": "2026-11-01T00:00:00Z", "cumulative_usd": 1.5},'
        ' {"resource": "vol-1", "timestamp": "2026-11-01", "usd_per_hour": "0.25", "kind": null}]'
    )
    expected = [
        Reading("gpu-1", "gpu", T0, 1_500_000_000),
        # What the settings say of a resource goes before the file.
        Reading("vol-1", "disk", T0, None, 250_000_000),
    ]
    assert list(read(tmp_path, "snapshots", csv).readings) == expected
    assert list(read(tmp_path, "snapshots", json).readings) == expected


def test_the_same_reading_twice_is_one_reading(tmp_path):
    row = "gpu-1,2026-11-01T00:00:00Z,1.5\n"
    told = read(tmp_path, "snapshots", f"resource,timestamp,cumulative_usd\n{row}{row}")
    assert len(told.readings) == 1


def test_an_amount_is_exact_however_it_is_written(tmp_path):
    texts = ["0.1", "1e-1", ".1", "+0.10", "0.1000000000000000000"]
    for text in texts:
        csv = f"resource,timestamp,cumulative_usd\nr,2026-11-01T00:00:00Z,{text}\n"
        [reading] = read(tmp_path, "snapshots", csv).readings
        assert reading.cumulative_nanousd == 100_000_000


@pytest.mark.parametrize(
    ("row", "message"),
    [
        ("r,2026-11-01T00:00:00Z,NaN", "cumulative_usd: expected a decimal number, such as 12.50"),
        ("r,2026-11-01T00:00:00Z,inf", "cumulative_usd: expected a decimal number, such as 12.50"),
        ("r,2026-11-01T00:00:00Z,1e999", "cumulative_usd: expected a decimal number"),
        ("r,2026-11-01T00:00:00Z,-1", "cumulative_usd: expected a decimal number from 0 to"),
        ("r,2026-11-01T00:00:00Z,2e9", "cumulative_usd: expected a decimal number from 0 to"),
        (
            "r,2026-11-01T00:00:00Z,",
            "cumulative_usd: expected an amount either here or in usd_per_hour, got 'neither'",
        ),
        ("r,yesterday,1", "timestamp: expected an RFC 3339 instant, got 'yesterday'"),
        (",2026-11-01T00:00:00Z,1", "resource: expected 1 to 500 printable characters, got ''"),
        ("r,2026-11-01T00:00:00Z,1,2", "row: expected 3 cells, got '4'"),
        ('r,2026-11-01T00:00:00Z,"1', "expected CSV"),
    ],
)
def test_a_reading_of_no_sense_is_one_line_with_its_place(tmp_path, row, message):
    found = refusal(tmp_path, "snapshots", f"resource,timestamp,cumulative_usd\n{row}\n")
    assert found.startswith("bill.csv:2: ")
    assert message in found


def test_two_readings_at_one_instant_and_two_kinds_of_one_resource_are_refused(tmp_path):
    head = "resource,timestamp,cumulative_usd,kind\n"
    first = "r,2026-11-01T00:00:00Z,1,gpu\n"
    twice = refusal(tmp_path, "snapshots", f"{head}{first}r,2026-11-01T00:00:00Z,2,gpu\n")
    assert twice.startswith("bill.csv:3: timestamp: expected one reading of 'r' at an instant")
    kinds = refusal(tmp_path, "snapshots", f"{head}{first}r,2026-11-02T00:00:00Z,2,disk\n")
    assert kinds == "bill.csv:3: kind: expected gpu, as in an earlier row, got 'disk'"
    other = refusal(tmp_path, "snapshots", f"{head}r,2026-11-02T00:00:00Z,2,tpu\n")
    assert other.startswith("bill.csv:2: kind: expected gpu, disk, network, other")


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("", "bill.csv:1: header: expected one column 'resource', got '0 of it'"),
        ("resource,timestamp\n", "bill.csv: expected at least one row, got none"),
        ("[]", "bill.csv: expected at least one row, got none"),
        ("[1]", "bill.csv[0]: expected an object, got int"),
        ('{"a": 1}', "bill.csv: expected a JSON list of objects, got dict"),
        ("[", "bill.csv: expected JSON, got"),
        ("[" * 100_000, "bill.csv: expected JSON, got"),
        (b"\xff\xfe", "bill.csv: expected UTF-8 text, got invalid start byte"),
        (
            '[{"resource": "r", "timestamp": "2026-11-01", "cumulative_usd": NaN}]',
            "bill.csv[0]: cumulative_usd: expected a decimal number, such as 12.50, got 'NaN'",
        ),
        (
            '[{"resource": "r", "timestamp": "2026-11-01", "cumulative_usd": true}]',
            "bill.csv[0]: cumulative_usd: expected a decimal number, such as 12.50, got 'True'",
        ),
    ],
)
def test_a_file_of_no_sense_is_one_line(tmp_path, text, message):
    assert refusal(tmp_path, "snapshots", text).startswith(message)


def test_a_file_that_is_not_there_or_too_large_is_one_line(tmp_path):
    with pytest.raises(ValueError, match="none.csv: cannot be read: No such file"):
        read_invoice(tmp_path / "none.csv", "focus", NO_RULES)
    large = tmp_path / "large.csv"
    with large.open("wb") as file:
        file.truncate(64_000_001)
    with pytest.raises(ValueError, match="expected at most 64,000,000 bytes, got 64,000,001"):
        read_invoice(large, "focus", NO_RULES)


def test_a_format_that_nobody_declared_is_one_line(tmp_path):
    found = refusal(tmp_path, "runpod", "a\n1\n")
    assert found == (
        "--format: expected focus, snapshots, lambda (or the name of a layout in [[invoices]]),"
        " got 'runpod'"
    )


# ---- a layout of the settings


def test_a_layout_says_in_which_column_what_stands(tmp_path):
    text = (
        "\ufeffInstance;Start;End;Cost;Cur;What;Class;Note\n"
        "gpu-1;01.11.2026 01:00;02.11.2026 01:00;10;EUR;rent;;x\n"
        "nothing-2;01.11.2026 01:00;02.11.2026 01:00;10;EUR;rent;;x\n"
        "vol-1;01.11.2026 01:00;02.11.2026 01:00;-2;USD;refund;credit;x\n"
    )
    told = read(tmp_path, "lambda", text)
    assert list(told.lines) == [
        InvoiceLine("gpu-1", "gpu", T0, T0 + DAY_NS, 11_700_000_000, "17", "rent"),
        InvoiceLine("vol-1", "disk", T0, T0 + DAY_NS, -2 * USD, "17", "refund", "Credit"),
    ]
    assert told.ignored == 1


@pytest.mark.parametrize(
    ("row", "message"),
    [
        ("g;01.11.2026 01:00;01.11.2026 01:00;1;USD;;", "End: expected an instant after Start"),
        ("g;02.11.2026 01:00;01.11.2026 01:00;1;USD;;", "End: expected an instant after Start"),
        ("g;2026-11-01;02.11.2026 01:00;1;USD;;", "Start: expected an instant like %d.%m.%Y"),
        ("g;01.11.2026 01:00;02.11.2026 01:00;1;XXX;;", "Cur: expected USD, EUR (or one of"),
        (
            "g;01.11.2026 01:00;02.11.2026 01:00;-1;USD;;",
            "Cost: expected at least 0 unless the charge is a Correction or Credit",
        ),
        ("g;01.11.2026 01:00;02.11.2026 01:00;1,5;USD;;", "Cost: expected a decimal number"),
        ("g;01.11.2026 01:00;02.11.2026 01:00;1;USD;;gift", "Class: expected nothing, or Corr"),
        ("g;01.11.2026 01:00;02.11.2026 01:00;2e9;USD;;", "amount: expected at most 1,000,000,000"),
    ],
)
def test_a_row_of_no_sense_is_one_line_with_its_place(tmp_path, row, message):
    text = f"Instance;Start;End;Cost;Cur;What;Class\n{row}\n"
    found = refusal(tmp_path, "lambda", text)
    assert found.startswith(f"bill.csv:2: {message}")


def test_a_kind_has_to_be_said_somewhere(tmp_path):
    columns = {name: name for name in ("resource", "from", "to", "amount", "kind")}
    rules = InvoiceRules({"plain": Layout(columns)}, [("gpu*", "gpu")])
    head = "resource,from,to,amount,kind\n"
    told = read(tmp_path, "plain", f"{head}GPU-1,{DAY},1,\na,{DAY},1,Disk\n", rules)
    assert [line.kind for line in told.lines] == ["gpu", "disk"]
    with pytest.raises(ValueError, match=r"bill.csv:2: kind: expected gpu, disk, .*got ''"):
        read(tmp_path, "plain", f"{head}a,{DAY},1,\n", rules)


# ---- FOCUS


@pytest.mark.parametrize(
    ("category", "service", "resource_type", "meter", "kind"),
    [
        ("Compute", "Virtual Machines", "Instance", "H100 GPU hours", "gpu"),
        ("Compute", "Amazon Elastic Compute Cloud", "Instance", "Hours", "gpu"),
        ("AI and Machine Learning", "Vertex AI", "", "", "gpu"),
        ("Compute", "Amazon Elastic Compute Cloud", "Volume", "GB-Months", "disk"),
        ("Storage", "Cloud Files", "", "GB", "disk"),
        ("Compute", "Compute Engine", "Instance", "Data Transfer Out", "network"),
        ("Networking", "VPC", "", "", "network"),
        ("Databases", "SQL", "Server", "Hours", "other"),
        ("", "Support", "", "", "other"),
    ],
)
def test_the_kind_of_a_focus_row_follows_from_its_words(
    tmp_path, category, service, resource_type, meter, kind
):
    row = f"1,USD,{DAY},r,{category},{service},{resource_type},{meter},,Usage,2026-11-01"
    [line] = read(tmp_path, "focus", focus(row)).lines
    assert line.kind == kind


def test_rows_of_focus_that_differ_in_the_amount_only_are_one_charge(tmp_path):
    row = f"USD,{DAY},r,Compute,VM,Instance,Hours,,Usage,2026-11-01"
    told = read(tmp_path, "focus", focus(f"0.0000000004,{row}", f"0.0000000004,{row}", f"2,{row}"))
    [line] = told.lines
    assert line.nanousd == 2 * USD + 1  # rounded once
    assert told.lines[line].endswith("bill.csv:2")


def test_too_much_money_is_named_as_a_plain_decimal(tmp_path):
    row = f"999999999.5,USD,{DAY},r,Compute,VM,Instance,Hours,,Usage,2026-11-01"
    message = refusal(tmp_path, "focus", focus(row, row))
    assert "expected at most 1,000,000,000 USD per resource, got 1999999999.00" in message


def test_a_correction_and_a_credit_are_lines_of_their_own_and_may_be_negative(tmp_path):
    tail = f"USD,{DAY},r,Compute,VM,Instance,Hours"
    told = read(tmp_path, "focus", focus(
        f"5,{tail},,Usage,2026-11-01",
        f"-1,{tail},Correction,Usage,2026-12-01",
        f"-2,{tail},,Credit,2026-11-01",
    )).lines  # fmt: skip
    assert [(line.nanousd, line.charge_class) for line in told] == [
        (5 * USD, ""), (-USD, "Correction"), (-2 * USD, "Credit"),
    ]  # fmt: skip
    assert "at least 0" in refusal(tmp_path, "focus", focus(f"-1,{tail},,Usage,2026-11-01"))


def test_a_row_of_no_resource_is_of_its_service_and_a_tax_is_no_gpu(tmp_path):
    row = f"3,USD,{DAY},,Compute,GPU Cloud,,,,Tax,2026-11-01"
    [line] = read(tmp_path, "focus", focus(row)).lines
    assert (line.resource, line.kind) == ("GPU Cloud", "other")


def test_a_focus_file_with_the_columns_that_count_is_enough(tmp_path):
    head = "ChargePeriodStart,ChargePeriodEnd,BilledCost,BillingCurrency,ResourceId"
    [line] = read(tmp_path, "focus", f"{head}\n{DAY},7,USD,r\n").lines
    assert (line.kind, line.nanousd, line.item) == ("other", 7 * USD, "")
    found = refusal(tmp_path, "focus", "ChargePeriodStart\nx\n")
    assert found == "bill.csv:1: header: expected one column 'ResourceId', got '0 of it'"


def test_long_texts_that_differ_stay_apart(tmp_path):
    rows = [
        f"{n},USD,{DAY},r,Compute,{'x' * 300}{n},Instance,Hours,,Usage,2026-11-01" for n in (1, 2)
    ]
    assert len(read(tmp_path, "focus", focus(*rows)).lines) == 2
