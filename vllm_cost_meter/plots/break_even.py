"""Plot the break-even point of self-hosting against an API, and what moves it.

The left side shows the effective cost of a token against utilization, with one line for each rate.
On logarithmic axes the lines are straight. A line meets the API's price at the break-even point.
The right side shows how that point moves when one input changes at a time. The input with the
widest bar is the one to know best.

Invariant: every figure drawn comes from the answer; only the points of the lines are computed here.
"""

from collections.abc import Mapping, Sequence
from itertools import groupby
from pathlib import Path
from typing import TYPE_CHECKING, Any

from vllm_cost_meter.plots import COLOURS, label_log_axis, new_figure, save

if TYPE_CHECKING:
    from matplotlib.axes import Axes

KIND_LABELS = {"on_demand": "on demand", "reserved": "reserved", "spot": "spot"}
INPUTS = {
    "usd_per_hour": "USD per hour",
    "api_usd_per_m": "API's price",
    "tokens_per_hour": "tokens per hour",
    "overhead_usd_per_month": "overhead, USD",
    "overhead_percent": "overhead, %",
}
LOWEST = 0.01
# The axis is wider than the bars by this factor, so that their labels have room.
ROOM = 1.35
# Full load is drawn only if it lies within this factor of the bars; else it would squeeze them.
FAR = 4


def draw(answer: Mapping[str, Any], paths: Sequence[Path]) -> None:
    """Plot an answer of `break-even` to .png or .svg files. Raises ValueError."""
    figure = new_figure(9.2, 4.2)
    cost, moved = figure.subplots(1, 2, width_ratios=(4, 3))
    _draw_cost(cost, answer)
    _draw_sensitivity(moved, answer)
    save(figure, paths)


def _draw_cost(axes: "Axes", answer: Mapping[str, Any]) -> None:
    api, rates = answer["inputs"]["api_usd_per_m"], answer["rates"]
    low = min(LOWEST, *(rate["break_even_utilization"] / 2 for rate in rates))
    for rate, colour in zip(rates, COLOURS, strict=False):
        full, used = rate["effective_usd_per_m_at_full_load"], rate["break_even_utilization"]
        meets = f"equal at {_percent(used)}" if used <= 1 else "dearer at any load"
        label = f"{KIND_LABELS[rate['kind']]}, {rate['usd_per_hour']:.4g} USD/h: {meets}"
        axes.plot([low, 1], [full / low, full], color=colour, linewidth=2, label=label)
        if used <= 1:
            axes.plot([used], [api], "o", color=colour, markersize=8, zorder=3)
    axes.axhline(
        api, color="black", linestyle="--", linewidth=1, zorder=1, label=f"API, {api:.4g} USD"
    )
    axes.set(xscale="log", yscale="log", xlim=(low, 1))
    ends = [rate["effective_usd_per_m_at_full_load"] for rate in rates]
    # The legend stands above the lines: each line of it takes a twelfth of the height.
    bottom, top = min(*ends, api) / 1.5, max(ends) / low
    legend = (len(rates) + 1) / 12
    axes.set_ylim(bottom, bottom * (top / bottom) ** (1 / (1 - legend)))
    label_log_axis(axes, "x", _percent)
    label_log_axis(axes, "y", lambda usd: f"{usd:g}")
    axes.set_title("What a million tokens cost, by load")
    axes.set(xlabel="utilization (log)", ylabel="USD per million tokens (log)")
    axes.grid(alpha=0.3)
    axes.legend(loc="upper right")


def _draw_sensitivity(axes: "Axes", answer: Mapping[str, Any]) -> None:
    names, ends = [], []
    for place, (name, moved) in enumerate(
        groupby(answer["sensitivity"], key=lambda row: row["input"])
    ):
        rows = sorted(moved, key=lambda row: row["break_even_utilization"])
        names.append(INPUTS[name])
        used = [row["break_even_utilization"] for row in rows]
        ends += [used[0], used[-1]]
        axes.plot(
            [used[0], used[-1]], [place] * 2, color=COLOURS[5], linewidth=14, solid_capstyle="butt"
        )
        for row, side, shift in ((rows[0], "right", -6), (rows[-1], "left", 6)):
            axes.annotate(
                f"x {row['factor']:g}", (row["break_even_utilization"], place), ha=side,
                xytext=(shift, 0), textcoords="offset points", va="center",
                bbox={"facecolor": "white", "edgecolor": "none", "pad": 1},
            )  # fmt: skip
    base = answer["break_even_utilization"]
    axes.axvline(base, color="black", linewidth=1)
    if min(ends) / FAR <= 1 <= max(ends) * FAR:
        ends.append(1)
        axes.axvline(1, color=COLOURS[1], linestyle="--", linewidth=1.5)
        axes.annotate(
            "full load", (1, -0.9), color=COLOURS[1], xytext=(3, -3), textcoords="offset points",
            va="top",
        )  # fmt: skip
    axes.set(xscale="log", ylim=(len(names) - 0.4, -0.9))
    axes.set_xlim(min(ends) / ROOM**2, max(ends) * ROOM**2)
    axes.set_yticks(range(len(names)), names)
    label_log_axis(axes, "x", _percent)
    axes.set_title("Where one input moves break-even")
    axes.set(xlabel=f"break-even utilization (as given: {_percent(base)})")


def _percent(part: float) -> str:
    return f"{100 * part:.3g} %"
