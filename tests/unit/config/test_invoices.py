"""How bills are read, as settings: what they make, and the one line of a slip."""

import pytest

from vllm_cost_meter.config.loading import load_settings
from vllm_cost_meter.errors import SettingError
from vllm_cost_meter.units.time import NS_PER_HOUR

COLUMNS = 'columns = { resource = "R", from = "F", to = "T", amount = "A" }'


def load(folder, text: str):
    path = folder / "meter.toml"
    path.write_text(text)
    return load_settings({"COST_METER_CONFIG": str(path)})


def test_without_settings_there_are_no_layouts_and_a_gap_of_a_day():
    rules = load_settings({}).invoice_rules
    assert (rules.layouts, list(rules.kinds), rules.gap_ns) == ({}, [], 24 * NS_PER_HOUR)


def test_settings_make_the_rules(tmp_path):
    rules = load(
        tmp_path,
        f'invoice_gap_hours = 6\n[[invoices]]\nname = "x"\n{COLUMNS}\ntimezone = "Europe/Berlin"\n'
        '[[invoice_resources]]\nresource = "vol-*"\nkind = "disk"\n'
        '[[invoice_resources]]\nresource = "*"\nkind = "ignore"\n'
        '[[invoice_rates]]\ncurrency = "EUR"\nusd_rate = "1.17"\n',
    ).invoice_rules
    assert str(rules.layouts["x"].zone) == "Europe/Berlin"
    assert [rules.kind_of(name) for name in ("VOL-1", "gpu")] == ["disk", "ignore"]
    assert str(rules.usd_rates["EUR"]) == "1.17"
    assert rules.gap_ns == 6 * NS_PER_HOUR


@pytest.mark.parametrize(
    ("text", "message"),
    [
        (f'[[invoices]]\nname = "focus"\n{COLUMNS}', "invoices[0].name (FILE:2): expected 1 to"),
        (
            '[[invoices]]\nname = "x"\ncolumns = { from = "F", to = "T", amount = "A" }',
            "invoices[0].columns (FILE:3): expected a column or a constant for 'resource', got n",
        ),
        (
            f'[[invoices]]\nname = "x"\n{COLUMNS}\nconstants = {{ resource = "r" }}',
            "invoices[0].constants (FILE:4): expected a column or a constant for 'resource', got",
        ),
        (
            '[[invoices]]\nname = "x"\ncolumns = { amounts = "A" }',
            "invoices[0].columns (FILE:3): expected a table of column names by field: resource",
        ),
        (
            f'[[invoices]]\nname = "x"\n{COLUMNS}\ntimezone = "Mars"',
            "invoices[0].timezone (FILE:4): expected the name of a time zone, such as Europe/Berl",
        ),
        (
            f'[[invoices]]\nname = "x"\n{COLUMNS}\ndelimiter = ".."',
            "invoices[0].delimiter (FILE:4): expected a comma, a semicolon, a tab or a",
        ),
        (
            f'[[invoices]]\nname = "x"\n{COLUMNS}\n[[invoices]]\nname = "x"\n{COLUMNS}',
            "invoices[1].name (FILE:5): expected each name once, got 'x' twice",
        ),
        (
            '[[invoice_resources]]\nresource = "x"\nkind = "cpu"',
            "invoice_resources[0].kind (FILE:3): expected gpu, disk, network, other or ignore",
        ),
        (
            '[[invoice_rates]]\ncurrency = "USD"\nusd_rate = 1',
            "invoice_rates[0].currency (FILE:2): expected a currency other than USD, got 'USD'",
        ),
        (
            '[[invoice_rates]]\ncurrency = "XXX"\nusd_rate = 1',
            "invoice_rates[0].currency (FILE:2): expected the three capital letters of a currency",
        ),
        (
            '[[invoice_rates]]\ncurrency = "EUR"\nusd_rate = 0',
            "invoice_rates[0].usd_rate (FILE:3): expected a decimal number above 0",
        ),
    ],
)
def test_a_slip_is_one_line_with_its_place(tmp_path, text, message):
    with pytest.raises(SettingError) as caught:
        load(tmp_path, text + "\n")
    found = str(caught.value).replace(str(tmp_path / "meter.toml"), "FILE")
    assert found.startswith(message)
    assert "\n" not in found
