"""Prices in the settings: what makes a book, and the line and key of what is refused."""

import json
from decimal import Decimal
from pathlib import Path

import pytest

from vllm_cost_meter.config.loading import load_settings
from vllm_cost_meter.errors import SettingError
from vllm_cost_meter.prices.book import GpuHourPrice, RunFacts

HOUR = 490_897  # 2026-01-01T01Z
RUN = RunFacts(gpus=8, model="m", gpu_name="NVIDIA H100 80GB HBM3", host="node-1")
FILE = """\
snapshot_interval_s = 0.5

[[prices]]
amount = 98.32
scope = "node"
gpus = 8
kind = "reserved"
effective_from = 2026-01-01T00:00:00Z
source = "contract 17"
gpu_name = "*H100*"

[[prices]]
amount = "2.123456789012345678"
currency = "EUR"
usd_rate = 1.1234567890123456
scope = "gpu"
kind = "spot"
effective_from = "2026-01-01T02:00:00+01:00"
source = "price list"

[[energy_prices]]
usd_per_kwh = 0.30
effective_from = 2026-01-01T00:00:00Z
source = "utility bill"

[[overheads]]
name = "rent"
usd_per_month = 1000
source = "lease"

[[overheads]]
name = "staff"
percent = 12.5
source = "plan"
effective_until = 2026-07-01T00:00:00Z
""".replace("2.123456789012345678", "2.123456789012345678")


@pytest.fixture
def load(tmp_path: Path):
    def load(text: str = FILE, **environ: str):
        path = tmp_path / "meter.toml"
        path.write_text(text)
        names = {f"COST_METER_{name.upper()}": value for name, value in environ.items()}
        return load_settings({"COST_METER_CONFIG": str(path), **names})

    return load


@pytest.fixture
def complaint(load, tmp_path: Path):
    def complaint(old: str = "", new: str = "", text: str = FILE) -> str:
        assert old in text
        with pytest.raises(SettingError) as caught:
            load(text.replace(old, new, 1))
        return str(caught.value).replace(str(tmp_path) + "/", "")

    return complaint


# ---- what makes a book


def test_the_file_makes_a_book_of_prices_energy_and_overheads(load):
    book = load().price_book
    price = book.price_at(RUN, HOUR)
    assert (price.key, price.text, price.entry.source) == ("prices[0]", "12.29", "contract 17")
    assert book.price_at(RunFacts(), HOUR - 1) is None
    assert book.price_at(RunFacts(), HOUR).key == "prices[1]"
    assert book.energy_price_at(RUN, HOUR).usd_per_kwh == Decimal("0.30")
    rent, staff = book.overheads
    assert (rent.usd_per_month, rent.percent) == (1000, None)
    assert (staff.percent, staff.effective_until_hour) == (Decimal("12.5"), 490_896 + 181 * 24)


def test_a_decimal_is_taken_digit_by_digit_as_a_number_and_as_a_text(load):
    entry = load().price_book.price_at(RunFacts(), HOUR).entry
    assert entry.amount == Decimal("2.123456789012345678")
    assert entry.usd_rate == Decimal("1.1234567890123456")
    assert load("gpu_hour_usd = 0.123456789012345678").gpu_hour_usd == Decimal(
        "0.123456789012345678"
    )


def test_the_short_form_is_the_price_where_no_entry_holds(load):
    book = load(gpu_hour_usd="2.50").price_book
    assert book.price_at(RunFacts(), HOUR - 1).text == "2.50"
    assert book.price_at(RunFacts(), HOUR - 10**6).entry.source == "COST_METER_GPU_HOUR_USD"
    assert book.price_at(RunFacts(), HOUR).key == "prices[1]"


def test_the_environment_takes_the_same_tables_as_json():
    entry = {
        "amount": 2.5,
        "scope": "gpu",
        "kind": "on_demand",
        "effective_from": "2026-01-01T00:00:00Z",
        "source": "list",
    }
    settings = load_settings({"COST_METER_PRICES": json.dumps([entry])})
    assert settings.price_book.price_at(RUN, HOUR).text == "2.5"


def test_without_settings_there_is_no_price(load):
    assert load_settings({}).price_book.price_at(RUN, HOUR) is None


# ---- what is refused, with its line and key


