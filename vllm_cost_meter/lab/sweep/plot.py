"""The plot of a sweep: what tokens cost against load, and below it the latency that comes with it.

Invariant: what is drawn is what the curve's file holds; a point of a rate that was not served is
hollow, since its latency is no more than the length of the backlog.
"""

from collections.abc import Mapping, Sequence
from typing import TYPE_CHECKING, Any

from vllm_cost_meter import plots
from vllm_cost_meter.units.money import format_rate

if TYPE_CHECKING:
    from matplotlib.axes import Axes
    from matplotlib.figure import Figure

PER_M = 1e6


def sweep_figure(curves: Sequence[Mapping[str, Any]], slo_ttft_ms: float | None = None) -> "Figure":
    """Return the plot of the curves of one deployment, a line for each shape.

    Without a price it shows GPU-seconds in place of USD. Raises ValueError without Matplotlib.
    """
    figure = plots.new_figure(8, 6.5)
    cost, latency = figure.subplots(2, 1, sharex=True, height_ratios=(3, 2))
    priced = all(curve["usd_per_hour"] is not None for curve in curves)
    for curve, colour in zip(curves, plots.COLOURS * len(curves), strict=False):
        points = curve["points"]
        rates = [point["arrivals_per_s"] for point in points]
        label = f"{curve['protocol']['plan']['shape']} tokens"
        costs = [_cost_of(curve, point, priced) for point in points]
        _line(cost, rates, costs, points, colour, label)
        _line(latency, rates, [p["ttft_p99_ms"] for p in points], points, colour, label)
        ends = [(x, y) for x, y in zip(rates, costs, strict=True) if y is not None]
        for x, y in ends[:1] + ends[-1:]:
            cost.annotate(
                f"{y:,.3g}", (x, y), textcoords="offset points", xytext=(6, 6), fontsize=8
            )
    unit = "USD" if priced else "GPU-seconds"
    cost.set(xscale="log", yscale="log", ylabel=f"{unit} per million output tokens")
    latency.set(yscale="log", xlabel="requests per second", ylabel="TTFT p99 (ms)")
    if slo_ttft_ms is not None:
        latency.axhline(slo_ttft_ms, color="black", linestyle="--", linewidth=1)
        latency.annotate(
            f"SLO {slo_ttft_ms:g} ms",
            (0.01, slo_ttft_ms),
            xycoords=("axes fraction", "data"),
            xytext=(0, 3),
            textcoords="offset points",
            fontsize=9,
        )
    for axes in (cost, latency):
        axes.margins(0.09, 0.15)
        axes.grid(visible=True, alpha=0.25)
    plots.label_log_axis(cost, "y", _number)
    plots.label_log_axis(latency, "y", _number)
    plots.label_log_axis(latency, "x", _number)
    cost.plot([], [], "o", color="grey", fillstyle="none", label="more than it serves")
    cost.legend(fontsize=9)
    figure.suptitle(title_of(curves[0]), fontsize=10)
    return figure


def title_of(curve: Mapping[str, Any]) -> str:
    """Return what was measured: model, hardware, engine, price and window."""
    protocol = curve["protocol"]
    about, plan = protocol["deployment"], protocol["plan"]
    usd = curve["usd_per_hour"]
    price = "no price" if usd is None else f"{format_rate(usd)} USD per hour"
    return (
        f"{about['model']} in {about['precision']} on {about['engines'] * about['gpus']} x"
        f" {about['hardware']}\nvLLM {about['vllm_version']}, {price}, windows of"
        f" {plan['window_s']:g} s after {plan['warmup_s']:g} s, {protocol['finished_at'][:10]}"
    )


def _number(value: float) -> str:
    return f"{value:,.6g}"


def _cost_of(curve: Mapping[str, Any], point: Mapping[str, Any], priced: bool) -> float | None:
    if priced:
        usd: float | None = point["usd_per_m_output_tokens"]
        return usd
    about, tokens_per_s = curve["protocol"]["deployment"], point["output_tokens_per_s"]
    return about["gpus"] * about["engines"] * PER_M / tokens_per_s if tokens_per_s else None


def _line(
    axes: "Axes",
    rates: Sequence[float],
    values: Sequence[float | None],
    points: Sequence[Mapping[str, Any]],
    colour: str,
    label: str,
) -> None:
    known = [(x, y, p["saturated"]) for x, y, p in zip(rates, values, points, strict=True) if y]
    axes.plot([x for x, _, _ in known], [y for _, y, _ in known], color=colour, label=label)
    for x, y, saturated in known:
        axes.plot([x], [y], "o", color=colour, fillstyle="none" if saturated else "full")
