"""The report of a comparison: what was declared and decided, tables, plots, and all
that only describes.
"""

import shutil
import subprocess
from collections.abc import Sequence
from importlib import metadata
from pathlib import Path
from typing import Any

import matplotlib.pyplot as plt
import pandas as pd
from matplotlib.figure import Figure

from lowrank_utils.comparison.declared import Declaration, judge, network_differences
from lowrank_utils.comparison.intervals import mean_interval
from lowrank_utils.comparison.plots import (
    plot_accuracy_over_steps,
    plot_declared,
    plot_differences,
    plot_networks,
)
from lowrank_utils.comparison.tables import (
    TASK,
    differences,
    means,
    results_table,
    spread_over_ranks,
    task_name,
    under_tuned,
)
from lowrank_utils.comparison.whole import in_one_step, write_whole
from lowrank_utils.plots import use_style

# What the report asks besides what was declared: the first method minus the second.
QUESTIONS = [
    ("DoRA with m's rate", "DoRA with one rate"),
    ("DoRA with m's rate", "LoRA"),
    ("DoRA with m's rate", "LoRA matched above"),
    ("DoRA with m's rate", "LoRA matched below"),
    ("DoRA with m's rate", "gain"),
    ("DoRA with m's rate", "random rows"),
    ("DoRA norm kept with m's rate", "DoRA with m's rate"),
    ("gain", "random rows"),
    ("gain", "positive gain"),
    ("random rows", "LoRA matched above"),
    ("LoRA", "LoRA with one rate"),
    ("LoRA with biases", "LoRA"),
    ("DoRA with one rate", "LoRA with one rate"),
]


def write_report(
    results: Sequence[tuple[str, dict[str, Any]]],
    version: str,
    folder: Path,
    stem: str,
    declaration: Declaration | None = None,
) -> Path:
    """Write ``STEM.csv`` (all runs), ``STEM.md`` (the report) and its plots, each in
    one step.

    Args:
        results: name and result of each run.
        version: of the code that they were computed with.
        folder: where to; it is made if need be.
        stem: the files' name.
        declaration: what the runs are to decide.

    Returns:
        The report's path.
    """
    table = results_table(result for _, result in results)
    write_whole(folder / f"{stem}.csv", table.to_csv(index=False, lineterminator="\n"))
    lines = [
        f"# Results on {' and '.join(table['data_set'].unique())}",
        f"{len(table):,} adaptations above {table['network'].nunique()} pretrained networks, "
        f"code {version}{_commit()}, torch {metadata.version('torch').split('+')[0]}. "
        f"All of them are in [{stem}.csv]({stem}.csv).",
    ]
    plots: dict[str, Figure] = {}
    use_style()
    if (
        declaration is not None
        and (answers := judge_if_whole(table, declaration)) is not None
    ):
        lines += [
            "## What was declared before the runs",
            *declared_lines(answers, declaration),
        ]
        plots["declared"] = plot_declared(answers)
        lines.append(_picture("declared", stem))
        if len(declaration.shifts) > 1:
            lines += [
                "### The same without one of the tasks",
                without_one_task(table, declaration),
            ]
    lines += _accuracies(table)
    # Where something is declared, the plots keep to it: more panels than that are a
    # wall.
    shown = table
    if declaration is not None:
        declared = table["shift"].isin(declaration.shifts)
        shown = table[declared & table["steps"].isin(declaration.steps)]
    for rank in sorted(shown["rank"].dropna().unique()):
        name = f"rank_{rank}"
        plots[name] = plot_networks(
            shown[(shown["rank"] == rank) | shown["rank"].isna()]
        )
        lines.append(_picture(name, stem))
    pairs = differences(shown, "DoRA with m's rate", "LoRA")
    if len(pairs):
        plots["differences"] = plot_differences(pairs)
        lines.append(_picture("differences", stem))
    longest = table["steps"].max()
    ranks = table[table["steps"] == longest]["rank"].dropna()
    if table["steps"].nunique() > 2 and len(ranks):
        rank = int(ranks.min())
        plots["steps"] = plot_accuracy_over_steps(table, rank)
        lines += [f"## Longer runs, rank {rank}", _picture("steps", stem)]
    lines += _answers(table)
    for name, figure in plots.items():
        _save(figure, folder / f"{stem}_{name}.png")
    write_whole(folder / f"{stem}.md", "\n\n".join(lines) + "\n")
    return folder / f"{stem}.md"


