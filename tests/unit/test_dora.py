"""DoRA: the magnitude, the norm and its gradient, rows without a direction, extreme
scales."""

import numpy as np
import pytest
import torch
import torch.nn.functional as F
from hypothesis import assume, given
from support import (
    Reference,
    array,
    assert_close,
    cases,
    every_dora_wrapper,
    linear_layer,
    moved,
    normal,
    tolerance,
)
from torch import nn

from lowrank_utils.dora import LinearWithDoRAMerged
from lowrank_utils.lora import LinearWithLoRA

both_norms = pytest.mark.parametrize("detach_norm", [True, False])

X, G = normal(4, 7, seed=20), normal(4, 5, seed=21)


def gradients(layer, x=X, G=G):
    x = x.clone().requires_grad_()
    (layer(x) * G).sum().backward()
    return {"x": x.grad, **{name: p.grad for name, p in layer.named_parameters()}}


def assert_finite(gradients):
    for name, gradient in gradients.items():
        assert gradient is not None, name
        assert torch.isfinite(gradient).all(), name


def with_zero_rows(rows):
    linear = linear_layer()
    linear.weight.data[rows] = 0
    return linear


@every_dora_wrapper
def test_the_magnitude_starts_as_the_length_of_each_row_of_torchs_weight(wrapper):
    layer = wrapper(linear_layer(7, 5), 3, 2.0)
    assert layer.m.shape == (5,)
    assert_close(layer.m, np.sqrt((array(layer.linear.weight) ** 2).sum(axis=1)))
    assert layer.m.requires_grad


@every_dora_wrapper
@given(case=cases(dtypes=[torch.float64, torch.float32]))
def test_the_rows_of_the_merged_weight_are_as_long_as_m_says(wrapper, case):
    layer = case.adapter(wrapper)
    assume(Reference.of(layer).norm.min() > 0.01)
    lengths = np.sqrt((array(layer.weight) ** 2).sum(axis=1))
    assert_close(lengths, np.abs(array(layer.m)), rtol=tolerance(case.dtype))


@every_dora_wrapper
def test_m_sets_the_length_and_the_sign_of_a_row_and_nothing_else(wrapper):
    layer = moved(wrapper)
    assert layer.m[0] < 0
    assert layer.m[1] == 0
    b = layer.bias.detach()
    before = layer(X) - b
    assert torch.equal(before[:, 1], torch.zeros(4, dtype=torch.float64))
    with torch.no_grad():
        layer.m[0] *= -1
        layer.m[2] *= 3
    assert_close(layer(X) - b, before * torch.tensor([-1, 1, 3, 1, 1]))


@every_dora_wrapper
def test_the_length_of_a_direction_does_not_matter(wrapper):
    # Doubling W and ΔW doubles V, and V's length is divided out.
    layer = moved(wrapper)
    before = layer(X)
    with torch.no_grad():
        layer.linear.weight *= 2
        layer.lora.B *= 2
    assert_close(layer(X), before)


@every_dora_wrapper
def test_a_small_b_changes_the_output_little(wrapper):
    # A form that normalises the LoRA output for each example would jump to a change of
    # norm 1.
    layer = wrapper(linear_layer(), 3, 1.0)
    start = layer(X)
    with torch.no_grad():
        layer.lora.B.copy_(1e-6 * normal(3, 5, seed=9))
    assert 1e-8 < (layer(X) - start).abs().max().item() < 1e-4


@every_dora_wrapper
def test_detaching_the_norm_is_the_default_and_keyword_only(wrapper):
    assert wrapper(linear_layer(), 3, 1.0).detach_norm is True
    assert wrapper(linear_layer(), 3, 1.0, detach_norm=False).detach_norm is False
    with pytest.raises(TypeError, match="positional"):
        wrapper(linear_layer(), 3, 1.0, False)


