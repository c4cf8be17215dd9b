"""Write the two pages of docs/reference that the program describes itself: `make reference`.

`cli.md` comes from the commands and their help texts, `openapi.md` from the OpenAPI document of the
side endpoint. To change a page, change the help text, the docstring or the field, and run this.

Why our own: `typer utils docs` cuts the help texts in its list of commands and loses square
brackets; the makers of Markdown from OpenAPI write a page of JSON for each route.

Invariant: the same code gives the same bytes; tests/docs compares the files with these functions.
"""

import re
import sys
import tempfile
from collections import defaultdict
from collections.abc import Iterator, Mapping
from pathlib import Path
from textwrap import dedent
from typing import Any

import typer

from vllm_cost_meter.cli.commands import whole
from vllm_cost_meter.config.settings import Settings
from vllm_cost_meter.endpoint.access import OPEN
from vllm_cost_meter.endpoint.app import make_app
from vllm_cost_meter.endpoint.standalone.settings_routes import add_settings_routes
from vllm_cost_meter.ledger.reader import LedgerReader

FOLDER = Path(__file__).resolve().parents[1] / "docs" / "reference"
PROGRAM = "vllm-cost-meter"
MADE = "<!-- Made by `make reference` from the program: change it there, not here. -->"
EXTRAS = re.compile(r" *\[((?:default: |required|env var: |[-\d.]*<=?x|x[<>]=?)[^\]]*)\]$")


def main() -> None:
    for name, page in pages().items():
        (FOLDER / name).write_text(page, encoding="utf-8")


def pages() -> dict[str, str]:
    """Return the text of each page by its file name."""
    return {"cli.md": cli_page(whole()), "openapi.md": openapi_page(openapi_document())}


# -- the command line ---------------------------------------------------------------------------


def cli_page(root: Any) -> str:
    """Return the page of a group of commands, all of them loaded."""
    lines = ["# Command line", "", MADE, "", *paragraphs(root.help)]
    lines += [
        "Exit status: 0 done; 1 the books do not balance, or a check failed; 2 wrong usage or"
    ]
    lines += ["settings, with one line that says which.", ""]
    lines += parameter_table(root, typer.Context(root, info_name=PROGRAM))
    for panel, listed in by_panel(root).items():
        lines += [f"## {panel}", "", "| Command | |", "|---|---|"]
        for name, command in listed.items():
            link = f"[`{name}`](#{anchor(f'{PROGRAM} {name}')})"
            lines.append(f"| {link} | {cell(first_paragraph(command))} |")
        lines.append("")
    for name in sorted(root.commands):
        lines += command_section(root.commands[name], f"{PROGRAM} {name}", 2)
    return "\n".join(lines).rstrip() + "\n"


def by_panel(group: Any) -> dict[str, dict[str, Any]]:
    """Return the commands by the panel of --help that they stand in, in its order; none hidden."""
    found: dict[str, dict[str, Any]] = defaultdict(dict)
    for name in group.list_commands(typer.Context(group)):
        command = group.commands[name]
        if not command.hidden:
            panel = getattr(command, "rich_help_panel", None)
            found[panel if isinstance(panel, str) else "Commands"][name] = command
    return found


def command_section(command: Any, path: str, level: int) -> Iterator[str]:
    """Yield a command's section, and below it those of its own commands."""
    if command.hidden:
        return
    context = typer.Context(command, info_name=path)
    yield from (f"{'#' * level} {path}", "", *paragraphs(command.help))
    yield from (f"    {path} {' '.join(command.collect_usage_pieces(context))}", "")
    yield from parameter_table(command, context)
    for name, inner in sorted(getattr(command, "commands", {}).items()):
        yield from command_section(inner, f"{path} {name}", level + 1)


def parameter_table(command: Any, context: typer.Context) -> Iterator[str]:
    """Yield the table of a command's arguments and options, as --help has them."""
    records = [parameter.get_help_record(context) for parameter in command.params]
    rows = [record for record in records if record is not None]
    if rows:
        yield from ("| Argument or option | Default | Meaning |", "|---|---|---|")
        for spelling, text in rows:
            # At the end of the text stand the default, the range and "required", in brackets.
            found = EXTRAS.search(unmarked(text))
            meaning = EXTRAS.sub("", unmarked(text))
            extras = found[1].split("; ") if found else []
            default = next((e for e in extras if e.startswith("default: ")), "")
            shown = f"`{default.removeprefix('default: ')}`" if default else ""
            shown = "required" if "required" in extras else shown
            others = [e for e in extras if e != "required" and e != default]
            meaning += f" ({'; '.join(f'`{e}`' for e in others)})" if others else ""
            # A bar would end the cell.
            yield f"| `{spelling.replace('|', ' or ')}` | {cell(shown)} | {cell(meaning)} |"
        yield ""


def paragraphs(text: str | None) -> Iterator[str]:
    """Yield a help text as Markdown; what \\b protects from being wrapped is a block of code."""
    for paragraph in (text or "").strip().split("\n\n"):
        lines = unmarked(paragraph).splitlines()
        if lines and lines[0] == "\b":
            lines = [f"    {line}" for line in dedent("\n".join(lines[1:])).splitlines()]
        elif not paragraph.startswith("    "):
            lines = untagged("\n".join(lines)).splitlines()
        yield from (*lines, "")


def first_paragraph(command: Any) -> str:
    return (command.short_help or command.help or "").strip().split("\n\n")[0]


