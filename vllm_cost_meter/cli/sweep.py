"""The commands `sweep` and `saturation`: curves of cost against load, and full load out of them.

A sweep writes what it has at any end: done, Ctrl-C, or a client that failed. Exit status 0 if all
rates were measured, 130 after Ctrl-C, 1 if the client or the server failed, 2 for wrong usage.
"""

import json
import os
import tempfile
import time
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import replace
from pathlib import Path
from typing import Annotated, Any

import typer
from rich.console import Console
from rich.progress import BarColumn, Progress, TextColumn, TimeElapsedColumn, TimeRemainingColumn

from vllm_cost_meter import plots
from vllm_cost_meter.cli.calc import read_points
from vllm_cost_meter.cli.options import Json, Ledger, ledger_url, one_line_errors, write_output
from vllm_cost_meter.config.loading import load_settings
from vllm_cost_meter.console import interruptible, print_rows
from vllm_cost_meter.economics import saturation_of
from vllm_cost_meter.economics.numbers import positive
from vllm_cost_meter.errors import CostMeterError, ServerError
from vllm_cost_meter.lab.sweep.bench import Shape, Target
from vllm_cost_meter.lab.sweep.curve import Context, curve_file
from vllm_cost_meter.lab.sweep.meter import Deployment, Meter, served_by
from vllm_cost_meter.lab.sweep.plot import sweep_figure
from vllm_cost_meter.lab.sweep.run import PARTS, Measured, Plan, Sweep
from vllm_cost_meter.ledger.economics import saturation
from vllm_cost_meter.units.text import plain, rounded

FAILED, INTERRUPTED = 1, 130
TOKEN = "COST_METER_ADMIN_TOKEN"  # noqa: S105 - the name of a variable
COLUMNS = (
    "shape", "requests_per_s", "window_s", "sent", "failed", "utilization", "concurrency",
    "output_tokens_per_s", "usd_per_m_output_tokens", "usd_per_m_total_tokens", "ttft_p99_ms",
    "tpot_ms", "settled", "saturated",
)  # fmt: skip
KEPT_COLUMNS = (
    "measured_at", "model", "precision", "vllm_version", "hardware", "gpus", "engines",
    "input_tokens", "output_tokens", "output_tokens_per_s", "requests_per_s", "window_s",
)  # fmt: skip

app = typer.Typer(
    name="saturation",
    help="Full load as sweeps measured it: what `penalty` is against.",
    no_args_is_help=True,
    pretty_exceptions_enable=False,
)


def sweep(
    url: Annotated[str, typer.Option(help="vLLM's URL.")] = "http://127.0.0.1:8000",
    side_url: Annotated[
        str | None,
        typer.Option(help=f"The side endpoint's URL; its admin token is taken from {TOKEN}."),
    ] = None,
    shape: Annotated[
        list[str] | None,
        typer.Option(help="Tokens of each prompt and reply; repeat it for several. 512:256."),
    ] = None,
    rates: Annotated[
        str | None,
        typer.Option(help="Requests per second, with commas; otherwise found by a burst."),
    ] = None,
    window: Annotated[float, typer.Option(help="Seconds that count, of each rate.")] = 120.0,
    warmup: Annotated[float, typer.Option(help="Seconds before them that do not.")] = 30.0,
    repeats: Annotated[int, typer.Option(min=1, help="How often each rate is measured.")] = 1,
    burstiness: Annotated[
        float, typer.Option(help="Of the gaps between arrivals; 1 is a Poisson process.")
    ] = 1.0,
    burst_requests: Annotated[
        int, typer.Option(min=8, help="How many requests the burst is that finds the rates.")
    ] = 256,
    parts: Annotated[
        str | None,
        typer.Option(help="The rates to find, as parts of what is served, with commas."),
    ] = None,
    seed: Annotated[int, typer.Option(min=0, help="Of the random prompts.")] = 0,
    slo_ttft_ms: Annotated[
        float | None, typer.Option(help="A line in the plot; otherwise the setting's.")
    ] = None,
    output: Annotated[
        Path, typer.Option("--output", "-o", help="The folder for curves and plot.")
    ] = Path("sweep"),
    tokenizer: Annotated[
        str | None, typer.Option(help="Of the client; otherwise the model that vLLM loaded.")
    ] = None,
    ledger: Ledger = None,
    as_json: Json = False,
) -> None:
    """Measure what tokens cost at one load after another, with `vllm bench serve` as the client."""
    with one_line_errors():
        settings = load_settings()
        plan = Plan(
            Shape(1, 1),  # of each in its turn
            rates=_rates("rates", rates) if rates else (),
            window_s=positive("window", window),
            warmup_s=positive("warmup", warmup),
            repeats=repeats,
            burstiness=positive("burstiness", burstiness),
            seed=seed,
            burst_requests=burst_requests,
            parts=PARTS if parts is None else _rates("parts", parts),
        )
        plans = [replace(plan, shape=Shape.parse(each)) for each in shape or ["512:256"]]
        bound = settings.slo_ttft_ms if slo_ttft_ms is None else positive("slo", slo_ttft_ms)
        plots.new_figure(1, 1)  # a missing package is told now, not at the end
        _make_folder(output)
        found = _Found(url, _side_url(side_url, settings.port), tokenizer, output)
    status = found.measure(plans)
    if found.curves:
        _write(found, bound, ledger, as_json=as_json)
    if status:
        raise typer.Exit(status)