@pytest.mark.parametrize(
    ("old", "new", "said"),
    [
        ("98.32", "-1", "prices[0].amount (meter.toml:4): expected a decimal number from 0 to"),
        ("98.32", "nan", "prices[0].amount (meter.toml:4): expected a decimal number from 0 to"),
        ("98.32", "inf", "prices[0].amount (meter.toml:4): expected a decimal number from 0 to"),
        ("98.32", "true", "prices[0].amount (meter.toml:4): expected a decimal number from 0 to"),
        ("98.32", "1e13", "prices[0].amount (meter.toml:4): expected a decimal number from 0 to"),
        ("98.32", "99999999", "prices[0].amount (meter.toml:4): expected at most 1,000,000 USD"),
        ("amount = 98.32\n", "", "prices[0].amount (meter.toml:3): expected a decimal number"),
        ("EUR", "EUX", "prices[1].currency (meter.toml:14): expected the three capital letters"),
        ("EUR", "eur", "prices[1].currency (meter.toml:14): expected the three capital letters"),
        ("EUR", "XAU", "prices[1].currency (meter.toml:14): expected the three capital letters"),
        (
            "EUR",
            "USD",
            "prices[1].usd_rate (meter.toml:15): expected no rate, because the currency is USD",
        ),
        (
            "1.1234567890123456",
            "0",
            "prices[1].usd_rate (meter.toml:15): expected a decimal number",
        ),
        (
            '"node"',
            '"rack"',
            "prices[0].scope (meter.toml:5): expected gpu, node or deployment, got",
        ),
        (
            '"node"',
            '"gpu"',
            "prices[0].gpus (meter.toml:6): expected no number, because the amount is for one",
        ),
        ("gpus = 8\n", "", "prices[0].gpus (meter.toml:3): expected how many GPUs the amount of a"),
        ("gpus = 8", "gpus = 0", "prices[0].gpus (meter.toml:6): expected a whole number from 1"),
        ("gpus = 8", "gpus = true", "prices[0].gpus (meter.toml:6): expected a whole number from"),
        ('"spot"', '"spott"', "prices[1].kind (meter.toml:17): expected on_demand, reserved or"),
        ('"contract 17"', '""', "prices[0].source (meter.toml:9): expected 1 to 200 printable"),
        ('"*H100*"', '" x"', "prices[0].gpu_name (meter.toml:10): expected 1 to 200 printable"),
        ("gpu_name", "gpu", "prices[0].gpu (meter.toml:10): expected one of amount, currency,"),
        (
            "gpus = 8",
            "gpus = 8\nusd_per_kv_block_hour = -1e-5",
            "prices[0].usd_per_kv_block_hour (meter.toml:7): expected a decimal number from 0 to",
        ),
        (
            "gpus = 8",
            "gpus = 8\nusd_per_kv_block_hour = nan",
            "prices[0].usd_per_kv_block_hour (meter.toml:7): expected a decimal number from 0 to",
        ),
        ("0.30", "-0.1", "energy_prices[0].usd_per_kwh (meter.toml:22): expected a decimal number"),
        ("usd_per_month = 1000\n", "", "overheads[0].percent (meter.toml:26): expected one of"),
        ("percent = 12.5", "percent = -1", "overheads[1].percent (meter.toml:33): expected a"),
        (
            "percent = 12.5",
            "percent = 1\nusd_per_month = 1",
            "overheads[1].percent (meter.toml:33): expected one of percent and usd_per_month, got",
        ),
        (
            'source = "plan"',
            'source = "plan"\neffective_from = 2026-07-01T00:00:00Z',
            "overheads[1].effective_until (meter.toml:36): expected an instant after",
        ),
    ],
)
def test_a_bad_price_is_refused_with_the_line_and_the_key(complaint, old, new, said):
    assert complaint(old, new).startswith(said)


def test_a_price_of_blocks_is_in_usd_whatever_the_currency_and_however_many_gpus(load):
    text = FILE.replace('currency = "EUR"', 'currency = "EUR"\nusd_per_kv_block_hour = "1e-5"')
    book = load(text.replace("gpus = 8", "gpus = 8\nusd_per_kv_block_hour = 0.25")).price_book
    shown = [GpuHourPrice.of(entry).kv_text for entry in book.entries]
    assert shown == ["0.25", "0.00001"]
    assert [entry.usd_per_kv_block_hour for entry in load().price_book.entries] == [None, None]


