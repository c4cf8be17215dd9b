"""What the commands of the command line share: their options, and the ledger."""

import sys
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Annotated

import typer

from vllm_cost_meter.config.loading import load_settings
from vllm_cost_meter.errors import CostMeterError
from vllm_cost_meter.ledger.database import url_of
from vllm_cost_meter.ledger.opening import open_ledger
from vllm_cost_meter.ledger.reader import LedgerReader
from vllm_cost_meter.units.text import plain

Ledger = Annotated[
    str | None,
    typer.Option(
        help="SQLAlchemy URL of the ledger, or a SQLite file; otherwise COST_METER_LEDGER or the "
        "default."
    ),
]
Json = Annotated[bool, typer.Option("--json", help="Print one JSON object.")]


@contextmanager
def one_line_errors() -> Iterator[None]:
    """End the command with one line and status 2 at a user's error."""
    try:
        yield
    except (CostMeterError, ValueError) as error:
        print(plain(f"vllm-cost-meter: {error}"), file=sys.stderr)
        raise typer.Exit(2) from None


@contextmanager
def reading(ledger: str | None) -> Iterator[LedgerReader]:
    """Open the ledger; a user's error ends the command."""
    with (
        one_line_errors(),
        open_ledger(ledger_url(ledger), book=load_settings().price_book) as reader,
    ):
        yield reader


def ledger_url(ledger: str | None) -> str:
    """Return the URL of the ledger that an option or the settings name."""
    with one_line_errors():
        return url_of(ledger if ledger is not None else load_settings().ledger or None)


def write_output(path: Path, text: str) -> None:
    """Write what --output names, as it is: CSV has the line ends of its standard.

    Raises ValueError.
    """
    try:
        path.write_text(text, encoding="utf-8", newline="")
    except OSError as error:
        raise ValueError(f"--output: {path} cannot be written: {error.strerror}") from None
