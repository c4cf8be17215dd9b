"""The command `sweep`: measure curves of cost against load, and full load.

A sweep writes the points it has, even after Ctrl-C or a failure of its client. Exit status: 0 if
all rates were measured, 130 after Ctrl-C, 1 if the client or the server failed, 2 for wrong usage.
"""

import json
import tempfile
from collections.abc import Iterable, Mapping
from dataclasses import replace
from functools import partial
from pathlib import Path
from typing import Annotated, Any

import typer

from vllm_cost_meter import plots
from vllm_cost_meter.cli.options import (
    Config,
    Csv,
    Json,
    Ledger,
    Wide,
    ledger_url,
    local_settings,
    one_line_errors,
    print_answer,
    refuse_both,
    write_output,
)
from vllm_cost_meter.console import print_lines, print_rows
from vllm_cost_meter.economics import saturation_of
from vllm_cost_meter.economics.numbers import positive
from vllm_cost_meter.lab.sweep.bench import Shape
from vllm_cost_meter.lab.sweep.plot import sweep_figure
from vllm_cost_meter.lab.sweep.run import PARTS, Plan
from vllm_cost_meter.lab.sweep.session import TOKEN_ENV, SweepSession
from vllm_cost_meter.lab.sweep.side_client import Deployment
from vllm_cost_meter.ledger.economics import saturation
from vllm_cost_meter.units.money import figure_text
from vllm_cost_meter.units.text import significant

COLUMNS = (
    "shape", "requests_per_s", "window_s", "sent", "failed", "utilization", "concurrency",
    "output_tokens_per_s", "usd_per_m_output_tokens", "usd_per_m_total_tokens", "ttft_p99_ms",
    "tpot_ms", "settled", "saturated",
)  # fmt: skip

# A narrow terminal drops other columns before these.
FIRST = (
    "shape",
    "requests_per_s",
    "output_tokens_per_s",
    "usd_per_m_output_tokens",
    "utilization",
    "ttft_p99_ms",
)


def sweep(
    url: Annotated[str, typer.Option(help="vLLM's URL.")] = "http://127.0.0.1:8000",
    side_url: Annotated[
        str | None,
        typer.Option(help=f"The side endpoint's URL; its admin token is taken from {TOKEN_ENV}."),
    ] = None,
    shape: Annotated[
        list[str] | None,
        typer.Option(help="Tokens of each prompt and reply; repeat it for several. 512:256."),
    ] = None,
    rates: Annotated[
        str | None,
        typer.Option(help="Requests per second, with commas; otherwise found by a burst."),
    ] = None,
    measure_s: Annotated[float, typer.Option(help="Seconds of each rate that count.")] = 120.0,
    warmup: Annotated[float, typer.Option(help="Seconds before them that do not count.")] = 30.0,
    repeats: Annotated[int, typer.Option(min=1, help="How often each rate is measured.")] = 1,
    burstiness: Annotated[float, typer.Option(help="Of arrivals; 1 is a Poisson process.")] = 1.0,
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
    folder: Annotated[Path, typer.Option(help="The folder for curves and plot.")] = Path("sweep"),
    tokenizer: Annotated[
        str | None, typer.Option(help="Of the client; otherwise the model that vLLM loaded.")
    ] = None,
    ledger: Ledger = None,
    config: Config = None,
    wide: Wide = False,
    as_json: Json = False,
    as_csv: Csv = False,
) -> None:
    """Measure cost at one load after another.

    It sends requests with `vllm bench serve` to your server, writes the curve and draws it.

    Example: vllm-cost-meter sweep --shape 512:256 --rates 1,2,4,8
    """
    with one_line_errors():
        refuse_both(as_json=as_json, as_csv=as_csv)
        settings = local_settings(config)
        plan = Plan(
            Shape(1, 1),  # A placeholder: each plan below has its own shape.
            rates=_rates("rates", rates) if rates else (),
            window_s=positive("measure-s", measure_s),
            warmup_s=positive("warmup", warmup),
            repeats=repeats,
            burstiness=positive("burstiness", burstiness),
            seed=seed,
            burst_requests=burst_requests,
            parts=PARTS if parts is None else _rates("parts", parts),
        )
        plans = [replace(plan, shape=Shape.parse(each)) for each in shape or ["512:256"]]
        bound = settings.slo_ttft_ms if slo_ttft_ms is None else positive("slo", slo_ttft_ms)
        _prepare(folder)
        session = SweepSession(url, _side_url(side_url, settings.port), tokenizer, folder)
    status = session.measure(plans)
    if session.curves:
        rows, lines = _write(session, bound, ledger_url(ledger, config))
        show = partial(_show, rows, lines, wide=wide)
        print_answer({"curves": session.curves}, rows, show, as_json=as_json, as_csv=as_csv)
    raise typer.Exit(status)


