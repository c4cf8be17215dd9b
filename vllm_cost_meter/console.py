"""What commands show on a terminal or in a pipe: tables that are never cut, errors in one line.

Nothing in a table is taken for markup, and no error moves a cursor.
"""

import signal
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from typing import IO, Any, NoReturn

from rich.console import Console
from rich.table import Table

from vllm_cost_meter.units.text import plain


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
_NUMBERS = ("tokens", "_ns", "_mj", "_usd", "requests", "status")


def print_rows(
    rows: Sequence[Mapping[str, Any]],
    columns: Sequence[str],
    above: str = "",
    below: str = "",
    file: IO[str] | None = None,
) -> None:
    """Print rows as a table; GPU time in seconds, energy in joules, unknown as a dash."""
    table = Table(box=None, pad_edge=False)
    for column in columns:
        table.add_column(
            _UNITS[column][0] if column in _UNITS else plain(column),
            justify="right" if column.endswith(_NUMBERS) else "left",
            no_wrap=True,
        )
    for row in rows:
        table.add_row(*(_shown(column, row.get(column, "")) for column in columns))
    print_table(table, above, below, file)


def print_table(
    table: Table, above: str = "", below: str = "", file: IO[str] | None = None
) -> None:
    """Print a table as wide as it needs: a terminal wraps a line too long, no figure is cut."""
    console = _Console(markup=False, highlight=False, emoji=False, file=file)
    unlimited = console.options.update_width(1_000_000)
    console.width = max(console.width, console.measure(table, options=unlimited).maximum)
    # Not the table's own title and caption, which are wrapped to its width.
    if above:
        console.print(above, soft_wrap=True)
    console.print(table)
    if below:
        console.print(below, soft_wrap=True)


def _shown(column: str, value: object) -> str:
    if value is None:
        return "-"
    if column in _UNITS and isinstance(value, int):
        _, unit, places = _UNITS[column]
        return f"{value / unit:.{places}f}"
    return plain(str(value))
