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


def moved(control, bias=True, dtype=torch.float64):
    """Return a control as training could have left it, with some factors below zero,
    and seven inputs, five outputs."""
    layer = control(linear_layer(bias=bias, dtype=dtype), 3, 1.7)
    with torch.no_grad():
        for number, parameter in enumerate(
            [layer.lora.A, layer.lora.B, getattr(layer, CONTROLS[control])]
        ):
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
def test_all_that_is_trained_gets_a_finite_gradient_that_is_that_of_the_merged_weight(
    control,
):
    layer = moved(control)
    parameters = {
        name: p
        for name, p in layer.named_parameters()
        if not name.startswith("linear.")
    }
    assert set(parameters) == {"lora.A", "lora.B", CONTROLS[control]}
    x, to_y = normal(4, 7, seed=5), normal(4, 5, seed=6)
    through_forward = torch.autograd.grad(
        (layer(x) * to_y).sum(), [*parameters.values()]
    )
    through_weight = torch.autograd.grad(
        ((x @ layer.weight.T) * to_y).sum(), [*parameters.values()]
    )
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
    names = {
        name
        for name, _ in LinearWithPositiveGain(linear_layer(), 3, 1.7).named_parameters()
    }
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


# --- The start, the formula and the draw once more, without anything of the package's own -------------------


@every_control
@pytest.mark.parametrize("bias", [True, False])
@pytest.mark.parametrize("dtype", [torch.float64, torch.float32, torch.bfloat16])
def test_a_new_control_is_the_linear_layer_bit_for_bit_in_the_dtype_of_its_weight(
    control, bias, dtype
):
    linear = linear_layer(bias=bias, dtype=dtype)
    layer = control(linear, 3, 1.7)
    x = normal(2, 4, 7, dtype=dtype)
    assert torch.equal(layer.weight, linear.weight)
    assert {
        name: tensor.dtype for name, tensor in snapshot(layer).items()
    } == dict.fromkeys(layer.state_dict(), dtype)
    assert layer.weight.dtype == layer(x).dtype == dtype
    if bias and control is not LinearWithRandomRows:
        # The gain stands between product and bias, so there is a rounding more than in
        # torch's one step.
        assert_equal_but_for_rounding(layer(x), linear(x))
    else:
        assert torch.equal(layer(x), linear(x))


def far_away(control, bias):
    """Return a control of 7 inputs and 5 outputs with all its numbers moved: those
    beside A and B of both signs, and one zero."""
    layer = control(linear_layer(bias=bias), 3, 1.7)
    with torch.no_grad():
        layer.lora.B.copy_(normal(3, 5, seed=11))
        getattr(layer, CONTROLS[control]).copy_(
            torch.tensor([-1.5, 0.0, 0.4, -0.2, 2.0])
        )
    return layer


def written_out(control, x, W, b, A, B, numbers, R):
    """Return y by the formula, in torch."""
    V = W + 1.7 * (A @ B).T
    if control is LinearWithRandomRows:
        changed = V + torch.diag(numbers) @ R
    else:
        changed = (
            torch.diag(numbers if control is LinearWithGain else numbers.exp()) @ V
        )
    y = x @ changed.T
    return y if b is None else y + b


@every_control
@pytest.mark.parametrize("bias", [True, False])
@pytest.mark.parametrize("batch", [(), (4,), (2, 3)])
def test_outputs_and_all_gradients_are_those_of_the_formula_written_out(
    control, bias, batch
):
    layer = far_away(control, bias)
    x, to_y = normal(*batch, 7, seed=5).requires_grad_(), normal(*batch, 5, seed=6)
    inner = [layer.linear.weight, layer.linear.bias, layer.lora.A, layer.lora.B]
    own = [x, *inner, getattr(layer, CONTROLS[control])]
    copies = [None if t is None else t.detach().clone().requires_grad_() for t in own]
    y, expected = layer(x), written_out(control, *copies, getattr(layer, "R", None))
    assert y.shape == (*batch, 5)
    assert_close(y, expected)
    assert_close(x @ layer.weight.T + (layer.bias if bias else 0), expected)
    for merged in (merge_adapters(layer), merge_adapters(nn.Sequential(layer))):
        assert_close(merged(x), expected)
    (y * to_y).sum().backward()
    (expected * to_y).sum().backward()
    for tensor, copied in zip(own, copies, strict=True):
        if tensor is not None:
            assert copied.grad.abs().max() > 0
            assert_close(tensor.grad, copied.grad)


@every_control
@pytest.mark.parametrize("bias", [True, False])
def test_the_state_has_these_names_and_brings_another_control_to_the_same_outputs(
    control, bias
):
    layer, other = (
        far_away(control, bias),
        control(linear_layer(bias=bias, seed=5), 3, 1.7),
    )
    names = {"linear.weight", "lora.A", "lora.B", CONTROLS[control]}
    names |= {"linear.bias"} if bias else set()
    trained = set(dict(layer.named_parameters()))
    assert trained == names
    assert set(layer.state_dict()) == names | (
        {"R"} if control is LinearWithRandomRows else set()
    )
    x = normal(4, 7)
    assert not torch.allclose(other(x), layer(x))
    other.load_state_dict(layer.state_dict())
    assert torch.equal(other(x), layer(x))


@every_control
def test_a_copy_computes_the_same_and_moves_alone(control):
    layer = far_away(control, bias=True)
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
    assert torch.equal(
        (layer(x) - layer.bias).sign(), (layer.linear(x) - layer.bias).sign()
    )


@pytest.mark.parametrize("own", [True, False])
def test_a_seed_fixes_the_rows_that_of_the_generator_or_without_one_that_of_torch(own):
    def rows(seed):
        torch.manual_seed(0 if own else seed)
        options = {"generator": generator(seed)} if own else {}
        return [
            LinearWithRandomRows(linear_layer(), 3, 1.7, **options).R for _ in range(2)
        ]

    first, again, other = rows(5), rows(5), rows(6)
    for number in range(2):
        assert torch.equal(again[number], first[number])
        assert not torch.allclose(other[number], first[number])
    assert not torch.allclose(first[0], first[1])


@every_control
@pytest.mark.parametrize("shape", [(4, 6), (4, 5), (7, 4), (6,), ()])
def test_an_input_of_any_other_width_is_refused(control, shape):
    layer = control(linear_layer(), 3, 1.7)
    with pytest.raises(RuntimeError):
        layer(torch.zeros(shape, dtype=torch.float64))
