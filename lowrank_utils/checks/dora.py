"""The checks of notebook 5, DoRA."""

from collections.abc import Callable
from itertools import product
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from lowrank_utils.checks._shared import (
    ONE_IS_LOST,
    ExerciseError,
    Parts,
    Remark,
    ask,
    compare,
    equal,
    examples,
    exercise,
)
from lowrank_utils.checks.broken import LAYERS
from lowrank_utils.dora import LinearWithDoRA, LinearWithDoRAMerged

_BY_COLUMNS = "dim=0 takes one norm per input; DoRA's norms are those of the rows, one per output: dim=1"
_NOT_TRANSPOSED = "A·B has the shape (in, out), and V has torch's, (out, in): transpose it before you add it"
_KEEPDIM = "with keepdim=True the norms have the shape (out, 1), and dividing m by them gives a matrix: leave it out"
_WEIGHT_NOT_TRANSPOSED = (
    "torch stores the weight as (out, in), so the product with x is x @ weight.T"
)


def _square(names: str) -> tuple[Parts, dict[str, Any]]:
    """Return a layer whose sizes are all the same, and what of it has these names.

    Where axes are mixed up no product stops there, so a value tells which they were.
    """
    generator = torch.Generator().manual_seed(3)
    x, weight, A, B = torch.randn(4, 4, 4, generator=generator, dtype=torch.float64)
    bias, m = torch.rand(2, 4, generator=generator, dtype=torch.float64) + 0.5
    parts = Parts(x, weight, bias, A, B, 1.5, m)
    return parts, parts.take(names)


def _answer(
    function: Callable[..., Any],
    given: dict[str, Any],
    square: dict[str, Any],
    mixed_up: list[tuple[Any, str]],
) -> Any:
    """Return the answer to ``given``.

    Args:
        function: the learner's.
        given: what it is asked for.
        square: what it is asked for if it stops there because shapes don't fit.
        mixed_up: what mixed-up axes give for ``square``, each with its hint.

    Raises:
        ExerciseError: it stopped; with the hint of the mistake that it made.
    """
    __tracebackhide__ = True
    try:
        return ask(function, **given)
    except ExerciseError as stopped:
        if not isinstance(stopped.__cause__, (RuntimeError, IndexError)):
            raise
        try:
            answer = ask(function, **square)
        except ExerciseError:
            answer = None
        for wrong, hint in mixed_up:
            if equal(answer, wrong):
                raise ExerciseError(hint) from None
        raise


def _mixed_up_scales(e: Parts) -> list[tuple[Tensor, str]]:
    """Return the factors c that mixed-up axes give, each with its hint."""
    found = []
    for transposed, axis, keep in product((True, False), (1, 0), (False, True)):
        update = e.alpha * (e.A @ e.B)
        V = e.weight + (update.T if transposed else update)
        hints = [
            *([] if transposed else [_NOT_TRANSPOSED]),
            *([] if axis else [_BY_COLUMNS]),
            *([_KEEPDIM] if keep else []),
        ]
        if hints:
            found.append((e.m / V.norm(dim=axis, keepdim=keep), hints[0]))
    swapped = e.weight + e.alpha * (e.B @ e.A)
    # B·A is (r, r), and no update.
    found += [(e.m / swapped.norm(dim=axis), _NOT_TRANSPOSED) for axis in (1, 0)]
    return found


