"""The primary tests of a comparison: written down before the runs, so that nobody can
choose by the results.
"""

from collections.abc import Iterable, Mapping, Sequence
from dataclasses import asdict, dataclass
from typing import TYPE_CHECKING, Any, NamedTuple

import pandas as pd

from lowrank_utils._arguments import check_one_of, check_whole_number
from lowrank_utils.comparison.intervals import (
    CONFIDENCE,
    UNDECIDED,
    holm,
    mean_interval,
    networks_needed,
    sign_flip_test,
)
from lowrank_utils.comparison.methods import METHODS
from lowrank_utils.comparison.shifts import SHIFTS
from lowrank_utils.comparison.tables import network_means

if TYPE_CHECKING:
    from lowrank_utils.comparison.settings import Settings

# More than these would make each of them too weak.
MOST = 5
# What may differ between the runs of one declared shift.
APART = {"networks", "methods", "ranks", "steps"}


class PrimaryTest(NamedTuple):
    """One declared test: is the mean of first − second, over the declared shifts and
    these ranks, zero?

    Attributes:
        first: a method with a rank.
        second: another one.
        ranks: that the mean is taken over.
    """

    first: str
    second: str
    ranks: tuple[int, ...]

    def __str__(self) -> str:
        ranks = " and ".join(map(str, self.ranks))
        return f"{self.first} − {self.second}, rank {ranks}"


@dataclass(frozen=True)
class Declaration:
    """What a sweep is to decide.

    Attributes:
        shifts: that each test's mean is taken over.
        steps: the lengths, each of which is judged by itself.
        tests: five at most.
    """

    shifts: tuple[str, ...]
    steps: tuple[int, ...]
    tests: tuple[PrimaryTest, ...]

    def as_dict(self) -> dict[str, Any]:
        """Return it as JSON holds it."""
        return asdict(self) | {"tests": [test._asdict() for test in self.tests]}

    def check(self, runs: Iterable["Settings"]) -> None:
        """Refuse tests that the runs can't answer, before anything is trained.

        Args:
            runs: the settings of all runs of the sweep.

        Raises:
            ValueError: the runs of a shift differ in more than networks, methods, ranks
                and steps, a method isn't run with a rank and a length on one of the
                shifts, or above fewer networks than the smallest possible p-value
                needs.
        """
        above: dict[tuple[str, int, str, int | None], set[int]] = {}
        tasks: dict[str, dict[str, Any]] = {}
        for settings in runs:
            if settings.shift in self.shifts:
                task = {
                    name: value
                    for name, value in settings.as_dict().items()
                    if name not in APART
                }
                for name, value in tasks.setdefault(settings.shift, task).items():
                    if task[name] != value:
                        raise ValueError(
                            f"{settings.shift} is declared as one task, but runs with {name} {value!r} and {task[name]!r}"
                        )
            for method, rank in settings.configurations():
                for steps in settings.steps:
                    cell = (settings.shift, steps, method, rank)
                    above.setdefault(cell, set()).update(settings.networks)
        needed = networks_needed(len(self.tests))
        for test in self.tests:
            cells = [
                (shift, steps, method, rank)
                for shift in self.shifts
                for steps in self.steps
                for rank in test.ranks
                for method in (test.first, test.second)
            ]
            for shift, steps, method, rank in cells:
                if (shift, steps, method, rank) not in above:
                    raise ValueError(
                        f"“{test}” is declared, but {method} isn't run with rank {rank} and {steps} steps on {shift}"
                    )
            count = len(set.intersection(*(above[cell] for cell in cells)))
            if count < needed:
                raise ValueError(
                    f"“{test}” is declared, but its runs have {count} networks in common; {len(self.tests)} tests "
                    f"need {needed} or more: with n networks p can't be below 2/2ⁿ"
                )


def read_declaration(declared: Any) -> Declaration:
    """Return what a grid's file declares: a mapping with shifts, steps, and tests with
    first, second and ranks.

    Raises:
        ValueError: it holds something else, an unknown name, or more than five tests.
    """
    if not isinstance(declared, Mapping) or set(declared) != {
        "shifts",
        "steps",
        "tests",
    }:
        raise ValueError(
            f"declared must have shifts, steps and tests; got {declared!r}"
        )
    shifts = [
        check_one_of("a shift", shift, SHIFTS)
        for shift in _list("shifts", declared["shifts"])
    ]
    lengths = [
        check_whole_number("steps", steps, minimum=1)
        for steps in _list("steps", declared["steps"])
    ]
    tests = [_test(entry) for entry in _list("tests", declared["tests"])]
    if len(tests) > MOST:
        raise ValueError(f"tests must be {MOST} or fewer; got {len(tests)}")
    return Declaration(tuple(shifts), tuple(lengths), tuple(tests))


