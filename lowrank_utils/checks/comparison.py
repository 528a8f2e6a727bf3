"""The checks of notebook 7, whether DoRA is better than LoRA."""

from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor

from lowrank_utils.checks._shared import ExerciseError, ask, compare, exercise


@exercise("7.1")
def check_chosen_rate(function: Callable[[dict[float, list[float]]], float]) -> None:
    """Check exercise 7.1, the learning rate with the highest mean validation accuracy."""
    __tracebackhide__ = True
    # One lucky seed, the largest rate, the worst mean and the first entry each lead to another rate.
    scores = {
        0.1: [0.20, 0.30],
        0.001: [0.70, 0.71],
        0.01: [0.80, 0.82],
        0.003: [0.60, 0.95],
        0.03: [0.50, 0.60],
    }
    mistakes = {
        "that rate has the best single run; go by the mean over the seeds": 0.003,
        "return the learning rate, not its score": 0.81,
        "that is the largest rate; the scores decide": 0.1,
        "that is the smallest rate; the scores decide": 0.001,
    }
    compare("chosen_rate", ask(function, scores=scores), 0.01, mistakes)
    # The sums mislead here: this rate has one run more.
    scores = {0.02: [0.30, 0.32, 0.31], 0.3: [0.40, 0.44], 0.005: [0.10, 0.20]}
    mistakes = {"that rate has the largest sum, of more runs; go by the mean over the seeds": 0.02}
    compare("chosen_rate", ask(function, scores=scores), 0.3, mistakes)


@exercise("7.2")
def check_interval(function: Callable[[Tensor, float], tuple[Any, Any]]) -> None:
    """Check exercise 7.2, the t interval of a mean of paired differences."""
    __tracebackhide__ = True
    cases = [([0.010, 0.022, -0.004, 0.016, 0.011], 2.776), ([-0.02, 0.01, -0.03], 4.303)]
    for values, t in cases:
        d = torch.tensor(values, dtype=torch.float64)
        mean, spread, n = d.mean(), d.std(), len(values)

        def ends(half: Tensor, mean: Tensor = mean) -> tuple[Tensor, Tensor]:
            return mean - half, mean + half

        expected = ends(t * spread / n**0.5)
        mistakes = {
            "that is the spread of the differences; their mean is steadier, by √n": ends(t * spread),
            "divide by √n, not by n": ends(t * spread / n),
            "the mean was estimated from the same numbers: take the standard deviation with n − 1": ends(
                t * d.std(correction=0) / n**0.5
            ),
            "that is one standard error; t times as many belong to 95%": ends(spread / n**0.5),
            "the lower end comes first": (expected[1], expected[0]),
        }
        answer = ask(function, differences=d, t=t)
        if isinstance(answer, tuple) and len(answer) == 2:
            # Numbers are as good as tensors.
            answer = torch.as_tensor(answer[0]).double(), torch.as_tensor(answer[1]).double()
        compare("interval", answer, expected, mistakes)


@exercise("7.3")
def check_matched_ranks(function: Callable[[list[tuple[int, int]], int], list[int]]) -> None:
    """Check exercise 7.3, ranks that give LoRA as many numbers as DoRA."""
    __tracebackhide__ = True
    cases = [
        ([(784, 128), (128, 256), (256, 10)], 4, [4, 5, 4]),
        ([(20, 30), (10, 100), (5, 7)], 1, [1, 2, 1]),
        ([(5, 40), (200, 20), (60, 30)], 2, [2, 2, 3]),
        ([(50, 10), (10, 40)], 2, [2, 3]),
    ]
    for layers, rank, expected in cases:
        answer = ask(function, layers=layers, rank=rank)
        if not isinstance(answer, list) or len(answer) != len(layers):
            raise ExerciseError(
                f"matched_ranks must be a list with a rank for each of {len(layers)} layers; got {answer!r}"
            )
        magnitudes = sum(n_out for _, n_out in layers)
        most = max(range(len(layers)), key=lambda i: sum(layers[i]))
        widest = max(range(len(layers)), key=lambda i: layers[i][1])
        mistakes = {
            "no layer has got one more rank": [rank] * len(layers),
            "one more rank in every layer is too much: m has one number per output, a rank has in + out": [
                rank + 1
            ]
            * len(layers),
            "that is the layer in which one more rank costs most; which comes nearest to the number of magnitudes?": [
                rank + (i == most) for i in range(len(layers))
            ],
            "that is the layer with the most outputs; what does one more rank cost there?": [
                rank + (i == widest) for i in range(len(layers))
            ],
        }
        for hint, wrong in mistakes.items():
            if answer == wrong != expected:
                raise ExerciseError(hint)
        if answer != expected:
            raise ExerciseError(
                f"matched_ranks isn't right yet for the layers {layers}: together their m have {magnitudes} numbers"
            )
