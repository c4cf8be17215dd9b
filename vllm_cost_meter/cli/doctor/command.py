"""The command `doctor`: run all checks and print what they found.

Invariant: it changes nothing: no file is made, no ledger migrated, no mode changed.
"""

import json
from collections.abc import Callable, Sequence
from typing import Annotated, Any

import typer

from vllm_cost_meter.cli.doctor import figures, fleet, installation, ledger
from vllm_cost_meter.cli.doctor.findings import Finding, Outcome, contained
from vllm_cost_meter.cli.doctor.server import ask_server
from vllm_cost_meter.cli.options import (
    Config,
    Json,
    Ledger,
    ledger_url,
    one_line_errors,
    settings_of,
)
from vllm_cost_meter.config.settings import Settings
from vllm_cost_meter.console import print_lines
from vllm_cost_meter.prices.book import NO_PRICES, PriceBook

# Servers hold the ledger for milliseconds at a time.
LEDGER_TIMEOUT_S = 2.0
# Who checks an installation does not wait for a disk.
QUICK_CHECK_S = 5.0
# No server answers at the port of these.
UNASKED = Settings(port="off")
MARKS = {Outcome.OK: "ok  ", Outcome.WARN: "warn", Outcome.FAIL: "FAIL"}


def doctor_(
    url: Annotated[
        str | None,
        typer.Option(
            help="The side endpoint of a running server; otherwise that of COST_METER_HOST and"
            " COST_METER_PORT, if one answers there."
        ),
    ] = None,
    ledger: Ledger = None,
    config: Config = None,
    as_json: Json = False,
) -> None:
    """Is the meter installed, and does it work?

    Each check says in one line what it found. It changes nothing. A server that runs is asked for
    its own figures. Exit status 1 if a check fails; a warning is no failure.

    Example: vllm-cost-meter doctor --ledger ledger.db
    """
    with one_line_errors():
        settings = settings_of(ledger, config)
    findings = examine(ledger_url(ledger, config), settings.price_book, settings, server_url=url)
    if as_json:
        print(json.dumps({"ok": all(f.ok for f in findings), "findings": _dicts(findings)}))
    else:
        print_lines(f"{MARKS[f.outcome]} {f.name}: {f.detail}" for f in findings)
    if not all(finding.ok for finding in findings):
        raise typer.Exit(1)


def examine(
    url: str,
    book: PriceBook = NO_PRICES,
    settings: Settings = UNASKED,
    *,
    server_url: str | None = None,
    ledger_timeout_s: float = LEDGER_TIMEOUT_S,
    quick_check_s: float = QUICK_CHECK_S,
) -> list[Finding]:
    """Run all checks on the ledger at `url`; `book` is the price book in the settings.

    A ledger that another process holds for longer than `ledger_timeout_s`, twice, cannot be
    written. Its pages are read for `quick_check_s` at most.
    """
    asked = ask_server(settings, server_url)
    server = asked.server
    checks: list[tuple[str, Callable[[], Finding]]] = [
        ("entry points", installation.entry_points_found),
        ("named", installation.is_named),
        ("native", installation.native_loaded),
        ("vllm", installation.vllm_understood),
        ("server", lambda: asked.finding),
        ("ledger", lambda: ledger.ledger_writable(url, server, ledger_timeout_s)),
        ("journal", lambda: ledger.journals_writable(url, settings.second_journal)),
        ("archive", lambda: ledger.archive_writable(settings.archive)),
        ("fleet", lambda: fleet.fleet_reached(settings.fleet, url)),
        ("settings", lambda: fleet.settings_shared(settings, url)),
        ("schema", lambda: ledger.schema_known(url, server)),
        ("pages", lambda: ledger.pages_sound(url, quick_check_s)),
        ("books", lambda: figures.books_balance(url, server)),
        ("cost model", lambda: figures.cost_model(url, server)),
        ("price", lambda: figures.price(url, book, server)),
        ("energy", installation.energy_counter),
        ("access", lambda: installation.access(settings)),
    ]
    return [contained(name, check) for name, check in checks]


def _dicts(findings: Sequence[Finding]) -> list[dict[str, Any]]:
    return [
        {"name": f.name, "ok": f.ok, "state": f.outcome.name.lower(), "detail": f.detail}
        for f in findings
    ]
