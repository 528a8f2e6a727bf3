"""The plots of the comparison: each method above each network, differences with their
intervals, and longer runs.
"""

from collections.abc import Mapping
from typing import Any

import matplotlib.pyplot as plt
import pandas as pd
from matplotlib.figure import Figure
from matplotlib.ticker import NullFormatter, NullLocator

from lowrank_utils._arguments import check_one_of
from lowrank_utils.comparison.intervals import (
    BETTER,
    EQUAL,
    MARGIN,
    UNDECIDED,
    WORSE,
)
from lowrank_utils.comparison.methods import METHODS
from lowrank_utils.comparison.tables import UNDER_TUNED, means, network_means, task_name
from lowrank_utils.plots import LOOKS, PALETTE, Look

GAIN = Look(PALETTE["ink"], "--", "P", "")
RANDOM_ROWS = Look("#7A6A00", (0, (5, 1)), "X", "")  # type: ignore[arg-type]
# Variants of a method share its colour and are drawn hollow, each with a marker of its
# own.
METHOD_LOOKS: dict[str, Look] = {
    "frozen": LOOKS["frozen"],
    "last layer": LOOKS["frozen"]._replace(marker="P"),
    "m alone": LOOKS["magnitude"],
    "LoRA with one rate": LOOKS["LoRA"]._replace(line=":", marker="v"),
    "LoRA": LOOKS["LoRA"],
    "LoRA matched below": LOOKS["LoRA"]._replace(line="-.", marker="<"),
    "LoRA matched above": LOOKS["LoRA"]._replace(line="--", marker="s"),
    "LoRA with biases": LOOKS["LoRA"]._replace(line=":", marker="p"),
    "DoRA with one rate": LOOKS["DoRA"]._replace(line=":", marker="v"),
    "DoRA with m's rate": LOOKS["DoRA"],
    "DoRA norm kept with one rate": LOOKS["DoRA"]._replace(line=":", marker="<"),
    "DoRA norm kept with m's rate": LOOKS["DoRA"]._replace(line="--", marker="s"),
    "gain": GAIN,
    "positive gain": GAIN._replace(line=":", marker="v"),
    "random rows": RANDOM_ROWS,
    "full": LOOKS["full"],
}
FILLED = (
    "frozen",
    "m alone",
    "LoRA",
    "DoRA with m's rate",
    "gain",
    "random rows",
    "full",
)


def _look(method: str) -> Look:
    return METHOD_LOOKS[check_one_of("a method", method, METHOD_LOOKS)]


def _style(method: str) -> dict[str, Any]:
    look = _look(method)
    return {
        "color": look.color,
        "marker": look.marker,
        "markerfacecolor": look.color if method in FILLED else PALETTE["paper"],
    }


def _nothing_to_draw(what: str) -> Figure:
    figure, axes = plt.subplots(figsize=(7.2, 0.8))
    axes.set_axis_off()
    axes.text(
        0.5,
        0.5,
        f"These runs have no {what}.",
        ha="center",
        va="center",
        color=PALETTE["muted"],
    )
    return figure


