"""DoRA's c = m/‖V‖ by rows: two ways to compute the norms of V = W + ΔW, and when to compute them at all.

Notebook 8 derives the factored way. Storing the norms of an updated weight without the weight is
also the subject of "Scaling DoRA: High-Rank Adaptation via Factored Norms and Fused Kernels", arXiv 2603.22276.
"""

from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from lowrank_utils.decompose import row_norms
from lowrank_utils.promises import Promise


def row_scale(m: Tensor, norm: Tensor) -> Tensor:
    """Return c = m/‖V‖, by which each output is multiplied.

    A zero row has no direction; its c is 1, so that A and B still get a gradient.

    Args:
        m: the magnitude, (out,).
        norm: ‖V‖, the lengths of the rows of V = W + ΔW, (out,).

    Returns:
        Shape (out,), in the dtype of m.
    """
    # Rounded as m is: at the start c is then exactly 1 in every dtype.
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
    AW: Tensor | None = None,
    squares: Tensor | None = None,
) -> Tensor:
    """Return ‖W + s·(A·B)ᵀ‖ by rows from products with the thin factors alone; A·B is never formed.

    ‖W + sBᵀAᵀ‖² = ‖W‖² + 2s·Σ_r (AᵀWᵀ) ⊙ B + s²·Σ_r (AᵀA·B) ⊙ B, summed over the rank. The sum
    loses digits where the update takes most of a row away, so rows that have become shorter than half of W's
    are computed from the updated weight. For all others no term is larger than 12‖V‖², so of rounding errors
    there is at most a small multiple.

    Args:
        W: the weight, (out, in).
        A: the first factor, (in, r), in the dtype of W: float32 or float64.
        B: the second, (r, out).
        alpha: the scaling s.
        AW: AᵀWᵀ, (r, out), if it is there already.
        squares: ‖W‖² by rows, (out,), if it is there already.

    Returns:
        Shape (out,), in the dtype of W. Without a gradient.
    """
    with torch.no_grad():
        AW = F.linear(A.T, W) if AW is None else AW
        squares = squared_row_norms(W) if squares is None else squares
        update = torch.addmm(AW, A.T @ A, B, beta=2 * alpha, alpha=alpha**2)
        sums = torch.linalg.vecdot(update, B, dim=0).add_(squares)
        # Written so that NaN and what overflows count as unsafe too, and a row of zeros as well.
        safe = (
            (sums > 0.25 * squares) & (sums < torch.finfo(W.dtype).max) & (sums > torch.finfo(W.dtype).tiny)
        )
        norms = sums.sqrt_()
        if not safe.all():
            rows = (~safe).nonzero().squeeze(1)
            norms[rows] = row_norms(torch.addmm(W[rows], B[:, rows].T, A.T, alpha=alpha)).to(W.dtype)
    return norms


class _ProductsWithFrozen(torch.autograd.Function):
    """x·Wᵀ and Aᵀ·Wᵀ out of one product: Aᵀ's rows are appended to x's, so that W is read once.

    Autograd alone would send the appended rows through the backward pass as well, as zeros. ``forward`` takes
    the context itself: a separate ``setup_context``, which torch's function transforms would need (they
    never get here), costs some 4 % of a training step at 1024 → 1024, batch 64.
    """

    @staticmethod
    def forward(ctx: Any, x: Tensor, W: Tensor, A: Tensor) -> tuple[Tensor, Tensor]:
        rows = x.reshape(-1, x.shape[-1])
        products = torch.cat([rows, A.T]) @ W.T
        xW, AW = products[: len(rows)].view(*x.shape[:-1], len(W)), products[len(rows) :]
        ctx.save_for_backward(x if ctx.needs_input_grad[1] else None, W)
        ctx.mark_non_differentiable(AW)
        return xW, AW

    @staticmethod
    def backward(ctx: Any, grad: Tensor, _: Tensor) -> tuple[Tensor | None, Tensor | None, None]:
        x, W = ctx.saved_tensors
        grad_W = None if x is None else grad.reshape(-1, len(W)).T @ x.reshape(-1, x.shape[-1])
        return grad @ W if ctx.needs_input_grad[0] else None, grad_W, None


def factored_norm_pays(x: Tensor, W: Tensor, A: Tensor) -> bool:
    """Tell whether ``factored_row_norms`` is the faster way for an input x (…, in), and a safe one.

    Forward and backward on one and on two threads of an x86-64 server, batch 64, as a multiple of LoRA's time,
    A·B formed → factored: at 784 → 128 rank 4, 1.4 → 1.5; at 512 → 512 rank 8, 1.4 → 1.3; at 1024 → 1024 rank 8,
    1.5 → 1.3; at 4096 → 4096 rank 8, 2.7 → 1.1, rank 64, 3.0 → 1.4 (benchmarks/adapter_speed.py). So it pays
    for weights from 2¹⁸ entries on, below which its many small steps take longer than A·B.
    """
    rank = A.shape[1]
    return (
        values_can_be_read(W)
        # A product in half precision would lose the norm's digits, also under autocast.
        and x.dtype == W.dtype == A.dtype
        and W.dtype in (torch.float32, torch.float64)
        and not torch.is_autocast_enabled(W.device.type)
        and W.numel() >= 2**18
        # With more rank than this AᵀWᵀ costs as much as A·B and the sums come on top.
        and 4 * rank <= min(W.shape)
    )


