"""NaN, infinite, huge, tiny and no numbers: they stay where they belong, and no error
is swallowed."""

import math

import pytest
import torch
from support import (
    Reference,
    array,
    assert_close,
    assert_same_state,
    blobs,
    every_wrapper,
    linear_layer,
    moved,
    normal,
    snapshot,
    tolerance,
)
from torch import nn

from lowrank_utils.adapt import (
    freeze_linear_layers,
    merge_adapters,
    replace_linear_layers,
)
from lowrank_utils.adapters import AdapterBank
from lowrank_utils.dora import LinearWithDoRA
from lowrank_utils.lora import LinearWithLoRA
from lowrank_utils.training import train

every_bad_number = pytest.mark.parametrize("bad", [math.nan, math.inf, -math.inf])


@every_bad_number
@pytest.mark.parametrize("dtype", [torch.float64, torch.float32, torch.bfloat16])
@every_wrapper
def test_a_bad_number_in_one_example_reaches_no_other(wrapper, dtype, bad):
    layer = moved(wrapper, linear_layer(dtype=dtype))
    x = normal(4, 7, dtype=dtype, seed=20)
    spoilt = x.clone()
    spoilt[2, 3] = bad
    before = snapshot(layer)
    y, other = layer(x), layer(spoilt)
    # In other rows nothing at all has changed.
    rest = [0, 1, 3]
    assert torch.equal(other[rest], y[rest])
    assert not torch.isfinite(other[2]).any()
    assert_same_state(layer, before)


@every_bad_number
def test_a_bad_number_in_the_images_ends_training_in_the_first_epoch(bad):
    model = nn.Sequential(nn.Linear(12, 3, dtype=torch.float64))
    digits = blobs()
    digits.images[7, 3] = bad
    message = r"the loss is \S+ in epoch 1; .* look for NaN in the images"
    with pytest.raises(FloatingPointError, match=message):
        train(model, digits, epochs=2, learning_rate=0.01)


@every_wrapper
def test_a_batch_of_one_is_like_the_same_row_of_a_larger_one(wrapper):
    layer = moved(wrapper)
    x = normal(4, 7, seed=20)
    assert_close(layer(x[:1]), layer(x)[:1])
    assert_close(layer(x[0]), layer(x)[0])


@pytest.mark.parametrize("shape", [(0, 7), (3, 0, 7)])
@every_wrapper
def test_an_empty_batch_gives_an_empty_output_and_gradients_of_zero(wrapper, shape):
    layer = moved(wrapper)
    y = layer(torch.zeros(shape, dtype=torch.float64))
    assert y.shape == (*shape[:-1], 5)
    y.sum().backward()
    for name, parameter in layer.named_parameters():
        assert parameter.grad is None or not parameter.grad.any(), name


def test_an_empty_batch_and_a_batch_of_one_go_through_a_bank():
    base = nn.Sequential(linear_layer())
    bank = AdapterBank(base)
    adapted = nn.Sequential(moved(LinearWithDoRA))
    bank.add("anna", adapted)
    x = normal(1, 7, seed=20)
    with bank.rows([]):
        assert base(x[:0]).shape == (0, 5)
    with bank.rows(["anna"]):
        assert_close(base(x), adapted(x))


@every_wrapper
def test_a_weight_of_zeros_gives_no_nan_and_learns(wrapper):
    linear = linear_layer(bias=False)
    with torch.no_grad():
        linear.weight.zero_()
    layer = wrapper(linear, 2, 1.0)
    y = layer(normal(4, 7, seed=20))
    assert not y.any()
    y.sum().backward()
    for name, parameter in layer.named_parameters():
        assert torch.isfinite(parameter.grad).all(), name
    assert layer.lora.B.grad.any() or layer.m.grad.any()


# Scalings that a learner may try by mistake; the numbers still fit the dtype.
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("alpha", [1e-30, 1e-6, 1e6, 1e15])
@every_wrapper
def test_a_huge_or_tiny_scaling_gives_the_formulas_numbers(wrapper, dtype, alpha):
    layer = moved(wrapper, linear_layer(dtype=dtype), rank=2, alpha=alpha)
    x = normal(4, 7, dtype=dtype, seed=20)
    y = layer(x)
    reference = Reference.of(layer)
    error = abs(array(y) - reference.output(array(x)))
    assert (error <= tolerance(dtype) * reference.error_unit(array(x))).all()
    y.sum().backward()
    for name, parameter in layer.named_parameters():
        assert torch.isfinite(parameter.grad).all(), name


@pytest.mark.parametrize("wrapper", [LinearWithLoRA, LinearWithDoRA])
@every_bad_number
def test_a_diverged_model_is_merged_as_it_is_and_its_original_stays(wrapper, bad):
    # What training has spoilt is shown, not hidden.
    model = nn.Sequential(linear_layer())
    replace_linear_layers(model, wrapper, 2, 1.0)
    freeze_linear_layers(model)
    with torch.no_grad():
        model[0].lora.A[0, 0] = bad
        model[0].lora.B.fill_(1)
    before = snapshot(model)
    assert not torch.isfinite(merge_adapters(model)[0].weight).all()
    # NaN counts as equal to NaN.
    exact = {"rtol": 0, "atol": 0, "equal_nan": True}
    torch.testing.assert_close(snapshot(model), before, **exact)
