"""docs/configuration.md says what the code says: every setting, its default, unit and meaning."""

import re
from pathlib import Path

import pytest
from pydantic import BaseModel

from tests.docs.pages import section
from vllm_cost_meter.config import OTHER_NAMES, PREFIX, SECTIONS, Settings
from vllm_cost_meter.reload import live_names

PAGE = Path(__file__).parents[2] / "docs" / "configuration.md"


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


def test_every_setting_says_what_it_means():
    for model in (Settings, *SECTIONS.values()):
        for field in model.model_fields.values():
            assert field.description
            assert field.json_schema_extra["expected"]


def test_what_may_change_while_a_server_runs_is_listed():
    listed = section(PAGE, "Changes while a server runs").partition("\n\n")[0]
    assert set(re.findall("`([a-z_]+)`", listed)) == live_names()
