"""The configuration page says what the code says: each setting, default and unit."""

import re
from pathlib import Path

import pytest
from pydantic import BaseModel

from tests.support.pages import DOCS, section
from vllm_cost_meter.config.loading import OTHER_NAMES, SECTIONS, load_settings
from vllm_cost_meter.config.reload import live_names
from vllm_cost_meter.config.settings import PREFIX, Settings
from vllm_cost_meter.errors import SettingError

PAGE = DOCS / "reference" / "configuration.md"
PRICES = DOCS / "howto" / "set-prices.md"
# Each section of the file has its heading, in the order of the code.
HEADINGS = (
    "Tenants",
    "Tenant rules",
    "Prices of GPUs",
    "Energy prices",
    "Overheads",
    "Budgets",
    "Invoice layouts",
    "Invoice resources",
    "Invoice currencies",
)


def shown_default(field) -> str:
    if field.is_required():
        return "required"
    if isinstance(field.default, bool):
        return f"`{field.default}`".lower()
    return f"`{field.default}`" if field.default not in (None, (), {}) else "none"


def row(name: str, field, *, environment: bool) -> str:
    extra = field.json_schema_extra
    key = "not in the file" if name == "config" else f"`{name}`"
    cells = [f"`{PREFIX}{name.upper()}`"] if environment else []
    cells += [key, shown_default(field), extra["unit"] or "-", extra["expected"], field.description]
    return "| " + " | ".join(cells) + " |"


def rows(model: type[BaseModel], *, environment: bool) -> list[str]:
    return [row(n, f, environment=environment) for n, f in model.model_fields.items()]


EXPECTED = [
    *rows(Settings, environment=True),
    *(line for model in SECTIONS.values() for line in rows(model, environment=False)),
]


@pytest.mark.parametrize("line", EXPECTED)
def test_every_setting_is_documented_as_it_is(line):
    assert line in PAGE.read_text().splitlines()


def test_the_page_documents_nothing_else():
    first_cells = [r.split("|")[1].strip() for r in EXPECTED] + [f"`{n}`" for n in OTHER_NAMES]
    lines = [line for line in PAGE.read_text().splitlines() if line.startswith("| `")]
    assert sorted(line.split("|")[1].strip() for line in lines) == sorted(first_cells)


@pytest.mark.parametrize("name", sorted(OTHER_NAMES))
def test_names_that_are_no_settings_are_mentioned(name):
    assert f"| `{name}` |" in PAGE.read_text()


@pytest.mark.parametrize(("heading", "model"), list(zip(HEADINGS, SECTIONS.values(), strict=True)))
def test_every_key_of_a_section_is_documented_as_it_is_and_no_other(heading, model):
    lines = section(PAGE, heading).splitlines()
    shown = [line for line in lines if line.startswith("| `")]
    assert shown == rows(model, environment=False)


def test_the_book_on_the_page_can_be_loaded_and_the_error_below_is_what_a_slip_in_it_gives(
    tmp_path, monkeypatch
):
    page = PRICES.read_text()
    above = section(PRICES, "A price book")
    book = [line[4:] for line in above.splitlines() if line.startswith("    ") or not line]
    text = "\n".join(book).strip("\n") + "\n"
    monkeypatch.chdir(tmp_path)
    Path("meter.toml").write_text(text)
    loaded = load_settings({"COST_METER_CONFIG": "meter.toml"}).price_book
    assert [len(entries) for entries in loaded.listed().values()] == [2, 1, 2]
    Path("meter.toml").write_text(text.replace('"2.10"', '"-2.10"'))
    with pytest.raises(SettingError) as caught:
        load_settings({"COST_METER_CONFIG": "meter.toml"})
    assert f"    {caught.value}" in page.splitlines()


def test_every_setting_says_what_it_means():
    for model in (Settings, *SECTIONS.values()):
        for field in model.model_fields.values():
            assert field.description
            assert field.json_schema_extra["expected"]


def test_what_may_change_while_a_server_runs_is_listed():
    listed = section(PAGE, "Changes while a server runs").partition("\n\n")[0]
    assert set(re.findall("`([a-z0-9_]+)`", listed)) == live_names()
