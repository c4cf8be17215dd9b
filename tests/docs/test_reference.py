"""The pages that the program describes itself are up to date, and cope with any commands."""

import importlib.util
from enum import StrEnum
from types import ModuleType
from typing import Annotated

import pytest
import typer
import typer.main

from tests.support.pages import DOCS, ROOT


def load_script() -> ModuleType:
    spec = importlib.util.spec_from_file_location(
        "make_reference", ROOT / "scripts" / "make_reference.py"
    )
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


reference = load_script()
PAGES = reference.pages()


class Shape(StrEnum):
    TABLE = "table"
    JSON = "json"


def small_app() -> typer.Typer:
    app = typer.Typer(help="What the program does.", add_completion=False)
    inner = typer.Typer(name="inner", help="Commands below.")

    @app.command(rich_help_panel="See")
    def show(
        what: Annotated[str, typer.Argument(help="What to show.")],
        shape: Annotated[Shape, typer.Option(help="How.")] = Shape.TABLE,
        limit: Annotated[int, typer.Option(min=1, help="Rows | at most.")] = 100,
        secret: Annotated[str, typer.Option(hidden=True)] = "",
    ) -> None:
        """Show it, by the \\[[tables]] of the settings and a <token>.

        \b
          program show it --limit 3
          program show all
        """

    @app.command(hidden=True)
    def old() -> None:
        """Gone."""

    @inner.command()
    def deep() -> None:
        """Go deeper."""

    app.add_typer(inner)
    return app


@pytest.mark.parametrize("name", PAGES)
def test_the_page_is_as_the_program_describes_itself(name):
    shown = (DOCS / "reference" / name).read_text()
    assert shown == PAGES[name], f"docs/reference/{name} is out of date: run `make reference`"


def test_a_page_has_each_command_with_its_arguments_options_and_defaults():
    page = reference.cli_page(typer.main.get_group(small_app()))
    assert "## vllm-cost-meter show\n" in page
    assert "### vllm-cost-meter inner deep\n\nGo deeper.\n" in page
    rows = [line for line in page.splitlines() if line.startswith("| `")]
    assert rows == [
        "| `what <str>` | required | What to show. |",
        "| `--shape <table or json>` | `table` | How. |",
        "| `--limit <int range>` | `100` | Rows \\| at most. (`x>=1`) |",
    ]


def test_a_page_groups_commands_as_help_does_and_hides_what_it_hides():
    page = reference.cli_page(typer.main.get_group(small_app()))
    assert [line for line in page.splitlines() if line.startswith("## ")] == [
        "## See",
        "## Commands",
        "## vllm-cost-meter inner",
        "## vllm-cost-meter show",
    ]
    assert "secret" not in page
    assert "Gone" not in page


def test_brackets_and_examples_of_a_help_text_stay_as_they_are():
    page = reference.cli_page(typer.main.get_group(small_app()))
    assert page.count("Show it, by the [[tables]] of the settings and a &lt;token>.") == 2
    assert "\n\n    program show it --limit 3\n    program show all\n" in page


def test_an_object_of_the_endpoint_has_its_fields_with_type_default_and_meaning():
    row = {
        "properties": {
            "tenant": {"anyOf": [{"type": "string"}, {"type": "null"}], "description": "who pays"},
            "parts": {"type": "array", "items": {"$ref": "#/components/schemas/Part"}},
        },
        "required": ["tenant"],
    }
    answer = {"content": {"application/json": {"schema": {"$ref": "#/components/schemas/Row"}}}}
    route = {"description": "Return it.", "responses": {"200": answer}}
    page = reference.openapi_page(
        {"paths": {"/row": {"get": route}}, "components": {"schemas": {"Row": row}}}
    )
    assert "### GET /row\n\nReturn it.\n\nAnswer: [Row](#row).\n" in page
    assert "| `tenant` | string or null | required | who pays |\n" in page
    assert "| `parts` | list of [Part](#part) |  |  |\n" in page
