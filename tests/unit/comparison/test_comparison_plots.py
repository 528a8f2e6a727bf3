"""The comparison's plots show the numbers that they are given."""

import pandas as pd
import pytest
from test_declared import DECLARED, both_shifts
from test_tables import DORA, LONG, SCORES, SLOW, result

from lowrank_utils.comparison.declared import judge, read_declaration
from lowrank_utils.comparison.methods import METHODS
from lowrank_utils.comparison.plots import (
    FILLED,
    METHOD_LOOKS,
    plot_accuracy_over_steps,
    plot_declared,
    plot_differences,
    plot_networks,
)
from lowrank_utils.comparison.tables import differences, results_table
from lowrank_utils.plots import PALETTE


@pytest.fixture
def table():
    return results_table([result(), result(shift="inversion")])


def test_every_method_has_a_look_of_its_own():
    assert list(METHOD_LOOKS) == list(METHODS)
    cues = [
        (look.color, look.marker, name in FILLED) for name, look in METHOD_LOOKS.items()
    ]
    assert len(set(cues)) == len(cues), "marks are told apart"
    lines = [
        (look.color, str(look.line), look.marker) for look in METHOD_LOOKS.values()
    ]
    assert len(set(lines)) == len(lines), "and so are lines"
    # A table with all methods is drawn.
    scores = {
        (name, 1 if method.has_rank else None): [0.5, 0.6]
        for name, method in METHODS.items()
    }
    all_methods = results_table([result(scores), result(scores, steps=(LONG,))])
    (first, _) = plot_networks(all_methods).axes
    assert [label.get_text() for label in first.get_yticklabels()] == list(METHODS)
    legend = plot_accuracy_over_steps(all_methods, 1).legends[0]
    assert {text.get_text() for text in legend.get_texts()} == set(METHODS)


def drawn_at(axes, height):
    """Return the x data of the lines at a height, those of single networks first."""
    return [
        list(map(float, line.get_xdata()))
        for line in axes.lines
        if set(line.get_ydata()) == {height}
    ]


def test_each_network_and_the_mean_a_panel_for_each_task_length_and_rank(table):
    long = results_table([result(steps=(SLOW, LONG)), result(shift="inversion")])
    titles = [axes.get_title() for axes in plot_networks(long).axes if axes.get_title()]
    assert titles == [
        *("rotation −45°, r = 1, 64 steps", "rotation −45°, r = 4, 64 steps"),
        *("rotation −45°, r = 1, 128 steps", "rotation −45°, r = 4, 128 steps"),
        *("inversion, r = 1, 64 steps", "inversion, r = 4, 64 steps"),
    ]
    figure = plot_networks(table)
    # What all panels have in common isn't repeated.
    titles = [axes.get_title() for axes in figure.axes]
    assert titles == [
        f"{task}, r = {rank}"
        for task in ("rotation −45°", "inversion")
        for rank in (1, 4)
    ]
    assert figure.get_supxlabel() == "test accuracy (%)"
    methods = ["frozen", "m alone", "LoRA", DORA]
    for place, axes in enumerate(figure.axes):
        labels = [label.get_text() for label in axes.get_yticklabels()]
        assert labels == (methods if place % 2 == 0 else [""] * 4)
        assert axes.get_ylim() == (3.5, -0.5)
        for height, method in enumerate(methods):
            values = SCORES[
                method, None if method in methods[:2] else (1, 4)[place % 2]
            ]
            networks, (mean,) = drawn_at(axes, height)
            assert networks == pytest.approx([100 * value for value in values])
            assert mean == pytest.approx(100 * sum(values) / 3)


def test_one_network_alone_has_no_mark_for_a_mean():
    (axes,) = plot_networks(
        results_table([result({("full", None): [[0.5, 0.7]]})])
    ).axes
    assert axes.get_title() == "rotation −45°"
    assert drawn_at(axes, 0) == [pytest.approx([60])]


def intervals(axes):
    """Return (ends, mean) of each interval, without the line at zero."""
    zero, *drawn = axes.lines
    assert list(zero.get_xdata()) == [0, 0]
    for place, (bar, mean) in enumerate(zip(drawn[::2], drawn[1::2], strict=True)):
        assert set(bar.get_ydata()) == set(mean.get_ydata()) == {place}
        yield list(bar.get_xdata()), list(mean.get_xdata())


def shown(rows):
    return [
        (
            pytest.approx([100 * row["low"], 100 * row["high"]]),
            pytest.approx([100 * row["mean"]]),
        )
        for _, row in rows.iterrows()
    ]


def assert_margin_is_shaded(axes):
    (shade,) = axes.patches
    assert [shade.get_x(), shade.get_x() + shade.get_width()] == [-1, 1]


