"""LoRA: the low-rank layer, and a linear layer that uses it in two equal forms.

Hu et al., "LoRA: Low-Rank Adaptation of Large Language Models", arXiv 2106.09685.
"""

import math
import warnings
from collections.abc import Callable
from contextlib import AbstractContextManager, nullcontext
from typing import Any, ClassVar, TypeGuard

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from lowrank_utils._arguments import (
    check_finite_number,
    check_floating_dtype,
    check_one_of,
    check_whole_number,
)
from lowrank_utils._lazy_weight import lazy_weight
from lowrank_utils._weight_checks import (
    check_loaded,
    check_weight,
    check_weight_is_all,
    mark_of,
    start_of,
)
from lowrank_utils.quantized import KeepsCodes

HALF_PRECISION = (torch.float16, torch.bfloat16)


def article_init(A: Tensor) -> Tensor:
    """Fill A (in, r) with normal numbers of standard deviation 1/√r, and return it."""
    return nn.init.normal_(A, std=1 / math.sqrt(A.shape[1]))


def peft_init(A: Tensor) -> Tensor:
    """Fill A (in, r) as PEFT does, uniform between ±1/√in, and return it.

    PEFT calls ``kaiming_uniform_(a=√5)`` on its A of shape (r, in). The same call on
    our (in, r) would take r for the number of inputs, so the bound is written out here.
    """
    bound = 1 / math.sqrt(A.shape[0])
    return nn.init.uniform_(A, -bound, bound)


INITIALISATIONS = {"article": article_init, "peft": peft_init}
# A name of these, or a function that fills A in place and returns it.
Initialisation = str | Callable[[Tensor], Tensor]


def check_lora_arguments(
    in_dim: int,
    out_dim: int,
    rank: int,
    alpha: float,
    init: Initialisation,
    dtype: torch.dtype | None,
    dropout: float = 0.0,
) -> None:
    """Refuse sizes below 1, an alpha that isn't finite, an unknown initialisation, a
    dtype without fractions and a dropout outside of 0 to 1.
    """
    check_whole_number("in_dim", in_dim, minimum=1)
    check_whole_number("out_dim", out_dim, minimum=1)
    check_whole_number("rank", rank, minimum=1)
    check_finite_number("alpha", alpha)
    if not callable(init):
        check_one_of("init", init, INITIALISATIONS)
    if dtype is not None:
        check_floating_dtype("dtype", dtype)
    if not 0 <= check_finite_number("dropout", dropout) < 1:
        raise ValueError(f"dropout must be at least 0 and below 1; got {dropout!r}")
    if rank > max(in_dim, out_dim):
        warnings.warn(
            f"rank={rank} is larger than both sides of the layer ({in_dim} in, {out_dim} out): "
            f"A and B hold {rank * (in_dim + out_dim):,} numbers, the whole weight {in_dim * out_dim:,}",
            stacklevel=4,
        )


def without_autocast(device: torch.device) -> AbstractContextManager[Any]:
    """Return a context in which products keep the precision of their factors."""
    # The meta device, for one, has no autocast to switch off.
    active = torch.amp.is_autocast_available(device.type) and torch.is_autocast_enabled(
        device.type
    )
    return torch.autocast(device.type, enabled=False) if active else nullcontext()


