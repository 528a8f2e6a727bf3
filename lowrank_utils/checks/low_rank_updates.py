"""The checks of notebook 1, ΔW ≈ A·B."""

from collections.abc import Callable

import torch
from torch import Tensor

from lowrank_utils.checks._shared import (
    ONE_IS_LOST,
    Remark,
    ask,
    compare,
    equal,
    examples,
    exercise,
)


@exercise("1.1")
def check_adapter_parameters(function: Callable[[int, int, int], int]) -> None:
    """Check exercise 1.1, how many numbers A and B hold."""
    __tracebackhide__ = True
    for n_in, n_out, r in [(784, 128, 4), (10, 2, 1), (30, 50, 7)]:
        mistakes = {
            "A and B are stored, not their product: what are their shapes?": n_in
            * n_out,
            "that is A alone; B has numbers too": n_in * r,
            "that is B alone; A has numbers too": r * n_out,
            "A isn't as tall as B is wide: in and out may differ": 2 * n_in * r,
            "A·B is never stored: count A and B apart, and add": r * n_in * n_out,
            "A and B have one rank between them, and each has it as a side: multiply both sides by it": n_in
            + n_out * r,
            "where is the rank?": n_in + n_out,
        }
        answer = ask(function, in_dim=n_in, out_dim=n_out, rank=r)
        compare("adapter_parameters", answer, r * (n_in + n_out), mistakes)


@exercise("1.2")
def check_smallest_rank(function: Callable[[Tensor, float], int]) -> None:
    """Check exercise 1.2, the smallest rank that keeps a share of the squared norm."""
    __tracebackhide__ = True

    def first_above(kept: Tensor, share: float) -> int:
        return int((kept >= share).nonzero()[0, 0]) + 1

    # In the first case all mistakes give different ranks.
    cases = [
        ([6, 3, 2, 2, 2, 2, 2], 0.8),
        ([1] * 16, 0.5),
        ([9, 1, 1, 1, 1], 0.95),
        ([4, 2, 2, 1], 1.0),
    ]
    for values, share in cases:
        sigma = torch.tensor(values, dtype=torch.float64)
        kept = sigma.square().cumsum(0) / sigma.square().sum()
        expected = first_above(kept, share)
        mistakes = {
            "the squared norm adds up squares of the singular values": first_above(
                sigma.cumsum(0) / sigma.sum(), share
            ),
            "divide by the whole: share is a fraction of the squared norm": 1,
            "kept and share are both of the squared norm: don't take the root": first_above(
                kept.sqrt(), share
            ),
            "that compares the relative error; kept share = 1 − relative error²": first_above(
                kept, 1 - (1 - share) ** 2
            ),
            "one too few: an index counts from 0, a rank from 1": expected - 1,
            "one too many: the first rank that reaches the share is enough": expected
            + 1,
        }
        compare(
            "smallest_rank",
            ask(function, singular_values=sigma, share=share),
            expected,
            mistakes,
        )
    # Adding these squares one by one rounds each time, which torch.sum largely avoids.
    sigma = torch.tensor([1.0, *[1.75e-8] * 200], dtype=torch.float64)
    answer = function(sigma.clone(), 1.0)
    if answer is None or answer > len(sigma):
        raise Remark(
            f"with share = 1 and {len(sigma)} singular values it finds none of these ranks: what is added up step by "
            "step rounds differently from torch.sum, so divide by the last of your running sums"
        )


@exercise("1.3")
def check_apply_update(
    function: Callable[[Tensor, Tensor, Tensor, Tensor], Tensor],
) -> None:
    """Check exercise 1.3, x(W + AB) without the product A·B."""
    __tracebackhide__ = True
    for e in examples():
        base, update = e.x @ e.weight.T, e.x @ e.A @ e.B
        mistakes = {
            "that is x·Wᵀ alone; the update is missing": base,
            "that is the update alone": update,
            "the update is added, not taken away": base - update,
        }
        answer = ask(function, **e.take("x weight A B"))
        compare("apply_update", answer, base + update, mistakes)
    # Both rows of A·B round to the same numbers, and x takes their difference. x·A
    # still holds it.
    A = torch.tensor([[ONE_IS_LOST, 1.0], [ONE_IS_LOST, 0.0]], dtype=torch.float64)
    answer = function(
        torch.tensor([[1.0, -1.0]]).to(A),
        torch.zeros(3, 2).to(A),
        A,
        torch.ones(2, 3).to(A),
    )
    if not equal(answer, torch.ones(1, 3)):
        raise Remark("A·B was built in full: multiply x by A first")
