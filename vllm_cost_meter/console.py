"""What commands show on a terminal or in a pipe: tables that fit, text that wraps between words.

On a terminal a table that is wider than it has its long texts shortened in the middle, and then its
least important columns left out; a line below names them. With `--wide`, and where the output is no
terminal, tables are as wide as they need.

Invariant: no figure is cut. Nothing in a table is taken for markup, and no text moves a cursor.
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
    """Let SIGTERM and SIGHUP end what runs as Ctrl-C does, so that it cleans up."""

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
    """A console that leaves a closed pipe to the command line, as `print` does."""

    def on_broken_pipe(self) -> None:
        raise BrokenPipeError


# Columns whose unit is another one at a terminal, with what divides them.
_UNITS = {
    "gpu_time_ns": ("gpu_seconds", 10**9, 6),
    "idle_share_ns": ("idle_share_seconds", 10**9, 6),
    "energy_mj": ("joules", 1000, 3),
}
_NUMBERS = ("tokens", "_ns", "_mj", "_usd", "requests", "status", "used", "limit", "over")
# On a terminal that is too narrow, longer texts keep their two ends.
TEXT_CHARS_MAX = 24
_ELLIPSIS = "..."
_INSTANT = re.compile(r"(\d{4}-\d\d-\d\dT\d\d:\d\d:\d\d)\.\d+Z")
# What they hold is to be read or typed as it is.
_NEVER_SHORTENED = {"figure", "value", "http_request_id"}
# Sentences lose their end, as much as there is no room for.
_SENTENCES = {"meaning"}
# Between two columns.
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
    """Print rows as a table; GPU time in seconds, energy in joules, unknown as a dash.

    On a terminal that is too narrow the columns of `first` are the last to be left out, the first
    of them at the very last; then those that stand left.
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
    """Print a table: on a terminal as much as fits, otherwise or with `wide` all of it.

    `important` are the places of all columns, the most important first; without it the leftmost
    column is the most important.
    """
    console = _Console(markup=False, highlight=False, emoji=False, file=file)
    width = None if wide else terminal_width(file)
    note = ""
    if width is not None and _total(_widths(table)) > width:
        table, left_out = _fitted(table, width, important or range(len(table.columns)))
        what = f"left out: {', '.join(left_out)}" if left_out else "long texts are shortened"
        note = f"{what}; --wide shows all"
    whole = _total(_widths(table))
    # Both sides, or rich takes a dumb terminal for one of 80 columns.
    console.size = ConsoleDimensions(max(width or console.width, whole), console.height)
    # Not the table's own title and caption, which are wrapped to its width.
    if above:
        print_lines(above.split("\n"), file)
    console.print(table)
    if note:
        console.size = ConsoleDimensions(width or console.width, console.height)
        console.print(note, style="dim")
    if below:
        print_lines(below.split("\n"), file)


def print_lines(lines: Iterable[str], file: IO[str] | None = None) -> None:
    """Print lines of text; on a terminal they wrap between words, and go on indented."""
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
    """Return how many columns a terminal has, COLUMNS first; None for what is no terminal."""
    return shutil.get_terminal_size().columns if (file or sys.stdout).isatty() else None


def _fitted(table: Table, width: int, important: Sequence[int]) -> tuple[Table, list[str]]:
    """Return a table made to fit a width, and the heads of the columns that are left out.

    The most important column stays, whatever its width.
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
    """Return an instant to the second, and of a long text its two ends."""
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