class LoRALayer(nn.Module):
    """The low-rank map x → s·x·A·B, which is zero until B is trained.

    A is random and B zero, so the product starts at zero, yet B's first gradient is not
    zero (arXiv 2106.09685, §4.1). The scaling s is ``alpha`` as it is; for the paper's
    and PEFT's α/r pass ``alpha=α / rank``, for rsLoRA's α/√r (arXiv 2312.03732)
    ``alpha=α / rank**0.5``.

    Args:
        in_dim: number of input features.
        out_dim: number of output features.
        rank: inner dimension r of A (in, r) and B (r, out). A rank above both sides is
            allowed with a warning: it costs more than the weight itself and can say no
            more.
        alpha: the scaling s, a finite number.
        init: ``"article"`` draws A with standard deviation 1/√r; ``"peft"`` uniformly
            between ±1/√in. A function of your own fills A in place and returns it:
            ``nn.init.zeros_`` draws nothing, for numbers that are loaded afterwards.
        device, dtype: where A and B live and in which precision, as for ``nn.Linear``.
        dropout: with which probability a number of the input is left out in training,
            0 to below 1. The others grow by 1/(1 − dropout), as in ``nn.Dropout``.

    Raises:
        TypeError: a size isn't a whole number, or alpha isn't a number.
        ValueError: a size is below 1, alpha isn't finite, ``init`` is unknown, or
            dropout is out of range.
    """

    def __init__(
        self,
        in_dim: int,
        out_dim: int,
        rank: int,
        alpha: float,
        init: Initialisation = "article",
        device: torch.device | str | None = None,
        dtype: torch.dtype | None = None,
        dropout: float = 0.0,
    ) -> None:
        super().__init__()
        check_lora_arguments(in_dim, out_dim, rank, alpha, init, dtype, dropout)
        A = torch.empty(in_dim, rank, device=device, dtype=dtype)
        B = torch.zeros(rank, out_dim, device=device, dtype=dtype)
        self.A = nn.Parameter((init if callable(init) else INITIALISATIONS[init])(A))
        self.B = nn.Parameter(B)
        self.alpha = float(alpha)
        self.dropout = float(dropout)

    @property
    def drops(self) -> bool:
        """Whether a part of the input is left out now: in training, with dropout."""
        return self.training and self.dropout > 0

    def dropped(self, x: Tensor) -> Tensor:
        """Return what dropout leaves of x: x itself, unless ``drops``."""
        return F.dropout(x, self.dropout) if self.drops else x

    def forward(self, x: Tensor) -> Tensor:
        """Map x of shape (…, in) to s·x·A·B of shape (…, out), in the dtype of A."""
        return self.product(self.dropped(x))

    def product(self, x: Tensor) -> Tensor:
        """Return s·x·A·B without dropout, x (…, in), in the dtype of A."""
        if getattr(x, "dtype", None) in HALF_PRECISION:
            # Beside a weight in half precision A and B may be wider.
            x = x.to(self.A.dtype)
        # Autocast computes it in half precision; the sum that it belongs to is not.
        return self.alpha * (x @ self.A @ self.B).to(self.A.dtype)

    def delta_weight(self) -> Tensor:
        """Return ΔW = s·(A·B)ᵀ = s·Bᵀ·Aᵀ in the shape of torch's weight, (out, in)."""
        # A weight is computed in the precision of its factors, also under autocast.
        with without_autocast(self.A.device):
            return self.alpha * (self.B.T @ self.A.T)


# What an adapter can be put around.
Linear = nn.Linear | KeepsCodes


def is_linear(module: Any) -> TypeGuard[Linear]:
    """Tell whether ``module`` is a linear layer, plain or quantised."""
    return isinstance(module, (nn.Linear, KeepsCodes))


def is_adapter(module: nn.Module) -> bool:
    """Tell whether ``module`` is a linear layer with a LoRA layer beside it.

    It goes by the attributes ``linear`` and ``lora``, so that a class written in a
    notebook counts too.
    """
    return (
        is_linear(getattr(module, "linear", None))
        and getattr(module, "lora", None) is not None
    )


def check_linear(linear: Any) -> Linear:
    """Return ``linear``; it must be an initialised ``nn.Linear`` with a weight of half,
    single or double precision, or a ``QuantizedLinear``.
    """
    kind = type(linear).__name__
    if is_adapter(linear):
        raise TypeError(
            f"linear is already adapted ({kind}); an adapter on an adapter isn't supported. "
            "Merge the first one with merge_adapters, or adapt the plain nn.Linear"
        )
    if not is_linear(linear):
        raise TypeError(f"linear must be an nn.Linear; got {kind}")
    if isinstance(linear.weight, nn.UninitializedParameter):
        raise ValueError(
            f"linear ({kind}) has no shape yet: pass one batch through the model first"
        )
    if linear.weight.dtype not in (*HALF_PRECISION, torch.float32, torch.float64):
        raise TypeError(
            f"linear must have a floating-point weight; got {linear.weight.dtype} "
            f"({kind}), and allowed are float16, bfloat16, float32 and float64. If "
            "another library has quantised the layer, load the model without that, and call "
            "quantize_linear_layers(model)"
        )
    return linear


def adapter_dtype(dtype: torch.dtype) -> torch.dtype:
    """Return in which precision an adapter of a weight is trained: the weight's own,
    and float32 beside half precision, where a small step would be lost.
    """
    return torch.float32 if dtype in HALF_PRECISION else dtype


class AroundLinear(nn.Module):
    """What is put around a pretrained linear layer and answers to its sizes and its
    bias, like the layer itself.

    Attributes:
        linear: the pretrained layer.
    """

    linear: Linear

    @property
    def in_features(self) -> int:
        """Number of input features."""
        return self.linear.in_features

    @property
    def out_features(self) -> int:
        """Number of output features."""
        return self.linear.out_features

    @property
    def bias(self) -> Tensor | None:
        """The pretrained bias, (out,), or None."""
        return self.linear.bias


