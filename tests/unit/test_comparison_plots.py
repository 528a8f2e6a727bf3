"""The comparison's plots show the numbers that they are given."""

import pytest
from test_tables import SCORES, result

from lowrank_utils.comparison_plots import (
    METHOD_LOOKS,
    plot_accuracy_by_parameters,
    plot_accuracy_by_rank,
    plot_differences,
    plot_learning_curves,
    plot_weight_changes,
)
from lowrank_utils.methods import METHODS
from lowrank_utils.plots import PALETTE
from lowrank_utils.tables import differences, means, results_table


@pytest.fixture
def table():
    return results_table([result(), result(shift="inversion")])


def test_every_method_has_a_look_of_its_own():
    assert list(METHOD_LOOKS) == list(METHODS)
    cues = [(str(look.line), look.marker) for look in METHOD_LOOKS.values()]
    assert len(set(cues)) == len(cues), "told apart without colour"


def points(axes, name):
    (container,) = [c for c in axes.containers if c.get_label() == name]
    line = container.lines[0]
    return [list(map(float, axis)) for axis in (line.get_xdata(), line.get_ydata())]


def test_accuracy_by_parameters(table):
    figure = plot_accuracy_by_parameters(means(table))
    titles = [axes.get_title() for axes in figure.axes]
    assert titles == ["rotation 45° (frozen: 30.0 %)", "inversion (frozen: 30.0 %)"]
    x, y = points(figure.axes[0], "LoRA")
    assert x == [200, 400]
    assert y == pytest.approx([72, 80])
    assert figure.axes[0].get_ylim()[0] > 60, "the frozen network would press all others into a strip"
    assert figure.axes[0].get_ylabel() == "test accuracy (%)"
    assert [text.get_text() for text in figure.legends[0].get_texts()] == ["LoRA", "DoRA"]


def test_accuracy_by_rank_leaves_out_what_has_none(table):
    figure = plot_accuracy_by_rank(means(table))
    axes = figure.axes[0]
    assert [c.get_label() for c in axes.containers] == ["LoRA", "DoRA"]
    x, y = points(axes, "DoRA")
    assert x == pytest.approx([2, 4], rel=0.05)
    assert y == pytest.approx([74, 80.33333333])
    assert [label.get_text() for label in axes.get_xticklabels()] == ["2", "4"]


def test_intervals_are_drawn(table):
    summary = means(table)
    figure = plot_accuracy_by_rank(summary)
    (container,) = [c for c in figure.axes[0].containers if c.get_label() == "LoRA"]
    segments = container.lines[2][0].get_segments()
    rows = summary[(summary["method"] == "LoRA") & (summary["shift"] == "rotation")]
    assert [segment[:, 1].tolist() for segment in segments] == [
        pytest.approx([100 * row["low"], 100 * row["high"]]) for _, row in rows.iterrows()
    ]


def test_differences_are_a_line_each_with_both_intervals_and_a_panel_per_task(table):
    rows = differences(table, "DoRA", "LoRA")
    figure = plot_differences(rows)
    assert [axes.get_title() for axes in figure.axes] == ["rotation 45°", "inversion"]
    assert "DoRA − LoRA (percentage points)" in figure.get_supxlabel()
    for axes, (_, group) in zip(figure.axes, rows.groupby("shift", sort=False), strict=True):
        assert [label.get_text() for label in axes.get_yticklabels()] == ["r = 2", "r = 4"]
        zero, *drawn = axes.lines
        assert list(zero.get_xdata()) == [0, 0]
        for place, (_, row) in enumerate(group.iterrows()):
            thin, thick, mean = drawn[3 * place : 3 * place + 3]
            ends = 100 * row[["low_corrected", "low", "high", "high_corrected"]]
            assert list(thin.get_xdata()) == pytest.approx([ends.iloc[0], ends.iloc[3]])
            assert list(thick.get_xdata()) == pytest.approx([ends.iloc[1], ends.iloc[2]])
            assert mean.get_xdata() == pytest.approx([100 * row["mean"]])
            assert thick.get_linewidth() > thin.get_linewidth()
            assert set(mean.get_ydata()) == {place}


def test_the_margin_of_no_difference_is_shaded(table):
    figure = plot_differences(differences(table, "DoRA", "LoRA"))
    for axes in figure.axes:
        (shade,) = axes.patches
        assert [shade.get_x(), shade.get_x() + shade.get_width()] == [-1, 1]
    assert "shaded: within ±1" in figure.get_supxlabel()


def test_an_interval_has_the_colour_of_the_method_that_is_ahead():
    rows = differences(results_table([result()]), "DoRA", "LoRA")
    for low, high, mean, color in (
        (-0.03, -0.01, -0.02, METHOD_LOOKS["LoRA"].color),
        (0.01, 0.03, 0.02, METHOD_LOOKS["DoRA"].color),
        (-0.01, 0.03, 0.01, PALETTE["muted"]),
    ):
        figure = plot_differences(rows.head(1).assign(low_corrected=low, high_corrected=high, mean=mean))
        assert figure.axes[0].lines[1].get_color() == color


def test_learning_curves_span_the_seeds():
    figure = plot_learning_curves(result()["runs"], rank=2)
    (axes,) = figure.axes
    lines = {line.get_label(): line.get_ydata() for line in axes.lines}
    # What trains nothing has no curve, and neither has another rank.
    assert set(lines) == {"frozen", "LoRA", "DoRA"}
    values = SCORES["LoRA", 2]
    assert lines["LoRA"][-1] == pytest.approx(100 * (sum(values) / 3 - 0.01))
    shades = [shade.get_paths()[0].get_extents() for shade in axes.collections]
    assert any(shade.y1 == pytest.approx(100 * (max(values) - 0.01)) for shade in shades)


def test_weight_changes_are_a_panel_per_layer_and_a_line_per_seed():
    runs = result()["runs"]
    for number, run in enumerate(runs):
        run["changes"] = [[[0.1, 0.2], [0.3 + number, 0.4]], [[0.5, 0.6], [0.7 + number, 0.8]]]
    figure = plot_weight_changes(runs, rank=2)
    assert [axes.get_title() for axes in figure.axes] == ["layer 1", "layer 2"]
    first = next(number for number, run in enumerate(runs) if run["method"] == "LoRA")
    for axes, turned, stretched in zip(
        figure.axes, ([0.2, 0.6], [0.4, 0.8]), ([0.1, 0.5], [0.3 + first, 0.7 + first]), strict=True
    ):
        assert len(axes.lines) == 2 * 3
        assert list(axes.lines[0].get_xdata()) == turned
        assert list(axes.lines[0].get_ydata()) == pytest.approx(stretched)
    assert [text.get_text() for text in figure.legends[0].get_texts()] == ["LoRA", "DoRA"]


def test_where_there_is_nothing_to_draw_the_figure_says_so(table):
    only_frozen = table[table["method"] == "frozen"]
    for figure in (
        plot_accuracy_by_parameters(means(only_frozen)),
        plot_accuracy_by_rank(means(only_frozen)),
        plot_differences(differences(only_frozen, "DoRA", "LoRA")),
        plot_learning_curves([], rank=2),
        plot_weight_changes([], rank=2),
    ):
        (axes,) = figure.axes
        assert axes.texts[0].get_text().startswith("These runs have no ")
