"""The command `audit`: check that the books of every engine run balance; exit status 1 if not."""

import json
from collections.abc import Iterator, Mapping
from typing import Any

import typer

from vllm_cost_meter.cli.options import Config, Json, Ledger, reading
from vllm_cost_meter.console import print_lines
from vllm_cost_meter.ledger.queries.audit import DIFFERENCES
from vllm_cost_meter.ledger.queries.open_requests import MAX_LOST
from vllm_cost_meter.records.snapshot import CLASSES

# The audit leaves out these classes of time if they are 0.
SELDOM = {"sleep", "dummy", "lost"}
# Every terminal has so many columns. A class and its time stay on one line.
LINE_CHARS_MAX = 80
# The audit prints at most so many lost requests of a run.
LOST_LINES_MAX = 20


def audit(ledger: Ledger = None, config: Config = None, as_json: Json = False) -> None:
    """Do the books balance? Exit status 1 if not.

    It holds the time of every engine against all that was charged, to the nanosecond.

    Example: vllm-cost-meter audit --ledger ledger.db
    """
    with reading(ledger, config) as reader:
        answer = reader.audit()
    if as_json:
        print(json.dumps(answer, indent=2))
    else:
        print_lines(audit_lines(answer))
    if not answer["balanced"]:
        raise typer.Exit(1)


def audit_lines(answer: Mapping[str, Any]) -> Iterator[str]:
    """Yield the audit as text: a few lines per run, more where it does not balance."""
    for run in answer["runs"]:
        seconds = {name: run[f"{name}_ns"] / 1e9 for name in CLASSES}
        charged = [
            f"{name} {value:.3f}"
            for name, value in seconds.items()
            if name not in SELDOM or run[f"{name}_ns"]
        ]
        yield (
            f"{run['started_at'][:16].replace('T', ' ')} {run['host']} {run['model']},"
            f" engine {run['engine_index']}, run {run['run_id'][:8]}"
        )
        yield from _wrapped(
            f"wall {run['wall_ns'] / 1e9:.3f} s x {run['gpus']} GPU = {charged[0]}",
            *(f"+ {each}" for each in charged[1:-1]),
            f"+ {charged[-1]};",
            f"{run['last_seq']} bills;",
            f"difference {run['difference_ns']} ns",
        )
        for name in DIFFERENCES:
            # The line above already shows the difference of the classes.
            if name != "difference_ns" and run[name]:
                yield f"  {name}: {run[name]}"
        if run["missing_bills"]:
            yield f"  missing bills: {', '.join(map(str, run['missing_bills']))}"
        yield from _lost_lines(run)
    yield "balanced" if answer["balanced"] else "NOT BALANCED"


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
    """Yield the requests that a dead engine had in flight, with their time and tenant."""
    lost = run["lost_requests"]
    if not lost and not run["lost_step_ns"]:
        return
    yield (
        f"  lost {run['lost_ns'] / 1e9:.3f} s: {run['lost_requests_ns'] / 1e9:.3f} of requests"
        f" without a bill, {run['lost_step_ns'] / 1e9:.3f} of the step in flight"
    )
    for one in lost[:LOST_LINES_MAX]:
        yield (
            f"    {one['gpu_time_ns'] / 1e9:.3f} s at {one['as_of']}: tenant"
            f" {one['tenant'] or '(unknown)'}, {one['http_request_id'] or one['request_id']}"
        )
    if len(lost) > LOST_LINES_MAX:
        more = len(lost) - LOST_LINES_MAX
        yield f"    and {more} more with less time; --json lists them, up to {MAX_LOST} in all"
