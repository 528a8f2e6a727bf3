"""DoRA: a linear layer whose rows have a trained length and a direction trained by
LoRA.

Liu et al., "DoRA: Weight-Decomposed Low-Rank Adaptation", arXiv 2402.09353.
"""

from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from lowrank_utils._weight_checks import check_weight, mark_of
from lowrank_utils.decompose import magnitude_and_direction, row_norms
from lowrank_utils.lora import AdaptedLinear, without_autocast
from lowrank_utils.norms import (
    factored_norm_pays,
    factored_row_norms,
    formed_row_norms,
    row_scale,
    squared_row_norms,
)
from lowrank_utils.promises import SCALES, SQUARES


class LinearWithDoRAMerged(AdaptedLinear):
    """DoRA merged in the forward pass: y = x(c ⊙ V)ᵀ + b with V = W + ΔW and c = m/‖V‖.

    The magnitude m has one entry per output neuron, that is per row of torch's weight,
    and starts as ‖W‖, so the layer starts as the linear one (arXiv 2402.09353, Eq. 5).

    Args:
        linear: the pretrained layer. It is kept, not copied.
        rank: inner dimension of the LoRA factors.
        alpha: their scaling s.
        detach_norm: treat ‖V‖ as a constant in the backward pass (§4.3 of the paper).
            False keeps its gradient.
        lora_options: further arguments of ``LoRALayer``, such as ``init``.

    Raises:
        TypeError: ``linear`` isn't an ``nn.Linear``, or is already adapted.
        ValueError: ``linear`` has no shape yet, or an argument is out of range.
    """

    def __init__(
        self,
        linear: nn.Linear,
        rank: int,
        alpha: float,
        *,
        detach_norm: bool = True,
        **lora_options: Any,
    ) -> None:
        super().__init__(linear, rank, alpha, **lora_options)
        V = self.updated_weight()  # W, since B is still zero
        self.m = nn.Parameter(magnitude_and_direction(V.detach()).magnitude)
        self.detach_norm = detach_norm

    def adapted_weight(self) -> Tensor:
        """Return the weight that the layer amounts to, c ⊙ V, (out, in)."""
        V = self.updated_weight()
        norm = row_norms(V.detach() if self.detach_norm else V)
        return row_scale(self.m, norm).unsqueeze(1) * V

    def forward(self, x: Tensor) -> Tensor:
        """Map x of shape (…, in) to y of shape (…, out)."""
        return F.linear(x, self.weight, self.bias)


@torch.no_grad()
def reset_magnitudes(model: nn.Module) -> None:
    """Set m of each DoRA layer in ``model`` to the norms of the rows of its pretrained
    weight, as at the start.

    For a model whose pretrained weights were loaded after DoRA went in.
    """
    for layer in model.modules():
        if isinstance(layer, LinearWithDoRAMerged):
            layer.m.copy_(row_norms(layer.linear.weight))
            layer._mark = mark_of(layer.linear.weight)


def scale_and_bias(layer: LinearWithDoRAMerged) -> tuple[Tensor, Tensor | None]:
    """Return c = m/‖V‖, (out,), and the bias, (out,) or None.

    c is what ``row_scale(m, row_norms(V))`` gives, up to rounding. Inside
    ``constant_weights`` it is computed once.
    """
    check_weight(layer)
    kept = None if torch.compiler.is_compiling() else SCALES.value(layer, _scale)
    return _scale(layer) if kept is None else kept, layer.bias


def output_with_dropout(layer: LinearWithDoRAMerged, x: Tensor) -> Tensor:
    """Return what a DoRA layer makes of x (…, in) in training with dropout, (…, out).

    As in PEFT, the pretrained layer gets all of x, and what DoRA adds to it the rest d
    that dropout leaves: y = xWᵀ + b + (c ⊙ (dWᵀ + s·dAB) − dWᵀ).
    """
    d, W = layer.lora.dropped(x), layer.linear.weight
    base, rest = F.linear(x, W), F.linear(d, W)
    c, b = scale_and_bias(layer)
    y = base + (c * (rest + layer.lora.product(d)) - rest)
    return (y if b is None else y + b).to(base.dtype)


def _scale(layer: LinearWithDoRAMerged) -> Tensor:
    """Return c without forming V where that is faster; where the norm keeps its
    gradient, V is formed.
    """
    W, A, B = layer.linear.weight, layer.lora.A, layer.lora.B
    if torch.is_grad_enabled() and not layer.detach_norm:
        norm = row_norms(layer.updated_weight())
    elif factored_norm_pays(W, A):
        squares = SQUARES.value(
            layer, lambda layer: squared_row_norms(layer.linear.weight)
        )
        with without_autocast(W.device):
            norm = factored_row_norms(W, A, B, layer.lora.alpha, squares)
    else:
        with torch.no_grad():
            V = layer.updated_weight()
            # no_grad alone stops no derivative that is taken forward.
            norm = formed_row_norms(V.detach() if layer.detach_norm else V)
    return row_scale(layer.m, norm)


class LinearWithDoRA(LinearWithDoRAMerged):
    """DoRA unmerged and exact: y = c ⊙ (xWᵀ + s·xAB) + b, the bias not scaled.

    A row's scale can be applied to the weight or to the output that the row produces,
    so this equals ``LinearWithDoRAMerged`` up to rounding, with W left as it is. V is
    needed for its norms alone, and those cost less than V.

    With dropout, in training, the pretrained layer gets all of x, and what DoRA adds to
    it sees the rest that dropout leaves, as in PEFT (``output_with_dropout``).
    """

    def forward(self, x: Tensor) -> Tensor:
        """Map x of shape (…, in) to y of shape (…, out)."""
        if self.lora.drops:
            return output_with_dropout(self, x)
        base = F.linear(x, self.linear.weight)
        c, b = scale_and_bias(self)
        y = c * (base + self.lora(x))
        return (y if b is None else y + b).to(base.dtype)
