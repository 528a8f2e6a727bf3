"""The controls: what each computes, how it starts, and what stays out of its reach."""

import copy

import pytest
import torch
from support import (
    array,
    assert_close,
    assert_equal_but_for_rounding,
    generator,
    linear_layer,
    normal,
    snapshot,
    tolerance,
)
from torch import nn

from lowrank_utils.adapt import count_parameters, merge_adapters, replace_linear_layers
from lowrank_utils.controls import LinearWithGain, LinearWithPositiveGain, LinearWithRandomRows
from lowrank_utils.lora import LinearWithLoRA

CONTROLS = {LinearWithGain: "g", LinearWithPositiveGain: "theta", LinearWithRandomRows: "v"}

every_control = pytest.mark.parametrize("control", CONTROLS)
every_dtype = pytest.mark.parametrize("dtype", [torch.float64, torch.float32])


def moved(control, bias=True, dtype=torch.float64):
    """Return a control as training could have left it, with some factors below zero, and seven inputs, five outputs."""
    layer = control(linear_layer(bias=bias, dtype=dtype), 3, 1.7)
    with torch.no_grad():
        for number, parameter in enumerate([layer.lora.A, layer.lora.B, getattr(layer, CONTROLS[control])]):
            parameter.add_(normal(*parameter.shape, seed=10 + number, dtype=dtype))
    return layer


def expected_weight(layer):
    """Return W′ by the formulas of the docstrings, in NumPy."""
    W, A, B = array(layer.linear.weight), array(layer.lora.A), array(layer.lora.B)
    V = W + layer.lora.alpha * (A @ B).T
    if type(layer) is LinearWithGain:
        return array(layer.g)[:, None] * V
    if type(layer) is LinearWithPositiveGain:
        return array(layer.theta.exp())[:, None] * V
    return V + array(layer.v)[:, None] * array(layer.R)


@every_control
@every_dtype
@pytest.mark.parametrize("bias", [True, False])
def test_output_weight_and_merged_layer_are_those_of_the_formula(control, dtype, bias):
    layer = moved(control, bias, dtype)
    x = normal(2, 3, 7, seed=5, dtype=dtype)
    W = expected_weight(layer)
    # The bias isn't multiplied.
    expected = array(x) @ W.T + (array(layer.linear.bias) if bias else 0)
    assert_close(layer.weight, W, rtol=tolerance(dtype))
    assert_close(layer(x), expected, rtol=tolerance(dtype))
    alone, inside = merge_adapters(layer), merge_adapters(nn.Sequential(layer))[0]
    for merged in (alone, inside):
        assert type(merged) is nn.Linear
        assert_close(merged(x), expected, rtol=tolerance(dtype))
    assert {tensor.dtype for tensor in snapshot(layer).values()} == {dtype}
    assert layer(x).dtype == merged(x).dtype == dtype


@every_control
@every_dtype
def test_a_control_starts_at_exactly_the_pretrained_weight(control, dtype):
    linear = linear_layer(dtype=dtype)
    layer = control(linear, 3, 1.7)
    assert torch.equal(layer.weight, linear.weight)
    x = normal(4, 7, dtype=dtype)
    assert_equal_but_for_rounding(layer(x), linear(x))


@every_control
def test_all_that_is_trained_gets_a_finite_gradient_that_is_that_of_the_merged_weight(control):
    layer = moved(control)
    parameters = {name: p for name, p in layer.named_parameters() if not name.startswith("linear.")}
    assert set(parameters) == {"lora.A", "lora.B", CONTROLS[control]}
    x, to_y = normal(4, 7, seed=5), normal(4, 5, seed=6)
    through_forward = torch.autograd.grad((layer(x) * to_y).sum(), [*parameters.values()])
    through_weight = torch.autograd.grad(((x @ layer.weight.T) * to_y).sum(), [*parameters.values()])
    for one, other in zip(through_forward, through_weight, strict=True):
        assert one.isfinite().all()
        assert one.abs().max() > 0
        assert_close(one, other)