def judge_if_whole(
    table: pd.DataFrame, declaration: Declaration
) -> pd.DataFrame | None:
    """Return the declared tests' answers, or None as long as runs are missing."""
    try:
        return judge(table, declaration)
    except (KeyError, ValueError):
        return None


_ALT_TEXTS = {
    "declared": "Difference and interval of each declared test, a panel for each length; the margin is shaded.",
    "differences": "DoRA with m's rate minus LoRA, with intervals, a panel for each task; the margin is shaded.",
    "steps": "Mean test accuracy against the number of steps, a panel for each task, a line for each method.",
}


def _picture(name: str, stem: str) -> str:
    alt = (
        f"Test accuracy at rank {name.removeprefix('rank_')}, a panel for each task and length: a mark per "
        "network, and the mean."
        if name.startswith("rank_")
        else _ALT_TEXTS[name]
    )
    return f"![{alt}]({stem}_{name}.png)"


def _commit() -> str:
    """Return the commit that the code is at, if git is there and the code in a
    repository.
    """
    git = shutil.which("git")
    if git is None:
        return ""
    # No shell, and a fixed command.
    run = subprocess.run(  # noqa: S603
        [git, "rev-parse", "--short=10", "HEAD"],
        cwd=Path(__file__).parent,
        capture_output=True,
        text=True,
        check=False,
    )
    return f", commit {run.stdout.strip()}" if run.returncode == 0 else ""


def _signed(value: float) -> str:
    return f"{100 * value:+.1f}".replace("-", "−")


def declared_lines(answers: pd.DataFrame, declaration: Declaration) -> list[str]:
    """Return the declared tests' answers as a Markdown table, and a sentence that says
    how to read it.
    """
    lines = [
        "| steps | first − second | networks | difference | interval | p (Holm) | the first is |",
        "|---|---|---|---|---|---|---|",
    ]
    for _, row in answers.iterrows():
        p = "< 0.001" if row["p_holm"] < 0.001 else f"{row['p_holm']:.3f}"
        lines.append(
            f"| {row['steps']:,} | {row['test']} | {row['count']} | {_signed(row['mean'])} | "
            f"{_signed(row['low'])} to {_signed(row['high'])} | {p} | {row['verdict']} |"
        )
    return [
        "\n".join(lines),
        f"Points of test accuracy, in the mean over {', '.join(declaration.shifts)}. The unit is the pretrained "
        "network. The intervals of one length hold together (95 %, Bonferroni); p comes from flipping signs, and is "
        "corrected by Holm among the tests of one length. Within ± 1 point a difference isn't worth having.",
    ]


def without_one_task(table: pd.DataFrame, declaration: Declaration) -> str:
    """Return how large each declared difference is if one task is left out, as a
    Markdown table.
    """
    lines = [
        "| steps | first − second | "
        + " | ".join(f"without {name}" for name in declaration.shifts)
        + " |"
    ]
    lines.append("|---" * (len(declaration.shifts) + 2) + "|")
    for steps in declaration.steps:
        for test in declaration.tests:
            cells = []
            for left_out in declaration.shifts:
                shifts = [shift for shift in declaration.shifts if shift != left_out]
                values = network_differences(test, table, shifts, steps)
                interval = mean_interval(values.tolist())
                ends = f"{_signed(interval.low)} to {_signed(interval.high)}"
                cells.append(f"{_signed(interval.mean)} ({ends})")
            lines.append(f"| {steps:,} | {test} | " + " | ".join(cells) + " |")
    return "\n".join(lines)