@every_dora_wrapper
def test_the_kept_norm_changes_the_gradients_of_a_and_b_and_nothing_else(wrapper):
    layers = [moved(wrapper, detach_norm=detach) for detach in (True, False)]
    assert torch.equal(*[layer(X) for layer in layers])
    detached, kept = (gradients(layer) for layer in layers)
    assert detached.keys() == kept.keys()
    for name in ("lora.A", "lora.B", "linear.weight"):
        difference = (detached[name] - kept[name]).abs().max() / kept[name].abs().max()
        assert difference > 0.01, name
    for name in ("m", "x", "linear.bias"):
        assert_close(detached[name], kept[name])


def test_with_the_kept_norm_the_gradient_of_a_row_is_at_a_right_angle_to_the_row():
    # Only the direction of V counts, so a step along V changes nothing.
    layer = moved(LinearWithDoRAMerged, detach_norm=False)
    to_W, V = gradients(layer)["linear.weight"], torch.from_numpy(Reference.of(layer).V)
    # All but the row whose m is 0.
    cosines = F.cosine_similarity(to_W[[0, 2, 3, 4]], V[[0, 2, 3, 4]])
    assert_close(cosines, torch.zeros(4), rtol=0, atol=1e-12)


@pytest.mark.parametrize("zero_rows", [[1], [0, 3], [0, 1, 2, 3, 4]])
@every_dora_wrapper
@both_norms
def test_zero_rows_give_no_nan_in_outputs_or_gradients(wrapper, detach_norm, zero_rows):
    linear = with_zero_rows(zero_rows)
    layer = wrapper(linear, 3, 1.7, detach_norm=detach_norm)
    lora = LinearWithLoRA(linear, 3, 1.7)
    lora.lora.load_state_dict(layer.lora.state_dict())
    assert_close(layer(X), linear(X), atol=1e-12)
    found = gradients(layer)
    assert_finite(found)
    # The zero rows' columns of B have the gradient that LoRA gives them, or they could
    # never begin to learn.
    to_B = found["lora.B"][:, zero_rows]
    assert_close(to_B, gradients(lora)["lora.B"][:, zero_rows])
    assert to_B.abs().min() > 0


@every_dora_wrapper
@both_norms
def test_a_row_that_lora_cancels_exactly_gives_no_nan(wrapper, detach_norm):
    linear = nn.Linear(2, 3, dtype=torch.float64)
    layer = wrapper(linear, 1, 1.0, detach_norm=detach_norm)
    with torch.no_grad():
        linear.weight.copy_(torch.tensor([[1.0, 2.0], [3.0, 1.0], [0.0, 1.0]]))
        layer.lora.A.copy_(torch.tensor([[1.0], [2.0]]))
        layer.lora.B.copy_(torch.tensor([[-1.0, 1.0, 0.5]]))
    assert torch.equal(layer.weight[0], torch.zeros(2, dtype=torch.float64))
    assert_finite(gradients(layer, normal(4, 2, seed=20), normal(4, 3, seed=21)))


@pytest.mark.parametrize("optimizer", [torch.optim.SGD, torch.optim.Adam])
@every_dora_wrapper
@both_norms
def test_a_zero_row_learns(wrapper, detach_norm, optimizer):
    linear = with_zero_rows([1]).requires_grad_(False)
    layer = wrapper(linear, 3, 1.0, detach_norm=detach_norm)
    x = normal(64, 7, seed=20)
    target = x @ normal(7, 5, seed=22) + linear.bias
    start = layer(x).detach()
    update = optimizer([p for p in layer.parameters() if p.requires_grad], lr=0.02)
    for _ in range(200):
        update.zero_grad()
        F.mse_loss(layer(x), target).backward()
        update.step()
    end = layer(x).detach()
    assert torch.isfinite(end).all()
    assert (end[:, 1] - start[:, 1]).abs().max() > 0.1
    losses = [F.mse_loss(y[:, 1], target[:, 1]).item() for y in (start, end)]
    assert losses[1] < 0.8 * losses[0]
    assert layer.m[1].abs() > 0.1


