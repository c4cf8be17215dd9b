"""Plots with Matplotlib: make a figure, label its axes, and save it as PNG or SVG.

Matplotlib is an optional extra that is loaded only to draw; no server loads it. Figures need no
display. We do not use pyplot, because it would keep every figure in memory.

Invariant: a plot is written as PNG or SVG, or refused with a line that says how to get it.
"""

from collections.abc import Callable, Iterable, Sequence
from math import ceil, floor, log10
from pathlib import Path
from typing import TYPE_CHECKING, Literal

if TYPE_CHECKING:
    from matplotlib.axes import Axes
    from matplotlib.figure import Figure

SUFFIXES = (".png", ".svg")
DOTS_PER_INCH = 150
# Colours that the colour-blind can distinguish (Okabe and Ito 2008), in order of use.
COLOURS = ("#0072B2", "#D55E00", "#009E73", "#CC79A7", "#E69F00", "#56B4E9")
MISSING = "a plot needs Matplotlib, which is not installed: pip install matplotlib"


def new_figure(width_inches: float, height_inches: float) -> "Figure":
    """Return an empty figure. Raises ValueError if Matplotlib is missing."""
    try:
        from matplotlib.figure import Figure  # noqa: PLC0415 - an optional extra
    except ImportError:
        raise ValueError(MISSING) from None
    return Figure(figsize=(width_inches, height_inches), layout="constrained")


def label_log_axis(axes: "Axes", which: Literal["x", "y"], text: Callable[[float], str]) -> None:
    """Put ticks on a logarithmic axis; `text` gives a tick's label.

    The ticks are 1, 2 and 5 times each power of ten, or only the powers over more than two decades.
    """
    low, high = axes.get_xlim() if which == "x" else axes.get_ylim()
    first, last = floor(log10(low)), ceil(log10(high))
    steps = (1, 2, 5) if high <= 100 * low else (1,)
    ticks = [step * 10.0**power for power in range(first, last + 1) for step in steps]
    shown = [tick for tick in ticks if low <= tick <= high]
    axis = axes.xaxis if which == "x" else axes.yaxis
    axis.set_ticks(shown, [text(tick) for tick in shown])
    axis.set_ticks([], minor=True)


def is_plot(path: Path) -> bool:
    """Return whether a file's name ends like a plot's."""
    return path.suffix.lower() in SUFFIXES


def refuse_other_names(paths: Iterable[Path]) -> None:
    """Raise ValueError for a file name that does not end like a plot's."""
    for path in paths:
        if not is_plot(path):
            raise ValueError(f"{path}: expected a name that ends in {' or '.join(SUFFIXES)}")


def save(figure: "Figure", paths: Sequence[Path]) -> None:
    """Write a figure to files with names that end in .png or .svg.

    Raises ValueError for any other name, and for a file that cannot be written.
    """
    refuse_other_names(paths)
    for path in paths:
        try:
            # The date is left out, so that equal figures give equal files.
            metadata = {"Date": None} if path.suffix.lower() == ".svg" else None
            figure.savefig(path, dpi=DOTS_PER_INCH, metadata=metadata)
        except OSError as error:
            raise ValueError(f"{path} cannot be written: {error.strerror}") from None