def _accuracies(table: pd.DataFrame) -> list[str]:
    """Return for each task and length a table of mean accuracies, a row per method and
    a column per rank.
    """
    suspects = under_tuned(table)
    parts = ["## Accuracy"]
    for values, group in means(table).groupby([*TASK, "steps"], sort=False):
        task = dict(zip([*TASK, "steps"], values, strict=True))
        ranks = sorted(group["rank"].dropna().unique())
        lines = [
            "| method | "
            + " | ".join([*(f"r = {rank}" for rank in ranks), "without a rank"])
            + " |",
            "|---" * (len(ranks) + 2) + "|",
        ]
        for method, rows in group.groupby("method", sort=False):
            cells = {}
            for _, row in rows.iterrows():
                flagged = suspects[
                    (suspects["shift"] == row["shift"])
                    & (suspects["steps"] == row["steps"])
                    & (suspects["method"] == method)
                    & (
                        suspects["rank"].fillna(-1)
                        == (-1 if pd.isna(row["rank"]) else row["rank"])
                    )
                ]
                half = (
                    ""
                    if row["count"] == 1
                    else f" ± {50 * (row['high'] - row['low']):.1f}"
                )
                cells[None if pd.isna(row["rank"]) else row["rank"]] = (
                    f"{100 * row['mean']:.1f}{half} ({row['count']})"
                    + (f", dead {row['dead']:.0%}" if row["dead"] > 0 else "")
                    + (" †" if len(flagged) else "")
                )
            lines.append(
                f"| {method} | "
                + " | ".join(cells.get(rank, "") for rank in [*ranks, None])
                + " |"
            )
        parts += [
            f"### {task_name(task).capitalize()}, {task['steps']:,} steps",
            "\n".join(lines),
        ]
    parts.append(
        "Test accuracy in percent: mean over the networks ± half of its 95 % interval, in brackets how many networks. "
        "A run is dead if at the end its loss is no lower than guessing's. † Under-tuned: clearly worse than a "
        "submodel of its own, in training loss and in tuning score, so nothing may be concluded from it."
    )
    return [
        *parts,
        *_under_tuned_lines(suspects),
        *_negative_lines(table),
        *_rate_lines(table),
    ]


def _under_tuned_lines(suspects: pd.DataFrame) -> list[str]:
    if len(suspects) == 0:
        return []
    lines = [
        "| task | steps | method | its submodel | score, points | training loss, nats | networks |",
        "|---|---|---|---|---|---|---|",
    ]
    for _, row in suspects.iterrows():
        method, submodel = (
            name if pd.isna(rank) else f"{name}, r = {rank}"
            for name, rank in (
                (row["method"], row["rank"]),
                (row["submodel"], row["submodel_rank"]),
            )
        )
        lines.append(
            f"| {task_name(row)} | {row['steps']:,} | {method} | {submodel} | {_signed(row['score'])} | "
            f"+{row['training_loss']:.2f} | {row['count']} |"
        )
    return ["## Under-tuned", "\n".join(lines)]


def _negative_lines(table: pd.DataFrame) -> list[str]:
    """Return the share of m and of the gain that is below zero, layer by layer."""
    layers = [name for name in table.columns if name.startswith("negative_")]
    if not layers:
        return []
    summary = means(table)
    rows = summary[
        summary[layers].notna().any(axis=1) & (summary["method"] != "positive gain")
    ]
    heading = " | ".join(f"layer {name.removeprefix('negative_')}" for name in layers)
    lines = [
        f"| task | steps | method | rank | {heading} |",
        "|---" * (4 + len(layers)) + "|",
    ]
    for _, row in rows.iterrows():
        shares = " | ".join(
            "" if pd.isna(row[name]) else f"{row[name]:.0%}" for name in layers
        )
        rank = "" if pd.isna(row["rank"]) else row["rank"]
        lines.append(
            f"| {task_name(row)} | {row['steps']:,} | {row['method']} | {rank} | {shares} |"
        )
    return [
        "## Signs",
        "How many entries of m, or of the gain, are below zero at the end. A negative m isn't a length: the neuron's "
        "weights point the other way.",
        "\n".join(lines),
    ]


