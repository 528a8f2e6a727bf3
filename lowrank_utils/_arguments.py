"""The checks that public functions make at the door.

Each raises ``TypeError`` or ``ValueError`` with the argument's name, what came, and
what is allowed, so that a mistake is reported where it was made and not from deep
inside torch.
"""

import math
import operator
from collections.abc import Iterable
from numbers import Real
from typing import Any

import torch
from torch import nn


def check_whole_number(
    name: str, value: Any, minimum: int, maximum: int | None = None
) -> int:
    """Return ``value`` as an ``int``; it must be a whole number from ``minimum`` to
    ``maximum``.
    """
    allowed = (
        f"a whole number, {minimum} or more"
        if maximum is None
        else f"a whole number, {minimum} to {maximum}"
    )
    # True and False are ints to Python, but nobody means rank=True.
    if isinstance(value, bool):
        raise TypeError(f"{name} must be {allowed}; got {value!r} (bool)")
    try:
        number = operator.index(value)
    except TypeError:
        raise TypeError(
            f"{name} must be {allowed}; got {value!r} ({type(value).__name__})"
        ) from None
    if number < minimum or (maximum is not None and number > maximum):
        raise ValueError(f"{name} must be {allowed}; got {number}")
    return number


def check_seed(value: Any) -> int:
    """Return ``value`` as an ``int``; it must be a seed that every library of random
    numbers takes.
    """
    return check_whole_number("seed", value, minimum=0, maximum=2**32 - 1)


def check_finite_number(name: str, value: Any, *, above: float | None = None) -> float:
    """Return ``value`` as a ``float``; it must be finite, and larger than ``above`` if
    that is given.
    """
    allowed = "a finite number" + ("" if above is None else f" larger than {above:g}")
    if isinstance(value, bool) or not isinstance(value, Real):
        raise TypeError(
            f"{name} must be {allowed}; got {value!r} ({type(value).__name__})"
        )
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
        raise ValueError(
            f"{name} must be one of {', '.join(map(repr, words))}; got {value!r}"
        )
    return str(value)


def check_floating_dtype(name: str, value: Any) -> torch.dtype:
    """Return ``value``; it must be a torch dtype of real floating-point numbers."""
    if not isinstance(value, torch.dtype):
        raise TypeError(
            f"{name} must be a torch dtype such as torch.float32; got {value!r} ({type(value).__name__})"
        )
    if not value.is_floating_point:
        raise ValueError(
            f"{name} must be a floating-point dtype such as torch.float32; got {value}"
        )
    return value


def check_matrix(name: str, value: Any) -> torch.Tensor:
    """Return ``value``; it must be a tensor with two dimensions."""
    if not isinstance(value, torch.Tensor):
        raise TypeError(f"{name} must be a tensor; got {type(value).__name__}")
    if value.dim() != 2:
        raise ValueError(
            f"{name} must be a matrix (two dimensions); got shape {tuple(value.shape)}"
        )
    return value


def check_module(name: str, value: Any) -> nn.Module:
    """Return ``value``; it must be a module."""
    if not isinstance(value, nn.Module):
        raise TypeError(f"{name} must be an nn.Module; got {type(value).__name__}")
    return value


def check_pattern(name: str, value: Any) -> str:
    """Return ``value``; it must be a text."""
    if not isinstance(value, str):
        raise TypeError(
            f"{name} must be a string; got {value!r} ({type(value).__name__})"
        )
    return value


def some_of(names: list[str]) -> str:
    """Return the names for a message, or the first eight and how many more there
    are.
    """
    more = f" and {len(names) - 8} more" if len(names) > 8 else ""
    return ", ".join(names[:8]) + more
