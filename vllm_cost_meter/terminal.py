"""Tables on a terminal or in a pipe: never cut, and nothing in them is taken for markup."""

from rich.console import Console
from rich.table import Table


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