def values_can_be_read(tensor: Tensor) -> bool:
    """Tell whether a result can be looked at on the way: not while torch compiles, batches or only infers shapes."""
    if torch.compiler.is_compiling() or tensor.is_meta:
        return False
    return not torch._C._are_functorch_transforms_active()


def formed_row_norms(V: Tensor) -> Tensor:
    """Return ``row_norms(V)``, in float32 for a float32 V if its squares neither vanish nor overflow there.

    At 784 → 128 the float64 copy that ``row_norms`` makes takes a tenth of a training step and twice V's memory.
    """
    if V.dtype == torch.float32 and not V.requires_grad and values_can_be_read(V):
        norms = torch.linalg.vector_norm(V, dim=1)
        if ((norms > 1e-15) & (norms < 1e15)).all():
            return norms
    return row_norms(V)


def product_and_scale(layer: Any, x: Tensor) -> tuple[Tensor, Tensor]:
    """Return x·Wᵀ, (…, out), and c = m/‖V‖ by rows, (out,), for a DoRA layer and its input x (…, in).

    It gives what ``F.linear(x, W)`` and ``row_scale(m, row_norms(V))`` give, up to rounding, without
    forming V where that is faster.

    Args:
        layer: an ``AdaptedLinear`` with m, (out,), and ``detach_norm``. If that is False, the norm has its gradient,
            and V is formed.
        x: its input, (…, in).
    """
    if not torch.compiler.is_compiling() and (kept := _SCALES.value(layer)) is not None:
        return F.linear(x, layer.linear.weight), kept
    W, A = layer.linear.weight, layer.lora.A
    with_gradient = torch.is_grad_enabled() and not layer.detach_norm
    if with_gradient or not factored_norm_pays(x, W, A):
        with torch.set_grad_enabled(with_gradient):
            norm = formed_row_norms(layer.updated_weight())
        return F.linear(x, W), row_scale(layer.m, norm)
    xW, AW = _ProductsWithFrozen.apply(x, W, A.detach())
    norm = factored_row_norms(W, A, layer.lora.B, layer.lora.alpha, AW, _SQUARES.value(layer))
    return xW, row_scale(layer.m, norm)


@contextmanager
def constant_weights(model: nn.Module) -> Iterator[None]:
    """Promise that the weights of ``model`` stay as they are, so that each DoRA layer needs c = m/‖V‖ only once.

    Inside the block, a layer in evaluation mode computes c in its first forward pass without gradients
    and keeps it. A new one is computed after ``load_state_dict``, a conversion, another change that torch
    counts, or a forward pass with gradients, which an optimizer needs before its step. Copies of the
    model made in the block keep nothing. Some changes aren't counted (through ``.data``, by a
    fused optimizer), so at the end of the block every kept c is compared with a new one::

        model.eval()
        with torch.no_grad(), constant_weights(model):
            ...  # predict as often as you like

    Args:
        model: a module with adapters in it.

    Raises:
        RuntimeError: at the end of the block, if weights were changed unnoticed. The outputs
            since that change were computed with an old c.
    """
    with _SCALES.given_for(model):
        yield


@contextmanager
def frozen_weights(model: nn.Module) -> Iterator[None]:
    """Promise that the pretrained weights of ``model`` stay as they are while its adapters are trained.

    Inside the block, a DoRA layer whose W is frozen reads W once for ‖W‖² and keeps it, where it computes ‖V‖
    by ``factored_row_norms``. A large layer then saves a pass over W in each step, and computes the same bits.
    What is noticed of a change, and when, is as in ``constant_weights``::

        with frozen_weights(model):
            ...  # train as usual

    Args:
        model: a module with adapters in it.

    Raises:
        RuntimeError: at the end of the block, if a pretrained weight was changed unnoticed. The outputs
            since that change were computed with old norms.
    """
    with _SQUARES.given_for(model):
        yield


def _scale_now(layer: Any) -> Tensor:
    W, A, B = layer.linear.weight, layer.lora.A, layer.lora.B
    if factored_norm_pays(W, W, A):
        return row_scale(layer.m, factored_row_norms(W, A, B, layer.lora.alpha))
    return row_scale(layer.m, formed_row_norms(layer.updated_weight()))


def _sources_of_scale(layer: Any) -> tuple[Any, ...]:
    # At each pass: a module looks its parts up slowly.
    lora = layer.lora
    return layer.linear.weight, lora.A, lora.B, layer.m, lora.alpha


_SCALES = Promise(
    "constant_weights",
    _sources_of_scale,
    _scale_now,
    in_training=False,
)
_SQUARES = Promise(
    "frozen_weights",
    lambda layer: (layer.linear.weight,),
    lambda layer: squared_row_norms(layer.linear.weight),
    in_training=True,
)
