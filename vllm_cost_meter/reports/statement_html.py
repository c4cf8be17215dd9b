"""A statement as one HTML file that prints well and loads nothing.

The page has no script, link or font to load, so it looks the same in ten years.

Invariant: every text of the statement is escaped, so no name can become markup.
"""

from collections.abc import Iterator, Mapping, Sequence
from html import escape
from typing import Any

from vllm_cost_meter.reports.statement import notes
from vllm_cost_meter.reports.statement_text import (
    cents_notes,
    charges_lines,
    columns_of,
    rows,
    title,
    totals,
)
from vllm_cost_meter.units.text import plain

_HEADINGS: Mapping[str, str] = {
    "tenant": "Tenant",
    "day": "Day",
    "item": "Model or item",
    "requests": "Requests",
    "prompt_tokens": "Prompt tokens",
    "cached_tokens": "Cached",
    "output_tokens": "Output tokens",
    "gpu_time_ns": "GPU-seconds",
    "idle_share_ns": "Idle share, s",
    "kv_block_hours": "KV block-hours",
    "usd_per_kv_block_hour": "USD per KV block-hour",
    "usage_usd": "Usage",
    "idle_share_usd": "Idle share",
    "amount_usd": "Amount",
}
_TEXT = ("tenant", "day", "item")
_STYLE = """
body { font: 10pt/1.4 system-ui, sans-serif; color: #111; margin: 2em auto; max-width: 70em; }
h1 { font-size: 1.4em; margin: 0 0 .2em; }
table { border-collapse: collapse; width: 100%; margin: 1em 0; }
th, td { padding: .2em .5em; text-align: right; vertical-align: top; }
th { border-bottom: 1.5px solid #111; font-weight: 600; }
td { border-bottom: 1px solid #ddd; font-variant-numeric: tabular-nums; }
.text { text-align: left; overflow-wrap: anywhere; }
.total td { border-bottom: 1.5px solid #111; font-weight: 600; }
.totals { font-weight: 600; }
.notes { color: #333; font-size: .9em; padding-left: 1.2em; }
@page { size: A4 landscape; margin: 15mm; }
@media print {
  body { margin: 0; max-width: none; font-size: 8.5pt; }
  thead { display: table-header-group; }
  tr, .notes li { break-inside: avoid; }
  .totals, .notes { break-before: avoid; }
}
"""


def statement_html(answer: Mapping[str, Any]) -> str:
    """Return a statement as an HTML document."""
    name = _text(title(answer))
    columns = columns_of(answer)
    head = "".join(f"<th{_class(c)}>{_text(_HEADINGS[c])}</th>" for c in columns)
    lines = rows(answer)
    body = "\n".join(_row(row, columns) for row in lines)
    said = (*charges_lines(answer), *_named_as_above(cents_notes(lines)), *notes(answer))
    return f"""<!doctype html>
<html lang="en">
<head>
<meta charset="utf-8">
<meta name="viewport" content="width=device-width">
<title>{name}</title>
<style>{_STYLE}</style>
</head>
<body>
<h1>{name}</h1>
<p>{_text(_period(answer))}</p>
<table>
<thead><tr>{head}</tr></thead>
<tbody>
{body}
</tbody>
</table>
<div class="totals">
{"".join(_paragraphs(totals(answer)))}</div>
<ul class="notes">
{"".join(f"<li>{_text(note)}</li>{chr(10)}" for note in said)}</ul>
</body>
</html>
"""


def _named_as_above(lines: Sequence[str]) -> Iterator[str]:
    """Yield the lines with the headings of this table instead of the names of the columns."""
    names = ("idle_share_usd", "usage_usd", "amount_usd")
    for line in lines:
        for name in names:
            line = line.replace(name, _HEADINGS[name])
        yield line


def _period(answer: Mapping[str, Any]) -> str:
    window = answer["window"]
    return (
        f"from {window['from']} to {window['to']}, amounts in {answer['currency']}, "
        f"figures as of {answer['taken_at'] or 'never'}"
    )


def _paragraphs(lines: Iterator[str]) -> Iterator[str]:
    return (f"<p>{_text(line)}</p>\n" for line in lines)


def _row(row: Mapping[str, Any], columns: Sequence[str]) -> str:
    is_total = "kind" not in row
    cells = "".join(f"<td{_class(c)}>{_cell(c, row.get(c, ''))}</td>" for c in columns)
    return f"<tr{' class=total' if is_total else ''}>{cells}</tr>"


def _cell(column: str, value: object) -> str:
    if value is None:
        return "" if column in _TEXT else "&ndash;"
    if column.endswith("_ns") and isinstance(value, int):
        return f"{value / 1e9:,.6f}"
    return f"{value:,}" if isinstance(value, int) else _text(str(value))


def _class(column: str) -> str:
    return ' class="text"' if column in _TEXT else ""


def _text(text: str) -> str:
    return escape(plain(text))