def test_a_rate_is_needed_for_every_currency_but_usd(complaint):
    message = complaint("usd_rate = 1.1234567890123456\n")
    assert message == (
        "prices[1].usd_rate (meter.toml:12): expected how many USD one EUR is worth, got nothing"
    )


@pytest.mark.parametrize(
    ("instant", "got"),
    [
        ("2026-01-01T00:30:00Z", "usage is kept by the hour, got 2026-01-01T00:30:00+00:00"),
        ("2026-01-01T00:00:00+05:30", "by the hour, got 2026-01-01T00:00:00+05:30"),
        ("2026-01-01T00:00:00", "got 2026-01-01T00:00:00"),
        ("2026-01-01", "got 2026-01-01"),
        ('"2026-01-01T00:00:00"', "got '2026-01-01T00:00:00'"),
        ('"0001-01-01T00:00:00+01:00"', "got '0001-01-01T00:00:00+01:00'"),
        ('"soon"', "got 'soon'"),
        ("5", "got 5"),
    ],
)
def test_an_instant_is_a_full_utc_hour(complaint, instant, got):
    message = complaint("effective_from = 2026-01-01T00:00:00Z", f"effective_from = {instant}")
    assert message.startswith(
        "prices[0].effective_from (meter.toml:8): expected an RFC 3339 instant on a full UTC hour"
    )
    assert message.endswith(got)


def test_two_prices_for_the_same_runs_from_the_same_hour_are_refused(complaint):
    first = FILE[FILE.index("[[prices]]") : FILE.index('amount = "2')].removesuffix("[[prices]]\n")
    again = FILE + first.replace("*H100*", "*h100*").replace("98.32", "90")
    assert complaint(text=again) == (
        "prices[2].effective_from (meter.toml:41): expected another instant than prices[0], which"
        " has the same matches, got 2026-01-01T00Z"
    )


def test_two_energy_prices_from_the_same_hour_are_refused(complaint):
    energy = FILE[FILE.index("[[energy_prices]]") : FILE.index("[[overheads]]")]
    assert complaint(text=FILE + energy).startswith(
        "energy_prices[1].effective_from (meter.toml:38): expected another instant than"
        " energy_prices[0]"
    )


def test_overheads_of_one_name_may_follow_each_other_and_not_overlap(load, complaint):
    staff = FILE[FILE.index('[[overheads]]\nname = "staff"') :]
    later = staff.replace("effective_until = 2026-07", "effective_from = 2026-07")
    assert len(load(FILE + later).overheads) == 3
    early = staff.replace("effective_until = 2026-07", "effective_from = 2026-06")
    assert complaint(text=FILE + early) == (
        "overheads[2].name (meter.toml:37): expected another name or time than overheads[1], got"
        " 'staff'"
    )


def test_what_is_no_list_of_tables_is_refused_by_its_name(complaint):
    assert complaint(text="[prices]\nx = 1").startswith(
        "prices (meter.toml): expected a list of prices"
    )
    assert complaint(text="prices = [5]").startswith(
        "prices[0] (meter.toml): expected a list of prices"
    )


@pytest.mark.parametrize("name", ["PRICES", "ENERGY_PRICES", "OVERHEADS", "TENANTS"])
def test_text_that_is_no_json_is_blamed_on_its_variable(name):
    good = {f"COST_METER_{n}": "[]" for n in ("PRICES", "OVERHEADS", "TENANTS")}
    with pytest.raises(SettingError, match=rf"COST_METER_{name} .*got text that is not JSON"):
        load_settings({**good, f"COST_METER_{name}": "[{]"})


def test_a_price_may_be_for_engines_with_labels(load):
    text = FILE.replace('gpu_name = "*H100*"', 'labels = { pool = "spot-*", zone = "a" }')
    entry, *_ = load(text).price_book.entries
    assert entry.matches.labels == (("pool", "spot-*"), ("zone", "a"))


def test_labels_of_a_price_are_labels(complaint):
    said = complaint('gpu_name = "*H100*"', 'labels = { Pool = "spot" }')
    assert "prices[0].labels" in said
    assert "got the name 'Pool'" in said
