"""The checks of notebook 5, DoRA."""

from collections.abc import Callable
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from lowrank_utils.checks._shared import (
    ONE_IS_LOST,
    ExerciseError,
    Remark,
    ask,
    compare,
    equal,
    examples,
    exercise,
)
from lowrank_utils.checks.broken import LAYERS
from lowrank_utils.dora import LinearWithDoRA, LinearWithDoRAMerged


@exercise("5.1")
def check_dora_scale(function: Callable[..., Tensor]) -> None:
    """Check exercise 5.1, c = m/‖V‖."""
    __tracebackhide__ = True
    for e in examples():
        V, c = e.V, e.c
        unscaled = e.weight + (e.A @ e.B).T
        mistakes = {
            "that divides by the norms of W; V is W + ΔW": e.m / e.weight.norm(dim=1),
            "upside down: c makes the rows as long as m": 1 / c,
            "alpha is missing in ΔW": e.m / unscaled.norm(dim=1),
            "c must have the shape (out,)": c.unsqueeze(1),
            "that is 1/‖V‖; where is m?": 1 / V.norm(dim=1),
            "that divides by the squared lengths: take the root": e.m
            / V.square().sum(dim=1),
            "that divides by one norm of the whole V: each row has its own": e.m
            / V.norm(),
        }
        compare(
            "dora_scale", ask(function, **e.take("weight A B alpha m")), c, mistakes
        )


@exercise("5.2")
def check_dora_output(function: Callable[..., Tensor]) -> None:
    """Check exercise 5.2, the exact unmerged output of DoRA."""
    __tracebackhide__ = True
    for e in examples():
        x, bias, m, c = e.x, e.bias, e.m, e.c
        base, update = x @ e.weight.T, e.alpha * (x @ e.A @ e.B)
        unscaled = e.weight + (e.A @ e.B).T
        mistakes = {
            "the bias is scaled; it isn't part of W": c * (base + update + bias),
            "that is LoRA: nothing is scaled by c": base + update + bias,
            "c scales the frozen product too, not the update alone": base
            + c * update
            + bias,
            "c scales the update too, not the frozen product alone": c * base
            + update
            + bias,
            "the norm is taken per example; it belongs to the weight": base
            + m * F.normalize(update, dim=1)
            + bias,
            "the norm of the output is taken per example; it belongs to the weight": m
            * F.normalize(base + update, dim=1)
            + bias,
            "that divides by the norms of W; V is W + ΔW": m
            / e.weight.norm(dim=1)
            * (base + update)
            + bias,
            "multiplied by m, but not divided by ‖V‖": m * (base + update) + bias,
            "divided by ‖V‖, but not multiplied by m": (base + update) / e.V.norm(dim=1)
            + bias,
            "the bias is missing": c * (base + update),
            "alpha is missing": m / unscaled.norm(dim=1) * (base + update / e.alpha)
            + bias,
            "alpha is missing in the sum; c has it": c * (base + update / e.alpha)
            + bias,
            "alpha is missing in V; the sum has it": m
            / unscaled.norm(dim=1)
            * (base + update)
            + bias,
        }
        answer = ask(function, **e.take("x weight bias A B alpha m"))
        compare(
            "dora_output", answer, F.linear(x, c.unsqueeze(1) * e.V, bias), mistakes
        )
    # Each row of W is so large that W + ΔW rounds to W. x is at a right angle to it, so
    # that ΔW is all that counts.
    weight = torch.full((3, 2), ONE_IS_LOST, dtype=torch.float64)
    x, A, B = (
        torch.tensor(rows).to(weight)
        for rows in ([[1.0, -1.0]], [[1.0], [0.0]], [[1.0, 2.0, 3.0]])
    )
    # With m = ‖V‖ the factor c is 1.
    answer = function(
        x, weight, torch.zeros(3).to(weight), A, B, 2.5, weight.norm(dim=1)
    )
    if not equal(answer, 2.5 * B):
        raise Remark(
            "that is the merged form: x must meet W and A·B apart, as in LoRA's unmerged form"
        )