@exercise("5.1")
def check_dora_scale(function: Callable[..., Tensor]) -> None:
    """Check exercise 5.1, c = m/‖V‖."""
    __tracebackhide__ = True
    names = "weight A B alpha m"
    square, given = _square(names)
    mixed_up = _mixed_up_scales(square)
    for e in examples():
        V, c = e.V, e.c
        unscaled = e.weight + (e.A @ e.B).T
        mistakes = {
            "that divides by the norms of W; V is W + ΔW": e.m / e.weight.norm(dim=1),
            "upside down: c makes the rows as long as m": 1 / c,
            "alpha is missing in ΔW": e.m / unscaled.norm(dim=1),
            "alpha is the scaling s itself: don't divide it by the rank": e.m
            / (e.weight + e.alpha / len(e.B) * (e.A @ e.B).T).norm(dim=1),
            "c must have the shape (out,)": c.unsqueeze(1),
            "that is 1/‖V‖; where is m?": 1 / V.norm(dim=1),
            "that divides by the norms of ΔW; V is W + ΔW": e.m
            / (V - e.weight).norm(dim=1),
            "the norm of a sum isn't the sum of the norms: add W and ΔW first": e.m
            / (e.weight.norm(dim=1) + (V - e.weight).norm(dim=1)),
            "that divides by the squared lengths: take the root": e.m
            / V.square().sum(dim=1),
            "that divides by one norm of the whole V: each row has its own": e.m
            / V.norm(),
            "that is ‖V‖ alone; divide m by it": V.norm(dim=1),
            "that multiplies m and ‖V‖; divide": e.m * V.norm(dim=1),
            "that divides by the sums of absolute values; the length is the root of the sum of squares": e.m
            / V.abs().sum(dim=1),
            _KEEPDIM: e.m / V.norm(dim=1, keepdim=True),
        }
        answer = _answer(function, e.take(names), given, mixed_up)
        compare("dora_scale", answer, c, mistakes)


def _mixed_up_outputs(e: Parts) -> list[tuple[Tensor, str]]:
    """Return the outputs that mixed-up axes give, each with its hint."""
    update = e.alpha * (e.x @ e.A @ e.B)
    scales = [(e.c, ""), *_mixed_up_scales(e)]
    column = "c belongs to the outputs, the last axis of (batch, out): leave it (out,)"
    scales.append((e.c.unsqueeze(1), column))
    found = []
    for (c, hint), transposed in product(scales, (True, False)):
        base = e.x @ (e.weight.T if transposed else e.weight)
        first = hint if transposed else _WEIGHT_NOT_TRANSPOSED
        if first:
            found.append((c * (base + update) + e.bias, first))
    return found


@exercise("5.2")
def check_dora_output(function: Callable[..., Tensor]) -> None:
    """Check exercise 5.2, the exact unmerged output of DoRA."""
    __tracebackhide__ = True
    names = "x weight bias A B alpha m"
    square, given = _square(names)
    mixed_up = _mixed_up_outputs(square)
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
            "that multiplies by ‖V‖/m: c is m/‖V‖": (base + update) / c + bias,
            "the update is missing in the sum": c * base + bias,
        }
        answer = _answer(function, e.take(names), given, mixed_up)
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
    bias = torch.zeros(3).to(weight)
    answer = function(x, weight, bias, A, B, 2.5, weight.norm(dim=1))
    if not equal(answer, 2.5 * B):
        raise Remark(
            "that is the merged form: x must meet W and A·B apart, as in LoRA's unmerged form"
        )
    # Both rows of A·B round to the same numbers, and x takes their difference. x·A
    # still holds it.
    A = torch.tensor([[ONE_IS_LOST, 1.0], [ONE_IS_LOST, 0.0]]).to(weight)
    B = torch.ones(2, 3).to(weight)
    m = 2.5 * (A @ B).norm(dim=0)
    answer = function(x, torch.zeros_like(weight), bias, A, B, 2.5, m)
    if not equal(answer, 2.5 * torch.ones(1, 3)):
        raise Remark(
            "A·B was built in full for the sum, where the norm alone needs it: multiply x by A first"
        )


