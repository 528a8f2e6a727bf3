"""The checks that public functions make at the door.

Each raises ``TypeError`` or ``ValueError`` with the argument's name, what came, and what is
allowed, so that a mistake is reported where it was made and not from deep inside torch.
"""

import math
import operator
from collections.abc import Iterable
from numbers import Real
from typing import Any

import torch
from torch import nn


def check_whole_number(name: str, value: Any, minimum: int, maximum: int | None = None) -> int:
    """Return ``value`` as an ``int``; it must be a whole number from ``minimum`` to ``maximum``."""
    allowed = (
        f"a whole number, {minimum} or more" if maximum is None else f"a whole number, {minimum} to {maximum}"
    )
    # True and False are ints to Python, but nobody means rank=True.
    if isinstance(value, bool):
        raise TypeError(f"{name} must be {allowed}; got {value!r} (bool)")
    try:
        number = operator.index(value)
    except TypeError:
        raise TypeError(f"{name} must be {allowed}; got {value!r} ({type(value).__name__})") from None
    if number < minimum or (maximum is not None and number > maximum):
        raise ValueError(f"{name} must be {allowed}; got {number}")
    return number


def check_seed(value: Any) -> int:
    """Return ``value`` as an ``int``; it must be a seed that every library of random numbers takes."""
    return check_whole_number("seed", value, minimum=0, maximum=2**32 - 1)


def check_finite_number(name: str, value: Any, *, above: float | None = None) -> float:
    """Return ``value`` as a ``float``; it must be finite, and larger than ``above`` if that is given."""
    allowed = "a finite number" + ("" if above is None else f" larger than {above:g}")
    if isinstance(value, bool) or not isinstance(value, Real):
        raise TypeError(f"{name} must be {allowed}; got {value!r} ({type(value).__name__})")
    try:
        number = float(value)
    except OverflowError:
        number = math.inf
    if not math.isfinite(number) or (above is not None and number <= above):
        raise ValueError(f"{name} must be {allowed}; got {value!r}")
    return number


def check_one_of(name: str, value: Any, allowed: Iterable[str]) -> str:
    """Return ``value``; it must be one of the ``allowed`` words."""
    words = sorted(allowed)
    if value not in words:
        raise ValueError(f"{name} must be one of {', '.join(map(repr, words))}; got {value!r}")
    return str(value)


def check_floating_dtype(name: str, value: Any) -> torch.dtype:
    """Return ``value``; it must be a torch dtype of real floating-point numbers."""
    if not isinstance(value, torch.dtype):
        raise TypeError(
            f"{name} must be a torch dtype such as torch.float32; got {value!r} ({type(value).__name__})"
        )
    if not value.is_floating_point:
        raise ValueError(f"{name} must be a floating-point dtype such as torch.float32; got {value}")
    return value


def check_matrix(name: str, value: Any) -> torch.Tensor:
    """Return ``value``; it must be a tensor with two dimensions."""
    if not isinstance(value, torch.Tensor):
        raise TypeError(f"{name} must be a tensor; got {type(value).__name__}")
    if value.dim() != 2:
        raise ValueError(f"{name} must be a matrix (two dimensions); got shape {tuple(value.shape)}")
    return value


def check_last_dimension(x: Any, in_features: int) -> None:
    """Refuse an input whose last dimension isn't the layer's number of input features."""
    if not isinstance(x, torch.Tensor):
        raise TypeError(f"x must be a tensor; got {type(x).__name__}")
    if x.dim() == 0 or x.shape[-1] != in_features:
        raise ValueError(
            f"the last dimension of x must be in_features={in_features}; got shape {tuple(x.shape)}"
        )


def is_adapter(module: nn.Module) -> bool:
    """Tell whether ``module`` is a linear layer with a LoRA layer beside it.

    It goes by the attributes ``linear`` and ``lora``, so that a class written in a notebook counts too.
    """
    return isinstance(getattr(module, "linear", None), nn.Linear) and hasattr(module, "lora")


def check_linear(linear: Any) -> nn.Linear:
    """Return ``linear``; it must be an initialised ``nn.Linear`` with a floating-point weight."""
    kind = type(linear).__name__
    if is_adapter(linear):
        raise TypeError(
            f"linear is already adapted ({kind}); an adapter on an adapter isn't supported. "
            "Merge the first one with merge_adapters, or adapt the plain nn.Linear"
        )
    if not isinstance(linear, nn.Linear):
        raise TypeError(f"linear must be an nn.Linear; got {kind}")
    if isinstance(linear.weight, nn.UninitializedParameter):
        raise ValueError(f"linear ({kind}) has no shape yet: pass one batch through the model first")
    if not linear.weight.dtype.is_floating_point:
        raise TypeError(f"linear must have a floating-point weight; got {linear.weight.dtype}")
    return linear