def test_differences_are_a_line_each_and_a_panel_per_task(table):
    rows = differences(table, DORA, "LoRA")
    figure = plot_differences(rows)
    assert [axes.get_title() for axes in figure.axes] == ["rotation −45°", "inversion"]
    assert (
        f"{DORA} − LoRA (percentage points)\nshaded: within ±1"
        in figure.get_supxlabel()
    )
    for axes, (_, group) in zip(
        figure.axes, rows.groupby("shift", sort=False), strict=True
    ):
        labels = [label.get_text() for label in axes.get_yticklabels()]
        assert labels == ["r = 1, 64 steps", "r = 4, 64 steps"]
        assert list(intervals(axes)) == shown(group)
        assert_margin_is_shaded(axes)
    without_ranks = plot_differences(differences(table, "m alone", "frozen")).axes[0]
    assert [label.get_text() for label in without_ranks.get_yticklabels()] == [
        "64 steps"
    ]


def test_the_declared_tests_are_a_line_each_and_a_panel_per_length():
    results = [*both_shifts(), *both_shifts(steps=(LONG,))]
    answers = judge(
        results_table(results), read_declaration(DECLARED | {"steps": [SLOW, LONG]})
    )
    figure = plot_declared(answers)
    assert [axes.get_title() for axes in figure.axes] == ["64 steps", "128 steps"]
    assert "(percentage points); shaded: within ±1" in figure.get_supxlabel()
    for axes, (_, group) in zip(figure.axes, answers.groupby("steps"), strict=True):
        assert list(intervals(axes)) == shown(group)
        assert_margin_is_shaded(axes)
        assert axes.lines[1].get_color() == METHOD_LOOKS[DORA].color
        assert axes.lines[3].get_color() == PALETTE["muted"]
    labels = [label.get_text() for label in figure.axes[0].get_yticklabels()]
    assert labels == [f"{DORA}\n− LoRA, r = 1 and 4", f"{DORA}\n− gain, r = 1"]


@pytest.mark.parametrize(
    ("verdict", "color"),
    [
        ("better", METHOD_LOOKS[DORA].color),
        ("worse", METHOD_LOOKS["LoRA"].color),
        ("undecided", PALETTE["muted"]),
        ("no difference worth having", PALETTE["muted"]),
        ("under-tuned", PALETTE["muted"]),
    ],
)
def test_an_interval_has_the_colour_of_the_method_that_is_ahead(table, verdict, color):
    rows = differences(table, DORA, "LoRA").head(1).assign(verdict=verdict)
    assert plot_differences(rows).axes[0].lines[1].get_color() == color
    answer = rows.assign(test=f"{DORA} − LoRA, rank 1 and 4")
    assert plot_declared(answer).axes[0].lines[1].get_color() == color


def test_longer_runs_are_a_line_per_method_over_the_networks_that_have_all_lengths():
    longer = {
        key: [value + 0.1 for value in values[:2]]
        for key, values in SCORES.items()
        if key[1] != 4
    }
    del longer["frozen", None]
    table = results_table([result(), result(longer, steps=(LONG,))])
    figure = plot_accuracy_over_steps(table, 1)
    (axes,) = figure.axes
    assert axes.get_title() == "rotation −45°"
    assert (figure.get_supxlabel(), figure.get_supylabel()) == (
        "steps",
        "test accuracy (%)",
    )
    assert [label.get_text() for label in axes.get_xticklabels()] == ["64", "128"]
    lines = {line.get_label(): line for line in axes.lines}
    assert set(lines) == {"m alone", "LoRA", DORA}, (
        "the frozen network ran at one length alone"
    )
    for method, line in lines.items():
        # Network 13 has no long run, and so no part in the short one's mean either.
        short = sum(SCORES[method, None if method == "m alone" else 1][:2]) / 2
        assert list(line.get_xdata()) == [64, 128]
        assert list(line.get_ydata()) == pytest.approx([100 * short, 100 * short + 10])
        assert (line.get_color(), line.get_marker()) == (
            METHOD_LOOKS[method].color,
            METHOD_LOOKS[method].marker,
        )
    assert {text.get_text() for text in figure.legends[0].get_texts()} == set(lines)


def test_where_there_is_nothing_to_draw_the_figure_says_so(table):
    for figure in (
        plot_differences(differences(table, DORA, "full")),
        plot_accuracy_over_steps(table, 1),
        plot_accuracy_over_steps(table[pd.Series(False, table.index)], 1),
    ):
        (axes,) = figure.axes
        assert axes.texts[0].get_text().startswith("These runs have no ")
