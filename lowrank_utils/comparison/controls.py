"""Controls for DoRA: layers with as many numbers beside A and B as m has, and less of
an idea behind them.

What m does can be a matter of the norm that it replaces, of a factor for each neuron,
or only of some numbers that reach every weight and learn fast. Each of these layers
leaves one of the reasons out. Scaling by a trained factor stands in SSF (arXiv
2210.08823) and (IA)³ (arXiv 2205.05638), and in LHUC (Swietojanski and Renals 2014);
VeRA (arXiv 2310.11454) trains scales of frozen random matrices.
"""

from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from lowrank_utils.decompose import row_norms
from lowrank_utils.lora import AdaptedLinear, check_linear


class LinearWithGain(AdaptedLinear):
    """LoRA and a factor for each output neuron, without a norm: y = g ⊙ (xWᵀ + s·xAB) +
    b.

    Args:
        linear: the pretrained layer. It is kept, not copied.
        rank: inner dimension of the LoRA factors.
        alpha: their scaling s.
        lora_options: further arguments of ``LoRALayer``, such as ``init``.

    Attributes:
        g: the gain, (out,), at first 1.
    """

    def __init__(
        self, linear: nn.Linear, rank: int, alpha: float, **lora_options: Any
    ) -> None:
        # The experiment trains in one precision.
        lora_options.setdefault("dtype", check_linear(linear).weight.dtype)
        super().__init__(linear, rank, alpha, **lora_options)
        self.g = nn.Parameter(torch.ones_like(linear.weight[:, 0]))

    @property
    def gain(self) -> Tensor:
        """What each output is multiplied by, the bias left out; (out,)."""
        return self.g

    @property
    def weight(self) -> Tensor:
        """The weight that the layer now amounts to, g ⊙ (W + ΔW), (out, in)."""
        return self.gain.unsqueeze(1) * self.updated_weight()

    def forward(self, x: Tensor) -> Tensor:
        """Map x of shape (…, in) to y of shape (…, out)."""
        y = F.linear(x, self.linear.weight) + self.lora(x)
        # Under autocast y is narrower than the gain and the bias, and stays so, as with
        # nn.Linear.
        y = self.gain.to(y.dtype) * y
        return y if self.bias is None else y + self.bias.to(y.dtype)


class LinearWithPositiveGain(LinearWithGain):
    """``LinearWithGain`` whose factors can't change their sign: g = exp(θ).

    Attributes:
        theta: the logarithm of the gain, (out,), at first 0.
    """

    def __init__(
        self, linear: nn.Linear, rank: int, alpha: float, **lora_options: Any
    ) -> None:
        # The experiment trains in one precision.
        lora_options.setdefault("dtype", check_linear(linear).weight.dtype)
        super().__init__(linear, rank, alpha, **lora_options)
        del self.g
        self.theta = nn.Parameter(torch.zeros_like(linear.weight[:, 0]))

    @property
    def gain(self) -> Tensor:
        """What each output is multiplied by, the bias left out; (out,)."""
        return self.theta.exp()


class LinearWithRandomRows(AdaptedLinear):
    """LoRA and a multiple of a frozen random row for each output neuron: W′ = W + ΔW +
    diag(v)·R.

    There is no reason why these rows should help: they are drawn once, as long as W's
    rows, and never trained. A method that beats LoRA by some numbers more has to beat
    this one, too.

    Args:
        linear: the pretrained layer. It is kept, not copied.
        rank: inner dimension of the LoRA factors.
        alpha: their scaling s.
        generator: that the rows are drawn from; by default torch's.
        lora_options: further arguments of ``LoRALayer``, such as ``init``.

    Attributes:
        v: how much of its random row each neuron takes, (out,), at first 0.
        R: the random rows, (out, in), a buffer.
    """

    R: Tensor

    def __init__(
        self,
        linear: nn.Linear,
        rank: int,
        alpha: float,
        *,
        generator: torch.Generator | None = None,
        **lora_options: Any,
    ) -> None:
        # The experiment trains in one precision.
        lora_options.setdefault("dtype", check_linear(linear).weight.dtype)
        super().__init__(linear, rank, alpha, **lora_options)
        W = linear.weight.detach()
        # Drawn on the CPU, so that they are the same on every device.
        rows = torch.randn(W.shape, generator=generator, dtype=W.dtype).to(W.device)
        lengths = (row_norms(W) / row_norms(rows)).to(W.dtype)
        self.register_buffer("R", rows * lengths.unsqueeze(1))
        self.v = nn.Parameter(torch.zeros_like(W[:, 0]))

    @property
    def weight(self) -> Tensor:
        """The weight that the layer now amounts to, W + ΔW + diag(v)·R, (out, in)."""
        return self.updated_weight() + self.v.unsqueeze(1) * self.R

    def forward(self, x: Tensor) -> Tensor:
        """Map x of shape (…, in) to y of shape (…, out)."""
        y = F.linear(x, self.R)
        # As above: under autocast y stays narrow.
        return self.linear(x) + self.lora(x) + self.v.to(y.dtype) * y
