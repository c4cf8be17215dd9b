"""Options and helpers that the commands share: one-line errors, opening the ledger, output."""

import io
import json
import os
import sys
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager, redirect_stdout
from pathlib import Path
from typing import Annotated, Any

import typer

from vllm_cost_meter.config.fleet import FleetPlace
from vllm_cost_meter.config.loading import (
    SharedOf,
    fleet_place,
    load_settings,
    settings_with,
)
from vllm_cost_meter.config.settings import Settings
from vllm_cost_meter.errors import CostMeterError
from vllm_cost_meter.ledger.database import url_of
from vllm_cost_meter.ledger.opening import open_ledger
from vllm_cost_meter.ledger.reader import LedgerReader
from vllm_cost_meter.records.shared_settings import NOTHING_SHARED, SharedSettings
from vllm_cost_meter.units.calendar import EXPECTED as WINDOWS
from vllm_cost_meter.units.text import plain, to_csv

Ledger = Annotated[
    str | None,
    typer.Option(
        help="The ledger: a SQLite file, or a SQLAlchemy URL; otherwise COST_METER_LEDGER or the"
        " default."
    ),
]
Config = Annotated[
    Path | None, typer.Option(help="The settings file; otherwise that of COST_METER_CONFIG.")
]
Json = Annotated[bool, typer.Option("--json", help="Print one JSON object.")]
Wide = Annotated[
    bool,
    typer.Option(
        "--wide",
        help="Show all columns, uncut. Otherwise a terminal shows what fits; a pipe or a file gets"
        " all of it always.",
    ),
]
Csv = Annotated[bool, typer.Option("--csv", help="Print CSV.")]
Output = Annotated[
    Path | None, typer.Option("--output", "-o", help="A file to write, or write anew.")
]
TimeZone = Annotated[
    str | None,
    typer.Option("--tz", help="Time zone of days, such as Europe/Berlin; otherwise UTC."),
]
Engines = Annotated[
    str | None,
    typer.Option("--filter", help="Engines to answer about, such as label:pool=spot."),
]
Week = Annotated[str, typer.Option("--window", help=f"{WINDOWS}.")]
WindowOption = Annotated[
    str | None, typer.Option("--window", help=f"{WINDOWS}. Without it: the whole ledger.")
]


@contextmanager
def one_line_errors() -> Iterator[None]:
    """Turn an error of the user into one line on stderr and exit status 2."""
    try:
        yield
    except (CostMeterError, ValueError) as error:
        print(plain(f"vllm-cost-meter: {error}"), file=sys.stderr)
        raise typer.Exit(2) from None


@contextmanager
def reading(ledger: str | None, config: Path | None = None) -> Iterator[LedgerReader]:
    """Open the ledger for reading; an error of the user ends the command."""
    with one_line_errors():
        book = settings_of(ledger, config).price_book
        with open_ledger(ledger_url(ledger, config), book=book) as reader:
            yield reader


def ledger_url(ledger: str | None, config: Path | None = None) -> str:
    """Return the URL of the ledger that an option or the settings name."""
    with one_line_errors():
        named = local_settings(config).ledger if ledger is None else ledger
        return url_of(named or None)


def settings_of(
    ledger: str | None, config: Path | None, environ: Mapping[str, str] = os.environ
) -> Settings:
    """Return the settings; where a fleet shares some, from the ledger that an option names.

    Raises SettingError, or LedgerError if the fleet's database cannot be read.
    """
    return load_settings(environ, config=config, shared=_shared_of(ledger))


def local_settings(config: Path | None) -> Settings:
    """Return the settings without what a fleet shares, of which no database is asked.

    Raises SettingError.
    """
    if fleet_place(config=config).fleet_settings:
        return settings_with(NOTHING_SHARED, config=config)
    return load_settings(config=config)


def _shared_of(ledger: str | None) -> SharedOf:
    def shared(place: FleetPlace) -> SharedSettings:
        # Only who shares settings needs these modules.
        from vllm_cost_meter.api_server.shipping.settings_puller import (
            settings_for_reading,
        )

        return settings_for_reading(place, ledger)

    return shared


def dropped_lines(kept_from: str | None) -> list[str]:
    """Return the line that says which rows of requests there are; none if there are all."""
    if kept_from is None:
        return []
    date, _, time = kept_from.partition("T")
    if time.startswith("00:00:00"):
        return [f"rows of requests that ended before {date} (UTC) were dropped"]
    # Only of a fleet: retention drops whole days.
    return ["rows of requests are not here: a server of this fleet keeps them to itself"]


def engines_lines(engines: str | None) -> list[str]:
    """Return the line that says which engines an answer is about; none if about all."""
    return [] if engines is None else [f"of engines with {engines} alone: all figures are theirs"]


def print_answer(
    answer: Any,
    rows: Sequence[Mapping[str, Any]],
    show: Callable[[], None],
    *,
    as_json: bool,
    as_csv: bool,
    output: Path | None = None,
) -> None:
    """Print an answer as JSON, its rows as CSV, or what `show` prints; or write it to a file."""
    with one_line_errors():
        refuse_both(as_json=as_json, as_csv=as_csv)
        with _written_to(output):
            if as_json:
                print(json.dumps(answer, indent=2))
            elif as_csv:
                print(to_csv(rows), end="")
            else:
                show()


def refuse_both(*, as_json: bool, as_csv: bool) -> None:
    """Raise ValueError for a command that is asked for two formats at once."""
    if as_json and as_csv:
        raise ValueError("--csv: expected without --json, got both")


@contextmanager
def _written_to(output: Path | None) -> Iterator[None]:
    """Write what is printed to a file instead, if there is one and no error came before."""
    if output is None:
        yield
        return
    with redirect_stdout(io.StringIO()) as printed:
        yield
    write_output(output, printed.getvalue())


def write_output(path: Path, text: str) -> None:
    """Write a text to the file of --output, without changing its line ends. Raises ValueError.

    CSV text already has the line ends of its standard.
    """
    try:
        path.write_text(text, encoding="utf-8", newline="")
    except OSError as error:
        raise ValueError(f"--output: {path} cannot be written: {error.strerror}") from None


def new_group(name: str) -> typer.Typer:
    """Return an app for several commands; its help shows brackets as they are."""
    return typer.Typer(
        name=name,
        no_args_is_help=True,
        add_completion=False,
        pretty_exceptions_enable=False,
        rich_markup_mode=None,
    )