def _rate_lines(table: pd.DataFrame) -> list[str]:
    """Return the chosen rates and factors: medians over the networks, and how often a
    range grew.
    """
    tuned = table.drop_duplicates([*TASK, "steps", "method", "rank", "network"])
    tuned = tuned[tuned["learning_rate"].notna()]
    lines = [
        "| task | steps | method | rank | rate | factor | ranges that grew | at an edge | networks |",
        "|---|---|---|---|---|---|---|---|---|",
    ]
    for _, group in tuned.groupby(
        [*TASK, "steps", "method", "rank"], sort=False, dropna=False
    ):
        row = group.iloc[0]
        rank = "" if pd.isna(row["rank"]) else row["rank"]
        factor = group["factor"].median()
        lines.append(
            f"| {task_name(row)} | {row['steps']:,} | {row['method']} | {rank} | "
            f"{group['learning_rate'].median():.4f} | {'' if pd.isna(factor) else f'{factor:.0f}'} | "
            f"{(group['widened'].astype(int) > 0).sum()} | {group['at_edge'].astype(bool).sum()} | {len(group)} |"
        )
    return ["## Chosen rates", "Medians over the networks.", "\n".join(lines)]


def _answers(table: pd.DataFrame) -> list[str]:
    """Return a table of differences for each question that the runs can answer."""
    parts = [
        "## Differences, task by task",
        "These describe. What was tested, if anything was, stands at the top.",
    ]
    for first, second in QUESTIONS:
        rows = differences(table, first, second)
        if len(rows):
            parts += [f"### {first} − {second}", difference_lines(rows)]
    methods = ["LoRA", "DoRA with m's rate"]
    # The ranks above most networks; what has been run above a few says little of this.
    above = table[table["method"].isin(methods)].groupby("rank")["network"].nunique()
    ranks = above[above == above.max()].index
    spread = spread_over_ranks(table[table["rank"].isin(ranks)], methods)
    spread = spread[spread["ranks"] == len(ranks)]
    if len(ranks) > 1 and spread["method"].nunique() == 2:
        parts += [
            "### Robustness to the rank: spread of DoRA with m's rate − spread of LoRA",
            f"Over the ranks {' and '.join(map(str, ranks))}. "
            "The spread is the accuracy at the best rank minus that at the worst, for each network.",
            _spread_lines(spread),
        ]
    parts.append(
        "Points of test accuracy with 95 % t intervals over the networks, uncorrected. “No difference worth having”: "
        "the interval lies within ± 1 point. One network alone has no interval."
    )
    return parts


def difference_lines(rows: pd.DataFrame) -> str:
    """Return differences as a Markdown table."""
    lines = [
        "| task | steps | rank | networks | difference | 95 % interval | the first is |",
        "|---|---|---|---|---|---|---|",
    ]
    for _, row in rows.iterrows():
        rank = "" if pd.isna(row["rank"]) else row["rank"]
        ends = (
            ""
            if row["count"] == 1
            else f"{_signed(row['low'])} to {_signed(row['high'])}"
        )
        lines.append(
            f"| {task_name(row)} | {row['steps']:,} | {rank} | {row['count']} | {_signed(row['mean'])} | {ends} | "
            f"{row['verdict']} |"
        )
    return "\n".join(lines)


def _spread_lines(spread: pd.DataFrame) -> str:
    lines = [
        "| task | steps | networks | difference | 95 % interval |",
        "|---|---|---|---|---|",
    ]
    for (_, steps), group in spread.groupby(["shift", "steps"], sort=False):
        wide = group.pivot_table(index="network", columns="method", values="spread")
        wide = wide.reindex(columns=["DoRA with m's rate", "LoRA"])
        both = (wide["DoRA with m's rate"] - wide["LoRA"]).dropna().tolist()
        if not both:
            continue
        interval = mean_interval(both)
        ends = (
            ""
            if interval.count == 1
            else f"{_signed(interval.low)} to {_signed(interval.high)}"
        )
        lines.append(
            f"| {task_name(group.iloc[0])} | {steps:,} | {interval.count} | {_signed(interval.mean)} | {ends} |"
        )
    return "\n".join(lines)


def _save(figure: Figure, path: Path) -> None:
    with in_one_step(path) as temporary:
        figure.savefig(temporary, dpi=150, metadata={"Software": None})
    plt.close(figure)
