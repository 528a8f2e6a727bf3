"""Results of experiments as tables: a row per run, means over networks with intervals,
and differences in pairs.
"""

from collections.abc import Iterable, Mapping, Sequence
from typing import Any

import pandas as pd

from lowrank_utils._arguments import check_one_of
from lowrank_utils.comparison.intervals import MARGIN, Interval, mean_interval
from lowrank_utils.comparison.methods import METHODS

# The settings that tell one task from another.
TASK = [
    "data_set",
    "shift",
    "rotation",
    "adaptation_examples",
    "alpha",
    "scaling",
    "init",
]
CELL = [*TASK, "steps", "method", "rank"]
# The other settings that decide an adaptation; all runs of one task have the same.
COMMON = ["batch_size", "pretraining_epochs", "tuning_points", "tuning_seeds", "dtype"]
# A training loss that is higher by less than this, in nats, is as good.
LOSS_MARGIN = 0.01
UNDER_TUNED = "under-tuned"


def results_table(results: Iterable[Mapping[str, Any]]) -> pd.DataFrame:
    """Return a row for each adaptation in the results of some experiments.

    Args:
        results: what ``experiment.write_result`` gives. An adaptation that stands in
            several of them (a method without a rank, run beside several ranks) is taken
            once.

    Returns:
        The columns of ``TASK`` and network, steps, method, rank (missing if the method
        has none), seed, trainable, learning_rate, factor, score (validation accuracy in
        the tuning), widened, at_edge, training_loss, dead, validation and test
        (accuracies from 0 to 1), and for each layer ``negative_LAYER``, the share of
        its m or gain that is below zero.

    Raises:
        ValueError: the runs of one task differ in another setting, so that they aren't
            runs of one experiment.
    """
    rows = []
    common: dict[tuple[Any, ...], dict[str, Any]] = {}
    for result in results:
        task = {name: result["settings"][name] for name in TASK}
        others = {name: result["settings"][name] for name in COMMON}
        for name, value in common.setdefault(tuple(task.values()), others).items():
            if others[name] != value:
                raise ValueError(
                    f"runs of {task['shift']} differ in {name}: {value!r} and {others[name]!r}"
                )
        choices = {
            (one["network"], one["method"], one["rank"], one["steps"]): one
            for one in result["choices"]
        }
        for run in result["runs"]:
            values = {name: value for name, value in run.items() if name != "negative"}
            choice = choices.get(
                (run["network"], run["method"], run["rank"], run["steps"]), {}
            )
            tuned = {name: choice.get(name) for name in ("score", "widened", "at_edge")}
            negative = {
                f"negative_{layer.removeprefix('layers.')}": share
                for layer, share in run["negative"].items()
            }
            rows.append(task | values | tuned | negative)
    table = pd.DataFrame(rows).astype(
        {"rank": "Int64", "learning_rate": "float64", "factor": "float64"}
    )
    return table.drop_duplicates([*CELL, "network", "seed"], ignore_index=True)


def read_table(path: Any) -> pd.DataFrame:
    """Read a table from the CSV file that ``lowrank-compare`` wrote."""
    return pd.read_csv(path, dtype={"rank": "Int64"})


def task_name(task: Mapping[str, Any]) -> str:
    """Return a short name for a task, such as ``rotation −45°``."""
    if task["shift"] != "rotation":
        return str(task["shift"])
    return f"rotation {task['rotation']:g}°".replace("-", "−")


def network_means(table: pd.DataFrame) -> pd.DataFrame:
    """Return a row for each task, length, method, rank and network: means over its
    adaptation seeds.
    """
    columns = ["score", "training_loss", "validation", "test", "dead"]
    columns += [name for name in table.columns if name.startswith("negative_")]
    numbers = table.assign(**{name: table[name].astype("float64") for name in columns})
    keys = [*CELL, "trainable", "network"]
    return numbers.groupby(keys, sort=False, dropna=False)[columns].mean().reset_index()


def means(table: pd.DataFrame) -> pd.DataFrame:
    """Return the mean test accuracy over the networks with its 95 % interval, for each
    task, length, method and rank.

    Returns:
        A row each, with the columns of ``CELL``, trainable, count (of networks), mean,
        low, high (NaN with one network alone), dead (the share of runs), and
        ``negative_LAYER``.
    """
    networks = network_means(table)
    negative = [name for name in networks.columns if name.startswith("negative_")]
    rows = []
    keys = [*CELL, "trainable"]
    for values, group in networks.groupby(keys, sort=False, dropna=False):
        rows.append(
            dict(zip(keys, values, strict=True))
            | vars(mean_interval(group["test"].tolist()))
            | {name: group[name].mean() for name in ("dead", *negative)}
        )
    columns = [*keys, "count", "mean", "low", "high", "dead", *negative]
    return pd.DataFrame(rows, columns=columns).astype({"rank": "Int64"})


