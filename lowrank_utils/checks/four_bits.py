"""The checks of notebook 10, a base of four bits."""

from collections.abc import Callable

import torch
from torch import Tensor

from lowrank_utils.checks._shared import ExerciseError, ask, compare, exercise
from lowrank_utils.quantized import even_levels, nf4_levels


@exercise("10.1")
def check_bits_per_weight(function: Callable[[float, float, int], float]) -> None:
    """Check exercise 10.1, how many bits a weight takes with its share of the scale."""
    __tracebackhide__ = True
    for code, scale, block in [(3, 24, 5), (4, 32, 128), (8, 16, 64)]:
        mistakes = {
            "that is the code alone; the scale takes bits too": code,
            "a scale serves a whole block: each weight pays its share": code + scale,
            "a scale is shared out among the block, not paid more often": code
            + scale * block,
            "each weight has a code of its own; only the scale is shared": (
                code + scale
            )
            / block,
            "that is the whole block; what does one weight take?": code * block + scale,
            "that is in bytes; count bits": (code + scale / block) / 8,
            "that is how many bits are saved of 32": 32 - (code + scale / block),
            "add the scale's share, don't subtract it": code - scale / block,
            "that is the scale's share alone": scale / block,
            "a share may be a fraction of a bit: divide with / instead of //": code
            + scale // block,
            "the scale's bits are an argument, too; use scale_bits": code + 32 / block,
            "divide the scale's bits by the block size, not the other way round": code
            + block / scale,
        }
        answer = ask(function, code_bits=code, scale_bits=scale, block_size=block)
        compare("bits_per_weight", answer, code + scale / block, mistakes)


def _read_back(block: Tensor, levels: Tensor, scale: Tensor) -> Tensor:
    distances = (block.unsqueeze(1) / scale - levels).abs()
    return levels[distances.argmin(dim=1)] * scale


@exercise("10.2")
def check_round_to_levels(function: Callable[[Tensor, Tensor], Tensor]) -> None:
    """Check exercise 10.2, a block as it is read back from its codes."""
    __tracebackhide__ = True
    generator = torch.Generator().manual_seed(10)
    for size, table in [(9, nf4_levels()), (12, even_levels(3)), (7, nf4_levels())]:
        levels = table.double()
        block = 0.3 * torch.randn(size, generator=generator, dtype=torch.float64)
        # The largest magnitude is a negative number's.
        block[size // 2] = -1.5 * block.abs().max()
        scale = block.abs().max()
        below = torch.searchsorted(levels, block / scale, right=True) - 1
        rounded = _read_back(block, levels, scale)
        codes = (block.unsqueeze(1) / scale - levels).abs().argmin(dim=1)
        mistakes = {
            "the scale is the largest magnitude: a negative number can have it": (
                _read_back(block, levels, block.max())
            ),
            "the levels are between -1 and 1: multiply by the scale again": rounded
            / scale,
            "those are the codes; what do they stand for?": codes,
            "those are the codes, times the scale; each stands for a level": codes
            * scale,
            "divide by the scale first: the levels are between -1 and 1": (
                _read_back(block, levels, torch.ones_like(scale))
            ),
            "the block was divided by its scale, and the nearest level multiplied by it: once each": rounded
            * scale,
            "take the nearest level, not the next one below": levels[below] * scale,
            "take the nearest level, not the next one above": levels[
                torch.searchsorted(levels, block / scale)
            ]
            * scale,
            "the scale is the largest magnitude, not the standard deviation": (
                _read_back(block, levels, block.std())
            ),
            "the scale is the largest magnitude, not the length of the block": (
                _read_back(block, levels, block.norm())
            ),
            "nothing was rounded": block,
            "nearest is the smallest absolute difference; is an abs() missing?": levels[
                (block.unsqueeze(1) / scale - levels).argmin(dim=1)
            ]
            * scale,
            "the levels needn't be evenly spaced; use those that are given": (
                block / scale * 7
            ).round()
            / 7
            * scale,
        }
        answer = ask(function, block=block, levels=levels)
        compare("round_to_levels", answer, rounded, mistakes)
    zeros = torch.zeros(4, dtype=torch.float64)
    answer = ask(function, block=zeros, levels=nf4_levels().double())
    if isinstance(answer, Tensor) and answer.isnan().any():
        raise ExerciseError(
            "a block of zeros comes back as NaN: its scale is 0, and 0/0 is no number"
        )
    compare("round_to_levels of zeros", answer, zeros, {})


@exercise("10.3")
def check_gradient_of_x(
    function: Callable[[Tensor, Tensor, Tensor, Tensor], Tensor],
) -> None:
    """Check exercise 10.3, the backward pass of a product with a quantised weight."""
    __tracebackhide__ = True
    generator = torch.Generator().manual_seed(11)
    for batch, n_in, n_out in [(4, 5, 5), (5, 7, 4), (3, 4, 6)]:
        levels = nf4_levels().double()
        codes = torch.randint(16, (n_out, n_in), generator=generator)
        scales, to_y = (
            torch.randn(*size, generator=generator, dtype=torch.float64)
            for size in [(n_out,), (batch, n_out)]
        )
        scales = scales.abs() + 0.1
        W = levels[codes] * scales.unsqueeze(1)
        square = n_in == n_out
        mistakes = {
            "the scales are missing": to_y @ levels[codes],
            "each row is multiplied by its scale once": to_y
            @ (W * scales.unsqueeze(1)),
            "the rows are multiplied by their scales, not divided": to_y
            @ (levels[codes] / scales.unsqueeze(1)),
            "a code is the number of a level, not its value": to_y
            @ (codes * scales.unsqueeze(1)),
            "y = x·Wᵀ, so the gradient of x is the gradient of y times W as it is": (
                to_y @ W.T if square else torch.empty(0)
            ),
            "a scale belongs to a row of W; yours went to its columns": (
                to_y @ (levels[codes] * scales) if square else torch.empty(0)
            ),
            "that is the gradient of one example; keep the batch": (to_y @ W).sum(0),
            "that is W; multiply the gradient by it": W,
        }
        answer = ask(function, gradient=to_y, codes=codes, levels=levels, scales=scales)
        compare("gradient_of_x", answer, to_y @ W, mistakes)
