"""Print tables and text to a terminal or pipe: tables fit the width, text wraps between words.

If a table is wider than the terminal, long texts are shortened in the middle first. If that is not
enough, the least important columns are left out, and a line below the table names them. With
`--wide`, or if the output is not a terminal, tables are as wide as they need.

Invariant: no figure is cut. No table text is taken for markup, and no text moves the cursor.
"""

import re
import shutil
import signal
import sys
import textwrap
from collections.abc import Iterable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from typing import IO, Any, NoReturn

from rich.cells import cell_len
from rich.console import Console, ConsoleDimensions
from rich.table import Column, Table

from vllm_cost_meter.units.text import plain, rounded


@contextmanager
def interruptible() -> Iterator[None]:
    """Turn SIGTERM and SIGHUP into KeyboardInterrupt, so that the body cleans up as on Ctrl-C."""

    def interrupt(*_: object) -> NoReturn:
        raise KeyboardInterrupt

    before = {
        number: signal.signal(number, interrupt) for number in (signal.SIGTERM, signal.SIGHUP)
    }
    try:
        yield
    finally:
        for number, handler in before.items():
            signal.signal(number, handler)


class _Console(Console):
    """A console that raises BrokenPipeError for a closed pipe, as `print` does."""

    def on_broken_pipe(self) -> None:
        raise BrokenPipeError


# Columns that tables show in another unit: (new name, divisor, decimal places).
_UNITS = {
    "gpu_time_ns": ("gpu_seconds", 10**9, 6),
    "idle_share_ns": ("idle_share_seconds", 10**9, 6),
    "energy_mj": ("joules", 1000, 3),
}
_NUMBERS = (
    "tokens",
    "_ns",
    "_mj",
    "_usd",
    "requests",
    "status",
    "used",
    "limit",
    "over",
    "_within",
)
# If the terminal is too narrow, longer texts are shortened to this width.
TEXT_CHARS_MAX = 24
_ELLIPSIS = "..."
_INSTANT = re.compile(r"(\d{4}-\d\d-\d\dT\d\d:\d\d:\d\d)\.\d+Z")
# People read or type the values of these columns as they are.
_NEVER_SHORTENED = {"figure", "value", "http_request_id"}
# These columns hold sentences. A sentence that does not fit loses its end, not its middle.
_SENTENCES = {"meaning"}
# Spaces between two columns.
_GAP = 2


def print_rows(
    rows: Sequence[Mapping[str, Any]],
    columns: Sequence[str],
    above: str = "",
    below: str = "",
    file: IO[str] | None = None,
    *,
    first: Sequence[str] = (),
    wide: bool = False,
) -> None:
    """Print rows as a table; GPU time in seconds, energy in joules, unknown values as a dash.

    If the terminal is too narrow, columns are left out from right to left. The columns of `first`
    go after all others, and its first column goes last.
    """
    table = Table(box=None, pad_edge=False)
    for column in columns:
        table.add_column(
            _UNITS[column][0] if column in _UNITS else plain(column),
            justify="right" if column.endswith(_NUMBERS) else "left",
            no_wrap=True,
        )
    for row in rows:
        table.add_row(*(_shown(column, row.get(column, "")) for column in columns))
    order = [*(name for name in first if name in columns), *columns]
    important = [columns.index(name) for name in dict.fromkeys(order)]
    print_table(table, above, below, file, important=important, wide=wide)


def print_table(
    table: Table,
    above: str = "",
    below: str = "",
    file: IO[str] | None = None,
    *,
    important: Sequence[int] = (),
    wide: bool = False,
) -> None:
    """Print a table: as much as fits on a terminal; all of it to a pipe or with `wide`.

    `important` lists the column numbers, the most important first. By default the leftmost column
    is the most important.
    """
    console = _Console(markup=False, highlight=False, emoji=False, file=file)
    width = None if wide else terminal_width(file)
    note = ""
    if width is not None and _total(_widths(table)) > width:
        table, left_out = _fitted(table, width, important or range(len(table.columns)))
        what = f"left out: {', '.join(left_out)}" if left_out else "long texts are shortened"
        note = f"{what}; --wide shows all"
    whole = _total(_widths(table))
    # We set width and height: without both, rich takes a dumb terminal for one with 80 columns.
    console.size = ConsoleDimensions(max(width or console.width, whole), console.height)
    # We do not use rich's title and caption, because rich wraps them to the table's width.
    if above:
        print_lines(above.split("\n"), file)
    console.print(table)
    if note:
        console.size = ConsoleDimensions(width or console.width, console.height)
        console.print(note, style="dim")
    if below:
        print_lines(below.split("\n"), file)


