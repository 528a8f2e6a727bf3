"""DoRA: a linear layer whose rows have a trained length and a direction trained by
LoRA.

Liu et al., "DoRA: Weight-Decomposed Low-Rank Adaptation", arXiv 2402.09353.
"""

from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from lowrank_utils._weight_checks import check_weight, mark_of, start_of
from lowrank_utils.decompose import magnitude_and_direction, row_norms
from lowrank_utils.lora import AdaptedLinear, Linear, without_autocast
from lowrank_utils.norms import (
    factored_norm_pays,
    factored_row_norms,
    formed_row_norms,
    joined_products,
    row_scale,
    squared_row_norms,
)
from lowrank_utils.promises import SCALES, SQUARES


class LinearWithDoRAMerged(AdaptedLinear):
    """DoRA merged in the forward pass: y = x(c ⊙ V)ᵀ + b with V = W + ΔW and c = m/‖V‖.

    The magnitude m has one entry per output neuron, that is per row of torch's weight,
    and starts as ‖W‖, so the layer starts as the linear one (arXiv 2402.09353, Eq. 5).

    Args:
        linear: the pretrained layer, plain or quantised. It is kept, not copied.
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
        linear: Linear,
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
            layer._mark = mark_of(layer.linear)
            layer._start = start_of(layer.m, layer.linear)


def scale_and_bias(layer: LinearWithDoRAMerged) -> tuple[Tensor, Tensor | None]:
    """Return c = m/‖V‖, (out,), and the bias, (out,) or None.

    c is what ``row_scale(m, row_norms(V))`` gives, up to rounding. Inside
    ``constant_weights`` it is computed once.
    """
    check_weight(layer)
    kept = None if torch.compiler.is_compiling() else SCALES.value(layer, _scale)
    return _scale(layer) if kept is None else kept, layer.bias


def has_special_form(layer: LinearWithDoRAMerged, x: Tensor) -> bool:
    """Tell whether ``special_output`` computes what an unmerged DoRA layer makes of x
    (…, in), and not the formula of the class: in training with dropout, and where the
    weight is so large that reading it twice is what takes the time.
    """
    return layer.lora.drops or _joining_pays(layer, x)


def special_output(layer: LinearWithDoRAMerged, x: Tensor) -> Tensor:
    """Return what an unmerged DoRA layer makes of x (…, in), (…, out), where
    ``has_special_form`` says so.

    With dropout, as in PEFT, the pretrained layer gets all of x, and what DoRA adds to
    it the rest d that dropout leaves: y = xWᵀ + b + (c ⊙ (dWᵀ + s·dAB) − dWᵀ). Else it
    is the formula of the class, and the products xWᵀ and AᵀWᵀ are computed in one.
    """
    W, A, B = layer.linear.weight, layer.lora.A, layer.lora.B
    if layer.lora.drops:
        d = layer.lora.dropped(x)
        base, rest = F.linear(x, W), F.linear(d, W)
        c, b = scale_and_bias(layer)
        y = base + (c * (rest + layer.lora.product(d)) - rest)
    else:
        check_weight(layer)
        base, AW = joined_products(x, A, W)
        norm = factored_row_norms(W, A, B, layer.lora.alpha, _squares(layer), AW)
        c, b = row_scale(layer.m, norm), layer.bias
        y = c * (base + layer.lora(x))
    return (y if b is None else y + b).to(base.dtype)


def _joining_pays(layer: LinearWithDoRAMerged, x: Tensor) -> bool:
    """Tell whether ``joined_products`` can be used, and is faster: from 2²² entries of W
    on (benchmarks/adapter_speed.py).
    """
    linear = layer.linear
    if linear.in_features * linear.out_features < 2**22:
        return False
    W = linear.weight
    return (
        factored_norm_pays(W, layer.lora.A)
        # Else W is in a product whose gradient is asked for.
        and not W.requires_grad
        and (layer.detach_norm or not torch.is_grad_enabled())
        # Else the formula says what is wrong with x, as torch does.
        and type(x) is Tensor
        and x.layout == torch.strided
        # x is copied for it.
        and 4 * x.numel() <= W.numel()
        and (x.dtype, x.device, x.shape[-1:]) == (W.dtype, W.device, W.shape[1:])
        # Under autocast the product would be in half precision, and so the norms.
        and not torch.is_autocast_enabled(W.device.type)
        # A c that is kept needs no second product.
        and SCALES.value(layer, _scale) is None
    )


def _squares(layer: LinearWithDoRAMerged) -> Tensor | None:
    return SQUARES.value(layer, lambda layer: squared_row_norms(layer.linear.weight))


def _scale(layer: LinearWithDoRAMerged) -> Tensor:
    """Return c without forming V where that is faster; where the norm keeps its
    gradient, V is formed.
    """
    W, A, B = layer.linear.weight, layer.lora.A, layer.lora.B
    if torch.is_grad_enabled() and not layer.detach_norm:
        norm = row_norms(layer.updated_weight())
    elif factored_norm_pays(W, A):
        with without_autocast(W.device):
            norm = factored_row_norms(W, A, B, layer.lora.alpha, _squares(layer))
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
    it sees the rest that dropout leaves, as in PEFT (``special_output``).
    """

    def forward(self, x: Tensor) -> Tensor:
        """Map x of shape (…, in) to y of shape (…, out)."""
        if has_special_form(self, x):
            return special_output(self, x)
        base = F.linear(x, self.linear.weight)
        c, b = scale_and_bias(self)
        y = c * (base + self.lora(x))
        return (y if b is None else y + b).to(base.dtype)
