"""The plots of notebook 07 and of the comparison's report."""

from collections.abc import Iterable, Mapping
from typing import Any

import matplotlib.pyplot as plt
import numpy as np
import pandas as pd
from matplotlib.figure import Figure

from lowrank_utils.intervals import MARGIN
from lowrank_utils.plots import LOOKS, PALETTE, Look
from lowrank_utils.tables import task_name

METHOD_LOOKS: dict[str, Look] = {
    "frozen": LOOKS["frozen"],
    "last layer": Look(PALETTE["ink"], (0, (5, 1)), "P", ""),  # type: ignore[arg-type]
    "magnitude": LOOKS["magnitude"],
    "LoRA": LOOKS["LoRA"],
    "LoRA matched": LOOKS["LoRA"]._replace(line="--", marker="s"),
    "DoRA": LOOKS["DoRA"],
    "DoRA norm kept": LOOKS["DoRA"]._replace(line=":", marker="v"),
    "full": LOOKS["full"],
}


# Variants of LoRA and DoRA, whose colours they share.
HOLLOW = ("LoRA matched", "DoRA norm kept")


def _style(method: str) -> dict[str, Any]:
    look = METHOD_LOOKS[method]
    return {
        "color": look.color,
        "linestyle": look.line,
        "marker": look.marker,
        "markerfacecolor": PALETTE["paper"] if method in HOLLOW else look.color,
    }


def _with_interval(axes: Any, x: Any, rows: pd.DataFrame, method: str) -> None:
    percent = 100 * rows[["mean", "low", "high"]]
    errors = [percent["mean"] - percent["low"], percent["high"] - percent["mean"]]
    axes.errorbar(x, percent["mean"], yerr=errors, capsize=3, label=method, **_style(method))


def _tasks(table: pd.DataFrame) -> list[tuple[str, pd.DataFrame]]:
    """Return each task's name and rows; the data set is named only where there are several."""
    several = table["data_set"].nunique() > 1
    return [
        (task_name(group.iloc[0]) + (f", {group.iloc[0]['data_set']}" if several else ""), group)
        for _, group in table.groupby(["data_set", "shift", "rotation"], sort=False)
    ]


def _nothing_to_draw(what: str) -> Figure:
    figure, axes = plt.subplots(figsize=(7.2, 0.8))
    axes.set_axis_off()
    axes.text(0.5, 0.5, f"These runs have no {what}.", ha="center", va="center", color=PALETTE["muted"])
    return figure


