"""What commands show on a terminal or in a pipe: tables that are never cut, errors in one line.

Nothing in a table is taken for markup, and no error moves a cursor.
"""

import sys
from collections.abc import Iterator
from contextlib import contextmanager

import typer
from rich.console import Console
from rich.table import Table

from vllm_cost_meter.errors import CostMeterError
from vllm_cost_meter.text import plain


@contextmanager
def one_line_errors() -> Iterator[None]:
    """End the command with one line and status 2 at a user's error."""
    try:
        yield
    except (CostMeterError, ValueError) as error:
        print(plain(f"vllm-cost-meter: {error}"), file=sys.stderr)
        raise typer.Exit(2) from None


def print_table(table: Table, above: str = "", below: str = "") -> None:
    """Print a table as wide as it needs: a terminal wraps a line too long, no figure is cut."""
    console = Console(markup=False, highlight=False, emoji=False)
    unlimited = console.options.update_width(1_000_000)
    console.width = max(console.width, console.measure(table, options=unlimited).maximum)
    # Not the table's own title and caption, which are wrapped to its width.
    if above:
        console.print(above, soft_wrap=True)
    console.print(table)
    if below:
        console.print(below, soft_wrap=True)
