"""The checks of notebook 8, from scratch to production."""

from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor
from torch.utils._python_dispatch import TorchDispatchMode

from lowrank_utils.checks._shared import Remark, ask, compare, examples, exercise


@exercise("8.1")
def check_to_peft(
    function: Callable[[Tensor, Tensor, float], tuple[Tensor, Tensor, float]],
) -> None:
    """Check exercise 8.1, A, B and the scaling as PEFT stores them."""
    __tracebackhide__ = True
    for e in examples():
        A, B, alpha, r = e.A, e.B, e.alpha, len(e.B)
        mistakes = {
            "PEFT's A is (r, in): ours is its transpose": (A, None, None),
            "PEFT's B is (out, r): ours is its transpose": (None, B, None),
            "A and B have changed places": (B.T, A.T, None),
            "PEFT divides lora_alpha by the rank; multiply by it": (
                None,
                None,
                alpha / r,
            ),
            "that is the scaling itself; PEFT will divide it by the rank": (
                None,
                None,
                alpha,
            ),
            "√r belongs to rsLoRA": (None, None, alpha * r**0.5),
        }
        compare(
            "to_peft",
            ask(function, **e.take("A B alpha")),
            (A.T, B.T, r * alpha),
            mistakes,
        )


class _Watch(TorchDispatchMode):
    """Note how many operations run, and which results need ``limit`` numbers or more
    that no input holds.
    """

    def __init__(self, limit: int, inputs: list[Tensor]) -> None:
        super().__init__()
        self.limit, self.inputs = limit, inputs
        self.operations = 0
        self.large: list[Tensor] = []

    def __torch_dispatch__(
        self, func: Any, types: Any, args: Any = (), kwargs: Any = None
    ) -> Any:
        __tracebackhide__ = True
        result = func(*args, **(kwargs or {}))
        self.operations += 1
        taken = {tensor.untyped_storage().data_ptr() for tensor in self.inputs}
        for part in result if isinstance(result, (tuple, list)) else [result]:
            if (
                not isinstance(part, Tensor)
                or part.untyped_storage().data_ptr() in taken
            ):
                continue
            # The storage counts: what is expanded to a large shape holds few numbers.
            if part.untyped_storage().nbytes() >= self.limit * part.element_size():
                self.large.append(part)
        return result


@exercise("8.2")
def check_factored_squares(
    function: Callable[[Tensor, Tensor, Tensor, float], Tensor],
) -> None:
    """Check exercise 8.2, the squared row norms of W + ΔW from thin matrices alone."""
    __tracebackhide__ = True
    for e in examples():
        W, A, B, alpha = e.weight, e.A, e.B, e.alpha
        base, cross = W.square().sum(dim=1), ((W @ A) * B.T).sum(dim=1)
        update = (alpha * (A @ B)).square().sum(dim=0)
        expected = base + 2 * alpha * cross + update
        mistakes = {
            "the mixed term is missing: (a + b)² isn't a² + b²": base + update,
            "the mixed term should come twice, as 2ab in (a + b)²; yours comes once": base
            + alpha * cross
            + update,
            "the scaling should be squared in the last term; yours isn't": base
            + 2 * alpha * cross
            + update / alpha,
            "the last term lacks the scaling: u is s·A·b, so what is ‖u‖²?": base
            + 2 * alpha * cross
            + update / alpha**2,
            "the mixed term lacks the scaling: u is s·A·b": base + 2 * cross + update,
            "the scaling is squared in your mixed term, and should come once: only u has it": base
            + 2 * alpha**2 * cross
            + update,
            "alpha is missing": base + 2 * cross + update / alpha**2,
            "that is the norm; the square was asked for": expected.sqrt(),
            "one number per output: sum over the inputs, not over the outputs": e.V.square().sum(
                dim=0
            ),
            "that is W alone; the update is missing": base,
        }
        answer = ask(function, **e.take("weight A B alpha"))
        compare("factored_squares", answer, expected, mistakes)
    _check_that_nothing_large_is_stored(function)


