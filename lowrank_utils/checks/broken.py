"""Seven layers that are meant to be DoRA, each with one bug: what notebook 5 sends you
out to find.

Look for the bugs from outside first, with a test of your own. Each class says in its
first comment what is wrong.
"""

from typing import Any

import torch.nn.functional as F
from torch import Tensor, nn

from lowrank_utils.decompose import row_norms
from lowrank_utils.dora import LinearWithDoRAMerged
from lowrank_utils.lora import AdaptedLinear
from lowrank_utils.norms import row_scale


class LayerA(LinearWithDoRAMerged):
    """DoRA with a bug."""

    def forward(self, x: Tensor) -> Tensor:
        """Map x of shape (…, in) to y of shape (…, out)."""
        # The bug: c scales the bias too, which isn't part of W.
        c = row_scale(self.m, row_norms(self.updated_weight().detach()))
        return c * (self.linear(x) + self.lora(x))


class LayerB(AdaptedLinear):
    """DoRA with a bug."""

    def __init__(
        self, linear: nn.Linear, rank: int, alpha: float, **lora_options: Any
    ) -> None:
        super().__init__(linear, rank, alpha, **lora_options)
        # The bug: the norm is taken along the other axis of torch's weight, one
        # magnitude per input.
        self.m = nn.Parameter(linear.weight.detach().norm(dim=0))

    @property
    def weight(self) -> Tensor:
        """The weight that the layer now amounts to, (out, in)."""
        V = self.updated_weight()
        return self.m * V / V.detach().norm(dim=0)

    def forward(self, x: Tensor) -> Tensor:
        """Map x of shape (…, in) to y of shape (…, out)."""
        return F.linear(x, self.weight, self.bias)


class LayerC(LinearWithDoRAMerged):
    """DoRA with a bug."""

    def updated_weight(self) -> Tensor:
        """Return W + ΔW, (out, in)."""
        # The bug: alpha is forgotten.
        return self.linear.weight + self.lora.B.T @ self.lora.A.T


class LayerD(AdaptedLinear):
    """DoRA with a bug."""

    def __init__(
        self, linear: nn.Linear, rank: int, alpha: float, **lora_options: Any
    ) -> None:
        super().__init__(linear, rank, alpha, **lora_options)
        self.m = nn.Parameter(linear.weight.new_ones(linear.out_features))

    def forward(self, x: Tensor) -> Tensor:
        """Map x of shape (…, in) to y of shape (…, out)."""
        # The bug: the adapter's output is normalised, example by example, in the place
        # of the weight's rows.
        return self.linear(x) + self.m * F.normalize(self.lora(x), dim=-1)


class LayerE(LinearWithDoRAMerged):
    """DoRA with a bug."""

    @property
    def weight(self) -> Tensor:
        """The weight that the layer now amounts to, (out, in)."""
        V = self.updated_weight()
        # The bug: the axes are mixed; m has one entry per output, and the norm one per
        # input.
        return self.m.unsqueeze(1) * V / V.detach().norm(dim=0)


class LayerF(LinearWithDoRAMerged):
    """DoRA with a bug."""

    @property
    def weight(self) -> Tensor:
        """The weight that the layer now amounts to, (out, in)."""
        # The bug: the norms are those of W, and not of V = W + ΔW.
        return (
            row_scale(self.m, row_norms(self.linear.weight)).unsqueeze(1)
            * self.updated_weight()
        )


class LayerG(LinearWithDoRAMerged):
    """DoRA with a bug."""

    def adapted_weight(self) -> Tensor:
        """Return the weight that the layer amounts to, (out, in)."""
        V = self.updated_weight()
        # The bug: all of c is detached, and not its norm alone, so m gets no gradient.
        c = row_scale(self.m, row_norms(V)).detach()
        return c.unsqueeze(1) * V


LAYERS = (LayerA, LayerB, LayerC, LayerD, LayerE, LayerF, LayerG)
