"""What all plots have in common."""

import sys
from pathlib import Path

import pytest

from vllm_cost_meter import plots


def test_a_figure_becomes_png_and_svg(tmp_path: Path) -> None:
    figure = plots.new_figure(4, 3)
    figure.add_subplot().plot([1, 2], [3, 4])
    plots.save(figure, [tmp_path / "a.png", tmp_path / "a.svg"])
    assert (tmp_path / "a.png").read_bytes().startswith(b"\x89PNG")
    assert "<svg" in (tmp_path / "a.svg").read_text(encoding="utf-8")


def test_another_kind_of_file_is_refused(tmp_path: Path) -> None:
    with pytest.raises(ValueError, match=r"expected a name that ends in \.png or \.svg"):
        plots.save(plots.new_figure(4, 3), [tmp_path / "a.pdf"])


def test_a_folder_that_is_missing_is_said(tmp_path: Path) -> None:
    with pytest.raises(ValueError, match="cannot be written: No such file"):
        plots.save(plots.new_figure(4, 3), [tmp_path / "none" / "a.png"])


def test_where_matplotlib_is_missing_the_line_says_how_to_have_it(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    monkeypatch.setitem(sys.modules, "matplotlib.figure", None)
    with pytest.raises(ValueError, match="pip install matplotlib"):
        plots.new_figure(4, 3)
