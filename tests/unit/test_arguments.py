"""Wrong input to the layers is refused where it is made, with the argument's name, what
came and what is allowed."""

from fractions import Fraction
from math import inf, nan

import numpy as np
import pytest
import torch
from support import ALL, every_wrapper, linear_layer, moved, normal
from torch import nn

from lowrank_utils._arguments import (
    check_finite_number,
    check_floating_dtype,
    check_one_of,
    check_seed,
    check_whole_number,
)
from lowrank_utils.lora import LoRALayer


def refused(error, message, **arguments):
    """Give wrong arguments to the layer and to all wrappers."""
    arguments = {"rank": 2, "alpha": 1.0, **arguments}
    with pytest.raises(error, match=message):
        LoRALayer(7, 5, **arguments)
    for wrapper in ALL:
        with pytest.raises(error, match=message):
            wrapper(linear_layer(), **arguments)


@pytest.mark.parametrize(
    ("rank", "error", "shown"),
    [
        (0, ValueError, "0"),
        (-2, ValueError, "-2"),
        (2.5, TypeError, r"2\.5 \(float\)"),
        (4.0, TypeError, r"4\.0 \(float\)"),
        (True, TypeError, r"True \(bool\)"),
        ("4", TypeError, r"'4' \(str\)"),
        (None, TypeError, r"None \(NoneType\)"),
    ],
)
def test_a_wrong_rank_is_refused(rank, error, shown):
    message = f"^rank must be a whole number, 1 or more; got {shown}$"
    refused(error, message, rank=rank)


@pytest.mark.parametrize(
    ("alpha", "error", "shown"),
    [
        (nan, ValueError, "nan$"),
        (inf, ValueError, "inf$"),
        (-inf, ValueError, "-inf$"),
        pytest.param(10**400, ValueError, "1000", id="beyond a float"),
        ("8", TypeError, r"'8' \(str\)$"),
        (True, TypeError, r"True \(bool\)$"),
        (None, TypeError, r"None \(NoneType\)$"),
        (1j, TypeError, r"1j \(complex\)$"),
    ],
)
def test_a_wrong_alpha_is_refused(alpha, error, shown):
    refused(error, f"^alpha must be a finite number; got {shown}", alpha=alpha)


@pytest.mark.parametrize("argument", ["in_dim", "out_dim"])
@pytest.mark.parametrize(
    ("size", "error"),
    [(0, ValueError), (-1, ValueError), (2.0, TypeError), ("7", TypeError)],
)
def test_a_wrong_size_is_refused_by_its_name(argument, size, error):
    sizes = {"in_dim": 7, "out_dim": 5, argument: size}
    with pytest.raises(error, match=f"{argument} must be a whole number, 1 or more"):
        LoRALayer(**sizes, rank=2, alpha=1.0)


@pytest.mark.parametrize("init", ["zeros", "", "Article", None, 1, ["peft"]])
def test_an_unknown_initialisation_is_refused_and_the_known_ones_are_listed(init):
    message = "init must be one of 'article', 'peft'; got "
    refused(ValueError, message, init=init)


@pytest.mark.parametrize(
    ("dtype", "error", "message"),
    [
        (
            "float32",
            TypeError,
            r"dtype must be a torch dtype .*; got 'float32' \(str\)$",
        ),
        (torch.int64, ValueError, r"dtype must be a floating.*; got torch\.int64$"),
    ],
)
def test_a_dtype_that_cannot_be_trained_is_refused(dtype, error, message):
    with pytest.raises(error, match=message):
        LoRALayer(7, 5, 2, 1.0, dtype=dtype)


@pytest.mark.parametrize("number", [4, np.int64(4), torch.tensor(4)])
def test_whole_numbers_of_any_library_are_ranks(number):
    assert LoRALayer(7, 5, number, 1.0).B.shape == (4, 5)


@pytest.mark.parametrize("number", [2, 2.0, np.float64(2), np.float32(2), Fraction(2)])
def test_real_numbers_of_any_library_are_alphas(number):
    x = normal(4, 7)
    torch.testing.assert_close(
        moved(ALL[0], alpha=number)(x), moved(ALL[0], alpha=2.0)(x)
    )


class Head(nn.Module):
    """A module of one's own with a linear layer in it, and no adapter."""

    def __init__(self):
        super().__init__()
        self.linear = nn.Linear(7, 5)


@pytest.mark.parametrize(
    "layer",
    [
        *(nn.Conv2d(3, 4, 5), nn.ReLU(), nn.Bilinear(2, 3, 4), Head()),
        *(None, "linear", nn.Linear),
    ],
)
@every_wrapper
def test_a_layer_that_is_not_linear_is_refused_by_its_type(wrapper, layer):
    message = rf"linear must be an nn\.Linear; got {type(layer).__name__}$"
    with pytest.raises(TypeError, match=message):
        wrapper(layer, 2, 1.0)


