"""The commands `ledger ...`: look after a SQLite ledger's file.

What they do is in `vllm_cost_meter.ledger.upkeep`; here options are read and answers printed.

Invariant: a command that fails says in one line why, and that line says what became of the ledger.
"""

import json
import time
from collections.abc import Callable, Iterable, Mapping
from dataclasses import asdict
from pathlib import Path
from typing import Annotated, Any

import typer

from vllm_cost_meter.cli.options import (
    Config,
    Json,
    Ledger,
    ledger_url,
    local_settings,
    new_group,
    one_line_errors,
)
from vllm_cost_meter.console import interruptible, print_lines
from vllm_cost_meter.errors import LedgerError
from vllm_cost_meter.ledger.catching_up import catch_up, waiting_records
from vllm_cost_meter.ledger.database import open_database, parse_url, sqlite_path, url_of
from vllm_cost_meter.ledger.retention.archiving import archive_and_drop
from vllm_cost_meter.ledger.retention.dropping import (
    DroppedCounts,
    count_rows,
    cutoff_of,
    drop_rows,
)
from vllm_cost_meter.ledger.retention.parquet import ParquetArchive
from vllm_cost_meter.ledger.upkeep.checking import check_ledger
from vllm_cost_meter.ledger.upkeep.compacting import compact
from vllm_cost_meter.ledger.upkeep.copies import back_up
from vllm_cost_meter.ledger.upkeep.merging import merge
from vllm_cost_meter.ledger.upkeep.migrating import migrate_ledger
from vllm_cost_meter.ledger.upkeep.repairing import repair
from vllm_cost_meter.ledger.upkeep.restoring import restore

app = new_group("ledger")

# `repair` names at most so many runs with missing bills, and so many ranges of each.
MISSING_RUNS_MAX = 20
MISSING_RANGES_MAX = 20


@app.command()
def check(
    full: Annotated[
        bool, typer.Option("--full", help="Read indexes too, and add up what must add up.")
    ] = False,
    ledger: Ledger = None,
    config: Config = None,
    as_json: Json = False,
) -> None:
    """Is the ledger's file sound? Exit status 1 if not.

    It changes nothing, and may run beside a server.

    Example: vllm-cost-meter ledger check --full
    """
    with one_line_errors():
        found = check_ledger(ledger_url(ledger, config), full=full)
    ok = all(one.ok for one in found)
    lines = [f"{'ok  ' if one.ok else 'FAIL'} {one.name}: {one.detail}" for one in found]
    _answer({"ok": ok, "checks": [asdict(one) for one in found]}, lambda: lines, as_json)
    if not ok:
        raise typer.Exit(1)


@app.command()
def apply(
    ledger: Ledger = None,
    config: Config = None,
    as_json: Json = False,
) -> None:
    """Bring what journals hold into the ledger. Exit status 1 if some is left.

    A server does it all the time, and each command that reads the ledger does it first. So this is
    for a ledger that failed before, and for one whose servers are gone.

    Example: vllm-cost-meter ledger apply
    """
    with one_line_errors(), interruptible():
        url = ledger_url(ledger, config)
        left = catch_up(url)
        open_database(url, create=False).dispose()  # or there is no ledger to speak of
    told = (
        f"{left:,} records in journals are not in the ledger: a server that applies them is behind;"
        " see its log"
        if left
        else "the ledger has all that its journals hold"
    )
    _answer({"left_records": left}, lambda: [told], as_json)
    if left:
        raise typer.Exit(1)


@app.command()
def backup(
    file: Annotated[Path, typer.Argument(help="The copy to write.")],
    force: Annotated[bool, typer.Option("--force", help="Overwrite an existing file.")] = False,
    ledger: Ledger = None,
    config: Config = None,
    as_json: Json = False,
) -> None:
    """Copy the ledger as it is now, while servers write to it.

    The copy is checked before it gets its name, and only you can read it.

    Example: vllm-cost-meter ledger backup ledger-2027-01-15.db
    """
    with one_line_errors(), interruptible():
        url = ledger_url(ledger, config)
        _catch_up(url)
        copy = back_up(url, file, force=force)
    line = f"{copy.file}: {copy.rows:,} rows, {copy.bytes:,} bytes, schema version {copy.version}"
    _answer(_plain(asdict(copy)), lambda: [line], as_json)


