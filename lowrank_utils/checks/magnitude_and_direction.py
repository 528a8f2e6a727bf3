"""The checks of notebook 4, magnitude and direction."""

from collections.abc import Callable

import torch
from torch import Tensor

from lowrank_utils.checks._shared import ask, compare, equal, examples, exercise


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
        "that is the vector itself": v,
    }
    compare("unit_vector", ask(function, v=v), v / 13, mistakes)
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
            "a vector shorter than 1 must become longer: divide by its length, however short",
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
        }
        compare(
            "split_rows", ask(function, weight=weight), (rows, directions), mistakes
        )


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
        mistakes = {
            "g's gradient is the part of ∇w along v: divide v by its length": (
                grad_w @ v,
                None,
            ),
            "g's gradient is one number, the part of ∇w along v: take the dot product": (
                grad_w * unit,
                None,
            ),
            "v's gradient still has a part along v: subtract it": (
                None,
                g / length * grad_w,
            ),
            "v's gradient is scaled by g/‖v‖": (None, across),
            "v's gradient is divided by ‖v‖ too": (None, g * across),
            "v's gradient is scaled by g too": (None, across / length),
        }
        answer = ask(function, grad_w=grad_w, g=g, v=v)
        compare(
            "weight_norm_gradients", answer, (grad_g, g / length * across), mistakes
        )
