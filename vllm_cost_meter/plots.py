"""What all plots have in common: where Matplotlib comes from, and how a figure becomes files.

Matplotlib is an optional extra and loaded when something is to be drawn; nobody's server loads it.
A figure is drawn without a display and without pyplot, which would keep every figure in memory.

Invariant: a plot is written as PNG or SVG, or refused with the line that says how to have it.
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
# Colours that the colour-blind can tell apart (Okabe and Ito 2008), in the order they are used.
COLOURS = ("#0072B2", "#D55E00", "#009E73", "#CC79A7", "#E69F00", "#56B4E9")
MISSING = "expected Matplotlib for a plot, it is not installed: pip install matplotlib"


def new_figure(width_inches: float, height_inches: float) -> "Figure":
    """Return an empty figure. Raises ValueError where Matplotlib is missing."""
    try:
        from matplotlib.figure import Figure  # noqa: PLC0415 - an optional extra
    except ImportError:
        raise ValueError(MISSING) from None
    return Figure(figsize=(width_inches, height_inches), layout="constrained")


def label_log_axis(axes: "Axes", which: Literal["x", "y"], text: Callable[[float], str]) -> None:
    """Mark 1, 2 and 5 of each power of ten, or the powers alone over more than two of them."""
    low, high = axes.get_xlim() if which == "x" else axes.get_ylim()
    first, last = floor(log10(low)), ceil(log10(high))
    steps = (1, 2, 5) if high <= 100 * low else (1,)
    ticks = [step * 10.0**power for power in range(first, last + 1) for step in steps]
    shown = [tick for tick in ticks if low <= tick <= high]
    axis = axes.xaxis if which == "x" else axes.yaxis
    axis.set_ticks(shown, [text(tick) for tick in shown])
    axis.set_ticks([], minor=True)


def is_plot(path: Path) -> bool:
    """Return whether a file's name says that it is a plot."""
    return path.suffix.lower() in SUFFIXES


def refuse_other_names(paths: Iterable[Path]) -> None:
    """Raise ValueError for a file that is no plot by its name."""
    for path in paths:
        if not is_plot(path):
            raise ValueError(f"{path}: expected a name that ends in {' or '.join(SUFFIXES)}")


def save(figure: "Figure", paths: Sequence[Path]) -> None:
    """Write a figure to files whose names end in .png or .svg. Raises ValueError for any other."""
    refuse_other_names(paths)
    for path in paths:
        try:
            # Without a date the same figures give the same file.
            metadata = {"Date": None} if path.suffix.lower() == ".svg" else None
            figure.savefig(path, dpi=DOTS_PER_INCH, metadata=metadata)
        except OSError as error:
            raise ValueError(f"{path} cannot be written: {error.strerror}") from None