@app.command("restore")
def restore_(
    file: Annotated[Path, typer.Argument(help="The copy to put in the ledger's place.")],
    ledger: Ledger = None,
    config: Config = None,
    as_json: Json = False,
) -> None:
    """Put a backup in the ledger's place, and keep the ledger.

    It stays beside the backup under another name. Stop the servers that use it first.

    Example: vllm-cost-meter ledger restore ledger-2027-01-15.db
    """
    with one_line_errors(), interruptible():
        done = restore(ledger_url(ledger, config), file, time.time_ns())

    def lines() -> Iterable[str]:
        if done.aside is not None:
            yield f"the ledger before: {done.aside}"
        yield f"restored: {done.rows:,} rows, schema version {done.version}"

    _answer(_plain(asdict(done)), lines, as_json)


@app.command("merge")
def merge_(
    files: Annotated[list[Path], typer.Argument(help="Other ledgers; they stay as they are.")],
    dry_run: Annotated[bool, typer.Option(help="Say what would be done, and do nothing.")] = False,
    ledger: Ledger = None,
    config: Config = None,
    as_json: Json = False,
) -> None:
    """Add the rows of other ledgers to this one, each once.

    The same ledgers again change nothing. Where prices or bills contradict each other, nothing is
    written.

    Example: vllm-cost-meter ledger merge other-server.db
    """
    with one_line_errors(), interruptible():
        gap_ns = local_settings(config).invoice_rules.gap_ns
        url = ledger_url(ledger, config)
        for each in (url, *map(url_of, files)):
            _refuse_without_journals(each)
        merged = merge(url, files, gap_ns, dry_run=dry_run)

    def lines() -> Iterable[str]:
        for one in merged:
            counts = f"{one.new:,} new, {one.raised:,} raised, {one.known:,} known"
            differing = f", {one.differing:,} of them differing" if one.differing else ""
            yield f"{one.name}: {counts}{differing}"
        yield "nothing was written: --dry-run" if dry_run else "merged"

    _answer({"dry_run": dry_run, "tables": [asdict(one) for one in merged]}, lines, as_json)


@app.command("compact")
def compact_(ledger: Ledger = None, config: Config = None, as_json: Json = False) -> None:
    """Write the ledger's file anew, without free pages.

    Stop the servers that use it first.

    Example: vllm-cost-meter ledger compact
    """
    with one_line_errors(), interruptible():
        done = compact(ledger_url(ledger, config))
    line = f"{done.bytes_before:,} bytes before, {done.bytes_after:,} bytes after"
    _answer(asdict(done), lambda: [line], as_json)


@app.command()
def drop(
    before: Annotated[
        str, typer.Option("--before", help="A UTC date: rows that ended before it go.")
    ],
    archive: Annotated[
        Path | None,
        typer.Option(help="Put the rows into Parquet files in this folder first. Needs DuckDB."),
    ] = None,
    dry_run: Annotated[bool, typer.Option(help="Say what would be done, and do nothing.")] = False,
    ledger: Ledger = None,
    config: Config = None,
    as_json: Json = False,
) -> None:
    """Drop the rows of old requests; all sums stay as they are.

    Reports, statements, budgets and the audit do not change. Single requests, and what is read of
    them alone, are gone. It may run beside a server.

    With --archive a row goes only once a Parquet file holds it: FOLDER/requests/2026-08-01.parquet.

    Example: vllm-cost-meter ledger drop --before 2026-08-01
    """
    with one_line_errors(), interruptible():
        hour = cutoff_of(before, time.time_ns())
        url = ledger_url(ledger, config)
        engine = open_database(url, create=False)
        try:
            archived = None if archive is None or dry_run else ParquetArchive(archive)
            if not dry_run:
                _catch_up(url, "rows would be dropped before those that belong to them came")
                dropped = (
                    drop_rows(engine, hour)
                    if archived is None
                    else archive_and_drop(engine, hour, archived)
                )
            with engine.connect() as connection:
                left = count_rows(connection, hour)
        finally:
            engine.dispose()

    def lines() -> Iterable[str]:
        if dry_run:
            yield f"rows from before {before}: {_counted(left)}, and what belongs to them"
            yield "nothing was dropped: --dry-run"
            return
        yield f"dropped from before {before}: {_counted(dropped)}, and what belonged to them"
        if any(left):
            yield f"kept: {_counted(left)}, as these are open, or the last of a dead engine"
        yield "the file keeps its size: `vllm-cost-meter ledger compact` gives free pages back"

    found = {} if dry_run else {"dropped": dropped._asdict()}
    answer = {"before": before, "dry_run": dry_run, **found, "left": left._asdict()}
    _answer(answer, lines, as_json)


