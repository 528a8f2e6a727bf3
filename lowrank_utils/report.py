"""The report of a comparison: one table, its plots, and what the intervals allow to say."""

import contextlib
from collections.abc import Iterator, Sequence
from importlib import metadata
from pathlib import Path
from typing import Any

import matplotlib.pyplot as plt
import pandas as pd
from matplotlib.figure import Figure

from lowrank_utils.comparison_plots import (
    plot_accuracy_by_parameters,
    plot_accuracy_by_rank,
    plot_differences,
)
from lowrank_utils.plots import use_style
from lowrank_utils.tables import TASK, differences, means, results_table, spread_over_ranks, task_name

# Each question of the report: heading, the two methods, the second one's rank as a multiple of the first's.
QUESTIONS = [
    ("The same rank", "DoRA", "LoRA", 1),
    ("The same number of trainable parameters", "DoRA", "LoRA matched", 1),
    ("DoRA at half the rank", "DoRA", "LoRA", 2),
    ("The gradient through the norm", "DoRA norm kept", "DoRA", 1),
]


def write_report(
    results: Sequence[tuple[str, dict[str, Any]]], version: str, folder: Path, stem: str
) -> Path:
    """Write ``STEM.csv`` (all runs), ``STEM.md`` (the report) and its plots, each in one step.

    Args:
        results: name and result of each run.
        version: of the code that they were computed with.
        folder: where to; it is made if need be.
        stem: the files' name.

    Returns:
        The report's path.
    """
    folder.mkdir(parents=True, exist_ok=True)
    table = results_table(result for _, result in results)
    _write(folder / f"{stem}.csv", table.to_csv(index=False, lineterminator="\n"))
    settings = results[0][1]["settings"]
    lines = [
        f"# Is DoRA better than LoRA? On {settings['data_set']}",
        f"{len(results)} runs of notebook 07, {settings['data_set']}, {table['seed'].nunique()} seeds, "
        f"{settings['adaptation_examples']:,} examples × {settings['epochs']} epochs, "
        f"code {version}, torch {metadata.version('torch').split('+')[0]}. "
        f"All adaptations are in [{stem}.csv]({stem}.csv).",
        *_accuracies(table),
    ]
    for name, figure in _figures(table).items():
        _save(figure, folder / f"{stem}_{name.replace(' ', '_')}.png")
        lines.append(f"![{_ALT_TEXTS[name]}]({stem}_{name.replace(' ', '_')}.png)")
    lines += _answers(table)
    _write(folder / f"{stem}.md", "\n\n".join(lines) + "\n")
    return folder / f"{stem}.md"


_ALT_TEXTS = {
    "by rank": "Mean test accuracy with intervals against the rank, a panel for each shift, a line for each method.",
    "by parameters": "Mean test accuracy with intervals against the number of trainable parameters, a panel for each shift.",
    "differences": "DoRA's accuracy minus LoRA's at the same rank with intervals, a panel for each shift and a line for each rank; the margin of one point is shaded.",
}


def _figures(table: pd.DataFrame) -> dict[str, Figure]:
    use_style()
    summary = means(table)
    figures = {"by parameters": plot_accuracy_by_parameters(summary)}
    if table["rank"].notna().any():
        figures = {"by rank": plot_accuracy_by_rank(summary), **figures}
    pairs = differences(table, "DoRA", "LoRA")
    if len(pairs):
        figures["differences"] = plot_differences(pairs)
    return figures


def _accuracies(table: pd.DataFrame) -> list[str]:
    """Return a table of mean accuracies for each task, a row per method and a column per rank."""
    parts = []
    for _, group in means(table).groupby(TASK, sort=False):
        ranks = sorted(group["rank"].dropna().unique())
        lines = [
            "| method | " + " | ".join([*(f"r = {rank}" for rank in ranks), "without a rank"]) + " |",
            "|---" * (len(ranks) + 2) + "|",
        ]
        for method, rows in group.groupby("method", sort=False):
            cells = {
                None if pd.isna(row["rank"]) else row["rank"]: f"{100 * row['mean']:.1f} ± "
                f"{50 * (row['high'] - row['low']):.1f}" + ("*" if row["at_edge"] else "")
                for _, row in rows.iterrows()
            }
            lines.append(f"| {method} | " + " | ".join(cells.get(rank, "") for rank in [*ranks, None]) + " |")
        parts += [f"## {task_name(group.iloc[0]).capitalize()}", "\n".join(lines)]
    note = "Test accuracy in percent: mean over the seeds ± half of its 95 % interval."
    if table["at_edge"].any():
        note += " * The chosen learning rate is the first or last of its grid; a better one may lie outside."
    return [*parts, note]


def _answers(table: pd.DataFrame) -> list[str]:
    """Return a table of paired differences for each question that the runs can answer."""
    parts = []
    for heading, first, second, factor in QUESTIONS:
        rows = differences(table, first, second, factor)
        if len(rows):
            other = f"{second} at twice the rank" if factor == 2 else second
            parts += [f"## {heading}: {first} − {other}", difference_lines(rows)]
    spread = spread_over_ranks(table, ["DoRA", "LoRA"])
    if table["rank"].nunique() > 1 and spread["method"].nunique() == 2:
        parts += [
            "## Robustness to the rank: spread of DoRA − spread of LoRA",
            "The spread is the accuracy at the best rank minus that at the worst, for each seed.",
            difference_lines(differences(spread, "DoRA", "LoRA", exceeds="varies more")),
        ]
    if parts:
        parts.append(
            "Differences in percentage points, paired by seed, with 95 % t intervals. The corrected interval "
            "holds together with those of all rows of its table (Bonferroni), and the verdict goes by it: "
            "“no difference” means that it lies within ± 1 point. d is the mean over the standard deviation."
        )
    return parts


def difference_lines(rows: pd.DataFrame) -> str:
    """Return paired differences as a Markdown table."""
    lines = [
        "| task | rank | difference | 95 % interval | corrected | d | verdict |",
        "|---|---|---|---|---|---|---|",
    ]
    for _, row in rows.iterrows():
        low, high, low_all, high_all = (
            100 * row[k] for k in ("low", "high", "low_corrected", "high_corrected")
        )
        rank = "" if pd.isna(row["rank"]) else row["rank"]
        lines.append(
            f"| {task_name(row)} | {rank} | {100 * row['mean']:+.2f} | {low:+.2f} to {high:+.2f} | "
            f"{low_all:+.2f} to {high_all:+.2f} | {row['effect']:+.1f} | {row['verdict']} |"
        )
    return "\n".join(lines)


def _save(figure: Figure, path: Path) -> None:
    with _in_one_step(path) as temporary:
        figure.savefig(temporary, dpi=150, metadata={"Software": None})
    plt.close(figure)


def _write(path: Path, text: str) -> None:
    with _in_one_step(path) as temporary:
        temporary.write_text(text, encoding="utf-8", newline="\n")


@contextlib.contextmanager
def _in_one_step(path: Path) -> Iterator[Path]:
    """Yield where to write what then takes the place of ``path``; if it can't be written, nothing of it stays."""
    temporary = path.with_name(f".{path.stem}.tmp{path.suffix}")
    try:
        yield temporary
        temporary.replace(path)
    finally:
        temporary.unlink(missing_ok=True)
