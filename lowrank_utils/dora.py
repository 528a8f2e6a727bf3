"""DoRA: a linear layer whose rows have a trained length and a direction trained by LoRA.

Liu et al., "DoRA: Weight-Decomposed Low-Rank Adaptation", arXiv 2402.09353.
"""

from typing import Any

import torch.nn.functional as F
from torch import Tensor, nn

from lowrank_utils._arguments import check_last_dimension
from lowrank_utils.decompose import magnitude_and_direction, row_norms
from lowrank_utils.lora import AdaptedLinear
from lowrank_utils.norms import product_and_scale, row_scale


class LinearWithDoRAMerged(AdaptedLinear):
    """DoRA merged in the forward pass: y = x(c ⊙ V)ᵀ + b with V = W + ΔW and c = m/‖V‖.

    The magnitude m has one entry per output neuron, that is per row of torch's weight, and
    starts as ‖W‖, so the layer starts as the linear one (arXiv 2402.09353, Eq. 5).

    Args:
        linear: the pretrained layer. It is kept, not copied.
        rank: inner dimension of the LoRA factors.
        alpha: their scaling s.
        detach_norm: treat ‖V‖ as a constant in the backward pass (§4.3 of the paper). False
            keeps its gradient.
        lora_options: further arguments of ``LoRALayer``, such as ``init``.

    Raises:
        TypeError: ``linear`` isn't an ``nn.Linear``, or is already adapted.
        ValueError: ``linear`` has no shape yet, or an argument is out of range.
    """

    def __init__(
        self, linear: nn.Linear, rank: int, alpha: float, *, detach_norm: bool = True, **lora_options: Any
    ) -> None:
        super().__init__(linear, rank, alpha, **lora_options)
        self.m = nn.Parameter(magnitude_and_direction(linear.weight.detach()).magnitude)
        self.detach_norm = detach_norm

    @property
    def weight(self) -> Tensor:
        """The weight that the layer now amounts to, c ⊙ V, (out, in)."""
        V = self.updated_weight()
        norm = row_norms(V.detach() if self.detach_norm else V)
        return row_scale(self.m, norm).unsqueeze(1) * V

    def forward(self, x: Tensor) -> Tensor:
        """Map x of shape (…, in) to y of shape (…, out)."""
        check_last_dimension(x, self.in_features)
        return F.linear(x, self.weight, self.bias)


class LinearWithDoRA(LinearWithDoRAMerged):
    """DoRA unmerged and exact: y = c ⊙ (xWᵀ + s·xAB) + b, the bias not scaled.

    A row's scale can be applied to the weight or to the output that the row produces, so this
    equals ``LinearWithDoRAMerged`` up to rounding, with W left as it is. V is needed for its norms
    alone, and those cost less than V (``norms.product_and_scale``).
    """

    def forward(self, x: Tensor) -> Tensor:
        """Map x of shape (…, in) to y of shape (…, out)."""
        check_last_dimension(x, self.in_features)
        xW, c = product_and_scale(self, x)
        y = xW + self.lora(x)
        # Under autocast y is narrower than c and b, and stays so, as with nn.Linear.
        y, b = c.to(y.dtype) * y, self.bias
        return y if b is None else y + b.to(y.dtype)
