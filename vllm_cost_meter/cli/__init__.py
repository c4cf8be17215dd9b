"""The command `vllm-cost-meter`: reports, statements, prices, tenants, audit, validate, demo.

Reads the ledger that the settings name, or `--ledger`; a running server is not needed. Exit status:
0 done, 1 the books do not balance or something is not as it should be, 2 wrong usage or settings,
one line saying which. Nothing imports this module.
"""

import json
from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path
from typing import Annotated, Any

import typer

from vllm_cost_meter.cli.break_even import break_even_
from vllm_cost_meter.cli.budgets import budgets
from vllm_cost_meter.cli.calc import app as calc
from vllm_cost_meter.cli.compare import compare_
from vllm_cost_meter.cli.economics import economics_, explain_figure
from vllm_cost_meter.cli.invoice import app as invoice
from vllm_cost_meter.cli.options import Json, Ledger, ledger_url, one_line_errors, reading
from vllm_cost_meter.cli.report import report, statement
from vllm_cost_meter.cli.sweep import app as saturation
from vllm_cost_meter.cli.sweep import sweep
from vllm_cost_meter.cli.tenants import app as tenants
from vllm_cost_meter.config.loading import load_settings
from vllm_cost_meter.console import print_rows
from vllm_cost_meter.lab.tiny_model import default_path
from vllm_cost_meter.ledger.economics.figures import FIGURES
from vllm_cost_meter.ledger.queries.open_requests import MAX_LOST
from vllm_cost_meter.reports.price_lines import PRICE_COLUMNS
from vllm_cost_meter.units.text import plain
from vllm_cost_meter.version import __version__

app = typer.Typer(
    name="vllm-cost-meter",
    help="What the requests of a vLLM server cost: measured, per request and per tenant.",
    no_args_is_help=True,
    add_completion=False,
    pretty_exceptions_enable=False,
)
app.add_typer(tenants)
app.add_typer(calc)
app.add_typer(saturation)
app.add_typer(invoice)

# Lost requests of a run that the audit prints.
LOST_LINES_MAX = 20
app.command()(budgets)
app.command("break-even")(break_even_)
app.command("compare")(compare_)
app.command("economics")(economics_)
app.command()(report)
app.command()(statement)
app.command()(sweep)


@app.command()
def explain(
    request_id: Annotated[
        str,
        typer.Argument(
            help="Id in the reply, X-Request-Id, the record's own, an internal one, or the name of"
            " a figure of `economics`."
        ),
    ],
    ledger: Ledger = None,
    as_json: Json = False,
) -> None:
    """Print how a request's bill came about, to be recomputed by hand, or a figure's SQL."""
    if request_id in FIGURES:
        explain_figure(request_id, ledger, as_json=as_json)
        return
    with reading(ledger) as reader:
        rows = reader.look_up(request_id)
        if not rows:
            raise ValueError(f"no request with the id {request_id!r} in the ledger")
        answers = [reader.explain(row) for row in rows]
    if as_json:
        print(json.dumps(answers[0] if len(answers) == 1 else {"matches": answers}, indent=2))
        return
    for answer in answers:
        print("\n".join(plain(line) for line in answer["text"]))


@app.command()
def prices(as_json: Json = False) -> None:
    """Print the price book of the settings: each entry, and from when to when it holds."""
    with one_line_errors():
        book = load_settings().price_book.listed()
    if as_json:
        print(json.dumps(book, indent=2))
        return
    for name, columns in PRICE_COLUMNS.items():
        if book[name]:
            print_rows(book[name], columns)
    if not book["prices"]:
        print("no price: set COST_METER_GPU_HOUR_USD, or [[prices]] in the configuration file")


@app.command()
def audit(ledger: Ledger = None, as_json: Json = False) -> None:
    """Prove that the books balance at the last snapshot of every engine run; exit 1 if not."""
    with reading(ledger) as reader:
        answer = reader.audit()
    if as_json:
        print(json.dumps(answer, indent=2))
    else:
        for line in audit_lines(answer):
            print(plain(line))
    if not answer["balanced"]:
        raise typer.Exit(1)


@app.command()
def doctor(ledger: Ledger = None, as_json: Json = False) -> None:
    """Check the installation: loaded, native, vLLM understood, ledger writable, adding up."""
    # It imports vLLM, which takes seconds that a report should not take.
    from vllm_cost_meter.cli.doctor import examine

    with one_line_errors():
        book = load_settings().price_book
    findings = examine(ledger_url(ledger), book)
    if as_json:
        print(json.dumps({"ok": all(f.ok for f in findings), "findings": _dicts(findings)}))
    else:
        for finding in findings:
            print(plain(f"{'ok  ' if finding.ok else 'FAIL'} {finding.name}: {finding.detail}"))
    if not all(finding.ok for finding in findings):
        raise typer.Exit(1)