@every_control
def test_at_the_start_b_and_the_numbers_beside_it_have_a_gradient(control):
    layer = control(linear_layer(), 3, 1.7)
    (layer(normal(4, 7, seed=5)) * normal(4, 5, seed=6)).sum().backward()
    for parameter in (layer.lora.B, getattr(layer, CONTROLS[control])):
        assert parameter.grad.isfinite().all()
        assert parameter.grad.abs().min() > 0


@every_control
def test_a_control_has_one_number_for_each_output_more_than_lora(control):
    def trainable(layer_class):
        linear = linear_layer().requires_grad_(False)
        return count_parameters(layer_class(linear, 3, 1.7)).trainable

    assert trainable(control) - trainable(LinearWithLoRA) == 5


def test_only_the_plain_gain_can_turn_negative():
    for control, negative in ((LinearWithGain, True), (LinearWithPositiveGain, False)):
        layer = control(linear_layer(), 3, 1.7)
        # Long steps towards outputs of the other sign.
        optimizer = torch.optim.SGD([getattr(layer, CONTROLS[control])], lr=0.5)
        x = normal(20, 7)
        target = -layer(x).detach()
        for _ in range(20):
            optimizer.zero_grad()
            (layer(x) - target).square().mean().backward()
            optimizer.step()
        assert layer.gain.min() < 0.5, "the steps did nothing"
        assert bool((layer.gain < 0).any()) == negative
    names = {name for name, _ in LinearWithPositiveGain(linear_layer(), 3, 1.7).named_parameters()}
    assert "g" not in names


@every_dtype
def test_random_rows_are_as_long_as_those_of_the_weight_and_not_its_rows(dtype):
    linear = linear_layer(40, 30, dtype=dtype)
    with torch.no_grad():
        linear.weight[3] = 0
    R = LinearWithRandomRows(linear, 3, 1.7).R
    assert_close(R.norm(dim=1), linear.weight.norm(dim=1), rtol=tolerance(dtype))
    assert torch.equal(R[3], torch.zeros(40, dtype=dtype))
    places = [place for place in range(30) if place != 3]
    assert torch.cosine_similarity(R[places], linear.weight[places]).abs().max() < 0.7
    # Normal numbers, of both signs.
    assert 0.4 < (R[places] > 0).double().mean() < 0.6


def test_random_rows_are_saved_and_never_trained():
    layer = moved(LinearWithRandomRows)
    before = layer.R.clone()
    assert not layer.R.requires_grad
    assert "R" not in dict(layer.named_parameters())
    assert torch.equal(layer.state_dict()["R"], before)
    optimizer = torch.optim.AdamW(layer.parameters(), lr=0.1, weight_decay=0.5)
    layer(normal(4, 7)).square().sum().backward()
    optimizer.step()
    assert torch.equal(layer.R, before)
    assert torch.equal(copy.deepcopy(layer).R, before)


def test_random_rows_differ_from_layer_to_layer_and_leave_the_draw_of_a_alone():
    def adapted(layer_class, **options):
        model = nn.Sequential(linear_layer(6, 6), nn.ReLU(), linear_layer(6, 6))
        torch.manual_seed(5)
        replace_linear_layers(model, layer_class, 3, 1.7, **options)
        return model, torch.get_rng_state()

    (rows, state), (again, _), (lora, expected) = (
        adapted(LinearWithRandomRows, generator=generator(9)),
        adapted(LinearWithRandomRows, generator=generator(9)),
        adapted(LinearWithLoRA),
    )
    assert torch.equal(state, expected)
    for place in (0, 2):
        assert torch.equal(rows[place].lora.A, lora[place].lora.A)
        assert torch.equal(rows[place].R, again[place].R)
    # Both layers have the same weight, so only the draw can tell the rows apart.
    assert not torch.allclose(rows[0].R, rows[2].R)


@every_control
def test_an_input_of_another_size_is_refused(control):
    with pytest.raises(ValueError, match="the last dimension of x must be in_features=7; got shape"):
        control(linear_layer(), 3, 1.7)(normal(4, 6))