def _test(entry: Any) -> PrimaryTest:
    if not isinstance(entry, Mapping) or set(entry) != {"first", "second", "ranks"}:
        raise ValueError(f"a test must have first, second and ranks; got {entry!r}")
    with_rank = [name for name, method in METHODS.items() if method.has_rank]
    first, second = (
        check_one_of(name, entry[name], with_rank) for name in ("first", "second")
    )
    if first == second:
        raise ValueError(f"a test must compare two methods; got {first!r} twice")
    ranks = [
        check_whole_number("a rank", rank, minimum=1)
        for rank in _list("ranks", entry["ranks"])
    ]
    return PrimaryTest(first, second, tuple(ranks))


def _list(name: str, values: Any) -> list[Any]:
    if not isinstance(values, list) or not values:
        raise ValueError(
            f"{name} must be a list with one entry or more; got {values!r}"
        )
    if twice := [value for value in values if values.count(value) > 1]:
        raise ValueError(
            f"{name} must have each entry once; got {twice[0]!r} more often"
        )
    return values


def judge(table: pd.DataFrame, declaration: Declaration) -> pd.DataFrame:
    """Return the declared tests' answers, for each length.

    The unit is the network: its difference is the mean over the shifts and the ranks of
    the means over its seeds. Only networks that have all of them count.

    Args:
        table: as ``tables.results_table`` gives it.
        declaration: what to decide.

    Returns:
        A row for each length and test: steps, test, count (of networks), mean, low and
        high (Student's interval, which holds together with those of the other tests of
        its length: Bonferroni), p (sign flips), p_holm (corrected among the tests of
        its length), verdict (undecided if p_holm is above 0.05).

    Raises:
        ValueError: fewer than two networks have all that a test needs.
    """
    rows = []
    for steps in declaration.steps:
        answers = [
            _answer(test, table, declaration, steps) for test in declaration.tests
        ]
        for row, p in zip(answers, holm([row["p"] for row in answers]), strict=True):
            verdict = row["verdict"]
            if verdict in ("better", "worse") and p > 1 - CONFIDENCE:
                verdict = UNDECIDED
            rows.append(row | {"p_holm": p, "verdict": verdict})
    return pd.DataFrame(
        rows,
        columns=[
            "steps",
            "test",
            "count",
            "mean",
            "low",
            "high",
            "p",
            "p_holm",
            "verdict",
        ],
    )


def _answer(
    test: PrimaryTest, table: pd.DataFrame, declaration: Declaration, steps: int
) -> dict[str, Any]:
    differences = network_differences(test, table, declaration.shifts, steps).tolist()
    if len(differences) < 2:
        raise ValueError(
            f"“{test}” needs two networks or more with all its runs of {steps} steps; there are {len(differences)}"
        )
    interval = mean_interval(differences, 1 - (1 - CONFIDENCE) / len(declaration.tests))
    answer = {
        "steps": steps,
        "test": str(test),
        "p": sign_flip_test(differences),
        "verdict": interval.verdict(),
    }
    return answer | vars(interval)


def network_differences(
    test: PrimaryTest, table: pd.DataFrame, shifts: Sequence[str], steps: int
) -> "pd.Series[float]":
    """Return network → the mean of first − second over the shifts and the ranks, for
    the networks with all of them.
    """
    rows = table[
        table["shift"].isin(shifts)
        & (table["steps"] == steps)
        & table["rank"].isin(test.ranks)
    ]
    networks = network_means(rows[rows["method"].isin([test.first, test.second])])
    wide = networks.pivot_table(
        index=["shift", "rank", "network"], columns="method", values="test"
    )
    wide = wide.reindex(columns=[test.first, test.second])
    differences = (wide[test.first] - wide[test.second]).dropna().groupby("network")
    whole = differences.size() == len(shifts) * len(test.ranks)
    return differences.mean()[whole]
