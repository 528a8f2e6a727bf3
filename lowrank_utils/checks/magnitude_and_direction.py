"""The checks of notebook 4, magnitude and direction."""

from collections.abc import Callable

import torch
from torch import Tensor

from lowrank_utils.checks._shared import (
    ExerciseError,
    Remark,
    ask,
    compare,
    equal,
    examples,
    exercise,
)


@exercise("4.1")
def check_unit_vector(function: Callable[[Tensor], Tensor]) -> None:
    """Check exercise 4.1, the direction of a vector, also of a zero one."""
    __tracebackhide__ = True
    v = torch.tensor([3.0, -4.0, 12.0], dtype=torch.float64)
    mistakes = {
        "that is divided by the sum of the entries; the length is √(v·v)": v / v.sum(),
        "that is divided by the sum of absolute values; the length is √(v·v)": v
        / v.abs().sum(),
        "that is divided by the largest entry; the length is √(v·v)": v / v.abs().max(),
        "that is divided by the squared length: take the root": v / v.square().sum(),
        "that is divided by the number of entries; the length is √(v·v)": v / len(v),
        "that is multiplied by the length: divide by it": v * 13,
        "that is the vector itself": v,
        "that is its length; the direction is a vector": v.norm(),
        "all signs are lost: divide v, not its absolute values": v.abs() / 13,
    }
    try:
        answer = ask(function, v=v)
    except ExerciseError as stopped:
        if "ambiguous" in str(stopped.__cause__):
            raise ExerciseError(
                "`if` wants one yes or no, and v has several entries: decide by the "
                "length, which is one number"
            ) from stopped
        raise
    compare("unit_vector", answer, v / 13, mistakes)
    for entries, recognised in [
        (
            (0.0, 2.0),
            "this vector has a zero in it, but isn't a zero vector: decide by the length",
        ),
        (
            (1.0, -1.0),
            "these entries have a sum of 0, but a length: decide by the length",
        ),
        (
            (3e-5, 4e-5),
            "what is added to the length, or a limit for it, makes short vectors shorter than 1: divide by the length itself",
        ),
    ]:
        v = torch.tensor(entries, dtype=torch.float64)
        if not equal(answer := ask(function, v=v), v / v.norm()):
            compare("unit_vector", answer, v / v.norm(), {recognised: answer})
    zero = torch.zeros(3, dtype=torch.float64)
    hint = {"a zero vector gives NaN: 0/0 must be caught": zero / zero}
    compare("unit_vector of zero", ask(function, v=zero), zero, hint)


@exercise("4.2")
def check_split_rows(function: Callable[[Tensor], tuple[Tensor, Tensor]]) -> None:
    """Check exercise 4.2, magnitudes and directions per output neuron."""
    __tracebackhide__ = True
    for e in examples():
        weight = e.weight
        rows, columns = weight.norm(dim=1), weight.norm(dim=0)
        directions = weight / rows.unsqueeze(1)
        mistakes = {
            "that is one norm per input: a row of torch's weight belongs to an output": (
                columns,
                None,
            ),
            "that is one norm for the whole weight: each output has its own": (
                weight.norm(),
                None,
            ),
            "m must have the shape (out,): drop the dimension that keepdim leaves": (
                rows.unsqueeze(1),
                None,
            ),
            "these are squared lengths": (rows.square(), None),
            "that adds up absolute values; a length is the root of the squares' sum": (
                weight.abs().sum(dim=1),
                None,
            ),
            "that is a mean over the inputs; a length is the root of a sum": (
                weight.square().mean(dim=1).sqrt(),
                None,
            ),
            "the two parts have changed places: m first, then the directions": (
                directions,
                None,
            ),
            "the directions are divided along the wrong axis": (None, weight / columns),
            "the directions must keep torch's shape (out, in); yours are transposed": (
                None,
                directions.T,
            ),
            "the second part must be the directions, not the weight": (None, weight),
            "the directions are divided by the squared lengths": (
                None,
                weight / rows.square().unsqueeze(1),
            ),
            "the directions are divided by sums of absolute values": (
                None,
                weight / weight.abs().sum(dim=1, keepdim=True),
            ),
            "the directions are divided by one norm for the whole weight": (
                None,
                weight / weight.norm(),
            ),
            "the directions are multiplied by m: divide": (
                None,
                weight * rows.unsqueeze(1),
            ),
        }
        answer = _ask_to_split(function, weight)
        compare("split_rows", answer, (rows, directions), mistakes)


