"""What all plots have in common: where Matplotlib comes from, and how a figure becomes files.

Matplotlib is an optional extra and loaded when something is to be drawn; nobody's server loads it.
A figure is drawn without a display and without pyplot, which would keep every figure in memory.

Invariant: a plot is written as PNG or SVG, or refused with the line that says how to have it.
"""

from collections.abc import Iterable, Sequence
from pathlib import Path
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from matplotlib.axis import Axis
    from matplotlib.figure import Figure

SUFFIXES = (".png", ".svg")
DOTS_PER_INCH = 150
# Colours that the colour-blind can tell apart (Okabe and Ito 2008), in the order they are used.
COLOURS = ("#0072B2", "#D55E00", "#009E73", "#CC79A7", "#E69F00", "#56B4E9")
MISSING = "expected Matplotlib for a plot, it is not installed: pip install 'vllm-cost-meter[plot]'"


def new_figure(width_inches: float, height_inches: float) -> "Figure":
    """Return an empty figure. Raises ValueError where Matplotlib is missing."""
    try:
        from matplotlib.figure import Figure  # noqa: PLC0415 - an optional extra
    except ImportError:
        raise ValueError(MISSING) from None
    return Figure(figsize=(width_inches, height_inches), layout="constrained")


def label_log_scale(axis: "Axis") -> None:
    """Label a logarithmic axis with plain numbers at 1, 2 and 5."""
    from matplotlib.ticker import FuncFormatter, LogLocator, NullFormatter  # noqa: PLC0415

    axis.set_major_locator(LogLocator(subs=(1, 2, 5)))
    axis.set_major_formatter(FuncFormatter(lambda value, _: f"{value:,.6g}"))
    axis.set_minor_formatter(NullFormatter())


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
