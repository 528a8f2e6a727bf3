"""The controls: what each computes, how it starts, and what stays out of its reach."""

import copy

import pytest
import torch
from support import (
    assert_close,
    assert_equal_but_for_rounding,
    generator,
    linear_layer,
    normal,
    tolerance,
)
from torch import nn

from lowrank_utils.adapt import count_parameters, merge_adapters, replace_linear_layers
from lowrank_utils.comparison.controls import (
    LinearWithGain,
    LinearWithPositiveGain,
    LinearWithRandomRows,
)
from lowrank_utils.lora import LinearWithLoRA

CONTROLS = {
    LinearWithGain: "g",
    LinearWithPositiveGain: "theta",
    LinearWithRandomRows: "v",
}

every_control = pytest.mark.parametrize("control", CONTROLS)
every_dtype = pytest.mark.parametrize("dtype", [torch.float64, torch.float32])
with_and_without_bias = pytest.mark.parametrize("bias", [True, False])


@every_control
@with_and_without_bias
@pytest.mark.parametrize("dtype", [torch.float64, torch.float32, torch.bfloat16])
def test_a_control_starts_at_exactly_the_pretrained_weight(control, bias, dtype):
    linear = linear_layer(bias=bias, dtype=dtype)
    layer = control(linear, 3, 1.7)
    x = normal(2, 4, 7, dtype=dtype)
    tensors = [*layer.state_dict().values(), layer.weight, layer(x)]
    assert {tensor.dtype for tensor in tensors} == {dtype}
    assert torch.equal(layer.weight, linear.weight)
    if bias and control is not LinearWithRandomRows:
        # The gain stands between product and bias, so there is a rounding more than in
        # torch's one step.
        assert_equal_but_for_rounding(layer(x), linear(x))
    else:
        assert torch.equal(layer(x), linear(x))


@every_control
def test_at_the_start_b_and_the_numbers_beside_it_have_a_gradient(control):
    layer = control(linear_layer(), 3, 1.7)
    (layer(normal(4, 7, seed=5)) * normal(4, 5, seed=6)).sum().backward()
    for parameter in (layer.lora.B, getattr(layer, CONTROLS[control])):
        assert parameter.grad.isfinite().all()
        assert parameter.grad.abs().min() > 0


def far_away(control, bias=True, dtype=torch.float64):
    """Return a control of 7 inputs and 5 outputs with all its numbers moved: those
    beside A and B of both signs, and one zero."""
    layer = control(linear_layer(bias=bias, dtype=dtype), 3, 1.7)
    numbers = torch.tensor([-1.5, 0.0, 0.4, -0.2, 2.0])
    with torch.no_grad():
        layer.lora.B.copy_(normal(3, 5, seed=11))
        getattr(layer, CONTROLS[control]).copy_(numbers)
    return layer


def written_out(control, W, A, B, numbers, R):
    """Return W′ by the formula, in torch."""
    V = W + 1.7 * (A @ B).T
    if control is LinearWithRandomRows:
        return V + torch.diag(numbers) @ R
    return torch.diag(numbers if control is LinearWithGain else numbers.exp()) @ V


@every_control
@every_dtype
@with_and_without_bias
@pytest.mark.parametrize("batch", [(), (4,), (2, 3)])
def test_weight_outputs_and_gradients_are_the_formulas(control, dtype, bias, batch):
    layer = far_away(control, bias, dtype)
    x = normal(*batch, 7, seed=5, dtype=dtype).requires_grad_()
    to_y = normal(*batch, 5, seed=6, dtype=dtype)
    numbers = getattr(layer, CONTROLS[control])
    own = [layer.linear.weight, layer.lora.A, layer.lora.B, numbers, x]
    own += [layer.linear.bias] if bias else []
    copies = [tensor.detach().clone().requires_grad_() for tensor in own]
    weight = written_out(control, *copies[:4], getattr(layer, "R", None))
    # The bias isn't multiplied.
    expected = copies[4] @ weight.T + (copies[5] if bias else 0)
    y, rtol = layer(x), tolerance(dtype)
    assert (y.shape, y.dtype) == ((*batch, 5), dtype)
    assert_close(y, expected, rtol)
    assert_close(layer.weight, weight, rtol)
    for merged in (merge_adapters(layer), merge_adapters(nn.Sequential(layer))[0]):
        assert type(merged) is nn.Linear
        assert merged.weight.dtype == dtype
        assert_close(merged(x), expected, rtol)
    (y * to_y).sum().backward()
    (expected * to_y).sum().backward()
    for tensor, copied in zip(own, copies, strict=True):
        assert copied.grad.abs().max() > 0
        assert_close(tensor.grad, copied.grad, rtol)