def _ask_to_split(function: Callable[[Tensor], object], weight: Tensor) -> object:
    """Return the answer; a division of (out, in) by (out,) gets a hint of its own."""
    __tracebackhide__ = True
    try:
        return ask(function, weight=weight)
    except ExerciseError as stopped:
        if "must match the size of tensor" in str(stopped.__cause__):
            out, n_in = weight.shape
            raise ExerciseError(
                f"torch can't put ({out},) beside ({out}, {n_in}): one number for each "
                f"row must stand in a column, ({out}, 1)"
            ) from stopped
        raise


@exercise("4.3")
def check_weight_norm_gradients(
    function: Callable[[Tensor, Tensor, Tensor], tuple[Tensor, Tensor]],
) -> None:
    """Check exercise 4.3, the gradients of g and v in weight normalisation."""
    __tracebackhide__ = True
    for e in examples():
        grad_w, g, v = e.bias, e.m[0], e.m.flip(0)
        unit, length = v / v.norm(), v.norm()
        grad_g = grad_w @ unit
        across = grad_w - grad_g * unit
        grad_v = g / length * across
        mistakes = {
            "g's gradient is the part of ∇w along v: divide v by its length": (
                grad_w @ v,
                None,
            ),
            "g's gradient is one number, the part of ∇w along v: take the dot product": (
                grad_w * unit,
                None,
            ),
            "g's gradient is the part of ∇w along v, not the length of ∇w": (
                grad_w.norm(),
                None,
            ),
            "g's gradient isn't scaled by g": (g * grad_g, None),
            "g's gradient is a number, and yours is its vector along v": (
                grad_g * unit,
                None,
            ),
            "the two gradients have changed places: g's first, then v's": (
                grad_v,
                None,
            ),
            "v's gradient still has a part along v: subtract it": (
                None,
                g / length * grad_w,
            ),
            "that is ∇w: v's gradient has no part along v, so subtract it": (
                None,
                grad_w,
            ),
            "the part along v is subtracted, not added": (
                None,
                g / length * (grad_w + grad_g * unit),
            ),
            "what you subtract is the part along v: g's gradient times the *unit* vector": (
                None,
                g / length * (grad_w - grad_g * v),
            ),
            "that is the part along v; v's gradient is the rest": (
                None,
                g / length * grad_g * unit,
            ),
            "v's gradient is scaled by g/‖v‖": (None, across),
            "v's gradient is divided by ‖v‖ too": (None, g * across),
            "v's gradient is scaled by g too": (None, across / length),
            "v's gradient is scaled by g/‖v‖, and yours is upside down": (
                None,
                length / g * across,
            ),
        }
        answer = ask(function, grad_w=grad_w, g=g, v=v)
        compare("weight_norm_gradients", answer, (grad_g, grad_v), mistakes)
    if _differentiates(lambda: function(grad_w.clone(), g.clone(), v.clone())):
        raise Remark("autograd did the work: can you write the two formulas?")


def _differentiates(call: Callable[[], object]) -> bool:
    """Tell whether ``call`` makes autograd keep something for a backward pass."""
    kept: list[bool] = []

    def keep(tensor: Tensor) -> Tensor:
        kept.append(True)
        return tensor

    with torch.autograd.graph.saved_tensors_hooks(keep, lambda tensor: tensor):
        try:
            call()
        except ExerciseError:
            # It ran without these hooks, which torch.func refuses.
            return True
    return bool(kept)