def print_lines(lines: Iterable[str], file: IO[str] | None = None) -> None:
    """Print lines of text; on a terminal they wrap between words, and continue indented."""
    width = terminal_width(file)
    for line in lines:
        text = plain(line)
        if width is not None and cell_len(text) > width:
            indent = " " * (len(text) - len(text.lstrip()) + 2)
            text = textwrap.fill(
                text,
                width,
                subsequent_indent=indent,
                break_long_words=False,
                break_on_hyphens=False,
            )
        print(text, file=file)


def terminal_width(file: IO[str] | None = None) -> int | None:
    """Return the terminal's width (COLUMNS goes first); None if the output is not a terminal."""
    return shutil.get_terminal_size().columns if (file or sys.stdout).isatty() else None


def _fitted(table: Table, width: int, important: Sequence[int]) -> tuple[Table, list[str]]:
    """Return a table that fits a width, and the heads of the columns that were left out.

    The most important column always stays, whatever its width.
    """
    cells = [[str(cell) for cell in column.cells] for column in table.columns]
    for column, texts in zip(table.columns, cells, strict=True):
        if column.header in _SENTENCES:
            room = width - _total(_widths(table)) + max(map(cell_len, texts))
            texts[:] = [_without_end(text, max(room, TEXT_CHARS_MAX)) for text in texts]
        elif column.justify == "left" and column.header not in _NEVER_SHORTENED:
            texts[:] = map(_shortened, texts)
    widths = _widths(_of_columns(table.columns, cells))
    kept = list(important)
    while len(kept) > 1 and _total([widths[at] for at in kept]) > width:
        kept.pop()
    heads = [" ".join(str(column.header).split()) for column in table.columns]
    left_out = [head for at, head in enumerate(heads) if at not in kept]
    kept.sort()
    return _of_columns([table.columns[at] for at in kept], [cells[at] for at in kept]), left_out


def _of_columns(columns: Sequence[Column], cells: Sequence[Sequence[str]]) -> Table:
    table = Table(box=None, pad_edge=False)
    for column in columns:
        table.add_column(column.header, justify=column.justify, no_wrap=True)
    for row in zip(*cells, strict=True):
        table.add_row(*row)
    return table


def _widths(table: Table) -> list[int]:
    return [
        max(
            cell_len(line)
            for text in (column.header, *column.cells)
            for line in str(text).split("\n")
        )
        for column in table.columns
    ]


def _total(widths: Sequence[int]) -> int:
    return sum(widths) + _GAP * (len(widths) - 1)


def _shortened(text: str) -> str:
    """Shorten an instant to whole seconds, and a long text to its two ends."""
    if found := _INSTANT.fullmatch(text):
        return f"{found[1]}Z"
    if len(text) <= TEXT_CHARS_MAX:
        return text
    tail = (TEXT_CHARS_MAX - len(_ELLIPSIS)) // 2
    return f"{text[: TEXT_CHARS_MAX - len(_ELLIPSIS) - tail]}{_ELLIPSIS}{text[-tail:]}"


def _without_end(text: str, chars: int) -> str:
    return text if len(text) <= chars else text[: chars - len(_ELLIPSIS)].rstrip() + _ELLIPSIS


def _shown(column: str, value: object) -> str:
    if value is None:
        return "-"
    if column in _UNITS and isinstance(value, int):
        _, unit, places = _UNITS[column]
        return f"{value / unit:.{places}f}"
    return plain(rounded(value))