class _Found:
    """Measures plan after plan, and holds what came of it, at any end."""

    def __init__(self, url: str, side_url: str, tokenizer: str | None, output: Path) -> None:
        """Raises ServerError where there is no metered server."""
        self.output = output
        self.meter = Meter(side_url, os.environ.get(TOKEN))
        model, root = served_by(url)
        self.target = Target(url, model, tokenizer or root)
        self.deployment = self.meter.deployment()
        self.curves: list[dict[str, Any]] = []

    def measure(self, plans: Sequence[Plan]) -> int:
        """Measure all shapes; return the exit status. What was measured stays."""
        try:
            with interruptible(), _progress() as watcher:
                for plan in plans:
                    watcher.shapes_left = len(plans) - len(self.curves) - 1
                    self._measure(plan, watcher)
        except KeyboardInterrupt:
            return _failed("interrupted; what was measured until then is kept", INTERRUPTED)
        except CostMeterError as error:
            return _failed(str(error), FAILED)
        return 0

    def _measure(self, plan: Plan, watcher: "_Watcher") -> None:
        measured: list[Measured] = []
        started_at_ns = time.time_ns()
        # Now: at the end of a sweep that fails nobody may be there to tell.
        price, prices = self.meter.prices()
        done = False
        try:
            with tempfile.TemporaryDirectory(prefix="vllm-cost-meter-sweep-") as folder:
                sweep = Sweep(plan, self.target, self.meter, Path(folder), os.environ, watcher)
                for point in sweep.points():
                    measured += [point]
            self._refuse_another()
            done = True
        finally:
            if measured:
                times_ns = (started_at_ns, time.time_ns())
                context = Context(plan, self.deployment, price, prices, *times_ns, not done)
                self.curves.append(curve_file(context, measured))

    def _refuse_another(self) -> None:
        """Raise ServerError if something else serves than when the sweep began."""
        if (now := self.meter.deployment()) != self.deployment:
            raise ServerError(
                f"expected the engines that the sweep began with ({_ids(self.deployment)}), got"
                f" others ({_ids(now)}): was the server restarted?"
            )


def _side_url(told: str | None, port: int | None) -> str:
    if told is None and not port:
        raise ValueError("--side-url: expected where the side endpoint is, got no port of it")
    return told or f"http://127.0.0.1:{port}"


def _ids(deployment: Deployment) -> str:
    return ", ".join(deployment.run_ids)


def _write(found: _Found, slo_ttft_ms: float | None, ledger: str | None, *, as_json: bool) -> None:
    """Write curves and plot, print the table, and keep full load where the ledger is at hand."""
    rows, lines = [], []
    with one_line_errors():
        for curve in found.curves:
            name = str(curve["protocol"]["plan"]["shape"]).replace(":", "x")
            path = found.output / f"curve-{name}.json"
            write_output(path, json.dumps(curve, indent=2) + "\n")
            lines += [f"curve: {path}", *_kept(curve, path, ledger, found.deployment)]
            rows += [
                {"shape": name, **{key: _cell(value) for key, value in point.items()}}
                for point in curve["points"]
            ]
        plot = [found.output / f"sweep{suffix}" for suffix in plots.SUFFIXES]
        plots.save(sweep_figure(found.curves, slo_ttft_ms), plot)
        lines.append(f"plot: {' and '.join(map(str, plot))}")
    if as_json:
        print(json.dumps({"curves": found.curves}, indent=2))
        return
    print_rows(rows, COLUMNS)
    print("\n".join(map(plain, lines)))


def _make_folder(path: Path) -> None:
    """Make a folder that files can be written to. Raises ValueError."""
    try:
        path.mkdir(parents=True, exist_ok=True)
        tempfile.TemporaryFile(dir=path).close()
    except OSError as error:
        raise ValueError(f"--output: {path} cannot be written: {error.strerror}") from None


