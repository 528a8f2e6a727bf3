"""The checks of notebook 6, fine-tuning on MNIST."""

from collections.abc import Callable

import torch
from torch import Tensor, nn

from lowrank_utils.adapt import replace_linear_layers
from lowrank_utils.checks._shared import ExerciseError, ask, compare, exercise
from lowrank_utils.dora import LinearWithDoRA
from lowrank_utils.training import MultilayerPerceptron


@exercise("6.1")
def check_standard_error(function: Callable[[float, int], float]) -> None:
    """Check exercise 6.1, the standard error of an accuracy."""
    __tracebackhide__ = True
    for p, n in [(0.85, 1000), (0.5, 25)]:
        mistakes = {
            "that is the variance: take the root": p * (1 - p) / n,
            "that is the spread of one answer: divide by the number of digits under the root": (
                p * (1 - p)
            )
            ** 0.5,
            "the root goes over n as well": (p * (1 - p)) ** 0.5 / n,
            "the root goes over p(1 − p) as well": p * (1 - p) / n**0.5,
            "the 1 − p is missing": (p / n) ** 0.5,
        }
        answer = ask(function, accuracy=p, count=n)
        compare("standard_error", answer, (p * (1 - p) / n) ** 0.5, mistakes)


@exercise("6.2")
def check_paired_difference(
    function: Callable[[Tensor, Tensor], tuple[Tensor, Tensor]],
) -> None:
    """Check exercise 6.2, mean and standard error of paired differences."""
    __tracebackhide__ = True
    cases = [
        ([0.81, 0.86, 0.84, 0.90], [0.80, 0.84, 0.83, 0.87]),
        ([0.91, 0.93, 0.90, 0.94, 0.89, 0.92], [0.92, 0.93, 0.92, 0.92, 0.92, 0.92]),
    ]
    for values in cases:
        first, second = (
            torch.tensor(accuracies, dtype=torch.float64) for accuracies in values
        )
        d, root = first - second, len(first) ** 0.5
        mistakes = {
            "the order is first − second": (-d.mean(), None),
            "the sign tells which method is ahead: don't take absolute values": (
                d.abs().mean(),
                None,
            ),
            "that treats the runs as unrelated; take the differences first": (
                None,
                (first.var() + second.var()).sqrt() / root,
            ),
            "that is the spread of the differences; their mean is steadier, by √n": (
                None,
                d.std(),
            ),
            "divide by √n, not by n": (None, d.std() / len(d)),
            "that is the square of it: take the root": (None, d.var() / len(d)),
            "std() divides by n − 1 already; divide it by √n": (
                None,
                d.std() / (len(d) - 1) ** 0.5,
            ),
            "the mean was estimated from the same numbers: divide by n − 1": (
                None,
                d.std(correction=0) / root,
            ),
        }
        answer = ask(function, first=first, second=second)
        compare("paired_difference", answer, (d.mean(), d.std() / root), mistakes)


@exercise("6.3")
def check_magnitude_only(function: Callable[[nn.Module], int]) -> None:
    """Check exercise 6.3, a DoRA model of which only the magnitudes are trained."""
    __tracebackhide__ = True
    for sizes in [(20, 8, 6, 3), (5, 7, 9, 4)]:
        model = MultilayerPerceptron(*sizes)
        model.norm = nn.LayerNorm(3)
        replace_linear_layers(model, LinearWithDoRA, rank=2, alpha=1)
        # The other way round: what must learn is frozen, and the rest is not.
        for name, parameter in model.named_parameters():
            parameter.requires_grad_(not name.endswith(".m"))
        count = function(model)
        trainable = {name for name, p in model.named_parameters() if p.requires_grad}
        if any(".lora." in name for name in trainable):
            raise ExerciseError("A and B are still trainable")
        if trainable != {f"layers.{index}.m" for index in (0, 2, 4)}:
            raise ExerciseError(
                f"trainable must be the three m and nothing else; got {sorted(trainable)}"
            )
        mistakes = {
            "count the numbers, not the tensors": 3,
            "that counts frozen numbers too": sum(
                p.numel() for p in model.parameters()
            ),
        }
        compare("magnitude_only", count, sum(sizes[1:]), mistakes)