@app.command()
def validate(
    gpu: Annotated[
        list[str] | None, typer.Option(help="h100, a100 or l4; repeat it for several, or all.")
    ] = None,
    model: Annotated[
        list[str] | None,
        typer.Option(
            help="llama-3.1-8b, qwen3-30b-a3b, or qwen3-30b-a3b-random (experts chosen at random);"
            " repeat it for several, or all."
        ),
    ] = None,
    batch: Annotated[
        list[int] | None,
        typer.Option(min=1, max=1000, help="Mean requests per step; or 10, 60 and 160."),
    ] = None,
    steps: Annotated[
        int, typer.Option(min=100, help="Steps to simulate; the first third is not compared.")
    ] = 30_000,
    every: Annotated[int, typer.Option(min=1, help="Compare every n-th step.")] = 10,
    seed: Annotated[int, typer.Option(min=0, help="Another seed, other traffic.")] = 0,
    step_log: Annotated[
        Path | None, typer.Option(help="Replay a file that COST_METER_STEP_LOG wrote instead.")
    ] = None,
    server: Annotated[
        str | None,
        typer.Option(
            help="Measure on a real server of this model instead: two tenants, apart and"
            " together. A folder or a name; `tiny` is the demo's."
        ),
    ] = None,
    rounds: Annotated[int, typer.Option(min=2, help="With --server: how often.")] = 5,
    as_json: Json = False,
) -> None:
    """Measure how wrong each attribution method is, against a simulated or a measured truth."""
    # It loads the native attribution, and a simulation loads numpy and vLLM.
    from vllm_cost_meter.lab.validation import command, tables

    with one_line_errors():
        if step_log is not None and (gpu or model or batch):
            raise ValueError("--step-log: expected without --gpu, --model and --batch")
        if server is not None:
            path = str(default_path()) if server == "tiny" else server
            answer, show = command.measured(path, rounds), tables.show_servers
        elif step_log is None:
            plan = command.Plan(gpu or (), model or (), batch or (), steps, every, seed=seed)
            answer, show = command.validate(plan), tables.show_truths
        else:
            answer, show = command.replayed(step_log), tables.show_replay
    if as_json:
        print(json.dumps(answer))
    else:
        show(answer)


@app.command()
def demo(
    model: Annotated[
        str | None, typer.Option(help="Model to serve; a tiny random one otherwise.")
    ] = None,
    keep: Annotated[bool, typer.Option(help="Leave the server running at the end.")] = False,
    sweep: Annotated[
        bool, typer.Option(help="Measure cost against load instead, and plot it.")
    ] = False,
    print_model_path: Annotated[
        bool, typer.Option(help="Print where the tiny model is, and do nothing else.")
    ] = False,
) -> None:
    """Start a real vLLM server with the meter inside, let three tenants use it, print the bill."""
    # It imports the OpenAI client, which reports do not need.
    from vllm_cost_meter.lab.demo.run import run_demo
    from vllm_cost_meter.lab.tiny_model import default_path

    if print_model_path:
        print(default_path())
        return
    raise typer.Exit(run_demo(model, keep=keep, sweep=sweep))


@app.callback(invoke_without_command=True)
def main(version: Annotated[bool, typer.Option("--version", help="Print it.")] = False) -> None:
    """What the requests of a vLLM server cost: measured, per request and per tenant."""
    if version:
        print(__version__)
        raise typer.Exit


# -- helpers ------------------------------------------------------------------------------------


def _dicts(findings: Sequence[Any]) -> list[dict[str, Any]]:
    return [{"name": f.name, "ok": f.ok, "detail": f.detail} for f in findings]


def audit_lines(answer: Mapping[str, Any]) -> Iterator[str]:
    """Yield the audit as text: one line per run, more where it does not balance."""
    for run in answer["runs"]:
        parts = " + ".join(
            f"{name} {run[f'{name}_ns'] / 1e9:.3f}"
            for name in ("requests", "in_flight", "idle", "host", "startup", "tail")
        )
        rest = sum(run[f"{name}_ns"] for name in ("sleep", "dummy", "lost")) / 1e9
        yield (
            f"run {run['run_id'][:8]} engine {run['engine_index']}: wall {run['wall_ns'] / 1e9:.3f}"
            f" s x {run['gpus']} GPU = {parts} + other {rest:.3f}; {run['last_seq']} bills;"
            f" difference {run['difference_ns']} ns"
        )
        for name in (
            "billed_difference_ns",
            "ledger_difference_ns",
            "hours_difference_ns",
            "in_flight_difference_ns",
            "uneven_bills",
            "energy_difference_mj",
        ):
            if run[name]:
                yield f"  {name}: {run[name]}"
        if run["missing_bills"]:
            yield f"  missing bills: {', '.join(map(str, run['missing_bills']))}"
        yield from _lost_lines(run)
    yield "balanced" if answer["balanced"] else "NOT BALANCED"


def _lost_lines(run: Mapping[str, Any]) -> Iterator[str]:
    """Yield whose the time was that a dead engine had in flight."""
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