@exercise("5.3")
def check_magnitude_gradient(function: Callable[..., Tensor]) -> None:
    """Check exercise 5.3, the gradient of the loss with respect to m."""
    __tracebackhide__ = True
    generator = torch.Generator().manual_seed(2)

    def given_for(e: Parts) -> dict[str, Tensor]:
        grad_y = torch.randn(
            len(e.x), len(e.weight), generator=generator, dtype=torch.float64
        )
        return {"grad_y": grad_y, "x": e.x, "V": e.V}

    square = given_for(_square("x")[0])
    mixed_up = _mixed_up_gradients(**square)
    for e in examples():
        given = given_for(e)
        grad_y, V, norm = given["grad_y"], e.V, e.V.norm(dim=1)
        per_example = grad_y * (e.x @ V.T)
        mistakes = {
            "every example of the batch adds its part: sum, don't average": (
                per_example / norm
            ).mean(dim=0),
            "divide by ‖V‖: y contains m only as m/‖V‖": per_example.sum(dim=0),
            "divide by ‖V‖, not by its square": (per_example / norm.square()).sum(
                dim=0
            ),
            "where is xVᵀ? m multiplies it": grad_y.sum(dim=0) / norm,
            "multiply first, and sum over the batch then": grad_y.sum(dim=0)
            * (e.x @ V.T).sum(dim=0)
            / norm,
            "m itself drops out of its own derivative": (per_example * e.c).sum(dim=0),
            "m has one entry per output: sum over the batch": per_example / norm,
            "m has one entry per output: sum over the batch, not over the outputs": (
                per_example / norm
            ).sum(dim=1),
            "m has one entry per output: that sum is over the outputs too": (
                per_example / norm
            ).sum(),
            "the gradient that arrives, grad_y, is missing": (e.x @ V.T / norm).sum(
                dim=0
            ),
            "that divides by one norm of the whole V: each row has its own": (
                per_example / V.norm()
            ).sum(dim=0),
        }
        answer = _answer(function, given, square, mixed_up)
        compare("magnitude_gradient", answer, (per_example / norm).sum(dim=0), mistakes)


def _mixed_up_gradients(
    grad_y: Tensor, x: Tensor, V: Tensor
) -> list[tuple[Tensor, str]]:
    """Return the gradients of m that mixed-up axes give, each with its hint."""
    found = []
    keepdim = "with keepdim=True the norms have the shape (out, 1), which doesn't fit (batch, out): leave it out"
    for transposed, axis, keep in product((True, False), (1, 0), (False, True)):
        hints = [
            *([] if transposed else ["V is (out, in), so the product is x @ V.T"]),
            *([] if axis else [_BY_COLUMNS]),
            *([keepdim] if keep else []),
        ]
        if hints:
            norm = V.norm(dim=axis, keepdim=keep)
            each = grad_y * (x @ (V.T if transposed else V))
            found += [(way.sum(dim=0), hints[0]) for way in (each / norm,)]
            found.append((each.sum(dim=0) / norm, hints[0]))
    return found


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
    "LayerG": "the gradients of A, B and m: its outputs are right",
}


def _is_bool(verdict: Any) -> bool:
    """Return whether this is a truth value of Python, numpy or torch."""
    return getattr(verdict, "ndim", 0) == 0 and verdict in (True, False)


def _nameless(layer_class: type[nn.Module]) -> type[nn.Module]:
    """Return the same class under a name that tells nothing."""
    return type("Layer", (layer_class,), {"__module__": "__main__"})


@exercise("5.4")
def check_finds_bug(function: Callable[[type[nn.Module]], bool]) -> None:
    """Check exercise 5.4, a test that accuses the seven broken layers and none of the
    right ones.
    """
    __tracebackhide__ = True
    right = (LinearWithDoRA, LinearWithDoRAMerged, _NormKept)
    verdicts = [function(_nameless(layer_class)) for layer_class in right]
    for verdict in verdicts:
        if not _is_bool(verdict):
            raise ExerciseError(
                f"finds_bug must return True or False; got {type(verdict).__name__}"
            )
    if any(verdicts):
        if bool(verdicts[0]) != bool(verdicts[2]):
            raise ExerciseError(
                "a right layer is accused for its gradients: those of A and B differ with the norm detached and "
                "with it kept, and both are right"
            )
        raise ExerciseError(
            "a right layer is accused: compare with torch.allclose, since the forms differ by roundings, "
            "and ask only for what DoRA's formula promises"
        )
    for layer_class in LAYERS:
        name = layer_class.__name__
        try:
            found = function(_nameless(layer_class))
        except ExerciseError as error:
            raise _stopped_at(name, error) from None
        if not found:
            raise ExerciseError(
                f"{name} passes your test, but it has a bug. Test {_PROPERTIES[name]}"
            )


def _stopped_at(name: str, error: ExerciseError) -> ExerciseError:
    """Return the hint for a test that stops at a broken layer."""
    cause = error.__cause__
    if "NoneType" in str(cause) or "in the graph" in str(cause):
        advice = "what gets no gradient has None as its .grad, so look for None first"
    elif isinstance(cause, RuntimeError):
        advice = "not every m has the shape (out,), so look at the shape first"
    else:
        return error
    return ExerciseError(f"your test stops at {name} ({cause}): {advice}")