@exercise("5.3")
def check_magnitude_gradient(function: Callable[..., Tensor]) -> None:
    """Check exercise 5.3, the gradient of the loss with respect to m."""
    __tracebackhide__ = True
    generator = torch.Generator().manual_seed(2)
    for e in examples():
        V, norm = e.V, e.V.norm(dim=1)
        grad_y = torch.randn(len(e.x), len(V), generator=generator, dtype=torch.float64)
        per_example = grad_y * (e.x @ V.T)
        mistakes = {
            "every example of the batch adds its part: sum, don't average": (
                per_example / norm
            ).mean(dim=0),
            "divide by ‖V‖: y contains m only as m/‖V‖": per_example.sum(dim=0),
            "divide by ‖V‖, not by its square": (per_example / norm.square()).sum(
                dim=0
            ),
            "m itself drops out of its own derivative": (per_example * e.c).sum(dim=0),
            "m has one entry per output: sum over the batch": per_example / norm,
            "m has one entry per output: sum over the batch, not over the outputs": (
                per_example / norm
            ).sum(dim=1),
            "the gradient that arrives, grad_y, is missing": (e.x @ V.T / norm).sum(
                dim=0
            ),
        }
        answer = ask(function, grad_y=grad_y, x=e.x, V=V)
        compare("magnitude_gradient", answer, (per_example / norm).sum(dim=0), mistakes)


class _NormKept(LinearWithDoRA):
    """A right layer whose gradient flows through the norm."""

    def __init__(self, linear: nn.Linear, rank: int, alpha: float) -> None:
        super().__init__(linear, rank, alpha, detach_norm=False)


# What to test, in the order of LAYERS. A hint names a property and not the bug.
_PROPERTIES = {
    "LayerA": "what comes out at x = 0, with m moved",
    "LayerB": "how many outputs change when one entry of m does",
    "LayerC": "what alpha does: doubled alpha and halved B are the same ΔW",
    "LayerD": "whether the output, bias aside, is linear in x",
    "LayerE": "the output at the start, before anything has moved",
    "LayerF": "how long the rows of the weight are, with B moved",
}


def _is_bool(verdict: Any) -> bool:
    """Return whether this is a truth value of Python, numpy or torch."""
    return getattr(verdict, "ndim", 0) == 0 and verdict in (True, False)


def _nameless(layer_class: type[nn.Module]) -> type[nn.Module]:
    """Return the same class under a name that tells nothing."""
    return type("Layer", (layer_class,), {"__module__": "__main__"})


@exercise("5.4")
def check_finds_bug(function: Callable[[type[nn.Module]], bool]) -> None:
    """Check exercise 5.4, a test that accuses the six broken layers and none of the
    right ones.
    """
    __tracebackhide__ = True
    for right in (LinearWithDoRA, LinearWithDoRAMerged, _NormKept):
        verdict = function(_nameless(right))
        if not _is_bool(verdict):
            raise ExerciseError(
                f"finds_bug must return True or False; got {type(verdict).__name__}"
            )
        if verdict:
            raise ExerciseError(
                "a right layer is accused: compare with torch.allclose, since the forms differ by roundings, "
                "and ask only for what DoRA's formula promises"
            )
    for layer_class in LAYERS:
        name = layer_class.__name__
        try:
            found = function(_nameless(layer_class))
        except ExerciseError as error:
            if not isinstance(error.__cause__, RuntimeError):
                raise
            raise ExerciseError(
                f"your test stops at {name} ({error.__cause__}): not every m has the shape (out,), so look at the shape first"
            ) from None
        if not found:
            raise ExerciseError(
                f"{name} passes your test, but it has a bug. Test {_PROPERTIES[name]}"
            )
