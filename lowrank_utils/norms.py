"""DoRA's c = m/‖V‖ by rows, and two ways to compute the norms of V = W + ΔW: tensors
in, tensors out.

Notebook 8 derives the factored way. Storing the norms of an updated weight without the
weight is also the subject of "Scaling DoRA: High-Rank Adaptation via Factored Norms and
Fused Kernels", arXiv 2603.22276.
"""

from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

from lowrank_utils._lazy_weight import LazyWeight, is_followed
from lowrank_utils.decompose import row_norms

# FakeTensorMode, make_fx with what is built on it, and AOTAutograd.
_SYMBOLIC_MODES = (
    torch._C._TorchDispatchModeKey.FAKE,
    torch._C._TorchDispatchModeKey.PROXY,
    torch._C._TorchDispatchModeKey.FUNCTIONAL,
)


def row_scale(m: Tensor, norm: Tensor) -> Tensor:
    """Return c = m/‖V‖, by which each output is multiplied.

    A zero row has no direction; its c is 1, so that A and B still get a gradient.

    Args:
        m: the magnitude, (out,).
        norm: ‖V‖, the lengths of the rows of V = W + ΔW, (out,).

    Returns:
        Shape (out,), in the dtype of m.
    """
    # Rounded to m's dtype: else c isn't exactly 1 at the start.
    norm = norm.to(m.dtype)
    zero = norm == 0
    return (m / norm.masked_fill(zero, 1)).masked_fill(zero, 1)


def squared_row_norms(W: Tensor) -> Tensor:
    """Return ‖W‖² by rows, (out,), in the dtype of W. Without a gradient."""
    return torch.linalg.vector_norm(W.detach(), dim=1).square_()


def factored_row_norms(
    W: Tensor,
    A: Tensor,
    B: Tensor,
    alpha: float,
    squares: Tensor | None = None,
    AW: Tensor | None = None,
) -> Tensor:
    """Return ‖W + s·(A·B)ᵀ‖ by rows from products with the thin factors alone; A·B is
    never formed.

    ‖W + sBᵀAᵀ‖² = ‖W‖² + 2s·Σ_r (AᵀWᵀ) ⊙ B + s²·Σ_r (AᵀA·B) ⊙ B, summed over the rank.
    The sum loses digits where the update takes most of a row away, so rows that have
    become shorter than half of W's are computed from the updated weight. For all others
    no term is larger than 12‖V‖², so of rounding errors there is at most a small
    multiple.

    Args:
        W: the weight, (out, in).
        A: the first factor, (in, r), in the dtype of W: float32 or float64.
        B: the second, (r, out).
        alpha: the scaling s.
        squares: ‖W‖² by rows, (out,), if it is there already.
        AW: AᵀWᵀ, (r, out), if it is there already.

    Returns:
        Shape (out,), in the dtype of W. Without a gradient.
    """
    with torch.no_grad():
        AW = F.linear(A.T, W) if AW is None else AW
        squares = squared_row_norms(W) if squares is None else squares
        update = torch.addmm(AW, A.T @ A, B, beta=2 * alpha, alpha=alpha**2)
        sums = torch.linalg.vecdot(update, B, dim=0).add_(squares)
        # Written so that NaN and what overflows count as unsafe too, and a row of zeros
        # as well.
        safe = (
            (sums > 0.25 * squares)
            & (sums < torch.finfo(W.dtype).max)
            & (sums > torch.finfo(W.dtype).tiny)
        )
        norms = sums.sqrt_()
        if not safe.all():
            rows = (~safe).nonzero().squeeze(1)
            norms[rows] = row_norms(
                torch.addmm(W[rows], B[:, rows].T, A.T, alpha=alpha)
            ).to(W.dtype)
    return norms


def factored_norm_pays(W: Tensor, A: Tensor) -> bool:
    """Tell whether ``factored_row_norms`` is the faster way for W (out, in) and A (in,
    r), and a safe one.

    It pays for weights from 2¹⁸ entries on, below which its many small steps take
    longer than A·B (benchmarks/adapter_speed.py).
    """
    return (
        # First: where torch.jit traces, even the question for a shape becomes a part of
        # the graph.
        values_can_be_read(W)
        and W.dtype == A.dtype
        # A product in half precision would lose the norm's digits.
        and W.dtype in (torch.float32, torch.float64)
        and W.numel() >= 2**18
        # With more rank than this AᵀWᵀ costs as much as A·B and the sums come on top.
        and 4 * A.shape[1] <= min(W.shape)
    )


class _JoinedProducts(torch.autograd.Function):
    """The products of ``joined_products``; their second part is for c alone, and costs
    the backward pass nothing.
    """

    @staticmethod
    def forward(ctx: Any, x: Tensor, A: Tensor, W: Tensor) -> tuple[Tensor, Tensor]:
        ctx.save_for_backward(W)
        xW, AW = F.linear(torch.cat([x, A.T]), W).split([len(x), A.shape[1]])
        ctx.mark_non_differentiable(AW)
        return xW, AW

    @staticmethod
    def backward(ctx: Any, *gradients: Tensor) -> tuple[Tensor, None, None]:
        (W,) = ctx.saved_tensors
        return gradients[0] @ W, None, None


def joined_products(x: Tensor, A: Tensor, W: Tensor) -> tuple[Tensor, Tensor]:
    """Return x·Wᵀ and AᵀWᵀ from one product, which reads a large W once.

    Args:
        x: the input, (…, in).
        A: the first factor, (in, r).
        W: the weight, (out, in), frozen.

    Returns:
        Shapes (…, out), with a gradient for x alone, and (r, out), without one.
    """
    rows, A = x.reshape(-1, x.shape[-1]), A.detach()
    if isinstance(W, LazyWeight):
        # What autograd keeps of such a weight is the weight's own matter.
        xW, AW = F.linear(torch.cat([rows, A.T]), W).split([len(rows), A.shape[1]])
        AW = AW.detach()
    else:
        xW, AW = _JoinedProducts.apply(rows, A, W)
    return xW.reshape(*x.shape[:-1], W.shape[0]), AW


def values_can_be_read(tensor: Tensor) -> bool:
    """Tell whether a result can be looked at on the way, and computed in place: not
    while torch compiles, traces, batches, captures a graph, differentiates forward or
    only infers shapes.

    Args:
        tensor: that the result comes from.
    """
    # Differentiated forward, steps without gradients pass on tangents nevertheless, and
    # ‖W‖² that was computed apart has none.
    if is_followed() or tensor.is_meta:
        return False
    return not (
        # Such a class may hold no numbers (FakeTensor), or others than it shows.
        (
            type(tensor).__torch_dispatch__ is not Tensor.__torch_dispatch__
            and not isinstance(tensor, LazyWeight)
        )
        # Under these modes results hold no numbers, whatever they come from.
        or (
            torch._C._len_torch_dispatch_stack() > 0
            and any(torch._C._get_dispatch_mode(key) for key in _SYMBOLIC_MODES)
        )
        # A CUDA graph has no numbers before it is replayed.
        or (tensor.is_cuda and torch.cuda.is_current_stream_capturing())
    )


def formed_row_norms(V: Tensor) -> Tensor:
    """Return ``row_norms(V)``, in float32 for a float32 V if its squares neither vanish
    nor overflow there.

    The float64 copy that ``row_norms`` makes takes time and twice V's memory.
    """
    if V.dtype == torch.float32 and not V.requires_grad and values_can_be_read(V):
        norms = torch.linalg.vector_norm(V, dim=1)
        if ((norms > 1e-15) & (norms < 1e15)).all():
            return norms
    return row_norms(V)
