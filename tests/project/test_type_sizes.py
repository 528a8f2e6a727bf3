"""No type in a plot or a drawing is smaller than the talk's test counts with, so that
the last row reads all of it."""

import ast
from pathlib import Path

import matplotlib.pyplot as plt
import nbformat
import pytest
from matplotlib.font_manager import FontProperties

from lowrank_utils.plots import use_style

ROOT = Path(__file__).resolve().parents[2]
NOTEBOOKS = sorted((ROOT / "notebooks").glob("[0-9]*.ipynb"))
# In points: what tests/browser/test_slides.py takes for the smallest.
SMALLEST_IN_PLOTS, SMALLEST_IN_DRAWINGS = 10, 12
SIZES = {"size", "fontsize", "labelsize", "title_fontsize"}


def type_sizes(source):
    """Return each size of type that is written in a source, in points."""
    found = []
    for node in ast.walk(ast.parse(source)):
        if isinstance(node, ast.keyword) and node.arg in SIZES:
            found.append(node.value)
        elif isinstance(node, ast.FunctionDef):
            defaults = zip(
                reversed(node.args.args), reversed(node.args.defaults), strict=False
            )
            found += [
                default for argument, default in defaults if argument.arg in SIZES
            ]
    constants = [node.value for node in found if isinstance(node, ast.Constant)]
    return [FontProperties(size=value).get_size_in_points() for value in constants]


def code_of(path):
    if path.suffix == ".py":
        return path.read_text(encoding="utf-8")
    cells = nbformat.read(path, as_version=4).cells
    return "\n".join(cell.source for cell in cells if cell.cell_type == "code")


def test_sizes_are_found_as_numbers_words_and_defaults():
    source = "axes.text(0, 0, 'a', fontsize=8)\naxes.legend(fontsize='x-small')\ndef f(x, size=9): ..."
    assert sorted(type_sizes(source)) == pytest.approx([6.94, 8, 9], abs=0.01)


@pytest.mark.parametrize(
    "path",
    [*NOTEBOOKS, *sorted((ROOT / "lowrank_utils").glob("*.py"))],
    ids=lambda path: path.stem,
)
def test_plots_write_in_ten_points_or_more(path):
    assert (
        min(type_sizes(code_of(path)), default=SMALLEST_IN_PLOTS) >= SMALLEST_IN_PLOTS
    )


@pytest.mark.parametrize(
    "path", sorted((ROOT / "figures").glob("*.py")), ids=lambda path: path.stem
)
def test_drawings_write_in_twelve_points_or_more(path):
    assert (
        min(type_sizes(code_of(path)), default=SMALLEST_IN_DRAWINGS)
        >= SMALLEST_IN_DRAWINGS
    )


def test_the_style_sets_nothing_smaller():
    with plt.rc_context():
        use_style()
        sizes = {
            name: FontProperties(size=value).get_size_in_points()
            for name, value in plt.rcParams.items()
            if name.endswith(("labelsize", "titlesize", "fontsize", "font.size"))
            and value is not None
        }
        assert plt.rcParams["figure.dpi"] == 100
    assert len(sizes) >= 6
    assert min(sizes.values()) >= SMALLEST_IN_PLOTS, sizes