def _check_that_nothing_large_is_stored(
    function: Callable[[Tensor, Tensor, Tensor, float], Tensor],
) -> None:
    __tracebackhide__ = True
    generator = torch.Generator().manual_seed(1)
    W, A, B = (
        torch.randn(*shape, generator=generator)
        for shape in [(200, 300), (300, 2), (2, 200)]
    )
    # W·A and its like have 400 numbers, W and A·B 60,000, and W·A·B, of which only the
    # diagonal counts, 40,000.
    with _Watch(200 * 200, [W, A, B]) as watch:
        function(W, A, B, 2.0)
    for large in watch.large:
        if large.shape == W.shape and torch.equal(large, W.square()):
            raise Remark(
                "the squares of W were stored, a matrix as large as W: "
                "torch.linalg.vector_norm(weight, dim=1) stores none"
            )
        if large.squeeze().shape in {(200, 300), (300, 200)}:
            raise Remark(
                "A·B was built in full: regroup the last term as B · (AᵀA · B)"
            )
        raise Remark(
            f"on the way a result of shape {tuple(large.shape)} was stored, from which one number per "
            "output is used: multiply thin matrices element by element and sum over r"
        )


@exercise("8.3")
def check_mixed_batch(function: Callable[..., Tensor]) -> None:
    """Check exercise 8.3, DoRA with another adapter for each row of the batch."""
    __tracebackhide__ = True
    generator = torch.Generator().manual_seed(3)
    for e, customers, chosen in zip(
        examples(), [3, 2], [[2, 0, 2, 1, 0], [1, 0, 0, 1, 1, 0]], strict=True
    ):
        x, weight, bias = e.x, e.weight, e.bias
        (n_out, n_in), r = weight.shape, len(e.B)
        shapes = [(customers, n_in, r), (customers, r, n_out), (customers, n_out)]
        A, B, c = (
            torch.randn(*shape, generator=generator, dtype=torch.float64)
            for shape in shapes
        )
        choice = torch.tensor(chosen)
        base = x @ weight.T
        update = torch.stack(
            [row @ A[k] @ B[k] for row, k in zip(x, chosen, strict=True)]
        )
        norms = (weight + (A @ B).mT).norm(dim=2)
        first = chosen[0]
        mistakes = {
            "every row got the first row's adapter": c[first]
            * (base + x @ A[first] @ B[first])
            + bias,
            "the bias is scaled; it isn't part of W": c[choice]
            * (base + update + bias),
            "that is LoRA per row: where is c?": base + update + bias,
            "c should scale the frozen product too; yours scales the update alone": base
            + c[choice] * update
            + bias,
            "c should scale the update too; yours scales the frozen product alone": c[
                choice
            ]
            * base
            + update
            + bias,
            "c is m/‖V‖ already; you divide by the norm once more": (c / norms)[choice]
            * (base + update)
            + bias,
            "the bias is missing": c[choice] * (base + update),
            "the updates of all adapters were added up": c[choice]
            * (base + sum(x @ A[k] @ B[k] for k in range(customers)))
            + bias,
        }
        answer = ask(
            function, x=x, weight=weight, bias=bias, A=A, B=B, c=c, choice=choice
        )
        compare("mixed_batch", answer, c[choice] * (base + update) + bias, mistakes)
    _check_that_rows_go_together(function, generator)


def _check_that_rows_go_together(
    function: Callable[..., Tensor], generator: torch.Generator
) -> None:
    __tracebackhide__ = True
    operations = []
    for rows, customers in [(4, 3), (40, 30)]:
        shapes = [
            (rows, 50),
            (60, 50),
            (60,),
            (customers, 50, 2),
            (customers, 2, 60),
            (customers, 60),
        ]
        inputs = [torch.randn(*shape, generator=generator) for shape in shapes]
        inputs.append(torch.arange(rows) % customers)
        with _Watch(customers * 50 * 60, inputs) as watch:
            function(*inputs)
        if watch.large:
            raise Remark(
                "a weight was built for every row or customer: multiply x by A first, and that by B"
            )
        operations.append(watch.operations)
    if operations[1] > operations[0] + 10:
        raise Remark(
            f"with a loop: {operations[0]} operations for 4 rows became {operations[1]} for 40. "
            "Gather A, B and c with choice"
        )