@every_wrapper
def test_a_lazy_layer_is_refused_until_it_has_a_shape(wrapper):
    lazy, x = nn.LazyLinear(5), torch.ones(3, 7)
    with pytest.raises(ValueError, match=r"linear \(LazyLinear\) has no shape yet"):
        wrapper(lazy, 2, 1.0)
    expected = lazy(x)
    torch.testing.assert_close(wrapper(lazy, 2, 1.0)(x), expected)


@pytest.mark.parametrize("dtype", [torch.int8, torch.int64, torch.complex64])
@every_wrapper
def test_a_weight_that_is_not_floating_point_is_refused(wrapper, dtype):
    linear = nn.Linear(7, 5)
    linear.weight = nn.Parameter(torch.ones(5, 7, dtype=dtype), requires_grad=False)
    message = f"linear must have a floating-point weight; got {dtype}"
    with pytest.raises(TypeError, match=message):
        wrapper(linear, 2, 1.0)


@pytest.mark.parametrize("inner", ALL)
@pytest.mark.parametrize("outer", ALL)
def test_an_adapter_on_an_adapter_is_refused_with_what_to_do_instead(inner, outer):
    message = rf"already adapted \({inner.__name__}\).* Merge .* with merge_adapters"
    with pytest.raises(TypeError, match=message):
        outer(moved(inner), 2, 1.0)


class Doubled(nn.Linear):
    """A subclass whose output isn't what its weight says."""

    def forward(self, x):
        return 2 * super().forward(x)


class Named(nn.Linear):
    """A subclass that computes what nn.Linear does, as some models have."""


@every_wrapper
def test_a_layer_with_a_forward_of_its_own_is_refused(wrapper):
    with pytest.raises(TypeError, match=r"linear has a forward of its own \(Doubled\)"):
        wrapper(Doubled(7, 5), 2, 1.0)
    assert wrapper(Named(7, 5), 2, 1.0)(torch.ones(3, 7)).shape == (3, 5)


# Inside ``forward`` torch's own message stands, so that the formula stays a formula;
# what counts is that none is computed with.
WRONG_INPUTS = [
    *[torch.ones(shape) for shape in [(4, 6), (4, 8), (7, 4), (4, 1), (0,), ()]],
    *[np.ones((4, 7)), [[1.0] * 7], None],
]


@pytest.mark.parametrize(
    "x", WRONG_INPUTS, ids=lambda x: str(getattr(x, "shape", type(x).__name__))
)
def test_a_wrong_input_is_refused_by_the_layer_and_by_all_wrappers(x):
    wrapped = [wrapper(nn.Linear(7, 5), 2, 1.0) for wrapper in ALL]
    for layer in (LoRALayer(7, 5, 2, 1.0), *wrapped):
        with pytest.raises((RuntimeError, TypeError)):
            layer(x)


# --- The checks themselves ------------------------------------------------------------------------


def test_checks_return_what_they_let_through():
    assert check_whole_number("n", 3, 3) == 3
    assert type(check_whole_number("n", np.int64(3), 0)) is int
    assert check_finite_number("x", 0) == 0.0
    assert type(check_finite_number("x", Fraction(1, 2))) is float
    assert check_finite_number("x", 0.1, above=0) == 0.1
    assert check_one_of("word", "b", ["b", "a"]) == "b"
    assert check_floating_dtype("dtype", torch.bfloat16) is torch.bfloat16
    assert [check_seed(seed) for seed in (0, 2**32 - 1)] == [0, 2**32 - 1]


@pytest.mark.parametrize(
    ("check", "message"),
    [
        (lambda: check_whole_number("n", 2, 3), "n must be .*, 3 or more; got 2"),
        (lambda: check_finite_number("x", 0, above=0), "x .* larger than 0; got 0"),
        (lambda: check_finite_number("x", 2, above=2.5), r"larger than 2\.5; got 2"),
        (lambda: check_one_of("word", "c", ["b", "a"]), "one of 'a', 'b'; got 'c'"),
        (lambda: check_seed(-1), "^seed must be .*, 0 to 4294967295; got -1$"),
        (lambda: check_seed(2**32), "^seed must .* 4294967295; got 4294967296$"),
    ],
)
def test_what_is_allowed_is_part_of_the_message_and_a_limit_is_not_itself_allowed(
    check, message
):
    with pytest.raises(ValueError, match=message):
        check()
