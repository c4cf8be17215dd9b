"""Write a check's page: as text for a terminal, as Markdown, and all raw figures as JSON.

The first section says what the page is worth: on what it was measured, what could not be measured
and why, and what was found wrong. Files are replaced at once, so whoever reads one has a whole one.

Invariant: text and Markdown have the same words and figures.
"""

import json
from collections.abc import Iterator, Sequence
from pathlib import Path

from vllm_cost_meter.lab.gpu_check.findings import CheckResults
from vllm_cost_meter.lab.gpu_check.sections import PageSection, PageTable, sections_of

JSON_FILE, TEXT_FILE, MARKDOWN_FILE = "gpu-check.json", "gpu-check.txt", "gpu-check.md"


def write_results(found: CheckResults, folder: Path) -> None:
    """Write what was found so far to the three files."""
    _replace(folder / JSON_FILE, json.dumps(found, indent=1) + "\n")
    sections = sections_of(found)
    _replace(folder / TEXT_FILE, as_text(sections))
    _replace(folder / MARKDOWN_FILE, as_markdown(sections))


def _replace(path: Path, text: str) -> None:
    new = path.with_suffix(f"{path.suffix}.new")
    new.write_text(text, encoding="utf-8")
    new.replace(path)


def as_text(sections: Sequence[PageSection]) -> str:
    """Return a page for a terminal."""
    lines: list[str] = []
    for number, section in enumerate(sections):
        mark = "-" if number else "="
        lines += [section.title, mark * len(section.title), *section.before]
        if section.table is not None:
            lines += [*([""] if section.before else []), *_text_table(section.table)]
            lines += [""] if section.after else []
        lines += [*section.after, *section.verbatim, ""]
    return "\n".join(lines)


def as_markdown(sections: Sequence[PageSection]) -> str:
    """Return the same page as Markdown."""
    lines: list[str] = []
    for number, section in enumerate(sections):
        lines += [f"{'##' if number else '#'} {section.title}", ""]
        lines += _paragraphs(section.before)
        if section.table is not None:
            lines += [*_markdown_table(section.table), ""]
        lines += _paragraphs(section.after)
        if section.verbatim:
            lines += [*(f"    {line}".rstrip() for line in section.verbatim), ""]
    return "\n".join(lines)


def _paragraphs(words: Sequence[str]) -> Iterator[str]:
    """Yield lines with an empty one between paragraphs; items of a list stand together."""
    for number, line in enumerate(words):
        if number and not (line.startswith("- ") and words[number - 1].startswith("- ")):
            yield ""
        yield line
    if words:
        yield ""


def _text_table(table: PageTable) -> Iterator[str]:
    rows = [table.head, *table.rows] if any(table.head) else list(table.rows)
    widths = [max(len(row[at]) for row in rows) for at in range(len(table.head))]
    for row in rows:
        first, *rest = (
            cell.rjust(width) if at and any(table.head) else cell.ljust(width)
            for at, (cell, width) in enumerate(zip(row, widths, strict=True))
        )
        yield "  ".join([first, *rest]).rstrip()


def _markdown_table(table: PageTable) -> Iterator[str]:
    align = ("---", *(("---:",) if any(table.head) else ("---",)) * (len(table.head) - 1))
    for row in (table.head, align, *table.rows):
        cells = (cell.replace("|", "\\|") for cell in row)
        yield f"| {' | '.join(cells)} |"