@pytest.mark.parametrize(
    ("dtype", "scales"),
    [
        (torch.float64, (1e-150, 1e150)),
        (torch.float32, (1e-18, 1e17)),
        (torch.bfloat16, (1e-18, 1e17)),
        (torch.float16, (1e-3, 1e3)),
    ],
)
@every_dora_wrapper
@both_norms
def test_tiny_and_huge_weights_behave_like_others(wrapper, detach_norm, dtype, scales):
    x = X.to(dtype)
    for scale in scales:
        linear = linear_layer(bias=False)
        linear.weight.data.mul_(scale)
        layer = moved(wrapper, linear.to(dtype), 3, 1.7, detach_norm=detach_norm)
        layer.lora.B.data.mul_(scale)
        reference = Reference.of(layer)
        error = np.abs(array(layer(x)) - reference.output(array(x)))
        assert (error <= tolerance(dtype) * reference.error_unit(array(x))).all()
        assert_finite(gradients(layer, x, G.to(dtype)))


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("scale", [1e-25, 1e25])
@every_dora_wrapper
@both_norms
def test_weights_whose_squares_leave_the_range_of_their_dtype_give_no_nan(
    wrapper, detach_norm, dtype, scale
):
    linear, x = linear_layer(bias=False), X.to(dtype)
    linear.weight.data.mul_(scale)
    layer = wrapper(linear.to(dtype), 3, 1.7, detach_norm=detach_norm)
    assert torch.isfinite(linear(x)).all()
    torch.testing.assert_close(layer(x), linear(x))
    assert_finite(gradients(layer, x, G.to(dtype)))


@every_dora_wrapper
@pytest.mark.parametrize(
    "dtype", [torch.bfloat16, torch.float16, torch.float32, torch.float64]
)
@pytest.mark.parametrize("shape", [(784, 128), (1, 9), (9, 1), (1000, 3)])
def test_at_the_start_c_is_exactly_one_in_every_dtype(wrapper, dtype, shape):
    linear = linear_layer(*shape, dtype=dtype)
    # c = 1 and nothing else leaves every bit of the weight as it was.
    assert torch.equal(wrapper(linear, 2, 1.7).weight, linear.weight)
    if dtype != torch.float64:
        # Also of one that is stored transposed, and whose rows are summed in another
        # order; the sums have digits to spare.
        linear.weight = nn.Parameter(normal(*shape, dtype=dtype).T)
        assert torch.equal(wrapper(linear, 2, 1.7).weight, linear.weight)


@every_dora_wrapper
def test_in_bfloat16_the_norm_is_rounded_once_and_not_at_every_term(wrapper):
    linear = linear_layer(2000, 6, dtype=torch.bfloat16)
    layer = wrapper(linear, 2, 1.0, dtype=torch.bfloat16)
    exact = torch.linalg.vector_norm(linear.weight.detach().double(), dim=1)
    # The nearest bfloat16 number is at most half a unit in the last place away, 2⁻⁹.
    assert layer.m.dtype == torch.bfloat16
    assert torch.equal(layer.m, exact.to(torch.bfloat16))


@every_dora_wrapper
def test_under_autocast_the_norm_is_not_taken_from_a_bfloat16_product(wrapper):
    # ΔW takes nearly all of W away, so three lost digits in ΔW would be most of the
    # norm. x doesn't touch A, so the output shows c = m/‖V‖ and nothing else.
    linear = linear_layer(bias=False, dtype=torch.float32)
    layer = wrapper(linear, 5, 1.0)
    with torch.no_grad():
        linear.weight[:, 1:].copy_(normal(5, 6, dtype=torch.float32))
        linear.weight[:, 0] = 0.01
        layer.lora.A[0] = 0
        layer.lora.A[1:] = -linear.weight[:, 1:].T * 0.999
        layer.lora.B.copy_(torch.eye(5))
    x = torch.zeros(3, 7)
    x[:, 0] = torch.tensor([1.0, 2.0, -1.0])
    expected = layer(x).detach()
    with torch.autocast("cpu", dtype=torch.bfloat16):
        output, weight = layer(x), layer.weight
    assert torch.equal(weight, layer.weight)
    torch.testing.assert_close(output.float(), expected, rtol=0.02, atol=0)