def _counted(counts: DroppedCounts) -> str:
    return f"{counts.bills:,} bills and {counts.replies:,} HTTP requests"


@app.command("repair")
def repair_(
    force: Annotated[
        bool, typer.Option("--force", help="Write it anew even if nothing is found damaged.")
    ] = False,
    ledger: Ledger = None,
    config: Config = None,
    as_json: Json = False,
) -> None:
    """Save every readable row of a damaged ledger into a new one.

    The damaged file stays beside it under another name. Stop the servers that use it first.

    Example: vllm-cost-meter ledger repair
    """
    with one_line_errors(), interruptible():
        done = repair(ledger_url(ledger, config), time.time_ns(), force=force)
    if done is None:
        _answer({"damaged": False}, lambda: ["nothing is damaged: nothing was changed"], as_json)
        return

    def lines() -> Iterable[str]:
        for one in done.tables:
            missing = "an unknown number" if one.missing is None else f"{one.missing:,}"
            pages = f", {one.damaged_pages:,} damaged pages" if one.damaged_pages else ""
            yield f"{one.name}: {one.saved:,} saved, {missing} missing{pages}"
        yield from _missing_lines(done.missing_bills)
        if done.damaged_frames:
            yield f"damaged frames in the log: {done.damaged_frames}"
        if done.unclear_pages:
            yield f"pages whose rows may be of several tables, left out: {done.unclear_pages}"
        if done.foreign_tables:
            yield f"tables that are none of the meter's, left out: {', '.join(done.foreign_tables)}"
        yield f"the damaged file: {done.aside}"

    _answer({"damaged": True, **_plain(asdict(done))}, lines, as_json)


@app.command()
def migrate(ledger: Ledger = None, config: Config = None, as_json: Json = False) -> None:
    """Bring an older ledger up to date, with a copy of it as it was.

    Stop the servers that use it first.

    Example: vllm-cost-meter ledger migrate
    """
    with one_line_errors(), interruptible():
        url = ledger_url(ledger, config)
        done = migrate_ledger(url, time.time_ns())

    def lines() -> Iterable[str]:
        if done.copy is None:
            yield f"schema version {done.version_after} already: nothing was changed"
            return
        yield f"the ledger as it was: {done.copy.file} ({done.copy.rows:,} rows)"
        yield f"migrated from schema version {done.version_before} to {done.version_after}"
        back = f"vllm-cost-meter ledger restore {done.copy.file}"
        named = "" if ledger is None else f" --ledger {ledger}"
        yield f"to go back: stop servers, and run `{back}{named}`"

    _answer(_plain(asdict(done)), lines, as_json)


def _missing_lines(missing: Mapping[str, list[str]]) -> Iterable[str]:
    """Yield which bills are missing, run by run."""
    for run_id, ranges in list(missing.items())[:MISSING_RUNS_MAX]:
        more = ", and more" if len(ranges) > MISSING_RANGES_MAX else ""
        yield f"missing bills of run {run_id}: {', '.join(ranges[:MISSING_RANGES_MAX])}{more}"
    if len(missing) > MISSING_RUNS_MAX:
        yield f"and of {len(missing) - MISSING_RUNS_MAX} more runs; --json lists them"


def _plain(answer: Any) -> Any:
    """Return an answer as JSON can have it: files by their names."""
    if isinstance(answer, dict):
        return {name: _plain(value) for name, value in answer.items()}
    return str(answer) if isinstance(answer, Path) else answer


def _refuse_without_journals(url: str) -> None:
    """Raise LedgerError for a ledger that lacks what its journals hold."""
    waiting = waiting_records(url)
    if waiting:
        path = sqlite_path(parse_url(url))
        raise LedgerError(
            f"ledger {path}: {waiting:,} records in its journals are not in it; nothing was"
            f" written: run `vllm-cost-meter ledger apply --ledger {path}` first"
        )


def _catch_up(url: str, what: str = "a copy would lack them") -> None:
    """Have the ledger hold all that clients were told. Raises LedgerError if it does not."""
    left = catch_up(url)
    if left:
        raise LedgerError(
            f"ledger: {left:,} records in journals are not in it yet, and {what};"
            " the server that applies them is behind: try again, or see its log"
        )


def _answer(answer: Any, lines: Callable[[], Iterable[str]], as_json: bool) -> None:
    if as_json:
        print(json.dumps(answer, indent=2))
    else:
        print_lines(lines())
