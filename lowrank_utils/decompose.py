"""Vectors and matrices as magnitude × direction, and matrices as products of two thin
ones.
"""

from typing import NamedTuple

import torch
from torch import Tensor

from lowrank_utils._arguments import check_matrix, check_whole_number


class MagnitudeAndDirection(NamedTuple):
    """Lengths and unit vectors: ``magnitude * direction`` is the original."""

    magnitude: Tensor
    direction: Tensor


class LowRankFactors(NamedTuple):
    """Two thin matrices whose product ``A @ B`` stands for a large one."""

    A: Tensor
    B: Tensor


def row_norms(matrix: Tensor) -> Tensor:
    """Return the length of each row, computed in float64.

    Sums of squares in bfloat16 would lose all but two or three digits, and in float32
    they overflow or vanish for lengths that float32 itself can hold.

    Args:
        matrix: shape (rows, columns).

    Returns:
        Shape (rows,), of dtype float64 (on Apple's GPUs, which don't have it, float32).
    """
    wide = torch.float32 if matrix.device.type == "mps" else torch.float64
    return torch.linalg.vector_norm(matrix.to(_floating(matrix)), dim=1, dtype=wide)


def magnitude_and_direction(tensor: Tensor) -> MagnitudeAndDirection:
    """Split a vector, or each row of a matrix, into its length and a unit vector.

    Torch stores the weight of ``nn.Linear`` as (out, in), so a row holds the weights
    that lead to one output neuron. This is weight normalisation's w = g·v/‖v‖ (Salimans
    and Kingma, arXiv 1602.07868, Eq. 2) and DoRA's m and V/‖V‖ (Liu et al., arXiv
    2402.09353, Eq. 2).

    Args:
        tensor: a vector (n,) or a matrix (rows, columns).

    Returns:
        The magnitude () and the direction (n,) of a vector, or the magnitudes (rows,)
        and the directions (rows, columns) of a matrix. A zero vector has magnitude 0
        and the direction 0.

    Raises:
        TypeError: ``tensor`` isn't a tensor.
        ValueError: it has neither one nor two dimensions.
    """
    if isinstance(tensor, Tensor) and tensor.dim() == 1:
        magnitude, direction = magnitude_and_direction(tensor.unsqueeze(0))
        return MagnitudeAndDirection(magnitude.squeeze(0), direction.squeeze(0))
    magnitude = row_norms(check_matrix("tensor", tensor)).to(_floating(tensor))
    divisor = torch.where(magnitude > 0, magnitude, 1)
    return MagnitudeAndDirection(magnitude, tensor / divisor.unsqueeze(1))


def low_rank_approximation(matrix: Tensor, rank: int) -> LowRankFactors:
    """Return the product of rank ``rank`` that is nearest to ``matrix``.

    It is the truncated singular value decomposition, which no other product of that
    rank beats in the Frobenius or the spectral norm (Eckart and Young, 1936). The
    singular values are shared evenly between the factors.

    Args:
        matrix: shape (n, k). For a weight update of ``nn.Linear``, (out, in), pass its
            transpose, so that A and B have the shapes of LoRA's.
        rank: from 1 to min(n, k).

    Returns:
        A of shape (n, rank) and B of shape (rank, k).

    Raises:
        TypeError: ``matrix`` isn't a tensor, or ``rank`` isn't a whole number.
        ValueError: ``matrix`` isn't two-dimensional, or ``rank`` is out of range.
    """
    matrix = check_matrix("matrix", matrix).to(_floating(matrix))
    check_whole_number("rank", rank, minimum=1)
    if rank > min(matrix.shape):
        raise ValueError(
            f"rank must be at most {min(matrix.shape)}, the shorter side of {tuple(matrix.shape)}; got {rank}"
        )
    wide = torch.promote_types(matrix.dtype, torch.float32)
    U, singular_values, Vh = torch.linalg.svd(matrix.to(wide), full_matrices=False)
    root = singular_values[:rank].sqrt()
    A = U[:, :rank] * root
    B = root.unsqueeze(1) * Vh[:rank]
    return LowRankFactors(A.to(matrix.dtype), B.to(matrix.dtype))


def magnitude_change(weight: Tensor, reference: Tensor) -> Tensor:
    """Return ΔM, by how much the rows' lengths differ on average.

    ΔM = (1/k) Σ |‖w_n‖ − ‖w⁰_n‖| over the k output neurons (arXiv 2402.09353, Eq. 3).

    Args:
        weight: the weight after training, (out, in).
        reference: the weight before it, of the same shape.

    Returns:
        A scalar tensor, 0 or more, in the unit of the weights.
    """
    _check_same_shape(weight, reference)
    return (row_norms(weight) - row_norms(reference)).abs().mean()


def direction_change(weight: Tensor, reference: Tensor) -> Tensor:
    """Return ΔD, by how much the rows have turned on average.

    ΔD = (1/k) Σ (1 − cos(w_n, w⁰_n)) over the k output neurons (arXiv 2402.09353, Eq.
    4).

    Args:
        weight: the weight after training, (out, in).
        reference: the weight before it, of the same shape.

    Returns:
        A scalar tensor from 0 (no row has turned) to 2 (all are reversed). A zero row
        counts as turned by a right angle, 1.
    """
    _check_same_shape(weight, reference)
    cosines = (
        magnitude_and_direction(weight).direction
        * magnitude_and_direction(reference).direction
    ).sum(dim=1)
    return (1 - cosines).mean()


def _floating(tensor: Tensor) -> torch.dtype:
    """Return the dtype of ``tensor``, or the default one in the place of whole
    numbers.
    """
    return tensor.dtype if tensor.is_floating_point() else torch.get_default_dtype()


def _check_same_shape(weight: Tensor, reference: Tensor) -> None:
    check_matrix("weight", weight)
    check_matrix("reference", reference)
    if weight.shape != reference.shape:
        raise ValueError(
            "weight and reference must have the same shape; "
            f"got {tuple(weight.shape)} and {tuple(reference.shape)}"
        )