def _panels(count: int, height: float = 3.4) -> tuple[Figure, list[Any]]:
    columns = min(count, 2)
    rows = -(-count // columns)
    # Two rows in all of 4.9 inches still fit on a slide in type that the last row reads.
    height = min(height, 2.45) if rows > 1 else height
    figure, grid = plt.subplots(rows, columns, figsize=(7.2, height * rows), squeeze=False)
    for axes in grid.flat[count:]:
        axes.set_axis_off()
    return figure, list(grid.flat[:count])


def _legend(figure: Figure) -> None:
    handles = {}
    for axes in figure.axes:
        handles.update(dict(zip(*reversed(axes.get_legend_handles_labels()), strict=True)))
    figure.legend(handles.values(), handles, loc="outside upper center", ncols=min(4, len(handles)))


def plot_accuracy_by_parameters(summary: pd.DataFrame) -> Figure:
    """Draw the mean test accuracy against the number of trainable parameters, a panel per task.

    Args:
        summary: as ``tables.means`` gives it. The accuracy of a method that trains nothing stands in the
            title: as a line it would press all others into a narrow strip.
    """
    trained = summary[summary["trainable"] > 0]
    if len(trained) == 0:
        return _nothing_to_draw("methods that train something")
    tasks = _tasks(summary)
    figure, panels = _panels(len(tasks))
    for axes, (name, group) in zip(panels, tasks, strict=True):
        for method, rows in group.groupby("method", sort=False):
            if (rows["trainable"] == 0).all():
                name += f" ({method}: {100 * rows['mean'].iloc[0]:.1f} %)"
            else:
                _with_interval(axes, rows["trainable"], rows, method)
        axes.set(title=name, xscale="log", xlabel="trainable parameters", ylabel="test accuracy (%)")
    _legend(figure)
    return figure


def plot_accuracy_by_rank(summary: pd.DataFrame) -> Figure:
    """Draw the mean test accuracy of the methods that have a rank against it, a panel per task."""
    ranked = summary[summary["rank"].notna()]
    if len(ranked) == 0:
        return _nothing_to_draw("methods with a rank")
    tasks = _tasks(ranked)
    figure, panels = _panels(len(tasks))
    ranks = sorted(ranked["rank"].unique())
    for axes, (name, group) in zip(panels, tasks, strict=True):
        for place, (method, rows) in enumerate(group.groupby("method", sort=False)):
            # Side by side, so that intervals don't hide each other.
            _with_interval(axes, rows["rank"].astype(float) * 1.04 ** (place - 1), rows, method)
        axes.set(title=name, xscale="log", xlabel="rank r", ylabel="test accuracy (%)")
        axes.set_xticks([float(r) for r in ranks], labels=[str(r) for r in ranks])
        axes.minorticks_off()
    _legend(figure)
    return figure


def plot_differences(rows: pd.DataFrame) -> Figure:
    """Draw paired differences with their intervals, a panel per task, thick for 95 % and thin for all rows together.

    The shade is the margin within which a difference is of no practical interest.

    Args:
        rows: as ``tables.differences`` gives it.
    """
    if len(rows) == 0:
        return _nothing_to_draw("two methods to compare")
    tasks = _tasks(rows)
    most = max(len(group) for _, group in tasks)
    figure, panels = _panels(len(tasks), height=1.1 + 0.26 * most)
    for axes, (name, group) in zip(panels, tasks, strict=True):
        axes.axvspan(-100 * MARGIN, 100 * MARGIN, color=PALETTE["muted"], alpha=0.18, lw=0, zorder=0)
        axes.axvline(0, color=PALETTE["ink"], lw=1)
        for place, (_, row) in enumerate(group.iterrows()):
            _difference(axes, place, row)
        ranks = ["" if pd.isna(rank) else f"r = {rank}" for rank in group["rank"]]
        axes.set_yticks(range(len(group)), labels=ranks)
        axes.set(ylim=(most - 0.5, -0.5), title=name)
    figure.supxlabel(
        f"test accuracy, {rows['first'].iloc[0]} − {rows['second'].iloc[0]} (percentage points)\n"
        f"shaded: within ±{100 * MARGIN:g}",
        fontsize="medium",
    )
    return figure


def _difference(axes: Any, place: int, row: pd.Series) -> None:
    """Draw one interval, in the colour of the method that is ahead; grey if neither certainly is."""
    color = PALETTE["muted"]
    if row["low_corrected"] > 0 or row["high_corrected"] < 0:
        color = METHOD_LOOKS[row["first"] if row["mean"] > 0 else row["second"]].color
    ends = 100 * row[["low_corrected", "low", "high", "high_corrected"]]
    axes.plot(ends.iloc[[0, 3]], [place, place], color=color, lw=1)
    axes.plot(ends.iloc[[1, 2]], [place, place], color=color, lw=4, solid_capstyle="butt")
    axes.plot(100 * row["mean"], place, marker="D", color=PALETTE["ink"])


def plot_learning_curves(runs: Iterable[Mapping[str, Any]], rank: int) -> Figure:
    """Draw the mean validation accuracy after each epoch; the shade spans all seeds.

    Args:
        runs: of one experiment.
        rank: which one to draw of the methods that have a rank.
    """
    curves: dict[str, list[list[float]]] = {}
    for run in runs:
        if run["rank"] in (rank, None) and len(run["validation"]) > 1:
            curves.setdefault(run["method"], []).append(run["validation"])
    if not curves:
        return _nothing_to_draw("learning curves of two epochs or more")
    figure, axes = plt.subplots()
    for method, values in curves.items():
        percent = 100 * np.array(values)
        epochs = range(1, percent.shape[1] + 1)
        axes.fill_between(
            epochs, percent.min(0), percent.max(0), color=METHOD_LOOKS[method].color, alpha=0.12, lw=0
        )
        axes.plot(epochs, percent.mean(0), label=method, **_style(method))
    axes.set(xlabel="epoch", ylabel="validation accuracy (%)")
    _legend(figure)
    return figure


def plot_weight_changes(runs: Iterable[Mapping[str, Any]], rank: int) -> Figure:
    """Draw ΔM against ΔD after each epoch, a panel per linear layer and a line per seed, for full, LoRA and DoRA.

    Args:
        runs: of one experiment.
        rank: which one to draw of the methods that have a rank.
    """
    chosen = [
        run for run in runs if run["method"] in ("full", "LoRA", "DoRA") and run["rank"] in (rank, None)
    ]
    if not chosen:
        return _nothing_to_draw("full fine-tuning, LoRA or DoRA")
    changes = np.array([run["changes"] for run in chosen])  # (runs, epochs, layers, ΔM and ΔD)
    layers = changes.shape[2]
    figure, panels = plt.subplots(1, layers, figsize=(7.2, 3.2), squeeze=False)
    for layer, axes in enumerate(panels.flat):
        for run, (stretched, turned) in zip(chosen, changes[:, :, layer].transpose(0, 2, 1), strict=True):
            style = _style(run["method"]) | {"linewidth": 1, "markersize": 3}
            axes.plot(turned, stretched, label=run["method"], **style)
        axes.set_title(f"layer {layer + 1}")
    panels[0, 0].set_ylabel("ΔM, mean change of length")
    figure.supxlabel("ΔD, mean change of direction (1 − cosine)", fontsize="medium")
    _legend(figure)
    return figure
