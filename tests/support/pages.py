"""Reads the pages of docs/, their tables and links, so that tests can compare them with code."""

import re
from pathlib import Path

ROOT = Path(__file__).parents[2]
DOCS = ROOT / "docs"
PAGES = sorted([*DOCS.rglob("*.md"), *ROOT.glob("*.md"), *(ROOT / "benchmarks").glob("*.md")])

_HEADING = re.compile(r"^(#+) (.*)$")
_LINK = re.compile(r"\]\(([^)\s]+)\)")


def section(page: Path, heading: str) -> str:
    """Return the text from a heading to the next of its level or above."""
    lines, level = [], 0
    for line in page.read_text().splitlines():
        found = _HEADING.match(line)
        if found and level and len(found[1]) <= level:
            break
        if level:
            lines.append(line)
        if found and found[2] == heading:
            level = len(found[1])
    assert level, f"{page.name} has no heading {heading!r}"
    return "\n".join(lines)


def table_rows(text: str) -> list[list[str]]:
    """Return the cells of every row of every table in a text, without headers and rules."""
    rows = [line for line in text.splitlines() if line.startswith("| ")]
    cells = [[cell.strip() for cell in row.strip("|").split("|")] for row in rows]
    return [row for row in cells if row[0].startswith("`")]


def names(page: Path, heading: str) -> list[str]:
    """Return the names that the first cells of a section's tables hold, in order."""
    return [
        name for row in table_rows(section(page, heading)) for name in re.findall("`(.*?)`", row[0])
    ]


def links(page: Path) -> list[tuple[Path, str]]:
    """Return the file and the anchor that each link of a page leads to, but for the web."""
    found = []
    for target in _LINK.findall(page.read_text()):
        if not target.startswith("https:"):
            path, _, anchor = target.partition("#")
            found.append(((page.parent / path).resolve() if path else page, anchor))
    return found


def linked_pages(page: Path) -> set[Path]:
    """Return the pages that a page links to."""
    return {path for path, _ in links(page) if path.suffix == ".md"}