def unmarked(text: str) -> str:
    """Return a help text without the backslashes that keep rich from reading brackets as styles."""
    return text.replace("\\[", "[")


# -- the side endpoint --------------------------------------------------------------------------


def openapi_document() -> dict[str, Any]:
    """Return the OpenAPI document of the side endpoint; the ledger behind it does not matter."""
    with tempfile.TemporaryDirectory() as folder:
        reader = LedgerReader(f"sqlite:///{folder}/ledger.db", late=True)
        try:
            app = make_app(reader, metrics=bytes)
            # Which fleet it is does not matter either, nor what its settings are checked with.
            add_settings_routes(app, "postgresql+psycopg://fleet", OPEN, lambda _: Settings())
            return app.openapi()
        finally:
            reader.close()


def openapi_page(document: Mapping[str, Any]) -> str:
    lines = ["# OpenAPI", "", MADE, ""]
    lines += [
        "The routes of the [side endpoint](http-api.md), as `/openapi.json` describes them.",
        "An error of any route is an [ErrorAnswer](#erroranswer).",
        "",
    ]
    lines += ["## Routes", ""]
    for path, methods in sorted(document["paths"].items()):
        for method, route in methods.items():
            lines += route_section(f"{method.upper()} {path}", route)
    schemas = document.get("components", {}).get("schemas", {})
    # FastAPI's own shapes of errors; the endpoint answers with errors of one shape instead.
    shown = {
        n: s for n, s in schemas.items() if n not in ("HTTPValidationError", "ValidationError")
    }
    if shown:
        lines += ["## Objects", ""]
        for name, schema in sorted(shown.items()):
            lines += schema_section(name, schema)
    return "\n".join(lines).rstrip() + "\n"


def route_section(title: str, route: Mapping[str, Any]) -> Iterator[str]:
    yield from (f"### {title}", "", sentence(route), "")
    rows = [
        (each["name"], each["schema"], each.get("description", ""), each["required"])
        for each in route.get("parameters", [])
        if each["in"] in ("path", "query")
    ]
    if rows:
        yield from ("| Parameter | Type | Default | Meaning |", "|---|---|---|---|")
        for name, schema, text, required in rows:
            default = default_of(schema, required)
            yield f"| `{name}` | {kind_of(schema)} | {default} | {cell(text)} |"
        yield ""
    body = json_of(route.get("requestBody", {}))
    if body:
        yield from (f"Body: {kind_of(body)}.", "")
    answer = json_of(route["responses"].get("200", {}))
    if answer and kind_of(answer) != "any":
        yield from (f"Answer: {kind_of(answer)}.", "")


def schema_section(name: str, schema: Mapping[str, Any]) -> Iterator[str]:
    yield from (f"### {name}", "")
    if schema.get("description"):
        yield from (" ".join(schema["description"].split()), "")
    fields = schema.get("properties", {})
    if not fields:
        yield from (f"{kind_of(schema)}.", "")
        return
    needed = set(schema.get("required", ()))
    yield from ("| Field | Type | Default | Meaning |", "|---|---|---|---|")
    for field, inner in fields.items():
        default = default_of(inner, field in needed)
        yield f"| `{field}` | {kind_of(inner)} | {default} | {cell(inner.get('description', ''))} |"
    yield ""


def sentence(route: Mapping[str, Any]) -> str:
    return " ".join((route.get("description") or route.get("summary") or "").split())


def json_of(holder: Mapping[str, Any]) -> Mapping[str, Any]:
    return holder.get("content", {}).get("application/json", {}).get("schema", {})


def kind_of(schema: Mapping[str, Any]) -> str:
    """Return the type of a JSON schema in words, an object of a name as a link to it."""
    if "$ref" in schema:
        name = schema["$ref"].rpartition("/")[2]
        return f"[{name}](#{anchor(name)})"
    for word in ("anyOf", "oneOf", "allOf"):
        if word in schema:
            return " or ".join(dict.fromkeys(kind_of(each) for each in schema[word]))
    if "enum" in schema:
        return ", ".join(f"`{value}`" for value in schema["enum"])
    if "const" in schema:
        return f"`{schema['const']}`"
    kind = schema.get("type", "any")
    if isinstance(kind, list):
        return " or ".join(kind)
    if kind == "array":
        return f"list of {kind_of(schema.get('items', {}))}"
    values = schema.get("additionalProperties")
    if kind == "object" and isinstance(values, Mapping) and values:
        return f"object of {kind_of(values)}"
    low, high = schema.get("minimum"), schema.get("maximum")
    if low is not None and high is not None:
        return f"{kind} from {low} to {high}"
    return str(kind)


def default_of(schema: Mapping[str, Any], required: bool) -> str:
    if required:
        return "required"
    default = schema.get("default")
    return "" if default is None else f"`{default}`"


def anchor(heading: str) -> str:
    """Return the anchor of a heading, as code hosts and the site make it."""
    return re.sub(r"[^\w\- ]", "", heading.lower()).replace(" ", "-")


def cell(text: str) -> str:
    """Return a text for one cell of a table."""
    return untagged(unmarked(" ".join(str(text).split())).replace("|", "\\|"))


def untagged(text: str) -> str:
    """Return a Markdown text in which no angle bracket begins a tag; code stays as it is."""
    parts = text.split("`")
    parts[::2] = [part.replace("<", "&lt;") for part in parts[::2]]
    return "`".join(parts)


if __name__ == "__main__":
    sys.exit(main())
