"""The command `audit`: check that the books of every engine run balance.

The exit status is 0 only if they do: it is 1 if they do not, and if the ledger cannot tell.
"""

import json
from collections.abc import Callable, Iterator, Mapping, Sequence
from typing import Annotated, Any

import typer

from vllm_cost_meter.cli.options import Config, Json, Ledger, dropped_lines, reading
from vllm_cost_meter.console import print_lines
from vllm_cost_meter.ledger.auditing.audit import DIFFERENCES
from vllm_cost_meter.ledger.ends.lost import MAX_LOST
from vllm_cost_meter.records.snapshot import CLASSES

# The audit leaves out these classes of time if they are 0.
SUMS = ("sums_difference_ns", "sums_difference_block_ms")
SELDOM = {"sleep", "dummy", "recomputed", "lost"}
# Every terminal has so many columns. A class and its time stay on one line.
LINE_CHARS_MAX = 80
NOT_READ = "The bills were not read again, only what they add up to: --full reads them."
# The audit prints at most so many lost requests, and replies without a bill, of a run.
LINES_MAX = 20


Full = Annotated[
    bool, typer.Option("--full", help="Read every bill again, and find what was changed outside.")
]


def audit(
    ledger: Ledger = None, config: Config = None, full: Full = False, as_json: Json = False
) -> None:
    """Do the books balance? Exit status 1 if not.

    It holds the time of every engine against all that was charged, to the nanosecond. A ledger
    without an engine run, or with one of which only bills are known, proves nothing: status 1 too.

    What the bills add up to is kept with them and read there. --full reads every bill again: it
    takes a minute for some million bills, and finds what somebody changed in the file.

    Example: vllm-cost-meter audit --ledger ledger.db
    """
    with reading(ledger, config) as reader:
        answer = reader.audit(full=full)
    if as_json:
        print(json.dumps(answer, indent=2))
    else:
        print_lines(audit_lines(answer))
    if not answer["balanced"]:
        raise typer.Exit(1)


def audit_lines(answer: Mapping[str, Any]) -> Iterator[str]:
    """Yield the audit as text: a few lines per run, more where it does not balance."""
    if (fleet := answer["fleet"]) is not None:
        yield from _fleet_lines(fleet)
    for run in answer["runs"]:
        yield (
            f"{run['started_at'][:16].replace('T', ' ')} {run['host']} {run['model']},"
            f" engine {run['engine_index']}, run {run['run_id'][:8]}"
        )
        yield from _wrapped(*_time_pieces(run))
        for name in DIFFERENCES:
            # The line above already shows the difference of the classes.
            if name != "difference_ns" and run[name]:
                yield f"  {name}: {run[name]}"
        yield from _missing_lines(run)
        yield from _lost_lines(run)
    for bare in answer["without_totals"]:
        yield (
            f"{bare['started_at'][:16].replace('T', ' ')} run {bare['run_id'][:8]}:"
            f" {bare['bills']} bills, {bare['ledger_ns'] / 1e9:.3f} s; no totals are known"
        )
        for name in ("uneven_bills", "changed", *SUMS):
            if bare[name]:
                yield f"  {name}: {bare[name]}"
        yield from _missing_lines(bare)
    for aside in answer["set_aside"]:
        yield f"{aside['file']}: set aside, and what it holds may be missing above;"
        yield f"  {aside['reason']}"
    for loss in answer["journal_losses"][:LINES_MAX]:
        yield (
            f"journal {loss['journal_id'][:8]}: {loss['records']} records after record"
            f" {loss['after_number']} are lost: {loss['reason']}"
        )
    yield from dropped_lines(answer["rows_kept_from"])
    if not answer["full"] and (answer["runs"] or answer["without_totals"]):
        yield NOT_READ
    yield _verdict(answer)


def _fleet_lines(fleet: Mapping[str, Any]) -> Iterator[str]:
    """Yield how much of a fleet is complete, and of each other run what may be missing."""
    yield (
        f"fleet: {fleet['complete_runs']} of {fleet['runs']} runs of {fleet['senders']} ledgers are"
        " complete: every bill is here, and they add up to the nanosecond"
    )
    incomplete = fleet["incomplete"]
    for run in incomplete[:LINES_MAX]:
        held_by = ", ".join(run["held_by"]) or "(unknown)"
        missing = f"bills {', '.join(run['missing_bills'])}"
        said = {
            "arriving": f"{_awaited(run)} here yet; {held_by} sends them",
            "missing": f"{missing} are not here; {held_by} holds them, silent since",
            "unknown": "later bills are unknown; the last word of its server was at",
        }[run["state"]]
        at = "" if run["state"] == "arriving" else f" {run['last_word_at']}"
        which = f"run {run['run_id'][:8]} on {run['host']}, up to bill {run['last_seq']}"
        yield f"  {which}: {said}{at}"
    if len(incomplete) > LINES_MAX:
        yield f"  and {len(incomplete) - LINES_MAX} more; --json lists them"
    for unsent in fleet["unsent"][:LINES_MAX]:
        yield (
            f"  run {unsent['run_id'][:8]}: {unsent['host']} dropped the rows of"
            f" {unsent['bills']} bills ({unsent['first_seq']}-{unsent['last_seq']}) before they"
            " were sent; what they add up to is here"
        )