def _panels(count: int, height: float) -> tuple[Figure, list[Any]]:
    columns = min(count, 2)
    rows = -(-count // columns)
    figure, grid = plt.subplots(
        rows, columns, figsize=(7.2, height * rows + 0.4), squeeze=False
    )
    for axes in grid.flat[count:]:
        axes.set_axis_off()
    return figure, list(grid.flat[:count])


def _tasks(table: pd.DataFrame) -> list[tuple[str, pd.DataFrame]]:
    return [
        (task_name(group.iloc[0]), group)
        for _, group in table.groupby(["data_set", "shift", "rotation"], sort=False)
    ]


def plot_networks(table: pd.DataFrame) -> Figure:
    """Draw the test accuracy of each method above each network, and the mean, a panel
    for each task, length and rank.

    Args:
        table: as ``tables.results_table`` gives it. A method without a rank stands in
            the panel of each rank.
    """
    networks = network_means(table)
    ranks = sorted(networks["rank"].dropna().unique()) or [None]
    lengths = networks["steps"].unique()
    panels = [
        (task, steps, rank, group[group["rank"].isna() | (group["rank"] == rank)])
        for task, rows in _tasks(networks)
        for steps, group in rows.groupby("steps")
        for rank in ranks
    ]
    there = {check_one_of("a method", m, METHODS) for m in networks["method"].unique()}
    methods = [method for method in METHODS if method in there]
    figure, grid = _panels(len(panels), height=0.75 + 0.27 * len(methods))
    for place, (axes, (task, steps, rank, group)) in enumerate(
        zip(grid, panels, strict=True)
    ):
        for height, method in enumerate(methods):
            accuracy = 100 * group[group["method"] == method]["test"]
            style = _style(method)
            axes.plot(
                accuracy, [height] * len(accuracy), ls="", ms=4, alpha=0.45, **style
            )
            if len(accuracy) > 1:
                axes.plot(
                    accuracy.mean(), height, ls="", ms=9, markeredgewidth=1.5, **style
                )
        labels = methods if place % 2 == 0 else [""] * len(methods)
        axes.set_yticks(range(len(methods)), labels=labels)
        # What all panels have in common needs no place in their titles.
        parts = [
            task,
            f"r = {rank}" * (len(ranks) > 1),
            f"{steps:,} steps" * (len(lengths) > 1),
        ]
        axes.set(ylim=(len(methods) - 0.5, -0.5))
        axes.set_title(", ".join(filter(None, parts)), fontsize="medium")
        axes.grid(axis="x", alpha=0.4)
    figure.supxlabel("test accuracy (%)", fontsize="medium")
    return figure


def plot_differences(rows: pd.DataFrame) -> Figure:
    """Draw differences with their 95 % intervals, a panel for each task and a line for
    each length and rank.

    The shade is the margin within which a difference isn't worth having.

    Args:
        rows: as ``tables.differences`` gives it.
    """
    if len(rows) == 0:
        return _nothing_to_draw("two methods to compare")
    tasks = _tasks(rows)
    most = max(len(group) for _, group in tasks)
    figure, panels = _panels(len(tasks), height=0.8 + 0.3 * most)
    for axes, (name, group) in zip(panels, tasks, strict=True):
        for place, (_, row) in enumerate(group.iterrows()):
            _interval(axes, place, row, row["first"], row["second"])
        labels = [
            ("" if pd.isna(row["rank"]) else f"r = {row['rank']}, ")
            + f"{row['steps']:,} steps"
            for _, row in group.iterrows()
        ]
        axes.set_yticks(range(len(group)), labels=labels)
        axes.set(ylim=(most - 0.5, -0.5), title=name)
    first, second = rows["first"].iloc[0], rows["second"].iloc[0]
    figure.supxlabel(
        f"test accuracy, {first} − {second} (percentage points)\nshaded: within ±{100 * MARGIN:g}",
        fontsize="medium",
    )
    return figure


def plot_declared(answers: pd.DataFrame) -> Figure:
    """Draw the answers of the declared tests, a panel for each length.

    Args:
        answers: as ``declared.judge`` gives it.
    """
    lengths = list(answers.groupby("steps"))
    tests = len(answers["test"].unique())
    figure, grid = plt.subplots(
        1, len(lengths), figsize=(7.2, 1.2 + 0.45 * tests), sharey=True, squeeze=False
    )
    for axes, (steps, group) in zip(grid.flat, lengths, strict=True):
        for place, (_, row) in enumerate(group.iterrows()):
            first, _, second = row["test"].rpartition(", rank ")[0].partition(" − ")
            _interval(axes, place, row, first, second)
        labels = [
            test.replace(" − ", "\n− ").replace(", rank", ", r =")
            for test in group["test"]
        ]
        axes.set_yticks(range(len(group)), labels=labels)
        axes.set(ylim=(tests - 0.5, -0.5), title=f"{steps:,} steps")
    figure.supxlabel(
        f"difference of test accuracy (percentage points); shaded: within ±{100 * MARGIN:g}",
        fontsize="medium",
    )
    return figure


def _interval(axes: Any, place: int, row: pd.Series, first: str, second: str) -> None:
    """Draw one interval, in the colour of the method that is ahead; grey if neither
    certainly is.
    """
    if place == 0:
        axes.axvspan(
            -100 * MARGIN,
            100 * MARGIN,
            color=PALETTE["muted"],
            alpha=0.18,
            lw=0,
            zorder=0,
        )
        axes.axvline(0, color=PALETTE["ink"], lw=1)
    ahead = {BETTER: first, WORSE: second, EQUAL: None, UNDECIDED: None}
    method = (ahead | {UNDER_TUNED: None})[
        check_one_of("a verdict", row["verdict"], [*ahead, UNDER_TUNED])
    ]
    color = PALETTE["muted"] if method is None else _look(method).color
    axes.plot(
        [100 * row["low"], 100 * row["high"]],
        [place, place],
        color=color,
        lw=4,
        solid_capstyle="butt",
    )
    axes.plot(100 * row["mean"], place, marker="D", ms=5, color=PALETTE["ink"])


def plot_accuracy_over_steps(table: pd.DataFrame, rank: int) -> Figure:
    """Draw the mean test accuracy against the number of steps, a panel for each task.

    Args:
        table: as ``tables.results_table`` gives it.
        rank: which one to draw of the methods that have a rank. Of networks only those
            count that have all lengths.
    """
    chosen = table[(table["rank"] == rank) | table["rank"].isna()]
    lengths = chosen["steps"].nunique()
    whole = (
        chosen.groupby(["shift", "method", "network"])["steps"].transform("nunique")
        == lengths
    )
    summary = means(chosen[whole])
    if len(summary) == 0 or lengths < 2:
        return _nothing_to_draw("two lengths or more")
    tasks = _tasks(summary)
    figure, panels = _panels(len(tasks), height=2.3)
    for axes, (name, group) in zip(panels, tasks, strict=True):
        for method, rows in group.groupby("method", sort=False):
            style = _style(method) | {
                "linestyle": _look(method).line,
                "label": method,
            }
            axes.plot(rows["steps"], 100 * rows["mean"], **style)
        steps = sorted(group["steps"].unique())
        axes.set(title=name, xscale="log")
        axes.set_xticks(steps, labels=[f"{count:,}" for count in steps])
        axes.xaxis.set_minor_locator(NullLocator())
        axes.xaxis.set_minor_formatter(NullFormatter())
    figure.supxlabel("steps", fontsize="medium")
    figure.supylabel("test accuracy (%)", fontsize="medium")
    _legend(figure)
    return figure


def _legend(figure: Figure) -> None:
    handles = {}
    for axes in figure.axes:
        handles.update(
            dict(zip(*reversed(axes.get_legend_handles_labels()), strict=True))
        )
    figure.legend(
        handles.values(),
        handles,
        loc="outside upper center",
        ncols=min(3, len(handles)),
    )


def plot_scores(scores: Mapping[str, float]) -> Figure:
    """Draw a bar with its number for each method.

    Args:
        scores: method → accuracy, from 0 to 1.
    """
    figure, axes = plt.subplots(figsize=(7.2, 0.7 + 0.42 * len(scores)))
    for place, (method, score) in enumerate(scores.items()):
        look = _look(method)
        axes.barh(
            place,
            100 * score,
            color=PALETTE["paper"],
            edgecolor=look.color,
            hatch=look.hatch,
        )
        axes.text(
            100 * score + 1,
            place,
            f"{100 * score:.0f} %",
            va="center",
            color=look.color,
        )
    axes.set_yticks(range(len(scores)), labels=list(scores))
    axes.set(xlim=(0, 100), ylim=(len(scores) - 0.5, -0.5), xlabel="test accuracy (%)")
    return figure