class AdaptedLinear(AroundLinear):
    """A linear layer and a ``LoRALayer`` beside it: what all four wrappers have in
    common.

    It answers to ``weight``, ``bias``, ``in_features`` and ``out_features`` like the
    ``nn.Linear`` that it replaces, so code that reads those instead of calling the
    layer (``nn.MultiheadAttention`` does) gets the adapted weight.

    Args:
        linear: the pretrained layer, plain or quantised. It is kept, not copied.
        rank: inner dimension of the LoRA factors.
        alpha: their scaling s.
        dtype: in which precision the adapter is kept and trained; by default that of
            the weight, and float32 beside a weight in half precision. The output has
            the linear layer's dtype, and is rounded to it once.
        lora_options: further arguments of ``LoRALayer``, such as ``init`` and
            ``dropout``.

    Raises:
        TypeError: ``linear`` isn't an ``nn.Linear``, is already adapted, or computes
            more than its weight says while this wrapper reads the weight.
        ValueError: ``linear`` has no shape yet, or an argument is out of range.
    """

    # Whether the forward pass reads the linear layer's weight instead of calling it.
    reads_weight: ClassVar[bool] = True

    def __init__(
        self,
        linear: Linear,
        rank: int,
        alpha: float,
        *,
        dtype: torch.dtype | None = None,
        **lora_options: Any,
    ) -> None:
        super().__init__()
        W = check_linear(linear).weight
        if self.reads_weight:
            check_weight_is_all(linear)
        out_dim, in_dim = W.shape
        self.linear = linear
        self.lora = LoRALayer(
            in_dim,
            out_dim,
            rank,
            alpha,
            device=W.device,
            dtype=dtype or adapter_dtype(W.dtype),
            **lora_options,
        )
        self._mark = mark_of(linear)

    def register_parameter(self, name: str, param: nn.Parameter | None) -> None:
        """Remember m as it was at the start, and register as torch does."""
        super().register_parameter(name, param)
        if name == "m" and param is not None and not hasattr(self, "_start"):
            self._start = start_of(param, self.linear)

    def updated_weight(self) -> Tensor:
        """Return W + ΔW, (out, in), in the wider dtype of the two; for DoRA this is V.

        Raises:
            TypeError: the linear layer computes more than its weight says.
        """
        check_weight(self)
        W, A, B = self.linear.weight, self.lora.A, self.lora.B
        # One product that adds to W, which is faster than a sum with delta_weight().
        with without_autocast(W.device):
            W = W.to(torch.promote_types(W.dtype, A.dtype))
            return torch.addmm(
                W, B.T.to(W.dtype), A.T.to(W.dtype), alpha=self.lora.alpha
            )

    def adapted_weight(self) -> Tensor:
        """Return the weight that the layer amounts to, (out, in), before it is rounded
        to the dtype of W.
        """
        return self.updated_weight()

    @property
    def weight(self) -> Tensor:
        """The weight that the layer now amounts to, (out, in), in the dtype of W; it is
        formed when something is computed with it.

        Raises:
            RuntimeError: when it is to be formed in training with dropout, which no
                weight can express.
        """
        W = self.linear.weight
        trained = W.requires_grad or self.lora.B.requires_grad
        return lazy_weight(W, self._formed_weight, requires_grad=trained)

    def _formed_weight(self) -> Tensor:
        if self.lora.drops:
            raise RuntimeError(
                f"{type(self).__name__} has dropout={self.lora.dropout}, which a weight "
                "can't express in training. Use LinearWithLoRA or LinearWithDoRA, or call "
                "eval()"
            )
        return self.adapted_weight().to(self.linear.weight.dtype)

    def _load_from_state_dict(
        self, state_dict: dict[str, Any], prefix: str, *others: Any
    ) -> None:
        super()._load_from_state_dict(state_dict, prefix, *others)
        if error := check_loaded(self, state_dict, prefix):
            others[-1].append(error)


class LinearWithLoRA(AdaptedLinear):
    """LoRA unmerged: y = xWᵀ + b + s·xAB, two thin products beside the frozen one
    (arXiv 2106.09685, Eq. 3).

    With dropout it is y = xWᵀ + b + s·d(x)AB in training, as in PEFT.
    """

    def forward(self, x: Tensor) -> Tensor:
        """Map x of shape (…, in) to y of shape (…, out)."""
        y = self.linear(x)
        return (y + self.lora(x)).to(y.dtype)


# It stands here, so that the class is as short as the one in notebook 2.
LinearWithLoRA.reads_weight = False


class LinearWithLoRAMerged(AdaptedLinear):
    """LoRA merged in the forward pass: y = x(W + ΔW)ᵀ + b, equal to ``LinearWithLoRA``
    up to rounding.
    """

    def forward(self, x: Tensor) -> Tensor:
        """Map x of shape (…, in) to y of shape (…, out)."""
        return F.linear(x, self.weight, self.bias)