def _side_url(given: str | None, port: int | None) -> str:
    if given is None and not port:
        raise ValueError("--side-url: expected where the side endpoint is, got no port of it")
    return given or f"http://127.0.0.1:{port}"


def _write(
    session: SweepSession, slo_ttft_ms: float | None, url: str
) -> tuple[list[dict[str, Any]], list[str]]:
    """Write curves and plot, and keep full load if the ledger has these runs.

    Return the points of all curves, and lines that say what was done.
    """
    rows: list[dict[str, Any]] = []
    lines: list[str] = []
    with one_line_errors():
        for curve in session.curves:
            name = str(curve["protocol"]["plan"]["shape"]).replace(":", "x")
            path = session.output / f"curve-{name}.json"
            write_output(path, json.dumps(curve, indent=2) + "\n")
            lines += [f"curve: {path}", *_kept(curve, path, url, session.deployment)]
            rows += [{"shape": name, **point} for point in curve["points"]]
        plot = [session.output / f"sweep{suffix}" for suffix in plots.SUFFIXES]
        plots.save(sweep_figure(session.curves, slo_ttft_ms), plot)
        lines.append(f"plot: {' and '.join(map(str, plot))}")
    return rows, lines


def _show(rows: Iterable[Mapping[str, Any]], lines: Iterable[str], *, wide: bool) -> None:
    print_rows([*map(_shown, rows)], COLUMNS, first=FIRST, wide=wide)
    print_lines(lines)


def _shown(point: Mapping[str, Any]) -> dict[str, str]:
    return {name: figure_text(name, value) for name, value in point.items()}


def _prepare(path: Path) -> None:
    """Make a folder that curves and plots can be written to. Raises ValueError."""
    plots.new_figure(1, 1)  # A missing Matplotlib fails now, and not at the end.
    try:
        path.mkdir(parents=True, exist_ok=True)
        tempfile.TemporaryFile(dir=path).close()
    except OSError as error:
        raise ValueError(f"--folder: {path} cannot be written: {error.strerror}") from None


def _kept(curve: dict[str, Any], path: Path, url: str, deployment: Deployment) -> list[str]:
    """Keep a curve's full load in the ledger that has this deployment; say what was done."""
    try:
        point = saturation_of(curve)
    except ValueError as error:
        return [f"no full load: {error}"]
    reached = f"full load: {significant(point.output_tokens_per_s)} output tokens/s"
    if not saturation.knows_runs(url, deployment.run_ids):
        return [
            f"{reached}; to have penalties against it,"
            f" `vllm-cost-meter saturation import {path}` beside its ledger"
        ]
    saturation.keep(url, [point])
    return [f"{reached}, kept in the ledger"]


def _rates(name: str, text: str) -> tuple[float, ...]:
    """Return the numbers, ascending. Raises ValueError for other text, and for one given twice."""
    found = []
    for each in text.split(","):
        try:
            found.append(positive(name, float(each)))
        except ValueError:
            raise ValueError(f"--{name}: expected numbers above 0, got {each!r}") from None
    if len(set(found)) < len(found):
        raise ValueError(f"--{name}: expected each number once, got {text!r}")
    return tuple(sorted(found))
