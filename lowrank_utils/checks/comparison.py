"""The checks of notebook 7, whether DoRA is better than LoRA."""

from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor

from lowrank_utils.checks._shared import ExerciseError, ask, compare, exercise

Scores = dict[str, tuple[float, float]]


@exercise("7.1")
def check_held_back(
    function: Callable[[Scores, dict[str, list[str]]], list[str]],
) -> None:
    """Check exercise 7.1, the methods that do worse than a part of themselves."""
    __tracebackhide__ = True
    contains = {"whole": ["half", "third"], "half": ["quarter"]}
    cases = [
        # Worse than a submodel in both numbers.
        (
            {"whole": (0.70, 0.60), "half": (0.80, 0.30), "third": (0.60, 0.90)},
            ["whole"],
            "only in the first submodel",
        ),
        (
            {"whole": (0.70, 0.60), "half": (0.60, 0.90), "third": (0.80, 0.30)},
            ["whole"],
            "only in the second submodel",
        ),
        # Worse in one of them: it may have overfitted, or have been lucky.
        (
            {"whole": (0.70, 0.20), "half": (0.80, 0.30), "third": (0.60, 0.90)},
            [],
            "its training loss is lower",
        ),
        (
            {"whole": (0.85, 0.60), "half": (0.80, 0.30), "third": (0.60, 0.90)},
            [],
            "its score is higher",
        ),
        # Worse than one submodel in this and than another one in that.
        (
            {"whole": (0.70, 0.60), "half": (0.80, 0.90), "third": (0.60, 0.30)},
            [],
            "no single submodel beats it twice",
        ),
        # A submodel that didn't run, and a method that contains nothing.
        (
            {"half": (0.60, 0.90), "quarter": (0.75, 0.40), "whole": (0.9, 0.1)},
            ["half"],
            "half is worse than quarter",
        ),
        (
            {"quarter": (0.10, 2.0), "third": (0.90, 0.1)},
            [],
            "neither contains the other",
        ),
    ]
    for scores, expected, reason in cases:
        answer = ask(function, scores=scores, contains=contains)
        if answer is None:
            raise ExerciseError("held_back is None: is the `return` missing?")
        if isinstance(answer, (str, bytes)) or not hasattr(answer, "__iter__"):
            raise ExerciseError(f"held_back must be a list of names; got {answer!r}")
        found = sorted(answer)
        if found == sorted(expected):
            continue
        if found == ["whole"] and reason == "its training loss is lower":
            raise ExerciseError(
                "the score alone isn't enough: whole has learned its training images better"
            )
        if found == ["whole"] and reason == "its score is higher":
            raise ExerciseError(
                "the training loss alone isn't enough: whole has the higher score"
            )
        raise ExerciseError(
            f"in {scores} it should be {expected}, since {reason}; got {found}"
        )


@exercise("7.2")
def check_enough_networks(function: Callable[[int], int]) -> None:
    """Check exercise 7.2, how many networks a number of declared tests needs."""
    __tracebackhide__ = True
    for tests, expected in ((5, 8), (1, 6), (2, 7), (20, 10), (40, 11)):
        mistakes = {
            "a mean can be far from zero on either side: the smallest p is 2/2ⁿ, not 1/2ⁿ": expected
            - 1,
            "one network more than it takes: p may be 0.05, but not above": expected
            + 1,
        }
        if tests > 1:
            mistakes["Holm multiplies the smallest p by the number of tests"] = 6
        compare("enough_networks", ask(function, tests=tests), expected, mistakes)


@exercise("7.3")
def check_sign_flip(function: Callable[[Tensor], Any]) -> None:
    """Check exercise 7.3, the sign-flip test of differences."""
    __tracebackhide__ = True
    for values in (
        [0.02, 0.01, 0.03],
        [0.010, 0.022, -0.004, 0.016, 0.011],
        [-0.5, -0.25, -0.125, 0.25],
    ):
        d = torch.tensor(values, dtype=torch.float64)
        signs = torch.cartesian_prod(
            *[torch.tensor([-1.0, 1.0], dtype=torch.float64)] * len(d)
        )
        means, seen = (signs * d).mean(dim=1), d.mean()
        # Sums in another order end in other last digits.
        as_far = means.abs() >= seen.abs() * (1 - 1e-9)
        mistakes = {
            "count on both sides of zero: a mean of −x is as far away as one of x": (
                (means >= seen * (1 - 1e-9)).double().mean()
            ),
            "the signs as they were count too: “as far from zero” means ≥, not >": (
                (means.abs() > seen.abs() * (1 + 1e-9)).double().mean()
            ),
            "return a share of all choices of signs, not their number": as_far.double().sum(),
        }
        compare(
            "sign_flip", ask(function, differences=d), as_far.double().mean(), mistakes
        )