def _awaited(run: Mapping[str, Any]) -> str:
    if not run["missing_bills"]:
        return "later bills may not be"
    return f"bills {', '.join(run['missing_bills'])} are not"


def _verdict(answer: Mapping[str, Any]) -> str:
    if answer["balanced"] is None:
        return f"NOT PROVED: {_WHY_UNKNOWN[answer['reason']]}"
    return "balanced" if answer["balanced"] else "NOT BALANCED"


_WHY_UNKNOWN = {
    "not_applied": "journals hold what the ledger lacks: run `vllm-cost-meter ledger apply`",
    "set_aside": "a damaged file was set aside: repair it and merge it back, as said above",
    "not_sent": "a server may hold bills that this fleet lacks, as said above",
    "no_runs": "this ledger has no engine run",
    "no_totals": "no totals are known of a run, so its bills cannot be held against anything",
}


def _time_pieces(run: Mapping[str, Any]) -> Iterator[str]:
    """Yield the equation of a run: its wall time, and beyond it its last bills, by class."""
    charged = [
        f"{name} {run[f'{name}_ns'] / 1e9:.3f}"
        for name in CLASSES
        if name not in SELDOM or run[f"{name}_ns"]
    ]
    beyond_ns = run["last_bills_ns"] - run["last_bills_in_flight_ns"]
    wall = f"wall {run['wall_ns'] / 1e9:.3f} s x {run['gpus']} GPU"
    beyond = f" + {beyond_ns / 1e9:.3f} s in its last bills" if beyond_ns else ""
    yield f"{wall}{beyond} = {charged[0]}"
    yield from (f"+ {each}" for each in charged[1:-1])
    yield f"+ {charged[-1]};"
    yield f"{run['last_seq']} bills;"
    yield f"difference {run['difference_ns']} ns"


def _missing_lines(run: Mapping[str, Any]) -> Iterator[str]:
    if run["missing_bills"]:
        yield f"  missing bills: {', '.join(map(str, run['missing_bills']))}"


def _wrapped(*pieces: str) -> Iterator[str]:
    """Yield the pieces in lines that fit a terminal; all but the first are indented further."""
    line = ""
    for piece in pieces:
        longer = f"{line} {piece}" if line else f"  {piece}"
        if line and len(longer) > LINE_CHARS_MAX:
            yield line
            longer = f"    {piece}"
        line = longer
    yield line


def _lost_lines(run: Mapping[str, Any]) -> Iterator[str]:
    """Yield what a dead engine took along: when it died, and each request with time and tenant."""
    lost, replies = run["lost_requests"], run["unbilled_replies"]
    if not (lost or replies or run["lost_step_ns"] or run["last_bills"]):
        return
    yield from _wrapped(
        f"died after {run['heard_at']} and bill {run['last_seq']};",
        f"last snapshot {run['taken_at']},",
        f"after bill {run['snapshot_seq']}:",
        f"{run['running']} ran,",
        f"{run['waiting']} waited",
    )
    if lost or run["lost_step_ns"]:
        parts = (run[name] or 0 for name in ("lost_ns", "lost_requests_ns", "lost_step_ns"))
        all_s, requests_s, step_s = (f"{ns / 1e9:.3f}" for ns in parts)
        yield (
            f"  lost {all_s} s: {requests_s} of requests without a bill, {step_s} of the step in"
            " flight"
        )
    yield from _listed(lost, _lost_line)
    if replies:
        yield "  ended without a bill as it died, on this server or another:"
    yield from _listed(replies, _reply_line)


def _listed(
    rows: Sequence[Mapping[str, Any]], line_of: Callable[[Mapping[str, Any]], str]
) -> Iterator[str]:
    yield from (f"    {line_of(row)}" for row in rows[:LINES_MAX])
    if len(rows) > LINES_MAX:
        yield f"    and {len(rows) - LINES_MAX} more; --json lists them, up to {MAX_LOST} in all"


def _lost_line(one: Mapping[str, Any]) -> str:
    used = "(unknown)"
    if one["gpu_time_ns"] is not None:
        used = f"{one['gpu_time_ns'] / 1e9:.3f} s at {one['as_of']}"
    return (
        f"{used}: tenant {one['tenant'] or '(unknown)'},"
        f" {one['http_request_id'] or one['request_id']}"
    )


def _reply_line(one: Mapping[str, Any]) -> str:
    told = ""
    if one["gpu_time_ns"]:
        told = f" told {one['gpu_time_ns'] / 1e9:.3f} s,"
    return f"{one['status']} at {one['finished_at']},{told} tenant {one['tenant']}, " + str(
        one["http_request_id"]
    )