@every_dtype
def test_random_rows_are_as_long_as_those_of_the_weight_and_not_its_rows(dtype):
    linear = linear_layer(40, 30, dtype=dtype)
    with torch.no_grad():
        linear.weight[3] = 0
    R = LinearWithRandomRows(linear, 3, 1.7).R
    assert not R.requires_grad
    assert_close(R.norm(dim=1), linear.weight.norm(dim=1), rtol=tolerance(dtype))
    assert torch.equal(R[3], torch.zeros(40, dtype=dtype))
    places = [place for place in range(30) if place != 3]
    assert torch.cosine_similarity(R[places], linear.weight[places]).abs().max() < 0.7
    # Normal numbers, of both signs.
    assert 0.4 < (R[places] > 0).double().mean() < 0.6


def test_random_rows_differ_from_layer_to_layer_and_leave_the_draw_of_a_alone():
    def adapted(layer_class, **options):
        model = nn.Sequential(linear_layer(6, 6), nn.ReLU(), linear_layer(6, 6))
        torch.manual_seed(5)
        replace_linear_layers(model, layer_class, 3, 1.7, **options)
        return model[0], model[2], torch.get_rng_state()

    *rows, state = adapted(LinearWithRandomRows, generator=generator(9))
    *lora, expected = adapted(LinearWithLoRA)
    assert torch.equal(state, expected)
    for one, other in zip(rows, lora, strict=True):
        assert torch.equal(one.lora.A, other.lora.A)
    # Both layers have the same weight, so only the draw can tell the rows apart.
    assert not torch.allclose(rows[0].R, rows[1].R)


@pytest.mark.parametrize("own", [True, False])
def test_a_seed_fixes_the_rows_that_of_the_generator_or_without_one_that_of_torch(own):
    def rows(seed):
        torch.manual_seed(0 if own else seed)
        options = {"generator": generator(seed)} if own else {}
        layers = [LinearWithRandomRows(linear_layer(), 3, 1.7, **options)]
        layers.append(LinearWithRandomRows(linear_layer(), 3, 1.7, **options))
        return torch.stack([layer.R for layer in layers])

    first, other = rows(5), rows(6)
    assert torch.equal(rows(5), first)
    assert not torch.isclose(first, other).all(dim=(1, 2)).any()
    assert not torch.allclose(first[0], first[1])


@every_control
@with_and_without_bias
def test_the_state_has_these_names_and_gives_the_same_outputs(control, bias):
    layer = far_away(control, bias)
    other = control(linear_layer(bias=bias, seed=5), 3, 1.7)
    names = {"linear.weight", "lora.A", "lora.B", CONTROLS[control]}
    names |= {"linear.bias"} if bias else set()
    assert {name for name, _ in layer.named_parameters()} == names
    buffers = {"R"} if control is LinearWithRandomRows else set()
    assert layer.state_dict().keys() == names | buffers
    lora = LinearWithLoRA(linear_layer(bias=bias), 3, 1.7)
    more = count_parameters(layer).trainable - count_parameters(lora).trainable
    assert more == 5, "one number for each output"
    x = normal(4, 7)
    assert not torch.allclose(other(x), layer(x))
    other.load_state_dict(layer.state_dict())
    assert torch.equal(other(x), layer(x))


@every_control
def test_a_copy_computes_the_same_and_moves_alone(control):
    layer = far_away(control)
    x = normal(4, 7)
    before, copied = layer(x).detach(), copy.deepcopy(layer)
    assert torch.equal(copied(x), before)
    with torch.no_grad():
        for tensor in copied.state_dict().values():
            tensor.add_(1)
    assert torch.equal(layer(x), before)
    assert not torch.allclose(copied(x), before)


@pytest.mark.parametrize("theta", [-30.0, -1.0, 0.0, 4.0])
def test_a_positive_gain_is_positive_whatever_theta_is(theta):
    layer = LinearWithPositiveGain(linear_layer(), 3, 1.7)
    with torch.no_grad():
        layer.theta.fill_(theta)
    assert layer.gain.min() > 0
    # No output changes its side of the bias.
    x = normal(20, 7)
    sides = [(y - layer.bias).sign() for y in (layer(x), layer.linear(x))]
    assert torch.equal(*sides)


@every_control
@pytest.mark.parametrize("shape", [(4, 6), (4, 5), (7, 4), (6,), ()])
def test_an_input_of_any_other_width_is_refused(control, shape):
    layer = control(linear_layer(), 3, 1.7)
    with pytest.raises(RuntimeError):
        layer(torch.zeros(shape, dtype=torch.float64))
