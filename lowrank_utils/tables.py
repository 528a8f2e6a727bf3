"""Results of experiments as tables: a row per run, means with intervals, and differences in pairs."""

from collections.abc import Iterable, Mapping, Sequence
from typing import Any

import pandas as pd

from lowrank_utils.intervals import difference_interval, mean_interval
from lowrank_utils.methods import METHODS

# The settings that tell one task from another.
TASK = ["data_set", "shift", "rotation", "adaptation_examples", "epochs", "alpha", "scaling", "init"]


def results_table(results: Iterable[Mapping[str, Any]]) -> pd.DataFrame:
    """Return a row for each adaptation in the results of some experiments.

    Args:
        results: what notebook 07 writes. An adaptation that stands in several of them (a method without a
            rank, run beside several ranks) is taken once.

    Returns:
        The columns of ``TASK`` and method, rank (missing if the method has none), trainable, learning_rate,
        at_edge (the rate is the first or last of its grid), seed, validation and test (accuracies from 0 to 1).
    """
    rows = []
    for result in results:
        task = {name: result["settings"][name] for name in TASK}
        at_edge = {
            (choice["method"], choice["rank"]): choice["at_edge"] for choice in result["learning_rates"]
        }
        rows += [
            task
            | {name: run[name] for name in ("method", "rank", "trainable", "learning_rate")}
            | {"at_edge": at_edge.get((run["method"], run["rank"]), False), "seed": run["seed"]}
            | {"validation": run["validation"][-1], "test": run["test"]}
            for run in result["runs"]
        ]
    table = pd.DataFrame(rows).astype({"rank": "Int64", "learning_rate": "float64"})
    return table.drop_duplicates([*TASK, "method", "rank", "seed"], ignore_index=True)


def read_table(path: Any) -> pd.DataFrame:
    """Read a table from the CSV file that ``lowrank-compare`` wrote."""
    return pd.read_csv(path, dtype={"rank": "Int64"})


def task_name(task: Mapping[str, Any]) -> str:
    """Return a short name for a task, such as ``rotation 45°``."""
    return f"rotation {task['rotation']:g}°" if task["shift"] == "rotation" else str(task["shift"])


def means(table: pd.DataFrame) -> pd.DataFrame:
    """Return the mean test accuracy over the seeds with its 95 % interval, for each task, method and rank.

    Returns:
        A row each, with the columns of ``TASK``, method, rank, trainable, at_edge, count, mean, low, high.
    """
    rows = []
    keys = [*TASK, "method", "rank", "trainable", "at_edge"]
    for values, group in table.groupby(keys, sort=False, dropna=False):
        interval = mean_interval(group["test"].tolist())
        rows.append(
            dict(zip(keys, values, strict=True))
            | {"count": interval.count, "mean": interval.mean, "low": interval.low, "high": interval.high}
        )
    columns = [*keys, "count", "mean", "low", "high"]
    return pd.DataFrame(rows, columns=columns).astype({"rank": "Int64"})


def differences(
    table: pd.DataFrame, first: str, second: str, rank_factor: int = 1, exceeds: str = "is better"
) -> pd.DataFrame:
    """Return the paired difference of two methods' test accuracies, for each task and rank.

    All rows are one family: the corrected intervals hold together.

    Args:
        table: as ``results_table`` gives it.
        first: the method whose accuracy is positive in the difference.
        second: the other. A method without a rank is paired with each rank of the other one.
        rank_factor: the rank of ``second`` as a multiple of that of ``first``.
        exceeds: what the verdict says of the method with the larger values.

    Returns:
        A row each, with the columns of ``TASK``, first, second, rank (of the first, if it has one), and the
        attributes of ``intervals.Difference``; ``verdict`` holds for a margin of one percentage point.
    """
    for method in (first, second):
        if method not in METHODS:
            raise ValueError(f"methods are {', '.join(METHODS)}; got {method!r}")
    pairs = []
    for values, group in table.groupby(TASK, sort=False):
        scores: dict[str, dict[int | None, dict[int, float]]] = {first: {}, second: {}}
        for (method, rank), part in group.groupby(["method", "rank"], sort=False, dropna=False):
            if method in scores:
                by_seed = dict(zip(part["seed"], part["test"], strict=True))
                scores[method][None if pd.isna(rank) else int(rank)] = by_seed
        for rank, one in scores[first].items():
            for other, two in scores[second].items():
                if rank is None or other is None or other == rank * rank_factor:
                    pairs.append((values, other if rank is None else rank, one, two))
    rows = []
    for values, rank, one, two in pairs:
        difference = difference_interval(one, two, comparisons=len(pairs))
        verdict = difference.verdict().replace("is better", exceeds)
        rows.append(
            dict(zip(TASK, values, strict=True))
            | {"first": first, "second": second, "rank": rank}
            | vars(difference)
            | {"verdict": verdict.replace("first", first).replace("second", second)}
        )
    columns = [*TASK, "first", "second", "rank"]
    return pd.DataFrame(rows, columns=None if rows else columns).astype({"rank": "Int64"})


def spread_over_ranks(table: pd.DataFrame, methods: Sequence[str]) -> pd.DataFrame:
    """Return how far apart the accuracies at the best and at the worst rank lie, for each task, method and seed.

    A method that is robust to the choice of the rank has a small spread.

    Returns:
        A row each, with the columns of ``TASK``, method, seed, test (the spread, so that ``differences`` takes
        it), rank (missing).
    """
    chosen = table[table["method"].isin(methods) & table["rank"].notna()]
    grouped = chosen.groupby([*TASK, "method", "seed"], sort=False)["test"]
    spread = (grouped.max() - grouped.min()).reset_index()
    return spread.assign(rank=pd.array([pd.NA] * len(spread), dtype="Int64"))