def differences(table: pd.DataFrame, first: str, second: str) -> pd.DataFrame:
    """Return by how much one method is ahead of another, for each task, length and
    rank.

    The differences are taken network by network, over the networks that have both.
    These rows describe; what is tested is declared beforehand (``declared.judge``).

    Args:
        table: as ``results_table`` gives it.
        first: the method whose accuracy is positive in the difference.
        second: the other. A method without a rank is paired with each rank of the other
            one.

    Returns:
        A row each, with the columns of ``TASK``, steps, first, second, rank (if one of
        them has one), count, mean, low, high, and a verdict: better, worse, no
        difference worth having or undecided for the first; "under-tuned" where
        ``under_tuned`` lists one of them.
    """
    for name, method in {"first": first, "second": second}.items():
        check_one_of(name, method, METHODS)
    networks = network_means(table)
    below = _under_tuned(networks, {first, second})
    suspects = {_cell(row) for _, row in below.iterrows()}
    rows = []
    for values, one, two in _pairs(networks, first, second):
        paired = (
            one.set_index("network")["test"] - two.set_index("network")["test"]
        ).dropna()
        interval = mean_interval(paired.tolist())
        verdict = interval.verdict()
        if suspects & {_cell(one.iloc[0]), _cell(two.iloc[0])}:
            verdict = UNDER_TUNED
        rank = one.iloc[0]["rank"] if METHODS[first].has_rank else two.iloc[0]["rank"]
        rows.append(
            values
            | {"first": first, "second": second, "rank": rank}
            | vars(interval)
            | {"verdict": verdict}
        )
    columns = [
        *TASK,
        "steps",
        "first",
        "second",
        "rank",
        "count",
        "mean",
        "low",
        "high",
        "verdict",
    ]
    return pd.DataFrame(rows, columns=columns).astype({"rank": "Int64"})


def _pairs(
    networks: pd.DataFrame, first: str, second: str
) -> Iterable[tuple[dict[str, Any], pd.DataFrame, pd.DataFrame]]:
    """Yield task and length with the rows of both methods, for each pair of ranks that
    belong together.
    """
    for values, group in networks.groupby([*TASK, "steps"], sort=False):
        sides = [
            [
                rows
                for _, rows in group[group["method"] == method].groupby(
                    "rank", sort=False, dropna=False
                )
            ]
            for method in (first, second)
        ]
        for one in sides[0]:
            for two in sides[1]:
                ranks = {
                    rank
                    for rank in (one.iloc[0]["rank"], two.iloc[0]["rank"])
                    if not pd.isna(rank)
                }
                if len(ranks) <= 1 and set(one["network"]) & set(two["network"]):
                    yield dict(zip([*TASK, "steps"], values, strict=True)), one, two


def _cell(row: Any) -> tuple[str, ...]:
    # As text, since one table has NumPy's numbers and another Python's.
    return tuple("" if pd.isna(row[name]) else str(row[name]) for name in CELL)


def under_tuned(table: pd.DataFrame) -> pd.DataFrame:
    """Return the methods that do clearly worse than a method that they contain, or than
    themselves at a smaller rank.

    A method can do all that its submodel can. Where both its training loss and its
    score in the tuning are clearly worse, it was held back, and nothing may be
    concluded from it. Clearly means: by more than a point of accuracy and 0.01 nats in
    the mean over the networks, with 95 % intervals that exclude zero if there are
    several.

    Returns:
        A row for each such pair, with the columns of ``CELL``, submodel, submodel_rank,
        score and training_loss (the method's minus the submodel's), count.
    """
    networks = network_means(table)
    return _under_tuned(networks, networks["method"].unique())


def _under_tuned(networks: pd.DataFrame, methods: Iterable[str]) -> pd.DataFrame:
    rows = []
    for method in methods:
        for submodel in (method, *METHODS[method].contains):
            for values, one, two in _submodels(networks, method, submodel):
                columns = ["score", "training_loss"]
                paired = (
                    one.set_index("network")[columns]
                    - two.set_index("network")[columns]
                ).dropna()
                if len(paired) == 0:
                    continue
                score = mean_interval(paired["score"].tolist())
                loss = mean_interval(paired["training_loss"].tolist())
                lower_score = _clearly_above(score, MARGIN, sign=-1)
                if lower_score and _clearly_above(loss, LOSS_MARGIN):
                    rows.append(
                        values
                        | {"submodel": submodel, "submodel_rank": two.iloc[0]["rank"]}
                        | {
                            "score": score.mean,
                            "training_loss": loss.mean,
                            "count": score.count,
                        }
                    )
    columns = [*CELL, "submodel", "submodel_rank", "score", "training_loss", "count"]
    return pd.DataFrame(rows, columns=columns).astype(
        {"rank": "Int64", "submodel_rank": "Int64"}
    )


def _submodels(
    networks: pd.DataFrame, method: str, submodel: str
) -> Iterable[tuple[dict[str, Any], pd.DataFrame, pd.DataFrame]]:
    for values, group in networks.groupby([*TASK, "steps"], sort=False):
        for rank, one in group[group["method"] == method].groupby(
            "rank", sort=False, dropna=False
        ):
            for other, two in group[group["method"] == submodel].groupby(
                "rank", sort=False, dropna=False
            ):
                smaller = pd.isna(other) or (not pd.isna(rank) and other <= rank)
                if smaller and (method, rank) != (submodel, other):
                    cell = dict(zip([*TASK, "steps"], values, strict=True))
                    yield cell | {"method": method, "rank": rank}, one, two


def _clearly_above(interval: Interval, margin: float, sign: int = 1) -> bool:
    mean, low = sign * interval.mean, interval.low if sign > 0 else -interval.high
    return mean > margin and (interval.count == 1 or low > 0)


def spread_over_ranks(table: pd.DataFrame, methods: Sequence[str]) -> pd.DataFrame:
    """Return how far apart the accuracies at the best and at the worst rank lie, for
    each task, length and network.

    A method that is robust to the choice of the rank has a small spread.

    Returns:
        A row each, with the columns of ``TASK``, steps, method, network, ranks (how
        many), spread.
    """
    for method in methods:
        check_one_of("a method", method, METHODS)
    networks = network_means(table)
    chosen = networks[networks["method"].isin(methods) & networks["rank"].notna()]
    grouped = chosen.groupby([*TASK, "steps", "method", "network"], sort=False)["test"]
    spread = (grouped.max() - grouped.min()).reset_index(name="spread")
    return spread.assign(ranks=grouped.count().to_numpy())
