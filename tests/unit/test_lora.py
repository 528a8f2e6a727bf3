"""LoRALayer: what it computes, how it starts."""

import math

import pytest
import torch
from support import LORA, array, assert_close, every_wrapper, linear_layer, normal

from lowrank_utils.lora import INITIALISATIONS, LoRALayer


def random_layer(in_dim=7, out_dim=5, rank=3, alpha=1.7):
    layer = LoRALayer(in_dim, out_dim, rank, alpha, dtype=torch.float64)
    with torch.no_grad():
        layer.B.copy_(normal(rank, out_dim, seed=5))
    return layer


def test_a_new_layer_maps_everything_to_zero_but_its_b_has_a_gradient():
    layer = LoRALayer(7, 5, 3, 2.0)
    x = normal(4, 7, dtype=torch.float32)
    y = layer(x)
    assert y.shape == (4, 5)
    assert torch.equal(y, torch.zeros(4, 5))
    (y * normal(4, 5, seed=1, dtype=torch.float32)).sum().backward()
    assert layer.B.grad.abs().min() > 0
    assert torch.equal(layer.A.grad, torch.zeros(7, 3))


def test_the_output_is_alpha_times_x_a_b():
    layer, x = random_layer(), normal(2, 4, 7)
    assert layer(x).shape == (2, 4, 5)
    assert_close(layer(x), 1.7 * (x.numpy() @ array(layer.A) @ array(layer.B)))


@pytest.mark.parametrize("sizes", [(7, 5), (6, 6)])
def test_the_delta_weight_has_the_shape_of_torchs_weight_and_gives_the_same_output(
    sizes,
):
    layer, x = random_layer(*sizes), normal(4, sizes[0])
    delta, product = layer.delta_weight(), 1.7 * (array(layer.A) @ array(layer.B))
    assert delta.shape == sizes[::-1]
    assert_close(delta, product.T)
    assert_close(layer(x), x @ delta.T)
    # With a symmetric product nothing would be seen.
    assert sizes != (6, 6) or abs(product - product.T).max() > 0.1


@pytest.mark.parametrize("alpha", [0, -2, 0.5, 8])
def test_alpha_is_the_scaling_itself_whatever_the_rank(alpha):
    x = normal(4, 7)
    for rank in (1, 2, 4):
        layer = random_layer(rank=rank, alpha=alpha)
        product = layer.A @ layer.B
        assert_close(layer(x), alpha * (x @ product))
        # It is read at every call, so it can be changed afterwards.
        layer.alpha = 3.0
        assert_close(layer(x), 3 * (x @ product))
        assert_close(layer.delta_weight(), 3 * product.T)


@pytest.mark.parametrize("rank", [4, 16, 64])
def test_by_default_a_is_normal_with_standard_deviation_one_over_root_rank(rank):
    A = LoRALayer(784, 10, rank, 1.0).A.detach()
    assert A.std().item() == pytest.approx(1 / math.sqrt(rank), rel=0.03)
    assert A.mean().item() == pytest.approx(0, abs=0.03 / math.sqrt(rank))
    # A uniform distribution of that deviation would end at √3.
    assert A.abs().max() > 2.5 / math.sqrt(rank)


@pytest.mark.parametrize("rank", [4, 16, 64])
def test_pefts_a_is_uniform_up_to_one_over_root_in_whatever_the_rank(rank):
    A = LoRALayer(784, 10, rank, 1.0, init="peft").A.detach()
    assert A.std().item() == pytest.approx(0.0206, abs=0.0004)
    assert 0.99 / 28 < A.max() <= 1 / 28
    assert -1 / 28 <= A.min() < -0.99 / 28


@pytest.mark.parametrize("init", INITIALISATIONS)
def test_every_initialisation_leaves_b_at_zero_and_needs_no_particular_dtype(init):
    for dtype in (torch.float64, torch.float32, torch.bfloat16, torch.float16):
        layer = LoRALayer(7, 5, 3, 1.0, init=init, dtype=dtype)
        assert layer.A.dtype == layer.B.dtype == dtype
        assert torch.count_nonzero(layer.B) == 0
        assert torch.count_nonzero(layer.A) == 21


@every_wrapper
def test_a_wrapper_passes_the_initialisation_on(wrapper):
    linear = linear_layer(784, 10)
    deviations = [
        wrapper(linear, 4, 1.0, **o).lora.A.std().item() for o in ({}, {"init": "peft"})
    ]
    assert deviations[0] == pytest.approx(0.5, abs=0.02)
    assert deviations[1] == pytest.approx(0.0206, abs=0.001)


def test_without_a_dtype_the_layer_takes_torchs_default():
    assert LoRALayer(7, 5, 3, 1.0).A.dtype == torch.float32
    torch.set_default_dtype(torch.float64)
    layer = LoRALayer(7, 5, 3, 1.0)
    assert layer.A.dtype == layer.B.dtype == torch.float64


def test_a_layer_on_the_meta_device_has_shapes_and_no_numbers():
    layer = LoRALayer(7, 5, 3, 1.0, device="meta")
    assert layer.A.is_meta
    assert layer.B.is_meta
    assert layer(torch.empty(4, 7, device="meta")).shape == (4, 5)


@pytest.mark.parametrize("sizes", [(3, 5, 6), (5, 3, 6), (1, 1, 2)])
def test_a_rank_above_both_sides_warns_that_it_costs_more_than_the_weight(sizes):
    i, o, rank = sizes
    numbers = f"A and B hold {rank * (i + o)} numbers, the whole weight {i * o}"
    message = f"rank={rank} is larger than both sides .*{numbers}"
    with pytest.warns(UserWarning, match=message):
        assert LoRALayer(*sizes, 1.0).A.shape == (i, rank)


@pytest.mark.parametrize("wrapper", LORA)
def test_the_warning_names_the_line_that_made_the_wrapper(wrapper):
    with pytest.warns(UserWarning, match="rank=8") as warned:
        wrapper(linear_layer(7, 5), 8, 1.0)
    assert [warning.filename for warning in warned] == [__file__]


@pytest.mark.parametrize("sizes", [(3, 5, 5), (5, 3, 5), (3, 5, 4), (1, 1, 1)])
def test_a_rank_up_to_the_longer_side_does_not_warn(sizes):
    # Warnings are errors in this project's tests.
    assert LoRALayer(*sizes, 1.0).B.shape == (sizes[2], sizes[1])
