"""The comparison's plots show the numbers that they are given."""

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

pytestmark = pytest.mark.slow


@pytest.fixture
def table():
    return results_table([result(), result(shift="inversion")])


def texts(labels):
    return [label.get_text() for label in labels]


def titles(figure):
    return [axes.get_title() for axes in figure.axes if axes.get_title()]


def test_every_method_has_a_look_of_its_own():
    assert list(METHOD_LOOKS) == list(METHODS)
    marks, lines = set(), set()
    for name, look in METHOD_LOOKS.items():
        marks.add((look.color, look.marker, name in FILLED))
        lines.add((look.color, str(look.line), look.marker))
    assert len(marks) == len(lines) == len(METHODS)
    # A table with all methods is drawn.
    ranks = {name: 1 if method.has_rank else None for name, method in METHODS.items()}
    scores = {cell: [0.5, 0.6] for cell in ranks.items()}
    all_methods = results_table([result(scores), result(scores, steps=(LONG,))])
    (first, _) = plot_networks(all_methods).axes
    assert texts(first.get_yticklabels()) == list(METHODS)
    legend = plot_accuracy_over_steps(all_methods, 1).legends[0]
    assert set(texts(legend.get_texts())) == set(METHODS)


def drawn_at(axes, height):
    """Return the x data of the lines at a height, those of single networks first."""
    lines = [line for line in axes.lines if set(line.get_ydata()) == {height}]
    return [list(map(float, line.get_xdata())) for line in lines]


def test_each_network_and_the_mean_a_panel_for_each_task_length_and_rank(table):
    long = results_table([result(steps=(SLOW, LONG)), result(shift="inversion")])
    assert titles(plot_networks(long)) == [
        *("rotation −45°, r = 1, 64 steps", "rotation −45°, r = 4, 64 steps"),
        *("rotation −45°, r = 1, 128 steps", "rotation −45°, r = 4, 128 steps"),
        *("inversion, r = 1, 64 steps", "inversion, r = 4, 64 steps"),
    ]
    figure = plot_networks(table)
    # What all panels have in common isn't repeated.
    tasks = ("rotation −45°", "inversion")
    assert titles(figure) == [
        f"{task}, r = {rank}" for task in tasks for rank in (1, 4)
    ]
    assert figure.get_supxlabel() == "test accuracy (%)"
    methods = ["frozen", "m alone", "LoRA", DORA]
    for place, axes in enumerate(figure.axes):
        labels = methods if place % 2 == 0 else [""] * 4
        assert texts(axes.get_yticklabels()) == labels
        assert axes.get_ylim() == (3.5, -0.5)
        for height, method in enumerate(methods):
            rank = None if method in methods[:2] else (1, 4)[place % 2]
            values = [100 * value for value in SCORES[method, rank]]
            networks, mean = drawn_at(axes, height)
            assert networks == pytest.approx(values)
            assert mean == pytest.approx([sum(values) / 3])


def test_one_network_alone_has_no_mark_for_a_mean():
    alone = results_table([result({("full", None): [[0.5, 0.7]]})])
    (axes,) = plot_networks(alone).axes
    assert axes.get_title() == "rotation −45°"
    assert drawn_at(axes, 0) == [pytest.approx([60])]


def assert_shown(rows, axes):
    """Assert that axes show the intervals of the rows, a line at zero and the
    margin."""
    zero, *drawn = axes.lines
    assert list(zero.get_xdata()) == [0, 0]
    for place, row in enumerate(rows.to_dict("records")):
        (low, high), mean = drawn_at(axes, place)
        expected = [100 * row[name] for name in ("low", "high", "mean")]
        assert [low, high, *mean] == pytest.approx(expected)
    assert len(drawn) == 2 * len(rows)
    (shade,) = axes.patches
    assert [shade.get_x(), shade.get_x() + shade.get_width()] == [-1, 1]


def test_differences_are_a_line_each_and_a_panel_per_task(table):
    rows = differences(table, DORA, "LoRA")
    figure = plot_differences(rows)
    assert titles(figure) == ["rotation −45°", "inversion"]
    label = f"{DORA} − LoRA (percentage points)\nshaded: within ±1"
    assert label in figure.get_supxlabel()
    groups = rows.groupby("shift", sort=False)
    for axes, (_, group) in zip(figure.axes, groups, strict=True):
        assert texts(axes.get_yticklabels()) == ["r = 1, 64 steps", "r = 4, 64 steps"]
        assert_shown(group, axes)
    without_ranks = plot_differences(differences(table, "m alone", "frozen")).axes[0]
    assert texts(without_ranks.get_yticklabels()) == ["64 steps"]


def test_the_declared_tests_are_a_line_each_and_a_panel_per_length():
    results = results_table([*both_shifts(), *both_shifts(steps=(LONG,))])
    answers = judge(results, read_declaration(DECLARED | {"steps": [SLOW, LONG]}))
    figure = plot_declared(answers)
    assert titles(figure) == ["64 steps", "128 steps"]
    assert "(percentage points); shaded: within ±1" in figure.get_supxlabel()
    for axes, (_, group) in zip(figure.axes, answers.groupby("steps"), strict=True):
        assert_shown(group, axes)
        colors = [axes.lines[place].get_color() for place in (1, 3)]
        assert colors == [METHOD_LOOKS[DORA].color, PALETTE["muted"]]
    labels = texts(figure.axes[0].get_yticklabels())
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
    answer = rows.assign(test=f"{DORA} − LoRA, rank 1 and 4")
    for figure in (plot_differences(rows), plot_declared(answer)):
        assert figure.axes[0].lines[1].get_color() == color


def test_longer_runs_are_a_line_per_method_over_the_networks_that_have_all_lengths():
    # The frozen network ran at one length alone. Network 13 has no long run, and so no
    # part in the short one's mean either.
    trained = {"m alone": None, "LoRA": 1, DORA: 1}
    longer = {cell: [v + 0.1 for v in SCORES[cell][:2]] for cell in trained.items()}
    table = results_table([result(), result(longer, steps=(LONG,))])
    figure = plot_accuracy_over_steps(table, 1)
    (axes,) = figure.axes
    assert axes.get_title() == "rotation −45°"
    labels = (figure.get_supxlabel(), figure.get_supylabel())
    assert labels == ("steps", "test accuracy (%)")
    assert texts(axes.get_xticklabels()) == ["64", "128"]
    lines = {line.get_label(): line for line in axes.lines}
    assert lines.keys() == trained.keys()
    for method, line in lines.items():
        short = 50 * sum(SCORES[method, trained[method]][:2])
        assert list(line.get_xdata()) == [64, 128]
        assert list(line.get_ydata()) == pytest.approx([short, short + 10])
        look = METHOD_LOOKS[method]
        assert (line.get_color(), line.get_marker()) == (look.color, look.marker)
    assert set(texts(figure.legends[0].get_texts())) == set(lines)


def test_where_there_is_nothing_to_draw_the_figure_says_so(table):
    for figure in (
        plot_differences(differences(table, DORA, "full")),
        plot_accuracy_over_steps(table, 1),
        plot_accuracy_over_steps(table.head(0), 1),
    ):
        (axes,) = figure.axes
        assert axes.texts[0].get_text().startswith("These runs have no ")