def _kept(
    curve: dict[str, Any], path: Path, ledger: str | None, deployment: Deployment
) -> list[str]:
    """Keep a curve's full load in the ledger that has this deployment; say what was done."""
    try:
        point = saturation_of(curve)
    except ValueError as error:
        return [f"no full load: {error}"]
    url = ledger_url(ledger)
    if not saturation.knows_runs(url, deployment.run_ids):
        return [
            f"full load: {point.output_tokens_per_s:.6g} output tokens/s; to have penalties"
            f" against it, `vllm-cost-meter saturation import {path}` beside its ledger"
        ]
    saturation.keep(url, [point])
    return [f"full load: {point.output_tokens_per_s:.6g} output tokens/s, kept in the ledger"]


@app.command("import")
def import_(
    files: Annotated[list[Path], typer.Argument(help="Curves that `sweep` wrote.")],
    ledger: Ledger = None,
) -> None:
    """Keep the full load of curves in the ledger; one without its whole protocol is refused."""
    with one_line_errors():
        points = []
        for file in files:
            try:
                points.append(saturation_of(read_points(file)))
            except ValueError as error:
                raise ValueError(f"{file}: {error}") from None
        new = saturation.keep(ledger_url(ledger), points)
    print(f"{new} new, {len(points) - new} known before")


@app.command("list")
def list_(ledger: Ledger = None, as_json: Json = False) -> None:
    """Print the full loads that the ledger has, the latest first."""
    with one_line_errors():
        rows = saturation.kept(ledger_url(ledger))
    if as_json:
        shown = [{**row, "protocol": json.loads(row["protocol"])} for row in rows]
        print(json.dumps({"saturation_points": shown}, indent=2))
        return
    print_rows(rows, KEPT_COLUMNS)


class _Watcher:
    """Shows on one line of a terminal what is measured and how long it will take; lines else."""

    def __init__(self, progress: Progress, console: Console) -> None:
        self._progress, self._console = progress, console
        self._task = progress.add_task("starting", total=None)
        self._last = ""
        self.shapes_left = 0

    def plan(self, left_s: float) -> None:
        done_s = self._progress.tasks[0].elapsed or 0.0
        total_s = done_s + left_s * (1 + self.shapes_left)
        self._progress.update(self._task, total=total_s, completed=done_s)

    def doing(self, what: str) -> None:
        self._progress.update(self._task, description=what)
        if not self._console.is_terminal and what != self._last:
            self._console.print(what)
        self._last = what

    def tick(self) -> None:
        self._progress.update(self._task, completed=self._progress.tasks[0].elapsed or 0.0)

    def measured(self, point: Measured) -> None:
        found = point.steady
        notes = [
            *(["more than it serves"] if found.saturated else []),
            *([] if found.saturated or point.settled else ["NOT settled: the warm-up was short"]),
            *([f"{found.failed} requests FAILED"] if found.failed else []),
            *([f"{point.other_requests} OTHER requests came"] if point.other_requests else []),
        ]
        self._console.print(
            f"{point.requests_per_s:g} requests/s, {found.window_s:.0f} s:"
            f" {found.output_tokens_per_s:.6g} output tokens/s, TTFT p99"
            f" {rounded(found.ttft_p99_ms)} ms, utilization {rounded(point.utilization)}"
            + "".join(f"; {note}" for note in notes),
            soft_wrap=True,
        )


@contextmanager
def _progress() -> Iterator[_Watcher]:
    # Not on standard output: that is for the table, or JSON.
    console = Console(stderr=True, markup=False, highlight=False)
    columns = (
        TextColumn("{task.description}"), BarColumn(), TimeElapsedColumn(), TextColumn("left"),
        TimeRemainingColumn(elapsed_when_finished=True),
    )  # fmt: skip
    with Progress(
        *columns, console=console, transient=True, disable=not console.is_terminal
    ) as progress:
        yield _Watcher(progress, console)


def _failed(why: str, status: int) -> int:
    typer.echo("\n".join(plain(f"vllm-cost-meter sweep: {x}") for x in why.splitlines()), err=True)
    return status


def _cell(value: object) -> object:
    return rounded(value) if isinstance(value, float) else value


def _rates(name: str, text: str) -> tuple[float, ...]:
    """Return numbers, ascending. Raises ValueError for what is none, or stands twice."""
    found = []
    for each in text.split(","):
        try:
            found.append(positive(name, float(each)))
        except ValueError:
            raise ValueError(f"--{name}: expected numbers above 0, got {each!r}") from None
    if len(set(found)) < len(found):
        raise ValueError(f"--{name}: expected each number once, got {text!r}")
    return tuple(sorted(found))
