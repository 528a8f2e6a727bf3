"""Wrong input to the layers is refused where it is made, with the argument's name, what
came and what is allowed."""

import re
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

WHOLE, FINITE = "a whole number, 1 or more", "a finite number"
KNOWN, SUCH = "one of 'article', 'peft'", "such as torch.float32; got"

WRONG = [
    ("rank", 0, ValueError, f"{WHOLE}; got 0"),
    ("rank", -2, ValueError, f"{WHOLE}; got -2"),
    ("rank", 2.5, TypeError, f"{WHOLE}; got 2.5 (float)"),
    ("rank", 4.0, TypeError, f"{WHOLE}; got 4.0 (float)"),
    ("rank", True, TypeError, f"{WHOLE}; got True (bool)"),
    ("rank", "4", TypeError, f"{WHOLE}; got '4' (str)"),
    ("rank", None, TypeError, f"{WHOLE}; got None (NoneType)"),
    ("alpha", nan, ValueError, f"{FINITE}; got nan"),
    ("alpha", inf, ValueError, f"{FINITE}; got inf"),
    ("alpha", -inf, ValueError, f"{FINITE}; got -inf"),
    # Beyond a float.
    ("alpha", 10**400, ValueError, f"{FINITE}; got 1000"),
    ("alpha", "8", TypeError, f"{FINITE}; got '8' (str)"),
    ("alpha", True, TypeError, f"{FINITE}; got True (bool)"),
    ("alpha", None, TypeError, f"{FINITE}; got None (NoneType)"),
    ("alpha", 1j, TypeError, f"{FINITE}; got 1j (complex)"),
    *[
        ("init", word, ValueError, f"{KNOWN}; got {word!r}")
        for word in ("zeros", "", "Article", None, 1, ["peft"])
    ],
    *[
        (name, size, error, f"{WHOLE}; got {size!r}")
        for name in ("in_dim", "out_dim")
        for error, sizes in ((ValueError, (0, -1)), (TypeError, (2.0, "7")))
        for size in sizes
    ],
    ("dtype", "float32", TypeError, f"a torch dtype {SUCH} 'float32' (str)"),
    ("dtype", torch.int64, ValueError, f"a floating-point dtype {SUCH} torch.int64"),
]


@pytest.mark.parametrize(
    ("name", "bad", "error", "message"), WRONG, ids=lambda value: str(value)[:20]
)
def test_a_wrong_argument_is_refused_with_its_name_what_came_and_what_is_allowed(
    name, bad, error, message
):
    right = {"rank": 2, "alpha": 1.0}
    message = f"^{re.escape(f'{name} must be {message}')}"
    with pytest.raises(error, match=message):
        LoRALayer(**{"in_dim": 7, "out_dim": 5, **right, name: bad})
    # The wrappers take sizes and dtype from the layer.
    for wrapper in ALL if name in ("rank", "alpha", "init") else []:
        with pytest.raises(error, match=message):
            wrapper(linear_layer(), **{**right, name: bad})


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


class Named(nn.Linear):
    """A subclass that computes what nn.Linear does, as some models have."""


def weighted(dtype):
    linear = nn.Linear(7, 5)
    linear.weight = nn.Parameter(torch.ones(5, 7, dtype=dtype), requires_grad=False)
    return linear


OTHERS = [nn.Conv2d(3, 4, 5), nn.ReLU(), nn.Bilinear(2, 3, 4), Head()]
NO_LINEAR_LAYERS = [
    *[
        (other, TypeError, rf"^linear .* nn\.Linear; got {type(other).__name__}$")
        for other in (*OTHERS, None, "linear", nn.Linear)
    ],
    *[
        (weighted(dtype), TypeError, f"must have a floating-point weight; got {dtype}")
        for dtype in (torch.int8, torch.int64, torch.complex64)
    ],
    *[
        (moved(inner), TypeError, rf"adapted \({inner.__name__}\).* merge_adapters")
        for inner in ALL
    ],
    (nn.LazyLinear(5), ValueError, r"linear \(LazyLinear\) has no shape yet"),
]


@pytest.mark.parametrize(("layer", "error", "message"), NO_LINEAR_LAYERS)
@every_wrapper
def test_a_layer_that_is_no_plain_linear_one_is_refused(wrapper, layer, error, message):
    with pytest.raises(error, match=message):
        wrapper(layer, 2, 1.0)


@every_wrapper
def test_a_lazy_layer_with_a_shape_and_a_subclass_that_computes_the_same_are_adapted(
    wrapper,
):
    x = torch.ones(3, 7)
    for linear in (nn.LazyLinear(5), Named(7, 5)):
        expected = linear(x)
        torch.testing.assert_close(wrapper(linear, 2, 1.0)(x), expected)


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


@every_wrapper
def test_a_layer_that_cannot_be_adapted_is_refused_with_the_way_out(wrapper):
    with pytest.raises(TypeError) as caught:
        wrapper(moved(wrapper), 2, 1.0)
    assert str(caught.value) == (
        f"linear is already adapted ({wrapper.__name__}); an adapter on an adapter isn't "
        "supported. Merge the first one with merge_adapters, or adapt the plain nn.Linear"
    )
    whole = linear_layer()
    whole.weight = nn.Parameter(torch.ones(5, 7, dtype=torch.int8), False)
    with pytest.raises(TypeError) as caught:
        wrapper(whole, 2, 1.0)
    assert str(caught.value) == (
        "linear must have a floating-point weight; got torch.int8 (Linear), and allowed "
        "are float16, bfloat16, float32 and float64. If another library has quantised the "
        "layer, load the model without that, and call quantize_linear_layers(model)"
    )
